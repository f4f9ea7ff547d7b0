"""Write the demo's sample of flight events: the first 20,000 lines of a larger file, unchanged.

    python benchmarks/make_sample.py flights-2013.jsonl.gz src/millstream/demo/flights-2013-01.jsonl.gz

The result is the same byte for byte wherever it is made: no name and no time are written into it.
"""

from __future__ import annotations

import gzip
import sys
from itertools import islice
from pathlib import Path

EVENTS = 20_000
MAX_SAMPLE_BYTES = 1_048_576  # it travels in every wheel


def main(source: Path, target: Path) -> None:
    with gzip.open(source) as lines:
        sample = b"".join(islice(lines, EVENTS))
    packed = gzip.compress(sample, compresslevel=9, mtime=0)
    if len(packed) > MAX_SAMPLE_BYTES:
        raise SystemExit(f"{len(packed):,} bytes, over the limit of {MAX_SAMPLE_BYTES:,}")
    target.write_bytes(packed)
    events = sample.count(b"\n")
    print(f"{target}: {events:,} events, {len(packed):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
