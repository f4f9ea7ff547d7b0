"""What a user tests with."""

from millstream.testing import TestApp
from shop.bank import fake_bank, open_bank
from shop.events import Charged, OrderPlaced, payments
from shop.main import app


async def test_a_placed_order_is_charged() -> None:
    async with TestApp(app, replace={open_bank: fake_bank}) as t:
        await t.publish(OrderPlaced(order_id="o-1", customer="c-9", total=1999))
        await t.advance("1h")  # virtual time: retries that fall due run now
        assert t.published(payments) == [Charged(order_id="o-1")]
        assert not t.dead("billing")
