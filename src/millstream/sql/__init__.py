from millstream.sql.inbox import Inbox
from millstream.sql.outbox import Lag, Outbox, Stuck
from millstream.sql.relay import Relay

__all__ = ["Inbox", "Lag", "Outbox", "Relay", "Stuck"]
