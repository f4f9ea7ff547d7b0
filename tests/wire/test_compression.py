"""Frames of zstd and lz4, and dictionaries: round trips, bombs, and what happens without a library."""

from __future__ import annotations

import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from millstream.errors import BadSetting, WireError
from millstream.units import MAX_DICTIONARY_BYTES, MAX_EVENT_BYTES, MAX_PACK_BYTES
from millstream.wire import compression
from millstream.wire.compression import (
    NAMES,
    Compression,
    Dictionary,
    UnknownDictionary,
    check_readable,
    compress,
    decompress,
    known,
    learn,
    train,
)

EVENTS = [b'{"order_id":"o-%d","status":"placed","total":%d}' % (k, k * 7_919 % 9_999) for k in range(2_000)]
WORDS = Dictionary(train(EVENTS, 1_024))
LIMIT = 10_000


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dictionary is known."""
    monkeypatch.setattr(compression, "_known", {WORDS.id: WORDS})


@given(st.binary(min_size=1, max_size=2_000), st.sampled_from(NAMES))
def test_content_survives_being_compressed(content: bytes, how: Compression) -> None:
    assert decompress(compress(content, how), how, LIMIT) == content


@pytest.mark.parametrize("how", NAMES)
def test_content_at_the_limit_is_read_and_one_byte_more_is_refused(how: Compression) -> None:
    assert decompress(compress(b"x" * LIMIT, how), how, LIMIT) == b"x" * LIMIT
    with pytest.raises(WireError, match="10,000"):
        decompress(compress(b"x" * (LIMIT + 1), how), how, LIMIT)


@pytest.mark.parametrize("how", NAMES)
def test_a_body_over_the_limit_is_refused_unseen(how: Compression) -> None:
    with pytest.raises(WireError, match="over the limit"):
        decompress(b"x" * (LIMIT + 1), how, LIMIT)


def lying_lz4() -> bytes:
    """A frame that says it holds ten bytes, and goes on for 50 MB."""
    context = lz4.frame.create_compression_context()
    begin: bytes = lz4.frame.compress_begin(context, source_size=10)
    frame: bytes = begin + lz4.frame.compress_chunk(context, bytes(50_000_000))
    return frame + bytes(4)


BOMBS = {
    "zstd": ("zstd", zstandard.compress(bytes(50_000_000))),
    "zstd that does not say": ("zstd", zstandard.ZstdCompressor(write_content_size=False).compress(bytes(9))),
    "zstd that says little": (
        "zstd",
        zstandard.compress(bytes(200))[:5] + b"\x01" + zstandard.compress(bytes(200))[6:],
    ),
    "zstd and more": ("zstd", zstandard.compress(b"x") + b"more"),
    "zstd twice": ("zstd", zstandard.compress(b"x") * 2),
    "zstd to be skipped": ("zstd", b"\x50\x2a\x4d\x18\xe8\x03\x00\x00" + bytes(1_000)),
    "zstd, cut": ("zstd", zstandard.compress(bytes(2_000))[:-2]),
    "lz4": ("lz4", lz4.frame.compress(bytes(2_000_000))),
    "lz4 that does not say": ("lz4", lz4.frame.compress(bytes(9), store_size=False)),
    "lz4 that says little": ("lz4", lying_lz4()),
    "lz4 and more": ("lz4", lz4.frame.compress(b"x") + b"more"),
    "lz4, cut": ("lz4", lz4.frame.compress(bytes(2_000))[:-3]),
    "another frame": ("zstd", lz4.frame.compress(b"x")),
    "nothing in zstd": ("zstd", b""),
    "nothing in lz4": ("lz4", b""),
    "unknown": ("snappy", b"x"),
}


@pytest.mark.parametrize(("how", "body"), BOMBS.values(), ids=BOMBS)
def test_bombs_and_broken_frames_are_refused_before_they_are_unpacked(how: str, body: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(WireError):
        decompress(body, how, MAX_PACK_BYTES // 4 if how == "lz4" else MAX_PACK_BYTES)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 300_000


@given(st.binary(max_size=100), st.sampled_from(["zstd", "lz4", "none", "", "ZSTD"]))
def test_arbitrary_bytes_raise_only_wire_errors(body: bytes, how: str) -> None:
    try:
        decompress(body, how, LIMIT)
    except WireError as error:
        assert len(str(error)) < 500


@given(st.sampled_from(EVENTS) | st.binary(max_size=200))
def test_data_survive_a_dictionary(data: bytes) -> None:
    assert decompress(compress(data, "zstd", WORDS), "zstd", LIMIT) == data


def test_an_event_alone_becomes_much_shorter() -> None:
    new = [b'{"order_id":"o-%d","status":"placed","total":%d}' % (k, k * 7) for k in range(5_000, 6_000)]
    assert sum(len(compress(data, "zstd", WORDS)) for data in new) < 0.6 * sum(map(len, new))


def test_a_dictionary_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_known", {})
    frame = compress(EVENTS[0], "zstd", WORDS)
    for call in (lambda: decompress(frame, "zstd", LIMIT), lambda: check_readable(frame, "zstd")):
        with pytest.raises(UnknownDictionary, match=f"dictionary {WORDS.id}") as raised:
            call()
        assert raised.value.number == WORDS.id
    assert learn(WORDS.content) is known(WORDS.id)
    check_readable(frame, "zstd")
    assert decompress(frame, "zstd", LIMIT) == EVENTS[0]


@pytest.mark.parametrize("how", [*NAMES, "snappy"])
def test_bytes_that_are_no_frame_lack_nothing(how: str) -> None:
    check_readable(b"nonsense", how)
    check_readable(compress(b"x", "zstd"), how)


def test_a_dictionary_is_known_by_the_id_of_its_content() -> None:
    assert Dictionary(WORDS.content).id == WORDS.id
    assert Dictionary(train(EVENTS[:1_000], 1_024)).id != WORDS.id


def test_a_second_dictionary_under_one_number_is_refused() -> None:
    other = WORDS.content[:-1] + bytes([WORDS.content[-1] ^ 1])
    assert Dictionary(other).id == WORDS.id
    with pytest.raises(BadSetting, match=f"number {WORDS.id}"):
        learn(other)
    assert known(WORDS.id) is WORDS


def test_packs_are_compressed_and_read_by_several_threads_at_once_and_after_a_broken_one() -> None:
    together = threading.Barrier(4)

    def back_and_forth(number: int) -> bool:
        content = b"%d" % number + b"".join(EVENTS)
        together.wait()
        for _ in range(20):
            frame = compress(content, "zstd")
            with pytest.raises(WireError):
                decompress(frame[:-3], "zstd", MAX_PACK_BYTES)
            if decompress(frame, "zstd", MAX_PACK_BYTES) != content:
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(back_and_forth, range(4)))


def test_a_dictionary_serves_several_threads_at_once() -> None:
    together = threading.Barrier(4)

    def some(start: int) -> bool:
        together.wait()
        return all(decompress(compress(data, "zstd", WORDS), "zstd", LIMIT) == data for data in EVENTS[start::4] * 5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(some, range(4)))


def test_data_that_say_they_hold_more_than_the_limit_are_refused() -> None:
    with pytest.raises(WireError, match="holds more"):
        decompress(WORDS.compress(bytes(MAX_EVENT_BYTES + 1)), "zstd", MAX_EVENT_BYTES)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x37\xa4\x30\xec" + b"x" * 50, bytes(MAX_DICTIONARY_BYTES + 1)])
def test_what_is_no_dictionary_is_refused(content: bytes) -> None:
    with pytest.raises(BadSetting):
        Dictionary(content)


def test_a_dictionary_needs_events_to_learn_from() -> None:
    with pytest.raises(BadSetting, match="too few"):
        train([b"{}"])
    with pytest.raises(BadSetting, match="112,640"):
        train(EVENTS, MAX_DICTIONARY_BYTES + 1)


def test_nothing_is_loaded_before_it_is_used_and_a_missing_library_is_named_with_its_remedy() -> None:
    code = """
import sys
from msgspec.structs import replace
from millstream.wire import compression as c, packs
from millstream.errors import NotSupported, WireError
assert not {"zstandard", "lz4"} & set(sys.modules)
sys.modules["zstandard"] = sys.modules["lz4"] = sys.modules["lz4.frame"] = None
columns = packs.Columns([b"{}"] * 9, "t")
plain = packs.write(columns, "none", partition=0, id_="a")
c.check("none")
assert len(packs.read(plain, "1-0")) == 9
for how in ("zstd", "lz4"):
    pack = replace(plain, headers=b'{"pack":"1/%s","n":"9"}' % how.encode())
    for call, kind in (
        (lambda: c.check(how), NotSupported),
        (lambda: packs.write(columns, how, partition=0, id_="a"), NotSupported),
        (lambda: packs.read(pack, "1-0"), WireError),
    ):
        try:
            call()
        except kind as error:
            assert f"pip install 'millstream[{how}]'" in str(error), error
        else:
            raise AssertionError(how)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
