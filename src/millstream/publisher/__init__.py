"""Publishing: an event becomes a record, and records become few large writes, tried again while there is patience."""

from millstream.publisher.client import Client, delayed, named, start_at
from millstream.publisher.declared import check_confirm, differences, in_words, policy_of, settings, spec_of, wanted
from millstream.publisher.publisher import Publisher
from millstream.publisher.records import due_ms
from millstream.publisher.shortening import Shortening
from millstream.publisher.unpacking import opened, unpacked

__all__ = [
    "Client",
    "Publisher",
    "Shortening",
    "check_confirm",
    "delayed",
    "differences",
    "due_ms",
    "in_words",
    "named",
    "opened",
    "policy_of",
    "settings",
    "spec_of",
    "start_at",
    "unpacked",
    "wanted",
]
