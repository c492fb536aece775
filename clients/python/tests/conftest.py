"""Real servers, named by DATABASE_URL and AMQP_URL; the database has the inbox installed.

Every test has a queue and a consumer name of its own. Handlers are written once, as coroutines that
await `run(sql, ...)`, and run under both helpers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pika
import psycopg
import pytest

from watership import Message, aio, sync
from watership.consumer import Consumer

Handler = Callable[[Message, Callable[..., Awaitable[Any]]], Awaitable[None]]


def url(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        pytest.fail(f"{name} is not set: these tests need a real server (see README.md)")
    return value


LIMIT = float(os.environ.get("WATERSHIP_TEST_LIMIT", "40"))


def eventually(what: Callable[[], Any], seconds: float = LIMIT) -> Any:
    """Waits until it is true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value


class Running:
    """A consumer in a thread."""

    def __init__(self, flavour: str, handler: Handler, **options: Any) -> None:
        self.inbox: Consumer
        self.error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        if flavour == "async":
            self.inbox = inbox = aio.Inbox(signals=False, **options)

            async def handle(message: Message, conn: psycopg.AsyncConnection[Any]) -> None:
                await handler(message, conn.execute)
            def run() -> None:
                self._loop.run_until_complete(inbox.run(handle))
        else:
            self.inbox = blocking = sync.Inbox(signals=False, **options)

            def block(message: Message, conn: psycopg.Connection[Any]) -> None:
                async def execute(*args: Any) -> Any:
                    return conn.execute(*args)
                with contextlib.suppress(StopIteration):
                    handler(message, execute).__await__().send(None)

            def run() -> None:
                blocking.run(block)
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self.error = error

    def ask_to_stop(self) -> None:
        self.inbox.stop()

    def in_loop(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls it where the consumer lives."""
        async def work() -> None:
            answer = function(*args)
            if hasattr(answer, "__await__"):
                await answer
        loop: asyncio.AbstractEventLoop = getattr(self.inbox, "_loop")
        asyncio.run_coroutine_threadsafe(work(), loop).result(10)

    def loop_ends(self, seconds: float) -> None:
        """After an error that ended it: its tasks are cancelled, as asyncio.run does."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(seconds))

    def stop(self) -> None:
        if self._thread.is_alive():
            self.ask_to_stop()
        self._thread.join(45)
        assert not self._thread.is_alive()

    def counted(self, name: str, label: str = "") -> int:
        for line in self.inbox.metrics().splitlines():
            series, _, value = line.rpartition(" ")
            if series.startswith(f"watership_inbox_{name}_total{{") and label in series:
                return int(value)
        return 0


class World:
    """A queue, a consumer name, and a view of the database."""

    def __init__(self, flavour: str) -> None:
        self.flavour, name = flavour, uuid.uuid4().hex[:12]
        self.queue, self.consumer = f"q-{name}", f"c-{name}"
        self.database, self.amqp = url("DATABASE_URL"), url("AMQP_URL")
        self.db = psycopg.connect(self.database, autocommit=True)
        self.connection = pika.BlockingConnection(pika.URLParameters(self.amqp))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.running: list[Running] = []
        self._number = 0

    def declare(self, **arguments: Any) -> None:
        kinds = {"x-queue-type": "quorum", **arguments}
        self.channel.queue_declare(self.queue, durable=True, arguments=kinds)

    def publish(self, key: str | None = None, *, id: str | None = "", at: int | None = 0,
                body: bytes | None = None, **properties: Any) -> str:
        """Publishes one message; its body has the next number. Returns its id."""
        self._number += 1
        text = json.dumps({"key": key, "number": self._number}).encode() if body is None else body
        message_id = str(uuid.uuid4()) if id == "" else id
        headers = dict(properties.pop("headers", {}))
        if key is not None:
            headers["ws-key"] = key
        self.channel.basic_publish("", self.queue, text, pika.BasicProperties(
            message_id=message_id, timestamp=int(time.time()) if at == 0 else at,
            headers=headers, delivery_mode=2, **properties), mandatory=True)
        return message_id or "sha256-" + hashlib.sha256(text).hexdigest()

    def start(self, handler: Handler | None = None, **options: Any) -> Running:
        given = {"consumer": self.consumer, "queue": self.queue, "amqp": self.amqp,
                 "database": self.database, "backoff": (0.02, 0.1)}
        running = Running(self.flavour, handler or self.effect, **{**given, **options})
        self.running.append(running)
        return running

    async def effect(self, message: Message, run: Callable[..., Awaitable[Any]]) -> None:
        body = json.loads(message.body)
        await run("INSERT INTO watership_test_effect (consumer, message_id, key, number) "
                  "VALUES (%s, %s, %s, %s)",
                  (self.consumer, message.id, message.key, body["number"]))

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.db.execute(query, values).fetchall()

    def effects(self, key: str | None = None) -> list[int]:
        """The numbers of the effects, in the order in which they happened."""
        return [row[0] for row in self.rows(
            "SELECT number FROM watership_test_effect WHERE consumer = %s "
            "AND (key = %s OR %s::text IS NULL) ORDER BY id", self.consumer, key, key)]

    def parked(self) -> list[tuple[str, str]]:
        return [(row[0], row[1]) for row in self.rows(
            "SELECT message_id, reason FROM watership_inbox.parked_messages WHERE consumer = %s "
            "ORDER BY id", self.consumer)]

    def depth(self) -> int:
        """Messages that are ready in the queue."""
        channel = self.connection.channel()
        count: int = channel.queue_declare(self.queue, passive=True).method.message_count
        channel.close()
        return count

    def get(self, queue: str) -> tuple[Any, bytes] | None:
        _, properties, body = self.channel.basic_get(queue, auto_ack=True)
        return None if properties is None else (properties, body)

    def nothing_left(self) -> bool:
        """All is acknowledged: once the consumers have gone, nothing is in the queue."""
        for running in self.running:
            running.stop()
        time.sleep(0.2)
        return self.depth() == 0

    def close(self) -> None:
        try:
            for running in self.running:
                running.stop()
        finally:
            with contextlib.suppress(Exception):
                self.connection.channel().queue_delete(self.queue)
                self.connection.close()
            self.db.close()


@pytest.fixture(scope="session", autouse=True)
def effect_table() -> None:
    with psycopg.connect(url("DATABASE_URL")) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS watership_test_effect (id bigserial PRIMARY KEY, "
                     "consumer text, message_id text, key text, number int)")


@pytest.fixture(params=["async", "sync"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    made.declare()
    yield made
    made.close()
