"""What users test with: `TestApp` runs a real worker under virtual time, `deliver` makes a delivery for one handler.

`conformance` is the suite for people who write a broker; it needs pytest, this module does not.
"""

from millstream.testing.app import DeadLetter, TestApp, deliver
from millstream.testing.clock import VirtualClock

__all__ = ["DeadLetter", "TestApp", "VirtualClock", "deliver"]
