"""Events that are no `Event`: dataclasses, pydantic models and Structs that exist already."""

from dataclasses import dataclass

from msgspec import Struct
from pydantic import BaseModel

from millstream import Envelope, Stream, event


@event("refund.asked")
@dataclass(frozen=True)
class RefundAsked:
    order_id: str


@event("refund.paid", version=2)
class RefundPaid(BaseModel):
    order_id: str
    cents: int


@event("refund.refused")
class RefundRefused(Struct, frozen=True):
    order_id: str


refunds = Stream("refunds", RefundAsked | RefundPaid | RefundRefused, key="order_id", others="skip")

asked: Envelope[RefundAsked] = Envelope(RefundAsked("o-1"), id="refund-1", headers={"via": "web"})
cents: int = RefundPaid(order_id="o-1", cents=1999).cents
