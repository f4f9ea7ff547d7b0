"""The Lua scripts: each lies in `lua/`, headed by its contract, and is called by its SHA-1.

`Link.run` calls one: by its digest, and by its source once when the server has not seen it or has forgotten it.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha1
from importlib.resources import files

from msgspec import Struct


class Script(Struct, frozen=True):
    """A script, its text, and the digest under which a server knows it."""

    name: str
    source: bytes
    sha: str


def script(name: str, source: bytes) -> Script:
    """A script from its text."""
    return Script(name, source, sha1(source, usedforsecurity=False).hexdigest())


def load() -> Mapping[str, Script]:
    """All scripts of `lua/`, by name: `settle.lua` is `settle`."""
    found = (path for path in files(__package__).joinpath("lua").iterdir() if path.name.endswith(".lua"))
    return {path.name.removesuffix(".lua"): script(path.name.removesuffix(".lua"), path.read_bytes()) for path in found}


scripts = load()
