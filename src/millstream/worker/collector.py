"""Python's collector of cycles, in a process that does nothing else than handle events.

It looks at what is new whenever 700 objects more were made than dropped, now and then at everything. The events that many
groups hold come and go in larger numbers than that, and no cycle is among them: with fifty groups 13 to 18 % of the
worker's time went into looking, with ten 5 %, with one nothing. At 10,000 it is below 1 %; 5,000 left 4.5 %, and 50,000
saved no more.

What it costs is memory, where handlers make cycles, such as an exception kept in a variable of the function that caught
it: some 2,500 of them wait for the collector, in place of 200. With an event of 200 bytes in each, the process took 35 MB
in place of 33, with 8 KB 55 in place of 37, with 64 KB 190 in place of 52.

Only for a process of our own: in somebody else's it is not ours to change, so `App.worker()` does not.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS = 10_000

_PYTHONS_OWN = gc.get_threshold()


@contextmanager
def relaxed() -> Iterator[None]:
    """Inside the block the collector looks seldom, and never at what was there before: modules, mostly.

    Thresholds that the app has set itself stay.
    """
    before = gc.get_threshold()
    if before == _PYTHONS_OWN:
        gc.set_threshold(OBJECTS, *before[1:])
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
