"""A parked event as it is stored: its id, a blank, and its fields as MessagePack. Whole, so that trimming loses nothing.

The id comes first and in plain text, so that a script compares it without decoding anything. So does, of a pack that was
tried before, what is left of it: `1693-0 0,3 …`. A digit is no MessagePack array, so it cannot be taken for the fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millstream.brokers.base import Claim, Position, Record, Stored
from millstream.brokers.redis import parts
from millstream.errors import WireError
from millstream.wire import entry

_decoder = msgspec.msgpack.Decoder(list[bytes])
_encoder = msgspec.msgpack.Encoder()


def encode(stored: Stored, left: Sequence[int] = ()) -> bytes:
    """A parked event; of a pack that was tried before, with what is left of it."""
    front = f"{stored.position.offset} {parts.text(left)} " if left else f"{stored.position.offset} "
    return front.encode() + _encoder.encode(fields(stored))


def decode(partition: int, parked: bytes) -> tuple[Stored, str]:
    """The event, and why it is none: then it has an empty type, and a preview as its data."""
    id_, _, packed = _split(parked)
    offset = id_.decode()
    position, stored_ms = Position(partition, offset), int(id_.partition(b"-")[0])
    found = _decoder.decode(packed)
    try:
        return Stored(position, entry.read(found, partition=partition, offset=offset, stored_ms=stored_ms)), ""
    except WireError as error:
        preview = dict(zip(found[::2], found[1::2], strict=False)).get(b"data") or entry.preview(found).encode()
        return Stored(position, Record(partition, str(position), "", preview, None, stored_ms)), str(error)


def waiting(partition: int, parked: bytes) -> tuple[Stored, Sequence[int]]:
    """The event, and what is left of it if it is a pack."""
    return decode(partition, parked)[0], parts.numbers(_split(parked)[1])


def claim(partition: int, head: Sequence[bytes | int], token: int) -> Claim:
    """The claim of a head as `heads.lua` hands it out: key, event, attempts, postponed, crashes."""
    _, parked, attempts, postponed, crashes = head
    assert isinstance(parked, bytes)
    stored, fault = decode(partition, parked)
    suspect = int(crashes) + 1 if int(crashes) else 0
    left = parts.numbers(_split(parked)[1])
    return Claim.of(stored, int(attempts), suspect, int(postponed), fault, token, left)


def fields(stored: Stored) -> tuple[bytes, ...]:
    """The fields of an event as they are stored; of what is none, only its preview."""
    record = stored.record
    return entry.write(record) if record.type else (b"data", record.data)


def _split(parked: bytes) -> tuple[bytes, bytes, bytes]:
    """Id, what is left, and fields."""
    id_, _, rest = parked.partition(b" ")
    if not rest[:1].isdigit():
        return id_, b"", rest
    left, _, packed = rest.partition(b" ")
    return id_, left, packed
