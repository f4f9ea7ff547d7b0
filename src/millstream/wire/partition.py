"""Key to partition: the fixed hash. Changing it would tear the keys of every live stream apart."""

from __future__ import annotations

from zlib import crc32


def partition_of(key: str, partitions: int) -> int:
    """The partition of a key: CRC-32 (ISO 3309, as in zlib) of its UTF-8 bytes, modulo the number of partitions.

    The same choice as librdkafka's `consistent` partitioner, and in every language's standard library.
    """
    return crc32(key.encode()) % partitions if partitions > 1 else 0
