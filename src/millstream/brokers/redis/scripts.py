"""The Lua scripts: each lies in `lua/`, headed by its contract, and is called by its SHA-1.

`Link.run` calls one: by its digest, and by its source once when the server has not seen it or has forgotten it.

What several scripts share lies in `lua/lib/`: a script whose header has a line `-- USES     store` is sent with
`lua/lib/store.lua` before it. Several names stand in one line with blanks between, in the order in which they are put.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha1
from importlib.resources import files
from importlib.resources.abc import Traversable

from msgspec import Struct

_USES = re.compile(rb"^-- USES +(.+)$", re.MULTILINE)


class Script(Struct, frozen=True):
    """A script, its text, and the digest under which a server knows it."""

    name: str
    source: bytes
    sha: str


def script(name: str, source: bytes) -> Script:
    """A script from its text."""
    return Script(name, source, sha1(source, usedforsecurity=False).hexdigest())


def load() -> Mapping[str, Script]:
    """All scripts of `lua/`, by name: `settle.lua` is `settle`. Each is whole, with what it uses before it."""
    folder = files(__package__).joinpath("lua")
    found = (path for path in folder.iterdir() if path.name.endswith(".lua"))
    return {
        path.name.removesuffix(".lua"): script(path.name.removesuffix(".lua"), _whole(path, folder)) for path in found
    }


def _whole(path: Traversable, folder: Traversable) -> bytes:
    own = path.read_bytes()
    used = _USES.search(own)
    names = used[1].decode().split() if used else ()
    return b"".join([*(folder.joinpath("lib", f"{name}.lua").read_bytes() for name in names), own])


scripts = load()
