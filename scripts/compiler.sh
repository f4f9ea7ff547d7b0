#!/usr/bin/env bash
# Sees to it that tests find a C compiler: one that is installed, else Debian's. Usage: scripts/compiler.sh
set -euo pipefail
cd "$(dirname "$0")/.."

main() {
    works || { from_debian && works; } && return
    echo "no C compiler: install the package gcc with libc6-dev (Debian, Ubuntu) or the command line tools (macOS)" >&2
    [ "${CI:-}" != true ] || exit 1
    echo "going on without: the tests that take the power away from a server are skipped" >&2
}

works() {
    echo '#include <stdlib.h>' | cc -x c -fsyntax-only - 2>/dev/null
}

from_debian() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && scripts/apt.sh gcc libc6-dev
}

main
