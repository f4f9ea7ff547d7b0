"""`app.blocking()`: the verbs for threads, behind a web server, in forked children and at the end of a process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

from millstream import (
    App,
    BadSetting,
    BrokerDown,
    Envelope,
    Event,
    MillstreamError,
    Position,
    Settings,
    Stream,
    TooLarge,
    Unconfirmed,
)
from millstream.blocking import Blocking
from millstream.brokers.memory.broker import MemoryBroker


class Placed(Event, type="order.placed"):
    n: int = 0
    note: str = ""


orders = Stream("orders", Placed, dedupe="10m")


def shop(tmp_path: Path, **options: Any) -> App:
    return App("shop", broker=f"sqlite:///{tmp_path}/shop.db?synchronous=normal", streams=[orders], **options)


def numbers(client: Blocking) -> list[int]:
    return [envelope.event.n for envelope in client.read(orders)]


def in_threads(count: int, work: Callable[[int], object]) -> list[Any]:
    """What each thread answered, or raised."""
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "millstream blocking"]


def held(app: App, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The app's writes wait until the event is set."""
    gate, connect = threading.Event(), app._client

    @asynccontextmanager
    async def slow(*given: Any) -> AsyncIterator[Any]:
        async with connect(*given) as client:
            append = client.broker.append

            async def waiting(*arguments: Any) -> list[Position]:
                await asyncio.to_thread(gate.wait, 30)
                return await append(*arguments)

            monkeypatch.setattr(client.broker, "append", waiting)
            yield client

    monkeypatch.setattr(app, "_client", slow)
    return gate


def test_all_verbs_work_in_a_thread_without_a_loop(tmp_path: Path) -> None:
    app = shop(tmp_path)
    with app.blocking() as client:
        assert client is app.blocking()
        position = client.publish(Placed(n=1))
        assert isinstance(position, Position)
        assert client.publish(Envelope(Placed(n=1), id="x"), to=orders) == client.publish(
            Envelope(Placed(), id="x"), to=orders
        )
        positions = client.publish_many(Placed(n=n) for n in range(2, 1_502))
        assert len(positions) == 1_500
        read = list(client.read(orders))
        assert [envelope.event.n for envelope in read] == [1, *range(1, 1_502)]
        assert (read[1].id, read[0].source) == ("x", "shop")
        assert list(client.read(orders, since="now")) == []
    assert ours() == []


def test_an_event_may_be_published_for_later(tmp_path: Path) -> None:
    with App("shop", broker="memory://", streams=[orders]).blocking() as client:
        client.publish_at(Placed(n=1), "1h")
        assert client.publish(Envelope(Placed(n=2), due="1h"), to=orders).offset == "later"
        assert numbers(client) == []


