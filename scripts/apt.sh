#!/usr/bin/env bash
# Installs Debian packages without a question; for root only. The package lists are fetched only if they are missing.
# Usage: scripts/apt.sh PACKAGE...
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

echo "installing $* with apt-get"
install=(apt-get install --yes --quiet --quiet --no-install-recommends "$@")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"${install[@]}" >"$log" 2>&1 || { apt-get update --quiet --quiet && "${install[@]}"; } >>"$log" 2>&1 || {
    cat "$log" >&2
    exit 1
}
