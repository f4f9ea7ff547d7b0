"""The contract: a module that several services import."""

from millstream import Dedupe, Event, Pack, Retention, Stream


class OrderPlaced(Event, type="order.placed"):
    order_id: str
    customer: str
    total: int  # cents


class OrderCancelled(Event, type="order.cancelled"):
    order_id: str
    reason: str = ""


class Charged(Event, type="payment.charged"):
    order_id: str


orders = Stream("orders", OrderPlaced | OrderCancelled, key="order_id", partitions=8)
payments_due = Stream(
    "payments-due",
    OrderPlaced,
    retention=Retention(age="30d", events=1_000_000, unread="keep", forget="never", ceiling="2GB"),
    dedupe=Dedupe("1h", ids=100_000),
    confirm="fsync",
)
payments = Stream("payments", Charged, key=lambda event: event.order_id)
clicks = Stream("clicks", Charged, codec="msgpack", pack=Pack(events=1_000, linger="20ms", codec="lz4"))
