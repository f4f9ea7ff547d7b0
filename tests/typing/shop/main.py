"""millstream run shop.main:app"""

from datetime import UTC, datetime, timedelta

from millstream import App, Envelope, Position, Unconfirmed
from shop.billing import billing
from shop.events import OrderCancelled, OrderPlaced, orders, payments, payments_due

app = App("shop", include=[billing], streams=[payments])  # MILLSTREAM_BROKER, else sqlite:///shop.db


async def place(order_id: str, customer: str, total: int) -> Position:  # a web handler, say
    return await app.publish(OrderPlaced(order_id=order_id, customer=customer, total=total), to=orders)


async def cancel_all(order_ids: list[str]) -> list[Position]:
    try:
        return await app.publish_many([OrderCancelled(order_id=order_id) for order_id in order_ids], to=orders)
    except Unconfirmed as unconfirmed:
        return await app.publish_many(unconfirmed.envelopes)


async def remind(order: OrderPlaced) -> None:
    await app.publish_at(order, "2d", to=orders)
    await app.publish_at(Envelope(order, id=order.order_id), datetime.now(UTC) + timedelta(days=2), confirm="fsync")
    later: Position = await app.publish(Envelope(order, due=timedelta(minutes=5)), to=orders)
    print(later.offset)


def place_from_a_thread(order: OrderPlaced) -> str:  # a Django view, say
    with app.blocking() as client:
        try:
            position: Position = client.publish(order, to=orders, confirm="replicated", timeout="5s")
        except Unconfirmed as unconfirmed:
            until: datetime | None = unconfirmed.retry_until
            print(until, client.publish_many(unconfirmed.envelopes))
            raise
        client.publish(Envelope(order, id="o-1"))
        client.publish_at(order, "5m")
        total = sum(found.event.total for found in client.read(payments_due, since="now"))
    return f"{position} {total}"


async def totals() -> dict[str, int]:
    found: dict[str, int] = {}
    async for envelope in app.read(orders, since="1h"):
        match envelope.event:
            case OrderPlaced(order_id=order_id, total=total):
                found[order_id] = total
            case OrderCancelled(order_id=order_id):
                found.pop(order_id, None)
    return found


async def main() -> None:
    async with app:  # a client: runs no handler. app.worker() does both
        await app.publish(Envelope(OrderPlaced(order_id="o-2", customer="c-9", total=1), headers={"tenant": "a"}))
        await place("o-1", "c-9", 1999)