def test_many_threads_share_one_loop_and_each_keeps_its_own_order(tmp_path: Path) -> None:
    app = shop(tmp_path)
    client = app.blocking()
    try:
        results = in_threads(16, lambda k: [client.publish(Placed(n=100 * k + n)) for n in range(20)])
        assert all(len(result) == 20 for result in results)
        assert len(ours()) == 1
        found = numbers(client)
        assert sorted(found) == sorted(100 * k + n for k in range(16) for n in range(20))
        assert [n for n in found if n // 100 == 3] == list(range(300, 320))  # each thread's own order
    finally:
        client.close()
    assert ours() == []


def test_a_closed_one_connects_anew_and_the_outermost_block_decides(tmp_path: Path) -> None:
    app = shop(tmp_path)
    with app.blocking() as outer:
        with app.blocking() as inner:
            inner.publish(Placed(n=1))
        assert len(ours()) == 1
        outer.publish(Placed(n=2))
    assert ours() == []
    app.blocking().publish(Placed(n=3))
    assert numbers(app.blocking()) == [1, 2, 3]
    app.blocking().close()
    app.blocking().close()


def test_errors_are_the_same_as_without_threads(tmp_path: Path) -> None:
    with shop(tmp_path).blocking() as client:
        with pytest.raises(TooLarge, match="over the limit"):
            client.publish(Placed(note="x" * 2_000_000))
        with pytest.raises(BadSetting, match="it must be zero or more"):
            client.publish_at(Placed(), -1)
        events = [Placed(n=n, note="x" * 2_000_000 if n == 1_200 else "") for n in range(1_500)]
        with pytest.raises(TooLarge) as refused:
            client.publish_many(events)
        assert refused.value.__notes__ == ["The first 1,000 events are stored, and no other."]
        assert len(numbers(client)) == 1_000


def test_what_cannot_connect_says_so_and_the_next_call_tries_again(tmp_path: Path) -> None:
    app = App("shop", broker="redis://127.0.0.1:1", streams=[orders])
    for _ in range(2):
        with pytest.raises(BrokerDown), app.blocking():
            raise AssertionError("it connected")
        with pytest.raises(BrokerDown):
            app.blocking().publish(Placed())
    with pytest.raises(BadSetting, match="kafka"):
        App("shop", broker="kafka://x").blocking().publish(Placed())
    app.configure(broker=f"sqlite:///{tmp_path}/shop.db")
    with app.blocking() as client:
        client.publish(Placed())


def test_a_write_that_takes_too_long_is_in_doubt_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = shop(tmp_path)
    gate = held(app, monkeypatch)
    with app.blocking() as client:
        with pytest.raises(Unconfirmed, match=r"no answer within 0\.05 s; the events may or may not be stored") as one:
            client.publish(Placed(n=1), timeout="50ms")
        with pytest.raises(Unconfirmed) as many:
            client.publish_many([Placed(n=2), Placed(n=3)], timeout=0.05)
        gate.set()
        assert [envelope.event.n for envelope in many.value.envelopes] == [2, 3]
        client.publish_many([*one.value.envelopes, *many.value.envelopes])
        assert sorted(numbers(client)) == [1, 2, 3]


def test_closing_waits_for_what_other_threads_are_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = shop(tmp_path)
    gate = held(app, monkeypatch)
    client = app.blocking()
    client.__enter__()
    begun = threading.Barrier(9)

    def work(n: int) -> Position | None:
        begun.wait(10)
        if n < 8:
            return client.publish(Placed(n=n))
        gate.set()
        client.close()
        return None

    results = in_threads(9, work)
    assert all(isinstance(result, Position) for result in results[:8])
    assert sorted(numbers(client)) == list(range(8))
    client.close()


def test_reading_may_follow_and_end_in_the_middle(tmp_path: Path) -> None:
    with shop(tmp_path).blocking() as client:
        client.publish_many([Placed(n=n) for n in range(1_200)])
        seen = []
        for envelope in client.read(orders, follow=True):
            seen.append(envelope.event.n)
            if len(seen) == 1_200:
                client.publish(Placed(n=9_999))
            if len(seen) == 1_201:
                break
        assert seen == [*range(1_200), 9_999]
        reading = client.read(orders, follow=True)
        next(reading)
    with pytest.raises(MillstreamError, match="the app was closed"):
        list(reading)


def test_an_app_that_ended_by_itself_is_opened_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = shop(tmp_path)
    client = app.blocking()
    client.publish(Placed(n=1))
    own = client._own
    assert own is not None

    def crash() -> None:
        raise SystemExit("a fault in a callback ends a loop")

    own.client.result().loop.call_soon_threadsafe(crash)
    own._thread.join(10)
    client.publish(Placed(n=2))
    assert numbers(client) == [1, 2]
    assert "the app ended on its own thread; the next call opens it again" in caplog.text
    client.close()


async def test_inside_of_an_event_loop_it_refuses_and_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(MillstreamError, match=r"would stop the event loop .*: write `await app\.publish\(…\)` here"):
        shop(tmp_path).blocking().publish(Placed())


async def test_while_the_app_is_open_on_a_loop_threads_go_through_that_one(tmp_path: Path) -> None:
    app = App("shop", broker="memory://", streams=[orders])
    seen: list[int] = []

    @app.subscriber(orders, "billing")
    def charge(event: Placed) -> None:  # a plain function: it runs in a thread
        seen.append(event.n)
        if event.n < 3:
            app.blocking().publish(Placed(n=event.n + 1))
        else:
            loop.call_soon_threadsafe(done.set_result, None)

    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    async with app.worker():
        await app.publish(Placed(n=1))
        await done
        assert ours() == []
    assert seen == [1, 2, 3]


def test_a_broker_that_does_not_answer_is_waited_for_no_longer_than_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    async def hang(_: MemoryBroker) -> None:
        await asyncio.to_thread(answers.wait)

    monkeypatch.setattr(MemoryBroker, "open", hang)
    client = App("shop", broker="memory://", streams=[orders]).blocking()
    try:
        with pytest.raises(BrokerDown, match=r"could not be opened within 0\.05 s; nothing was stored"):
            client.publish(Placed(n=1), timeout="50ms")
    finally:
        answers.set()
    client.publish(Placed(n=2))
    assert numbers(client) == [2]
    client.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_connects_by_itself_and_leaves_its_parents_connection_alone(tmp_path: Path) -> None:
    script = """
import os, sys, threading
from millstream import App, Event, Stream

class Placed(Event, type="order.placed"):
    n: int = 0

orders = Stream("orders", Placed)
app = App("shop", broker=sys.argv[1], streams=[orders])
client = app.blocking()
client.publish(Placed(n=0))
stop = threading.Event()

def busy():
    while not stop.is_set():
        client.publish(Placed(n=0))

thread = threading.Thread(target=busy)  # so that a lock may be held at the moment of a fork
thread.start()
children = []
for n in range(1, 6):
    child = os.fork()
    if child == 0:
        client.publish(Placed(n=n))
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
stop.set()
thread.join()
client.publish(Placed(n=6))
print(sorted({envelope.event.n for envelope in client.read(orders)}))
"""
    done = run(script, f"sqlite:///{tmp_path}/shop.db?synchronous=normal")
    assert (done.returncode, done.stdout.strip()) == (0, "[0, 1, 2, 3, 4, 5, 6]"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_forked_child_publishes_outlives_its_parents_connection(tmp_path: Path) -> None:
    script = """
import os, sys
from millstream import App, Event, Stream

class Placed(Event, type="order.placed"):
    n: int = 0

orders = Stream("orders", Placed)
client = App("shop", broker=sys.argv[1], streams=[orders]).blocking()
client.publish(Placed(n=0))
(begun, begin), (closed, close) = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    client.publish(Placed(n=1))
    os.write(begin, b".")
    os.read(closed, 1)
    client.publish(Placed(n=2))
    client.close()
    os._exit(0)
os.read(begun, 1)
client.close()  # were it the last one, it would take the write-ahead log away
os.write(close, b".")
assert os.waitpid(child, 0)[1] == 0
print(sorted(envelope.event.n for envelope in client.read(orders)))
"""
    done = run(script, f"sqlite:///{tmp_path}/shop.db")
    assert (done.returncode, done.stdout.strip()) == (0, "[0, 1, 2]"), done.stderr


def test_the_end_of_the_process_waits_for_what_is_being_written(tmp_path: Path) -> None:
    script = """
import sys, threading
from millstream import App, Event, MillstreamError, Stream

class Placed(Event, type="order.placed"):
    n: int = 0

app = App("shop", broker=sys.argv[1], streams=[Stream("orders", Placed)])
begun = threading.Barrier(9)

def publish(n):
    begun.wait()
    try:
        app.blocking().publish_many(Placed(n=n) for _ in range(500))
    except MillstreamError as error:
        assert str(error) == "the process is ending; nothing was stored", error

app.blocking().publish(Placed())
for n in range(8):
    threading.Thread(target=publish, args=(n,), daemon=True).start()
begun.wait()
"""
    url = f"sqlite:///{tmp_path}/shop.db?synchronous=normal"
    done = run(script, url)
    assert (done.returncode, done.stderr) == (0, "")
    with App("reader", broker=url).blocking() as client:
        stored = list(client.read(Stream("orders", Placed)))
    assert (len(stored) - 1) % 500 == 0  # whole writes: those that had begun


def test_ctrl_c_while_it_waits_ends_the_process_cleanly(tmp_path: Path) -> None:
    script = """
import sys
from millstream import App, Event, Stream

class Placed(Event, type="order.placed"):
    n: int = 0

orders = Stream("orders", Placed)
app = App("shop", broker=sys.argv[1], streams=[orders])
app.blocking().publish(Placed(n=1))
try:
    for envelope in app.blocking().read(orders, follow=True):
        print(envelope.event.n, flush=True)
except KeyboardInterrupt:
    app.blocking().publish(Placed(n=2))
    print([envelope.event.n for envelope in app.blocking().read(orders)], flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, f"sqlite:///{tmp_path}/shop.db"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output.strip(), errors) == (0, "[1, 2]", "")


def test_behind_a_web_server_with_threads(tmp_path: Path) -> None:
    app = shop(tmp_path, settings=Settings(publish_patience=0))

    def view(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        position = app.blocking().publish(Placed(n=int(environ["PATH_INFO"][1:])))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(position).encode()]

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with make_server("127.0.0.1", 0, view, handler_class=Quiet) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:

            def get(n: int) -> str:
                with urlopen(f"http://127.0.0.1:{server.server_port}/{n}", timeout=20) as answer:
                    text: str = answer.read().decode()
                    return text

            answers = in_threads(8, get)
        finally:
            server.shutdown()
            serving.join(10)
    assert len(set(answers)) == 8
    with app.blocking() as client:
        assert sorted(numbers(client)) == list(range(8))


def run(script: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, url], capture_output=True, text=True, timeout=50, check=False
    )
