"""Typical mistakes. Both checkers must flag every line that is marked, and no other."""
# ruff: noqa - the mistakes are the point

from millstream import (
    App,
    Batch,
    BatchFailed,
    Delivery,
    Depends,
    Envelope,
    Event,
    Pack,
    Reject,
    Retry,
    Retention,
    RetryLater,
    Router,
    Stream,
)
from millstream import Subscribber  # mistake: a public name misspelt
from millstream.testing import TestApp
from shop.bank import open_bank
from shop.events import Charged, OrderCancelled, OrderPlaced, orders, payments
from shop.main import app

router = Router()
placed = OrderPlaced(order_id="o-1", customer="c-9", total=1999)

OrderPlaced("o-1", "c-9", 1999)  # mistake: positional
OrderPlaced(order_id="o-1", customer="c-9", total="1999")  # mistake: a field of the wrong type
OrderPlaced(order_id="o-1", customer="c-9")  # mistake: a missing field
OrderPlaced(order_id="o-1", customer="c-9", total=1999, vat=19)  # mistake: an unknown field
placed.total = 0  # mistake: events are values


class Misspelt(Event, typ="order.misspelt"): ...  # mistake: a class keyword misspelt


class Versioned(Event, type="order.versioned", version="2"): ...  # mistake: a version is a number


Stream("orders")  # mistake: a stream without types
Stream("orders", Charged, key=lambda event: event.customer)  # mistake: a key from a field that is not there
Stream("orders", OrderPlaced | Charged, key=lambda event: event.total)  # mistake: a field that one of them lacks
Stream("orders", Charged, others="ignore")  # mistake: dead or skip
Stream("orders", Charged, partitions="8")  # mistake: partitions are a number


@router.subscriber("orders", "billing")  # mistake: the name in place of the stream
async def by_name(event: OrderPlaced) -> None: ...


@router.subscriber(orders)  # mistake: a group is always written
async def no_group(event: OrderPlaced) -> None: ...


@router.subscriber(orders, None)  # mistake: a group is always written
async def none_group(event: OrderPlaced) -> None: ...


@router.subscriber(orders, "billing", retries=3)  # mistake: an unknown option
async def unknown_option(event: OrderPlaced) -> None: ...


@router.subscriber(orders, "billing", retry=3)  # mistake: a number in place of a Retry
async def retry_number(event: OrderPlaced) -> None: ...


@router.subscriber(orders, "billing", batch=100)  # mistake: a number in place of a Batch
async def batch_number(events: list[OrderPlaced]) -> None: ...


@router.subscriber(orders, "billing", order="fifo")  # mistake: the order of keys, or none
async def ordered(event: OrderPlaced) -> None: ...


@router.subscriber(orders, "billing", start="yesterday")  # mistake: beginning, now, or a time
async def from_yesterday(event: OrderPlaced) -> None: ...


@router.subscriber(orders, "billing", "warehouse")  # mistake: options are given by name
async def two_groups(event: OrderPlaced) -> None: ...


Retry(atempts=3)  # mistake: an option misspelt
Retry(never=["CardRefused"])  # mistake: a name in place of a class
Batch("100")  # mistake: a size is a number
Depends(open_bank, scope="request")  # mistake: delivery or process
Envelope(placed, due=["5m"])  # mistake: due at a time, or after a while
Stream("orders", Charged, retention="7d")  # mistake: a duration in place of a Retention
Stream("orders", Charged, dedupe=[600])  # mistake: a duration, or a Dedupe
Stream("orders", Charged, confirm="disk")  # mistake: memory, fsync or replicated
Stream("orders", Charged, codec="avro")  # mistake: json or msgpack
Stream("orders", Charged, pack=512)  # mistake: a number in place of a Pack
Pack(codec="gzip")  # mistake: zstd, lz4 or none
Retention("7d")  # mistake: bounds are given by name
Retention(age="7d", unread="trim")  # mistake: keep or drop
App(include=[router])  # mistake: an app has a name
App("shop", include=router)  # mistake: one part in place of a list
App("shop", middleware=[open_bank])  # mistake: not a middleware
router.include("shop.billing")  # mistake: a name in place of a part


async def publishing(delivery: Delivery[OrderPlaced]) -> None:
    await app.publish("order placed", to=orders)  # mistake: text is no event
    await app.publish(Charged(order_id="o-1"), to=orders)  # mistake: the stream does not carry this type
    await app.publish(Envelope(Charged(order_id="o-1")), to=orders)  # mistake: the same, in an envelope
    await app.publish(placed, orders)  # mistake: `to` is given by name
    await app.publish(placed, confirm="disk")  # mistake: memory, fsync or replicated
    await app.publish_at(placed, to=orders)  # mistake: when?
    await app.publish_at(Charged(order_id="o-1"), "5m", to=orders)  # mistake: the stream does not carry this type
    (await app.publish_at(placed, "5m")).offset  # mistake: it has no position yet
    app.blocking().publish(Charged(order_id="o-1"), to=orders)  # mistake: the stream does not carry this type
    await app.blocking().publish(placed)  # mistake: it blocks, there is nothing to await
    app.blocking().publish_many([placed, Charged(order_id="o-1")], to=orders)  # mistake: one does not belong here
    await app.publish_many([placed, Charged(order_id="o-1")], to=orders)  # mistake: one of them does not belong here
    app.publish(placed).partition  # mistake: not awaited
    delivery.publish(Charged(order_id="o-1"), to=orders)  # mistake: the stream does not carry this type
    delivery.publish(placed, to="orders")  # mistake: the name in place of the stream
    delivery.event.reason  # mistake: a field of another type
    async for envelope in app.read(orders):
        envelope.event.total  # mistake: cancelled orders have no total


def verdicts() -> None:
    RetryLater()  # mistake: after how long?
    Reject()  # mistake: and why?
    BatchFailed([ValueError()])  # mistake: which index failed?


async def testing() -> None:
    async with TestApp(app, replace={"open_bank": open_bank}) as t:  # mistake: a name in place of a provider
        await t.publish(OrderCancelled(order_id="o-1"), to=payments)  # mistake: the stream does not carry this type
        t.published(payments)[0].total  # mistake: a field of another type
        t.dead(payments)  # mistake: dead letters are a group's
