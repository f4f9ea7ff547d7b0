"""Handlers."""

from typing import Annotated

from millstream import Batch, BatchFailed, Delivery, Depends, Reject, Retry, RetryLater, Router
from shop.bank import Bank, CardRefused, open_bank
from shop.events import Charged, OrderCancelled, OrderPlaced, orders, payments

billing = Router(timeout="30s")


@billing.subscriber(orders, "billing", retry=Retry(8, first="1s", max="1h", never=[CardRefused]))
async def charge(event: OrderPlaced, delivery: Delivery, bank: Annotated[Bank, Depends(open_bank)]) -> None:
    if delivery.last_attempt:
        raise Reject("the bank does not answer")
    await bank.charge(event.customer, event.total)
    delivery.publish(Charged(order_id=event.order_id), to=payments)  # stored with the outcome


@billing.subscriber(orders, "billing")  # same group, other type
async def refund(event: OrderCancelled) -> None: ...


@billing.subscriber(orders, "warehouse", batch=Batch(500, within="2s"))
async def load(events: list[OrderPlaced | OrderCancelled]) -> None:
    if not events:
        raise BatchFailed({0: RetryLater("5m")})


@billing.subscriber(payments, "receipts", concurrency=4, start="now")
def print_receipt(delivery: Delivery[Charged]) -> None:
    receipt: str = delivery.event.order_id
    print(receipt, delivery.position, delivery.attempt)


@billing.listener(payments)
async def watch(event: Charged) -> None: ...


async def still_plain(bank: Bank, delivery: Delivery) -> None:
    """Handlers stay callables with their own signature."""
    await charge(OrderPlaced(order_id="o-1", customer="c-9", total=1999), delivery, bank)
    print_receipt(delivery)
