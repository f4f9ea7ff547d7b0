"""millstream run shop.main:app"""

from millstream import App, Envelope, Position, Unconfirmed
from shop.billing import billing
from shop.events import OrderCancelled, OrderPlaced, orders, payments

app = App("shop", include=[billing], streams=[payments])  # MILLSTREAM_BROKER, else sqlite:///shop.db


async def place(order_id: str, customer: str, total: int) -> Position:  # a web handler, say
    return await app.publish(OrderPlaced(order_id=order_id, customer=customer, total=total), to=orders)


async def cancel_all(order_ids: list[str]) -> list[Position]:
    try:
        return await app.publish_many([OrderCancelled(order_id=order_id) for order_id in order_ids], to=orders)
    except Unconfirmed as unconfirmed:
        return await app.publish_many(unconfirmed.envelopes)


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
