#!/usr/bin/env bash
# Sees to it that benchmarks/engine.c compiles: a C compiler and hiredis, those that are installed, else Debian's.
# Without them benchmarks run, but show no limit. Usage: scripts/hiredis.sh
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
    works || { from_debian && works; } && return
    echo "no hiredis for C: install gcc, libc6-dev and libhiredis-dev (Debian, Ubuntu) or hiredis (Homebrew)" >&2
    echo "going on without: the limit of Redis is not measured" >&2
}

works() {
    echo '#include <hiredis/hiredis.h>' | cc -x c -fsyntax-only - 2>/dev/null
}

from_debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && scripts/apt.sh gcc libc6-dev libhiredis-dev
}

main
