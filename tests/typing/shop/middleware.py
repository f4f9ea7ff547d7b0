"""Middleware: functions that wrap a call."""

from contextlib import AbstractContextManager, nullcontext

from millstream import App, Call, Handle, Router


def timer(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def timed(handle: Handle) -> Handle:
    async def inner(call: Call) -> None:
        with timer(call.subscriber.group):
            await handle(call)

    return inner


first, second = Router(middleware=[timed]), Router()
app = App("shop", include=[first, second], middleware=[timed])
outer = App("all", include=[app])
