"""Bytes become fewer, and back: zstd and lz4 in their standard frames, and dictionaries for events that travel alone.

Both are extras, loaded when the first bytes need them. A frame says how much it holds, and that is looked at before
anything is allocated; a frame that says nothing, or lies, is refused.

A dictionary has a number, which training makes of its content, and a frame names the one that it was made with. So one
table serves all streams of a process: who has met a dictionary once can read whatever was made with it. Nothing is ever
taken out of the table, since an event may have been looked at, and not yet been read.

Figures for the 193-byte JSON of the benchmarks, per event: in a pack of 512 zstd takes 0.29 µs and leaves 56 bytes,
back 0.13 µs; lz4 0.14 µs and 84 bytes, back 0.04 µs. Alone with a dictionary of 16 KiB: 1.2 µs and 80 bytes, back 1.1
µs; of real flights 56 of 199 bytes are left. The library is `zstandard` rather than Python 3.14's own module (its name
elsewhere is `backports.zstd`): for packs they are equal, but that one wants a new context for every frame, 8.5 µs for
an event alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeAlias, get_args

from millstream.errors import BadSetting, NotSupported, WireError
from millstream.units import MAX_DICTIONARY_BYTES

Compression: TypeAlias = Literal["none", "zstd", "lz4"]
NAMES: tuple[Compression, ...] = get_args(Compression)

DICTIONARY_BYTES = 16_384  # a quarter of it leaves 2 bytes more of a flight, four times as much half a byte less

_ZSTD_LEVEL = 1  # 3 takes a third longer, and leaves as much of JSON in a pack
_ZSTD_LEVEL_ALONE = 3  # with a dictionary it leaves less, for 5 % more time
_LIBRARIES: Mapping[str, str] = {"zstd": "zstandard", "lz4": "lz4.frame"}


class Dictionary(threading.local):
    """What small events have in common: with it, one alone becomes almost as small as in a pack.

    Readers need the same dictionary; `id` is how a frame names it. Raises `BadSetting` for bytes that are none, and
    `NotSupported` without the library.
    """

    # Local to each thread, which therefore runs `__init__`: a context of zstd may be used by one thread at a time.
    def __init__(self, content: bytes) -> None:
        zstandard = imported("zstd")
        check_size(content)
        try:
            words = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_FULLDICT)
            words.precompute_compress(level=_ZSTD_LEVEL_ALONE)
            self.compress: Callable[[bytes], bytes] = zstandard.ZstdCompressor(dict_data=words).compress
        except zstandard.ZstdError as error:
            raise BadSetting(f"not a zstd dictionary: {error}") from None
        self.decompress = zstandard.ZstdDecompressor(dict_data=words).decompress
        self.content = content
        self.id: int = words.dict_id()


class UnknownDictionary(WireError):
    """A frame was made with a dictionary that this process has not met."""

    def __init__(self, number: int) -> None:
        super().__init__(f"it was compressed with dictionary {number}, which is not known here")
        self.number = number


_known: dict[int, Dictionary] = {}


def known(number: int) -> Dictionary | None:
    """The dictionary with this number, if this process has met it."""
    return _known.get(number)


def learn(content: bytes) -> Dictionary:
    """Know a dictionary from now on. Raises `BadSetting` for none, and for another one under a number that is taken."""
    dictionary = Dictionary(content)
    if _known.setdefault(dictionary.id, dictionary).content != content:
        raise BadSetting(f"there are two dictionaries with the number {dictionary.id}: train another one")
    return _known[dictionary.id]


def check_size(content: bytes) -> None:
    """Raise `BadSetting` for a dictionary that is over the limit."""
    if len(content) > MAX_DICTIONARY_BYTES:
        raise BadSetting(f"a dictionary of {len(content):,} bytes, over the limit of {MAX_DICTIONARY_BYTES:,}")


def train(samples: Sequence[bytes], size_bytes: int = DICTIONARY_BYTES) -> bytes:
    """Make the content of a dictionary from some thousands of events. Raises `BadSetting`, `NotSupported`."""
    zstandard = imported("zstd")
    if not 256 <= size_bytes <= MAX_DICTIONARY_BYTES:
        raise BadSetting(f"a dictionary has from 256 to {MAX_DICTIONARY_BYTES:,} bytes, not {size_bytes:,}")
    try:
        content: bytes = zstandard.train_dictionary(size_bytes, list(samples)).as_bytes()
    except zstandard.ZstdError as error:
        raise BadSetting(f"{len(samples):,} events are too few or too much alike for a dictionary: {error}") from None
    return content


def compress(content: bytes, compression: Compression, dictionary: Dictionary | None = None) -> bytes:
    """The content as one frame; only zstd makes use of a dictionary. Raises `NotSupported` without the library."""
    frame: bytes = content
    if compression == "lz4":
        frame = imported("lz4").compress(content)
    elif compression == "zstd" and dictionary is not None:
        frame = dictionary.compress(content)
    elif compression == "zstd":
        frame = _contexts(imported("zstd")).compress(content)
    return frame


def decompress(body: bytes, compression: str, max_bytes: int) -> bytes:
    """What `compress` was given. Raises `WireError`: a broken frame, one that holds more, or no library to read it."""
    if compression not in NAMES:
        raise WireError(f"unknown compression {compression[:20]!r}: a newer Millstream may read it")
    if len(body) > max_bytes:
        raise WireError(f"{len(body):,} bytes, over the limit of {max_bytes:,}")
    if compression == "none":
        return body
    return _of_lz4(body, max_bytes) if compression == "lz4" else _of_zstd(body, max_bytes)


def check_readable(body: bytes, compression: str) -> None:
    """Raise what may yet come: `NotSupported` without the library, `UnknownDictionary`."""
    if compression not in _LIBRARIES:
        return
    library = imported(compression)
    if compression == "zstd":
        with suppress(library.ZstdError):
            number = library.get_frame_parameters(body).dict_id
            if number and number not in _known:
                raise UnknownDictionary(number)


def check(compression: Compression) -> None:
    """Raise `NotSupported` when the library for it is not installed: better at the start than for every pack."""
    if compression != "none":
        imported(compression)


@cache
def imported(compression: str) -> Any:
    """The module that does it. Raises `NotSupported` when it is not installed."""
    try:
        return import_module(_LIBRARIES[compression])
    except ImportError:
        remedy = f"pip install 'millstream[{compression}]'"
        raise NotSupported(f"{compression} compression needs a library: {remedy}") from None


class _Contexts(threading.local):
    """What packs are compressed with, and back, in this thread. Made anew for each pack they would take 10 µs."""

    def __init__(self, zstandard: Any) -> None:
        self.compress: Callable[[bytes], bytes] = zstandard.ZstdCompressor(_ZSTD_LEVEL).compress
        self.decompress: Callable[..., bytes] = zstandard.ZstdDecompressor().decompress


_contexts = cache(_Contexts)


@cache
def _library_to_read(compression: str) -> Any:
    try:
        return imported(compression)
    except NotSupported as error:
        raise WireError(str(error)) from None


def _of_zstd(body: bytes, max_bytes: int) -> bytes:
    zstandard = _library_to_read("zstd")
    try:
        frame = zstandard.get_frame_parameters(body)
        _check_size(frame.content_size, max_bytes)
        if not frame.dict_id:
            expand = _contexts(zstandard).decompress
        elif frame.dict_id in _known:
            expand = _known[frame.dict_id].decompress
        else:
            raise UnknownDictionary(frame.dict_id)
        content: bytes = expand(body, 0, False, False)  # one frame, and nothing behind it; by name it is 0.3 µs more
    except zstandard.ZstdError as error:
        raise WireError(f"not a zstd frame: {error}") from None
    return content


def _of_lz4(body: bytes, max_bytes: int) -> bytes:
    frames = _library_to_read("lz4")
    try:
        size = frames.get_frame_info(body)["content_size"]
        _check_size(size or max_bytes + 1, max_bytes)  # 0: it does not say
        frame = frames.LZ4FrameDecompressor()
        # Not `frames.decompress`: where a frame says that it holds little, that goes on to the end all the same.
        content: bytes = frame.decompress(body, max_length=size)
    except RuntimeError as error:
        raise WireError(f"not an lz4 frame: {error}") from None
    if len(content) != size or not frame.eof or frame.unused_data:
        raise WireError("not an lz4 frame: its size is not what it says")
    return content


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise WireError(f"a frame that holds more than {max_bytes:,} bytes, or does not say how many")
