"""Bytes become fewer, and back: zstd and lz4 in their standard frames, and dictionaries for events that travel alone.

Both are extras, loaded when the first bytes need them. A frame says how much it holds, and that is looked at before
anything is allocated; a frame that says nothing, or lies, is refused. One that was made with a dictionary names it, so
no field has to: `shorter` shortens the data of an ordinary entry, and `plain` knows such data by zstd's magic number,
with which neither JSON nor a MessagePack map begins.

Figures for the 193-byte JSON of the benchmarks, per event: in a pack of 512 zstd takes 0.29 µs and leaves 56 bytes,
back 0.13 µs; lz4 0.14 µs and 84 bytes, back 0.04 µs. Alone with a dictionary of 16 KiB: 1.2 µs and 80 bytes, back 1.1
µs; of real flights 56 of 199 bytes are left. The library is `zstandard` rather than Python 3.14's own module (its name
elsewhere is `backports.zstd`): for packs they are equal, but that one wants a new context for every frame, 8.5 µs for
an event alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from millstream.errors import BadSetting, NotSupported, WireError
from millstream.units import MAX_DICTIONARY_BYTES, MAX_EVENT_BYTES

Compression: TypeAlias = Literal["none", "zstd", "lz4"]
NAMES: tuple[Compression, ...] = get_args(Compression)

DICTIONARY_BYTES = 16_384  # a quarter of it leaves 2 bytes more of a flight, four times as much half a byte less

_ZSTD_LEVEL = 1  # 3 takes a third longer, and leaves as much of JSON in a pack
_ZSTD_LEVEL_ALONE = 3  # with a dictionary it leaves less, for 5 % more time
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_LIBRARIES: Mapping[str, str] = {"zstd": "zstandard", "lz4": "lz4.frame"}


class Dictionary(threading.local):
    """What small events have in common: with it, one alone becomes almost as small as in a pack.

    Readers need the same dictionary; `id` is how a frame names it. Raises `BadSetting` for bytes that are none, and
    `NotSupported` without the library.
    """

    # Local to each thread, which therefore runs `__init__`: a context of zstd may be used by one thread at a time.
    def __init__(self, content: bytes) -> None:
        zstandard = imported("zstd")
        if len(content) > MAX_DICTIONARY_BYTES:
            raise BadSetting(f"a dictionary of {len(content):,} bytes, over the limit of {MAX_DICTIONARY_BYTES:,}")
        try:
            words = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_FULLDICT)
            words.precompute_compress(level=_ZSTD_LEVEL_ALONE)
            self.compress: Callable[[bytes], bytes] = zstandard.ZstdCompressor(dict_data=words).compress
        except zstandard.ZstdError as error:
            raise BadSetting(f"not a zstd dictionary: {error}") from None
        self.decompress = zstandard.ZstdDecompressor(dict_data=words).decompress
        self.content = content
        self.id: int = words.dict_id()


Dictionaries: TypeAlias = Mapping[int, Dictionary]
"""By id: those that a stream has had."""

NO_DICTIONARIES: Dictionaries = MappingProxyType({})


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
        # A context of its own is 0.02 µs for each event of a pack, and may run beside others in other threads.
        frame = imported("zstd").ZstdCompressor(_ZSTD_LEVEL).compress(content)
    return frame


def decompress(body: bytes, compression: str, max_bytes: int, dictionaries: Dictionaries = NO_DICTIONARIES) -> bytes:
    """What `compress` was given. Raises `WireError`: a broken frame, one that holds more, or no library to read it."""
    if compression not in NAMES:
        raise WireError(f"unknown compression {compression[:20]!r}: a newer Millstream may read it")
    if len(body) > max_bytes:
        raise WireError(f"{len(body):,} bytes, over the limit of {max_bytes:,}")
    if compression == "none":
        return body
    return _of_lz4(body, max_bytes) if compression == "lz4" else _of_zstd(body, max_bytes, dictionaries)


def shorter(data: bytes, dictionary: Dictionary) -> bytes:
    """The data of an event that travels alone, shorter where that is possible; `plain` is the way back."""
    frame = dictionary.compress(data)
    return frame if len(frame) < len(data) or _is_frame(data) else data


def plain(data: bytes, dictionaries: Dictionaries) -> bytes:
    """The data of an entry as they were before a dictionary shortened them, if one did. Raises `WireError`."""
    return _of_zstd(data, MAX_EVENT_BYTES, dictionaries) if _is_frame(data) else data


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


@cache
def _library_to_read(compression: str) -> Any:
    try:
        return imported(compression)
    except NotSupported as error:
        raise WireError(str(error)) from None


def _is_frame(data: bytes) -> bool:
    return data[:4] == _ZSTD_MAGIC


def _of_zstd(body: bytes, max_bytes: int, dictionaries: Dictionaries) -> bytes:
    zstandard = _library_to_read("zstd")
    try:
        frame = zstandard.get_frame_parameters(body)
        _check_size(frame.content_size, max_bytes)
        if not frame.dict_id:
            expand = zstandard.ZstdDecompressor().decompress
        elif frame.dict_id in dictionaries:
            expand = dictionaries[frame.dict_id].decompress
        else:
            raise WireError(f"it was compressed with dictionary {frame.dict_id}, which is not known here")
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
