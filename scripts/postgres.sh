#!/usr/bin/env bash
# Sees to it that tests find a PostgreSQL server: one that is installed, else Debian's. Starts nothing.
# Without one the tests that need it are skipped; where CI=true that is an error. Usage: scripts/postgres.sh
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
    installed || from_debian && return
    echo "no PostgreSQL server: install the package postgresql (Debian, Ubuntu) or postgresql@17 (Homebrew)" >&2
    [ "${CI:-}" != true ] || exit 1
    echo "going on without: the tests of inbox and outbox on PostgreSQL are skipped" >&2
}

# Debian keeps the server off the path.
installed() {
    local path
    for path in "$(command -v postgres || true)" /usr/lib/postgresql/*/bin/postgres; do
        [ -x "$path" ] && "$path" --version 2>/dev/null | grep -q '^postgres (PostgreSQL)' && return
    done
    return 1
}

# Debian's package would make a cluster and start it on port 5432, unless that is told before.
from_debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    scripts/apt.sh postgresql-common || return 1
    sed -i 's/^#create_main_cluster .*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
    scripts/apt.sh postgresql && installed
}

main
