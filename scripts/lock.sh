#!/usr/bin/env bash
# Writes requirements.lock anew: the newest versions that suit pyproject.toml, for every supported Python and system.
set -euo pipefail
cd "$(dirname "$0")/.."
new=$(mktemp)
trap 'rm -f "$new"' EXIT
# No index and no path of this machine may get into the file.
echo '# What `make` installs, pinned: the package'\''s own dependencies and the group `dev`. `make lock` renews it.' >"$new"
uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --upgrade \
    --group dev pyproject.toml >>"$new"
cat "$new" >requirements.lock
