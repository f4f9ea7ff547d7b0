"""A resource: the bank that handlers ask for, and what stands in for it in tests."""

from collections.abc import AsyncIterator
from typing import Annotated

from millstream import Depends


class CardRefused(Exception):
    """The customer has to use another card."""


class Pool:
    """Connections to the bank."""


class Bank:
    async def charge(self, customer: str, cents: int) -> None: ...


async def open_pool() -> AsyncIterator[Pool]:
    yield Pool()


async def open_bank(pool: Annotated[Pool, Depends(open_pool, scope="process")]) -> AsyncIterator[Bank]:
    yield Bank()


def fake_bank() -> Bank:
    return Bank()
