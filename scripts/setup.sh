#!/usr/bin/env bash
# Makes the virtual environment, or brings it up to requirements.lock. Needs Python 3.11 or newer, and pip or uv.
# Usage: scripts/setup.sh DIRECTORY
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python="$venv/bin/python"

main() {
    local base
    if ! is_recent "$python"; then
        echo "making $venv"
        rm -rf "$venv"
        # Where uv is there and fails (another index, no network for its own Python), pip has its turn.
        if ! has_uv || ! uv venv --quiet --python '>=3.11,<3.14' "$venv"; then
            base=$(find_python)
            make_venv "$base"
        fi
    fi
    echo "installing what requirements.lock names"
    install -r requirements.lock
    # The build backend is among the pins: nothing is fetched a second time, unpinned, for building.
    install --no-deps --no-build-isolation --editable .
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

has_uv() {
    command -v uv >/dev/null
}

find_python() {
    local name
    # The newest for which every package has a wheel, 3.14 last. A name that is found may still not run: pyenv's do not.
    for name in python3.13 python3.12 python3.11 python3 python3.14 python; do
        if is_recent "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed: install it, for example Debian's package python3 and python3-venv"
}

make_venv() {
    local base=$1
    if "$base" -c 'import venv, ensurepip' 2>/dev/null; then
        "$base" -m venv "$venv"
    elif "$base" -c 'import venv' 2>/dev/null && "$base" -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --without-pip "$venv" # Debian cuts ensurepip off; the pip that is there can do its work
    else
        install_venv "$base"
        "$base" -m venv "$venv"
    fi
}

install_venv() {
    local package
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "$1 cannot make a virtual environment: install the package $package (Debian, Ubuntu), or uv"
    fi
    scripts/apt.sh "$package" || fail "$1 cannot make a virtual environment, and apt-get could not install $package"
}

install() {
    local base
    if has_uv && uv pip install --quiet --python "$python" "$@"; then
        return
    fi
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --quiet --disable-pip-version-check "$@"
    else
        base=$(find_python)
        "$base" -m pip --python "$python" install --quiet --disable-pip-version-check "$@"
    fi
}

fail() {
    echo "error: $1" >&2
    exit 1
}

main
