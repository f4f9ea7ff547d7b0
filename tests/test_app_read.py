"""Reading a stream without a group, and publishing again what was read."""

from datetime import UTC, datetime
from pathlib import Path

from millstream import App, Envelope, Event, Stream


class Placed(Event, type="order.placed"):
    order_id: str


orders = Stream("orders", Placed, key="order_id", partitions=2)
copies = Stream("copies", Placed)


async def test_an_envelope_that_was_read_can_be_published_again_as_it_is(tmp_path: Path) -> None:
    app = App("shop", broker=f"sqlite:///{tmp_path}/shop.db", streams=[orders, copies])
    then = Envelope(Placed(order_id="o-1"), id="x", headers={"tenant": "a"})
    then.time_ms = int(datetime(2013, 1, 1, tzinfo=UTC).timestamp() * 1000)
    async with app:
        await app.publish(then, to=orders)
        (read,) = [envelope async for envelope in app.read(orders)]
        await app.publish(read, to=copies)
        (copy,) = [envelope async for envelope in app.read(copies)]
    assert (copy.event, copy.id, copy.time.year, dict(copy.headers)) == (then.event, "x", 2013, {"tenant": "a"})
    assert (copy.type, copy.source) == ("order.placed", "shop")


async def test_reading_follows_what_comes_until_it_is_left(tmp_path: Path) -> None:
    app = App("shop", broker=f"sqlite:///{tmp_path}/shop.db", streams=[orders])
    async with app:
        await app.publish_many([Placed(order_id=f"o-{n}") for n in range(1500)], to=orders)
        seen = 0
        async for _ in app.read(orders, follow=True):
            seen += 1
            if seen == 1500:
                await app.publish(Placed(order_id="later"), to=orders)
            if seen == 1501:
                break
    assert seen == 1501
