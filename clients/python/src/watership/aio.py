"""The asynchronous helper: psycopg 3 and aio-pika.

    async def handle(message: Message, conn: psycopg.AsyncConnection) -> None: ...
    await Inbox(consumer="billing", queue="billing", amqp=URL, database=URL).run(handle)
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Hashable
from datetime import datetime, timezone
from typing import Any, TypeVar

import aio_pika
import psycopg
from pamqp import decode
from yarl import URL

from .consumer import Consumer, log
from .database import Db
from .lanes import Delivery
from .message import DeadLetter, Message

Handler = Callable[[Message, psycopg.AsyncConnection[Any]], Coroutine[Any, Any, None]]
T = TypeVar("T")


def _lenient(kind: str, instead: Callable[[bytes], tuple[int, Any]]) -> None:
    """Over a value that it cannot represent, pamqp gives up the connection; each time that such a
    message is delivered, so that its queue would stand still.
    """
    given: Any = decode.METHODS[kind]

    def lenient(value: bytes) -> Any:
        try:
            return given(value)
        except (ValueError, OverflowError, OSError):
            return instead(value)
    decode.METHODS[kind] = lenient


# With NUL an id counts as none; the end of the calendar lies ahead, so the inbox parks it.
_lenient("shortstr", lambda value: (
    value[0] + 1, value[1:value[0] + 1].decode(errors="replace") + "\0"))
_lenient("timestamp", lambda _: (8, datetime.max.replace(tzinfo=timezone.utc)))


async def _apart(work: Coroutine[Any, Any, T], seconds: float | None = 10.0) -> T:
    """In a task of its own: when a connection is lost, aiormq cancels what waits for an answer,
    and that must not look like a cancel of this task.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if is_late := not task.done():
            task.cancel()
    if is_late or task.cancelled():
        raise ConnectionError("no answer of the broker" if is_late else "cancelled")
    return task.result()


class Inbox(Consumer):
    """A consumer. Its handler runs in a transaction, once for each message."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stopped = asyncio.Event()
        self._ready: asyncio.Queue[Hashable | None] = asyncio.Queue()
        self._connection: aio_pika.abc.AbstractConnection | None = None

    async def run(self, handler: Handler) -> None:
        """Until SIGTERM, SIGINT (with `signals`) or `stop()`."""
        self._handler = handler
        if self.signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        first, *dbs = [Db(psycopg.AsyncConnection.connect, self.database)
                       for _ in range(self.concurrency + 3)]
        self._tasks = [asyncio.create_task(self.worker(db)) for db in dbs[2:]]
        self._tasks.append(asyncio.create_task(self.upkeep(dbs[0], dbs[1])))
        try:
            await self.supervise(first)
            for _ in self._tasks:
                self._ready.put_nowait(None)
            _, late = await asyncio.wait(self._tasks, timeout=self.stop_timeout)
            if late:
                log.error("consumer %s: %d handlers are cut off", self.consumer, len(late))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=5)
            await self.unsubscribe()
            for db in [first, *dbs]:
                await db.close()

    def stop(self) -> None:
        """Begins no more messages; `run` returns when those in hand have ended."""
        self.no_more()
        self._stopped.set()

    async def sleep(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def make_ready(self, lane: Hashable) -> None:
        self._ready.put_nowait(lane)

    async def next_lane(self) -> Hashable | None:
        return await self._ready.get()

    async def invoke(self, message: Message, conn: Any) -> None:
        await _apart(self._handler(message, conn), None)

    async def subscribe(self) -> None:
        url = URL(self.amqp)
        if "heartbeat" not in url.query:
            url = url.update_query(heartbeat="10")
        self._connection = await _apart(aio_pika.connect(url))
        channel = self._channel = await self._new_channel()
        version = channel.connection.server_properties.get("version", "")
        await _apart(channel.basic_qos(prefetch_count=self.chosen_prefetch(str(version))))

        async def on_message(raw: Any) -> None:
            # Nothing in here waits: aiormq ends this task when the channel closes.
            sent = raw.delivery
            message = Message.of(raw.header.properties, raw.body, exchange=sent.exchange,
                                 routing_key=sent.routing_key, redelivered=sent.redelivered)
            if channel is self._channel:
                self.deliver(Delivery(message, sent.delivery_tag, channel, raw))

        self._tag = (await _apart(channel.basic_consume(self.queue, on_message))).consumer_tag

    async def _new_channel(self) -> Any:
        if self._connection is None or self._connection.is_closed:
            raise ConnectionError("not connected to the broker")
        channel = self._connection.channel(on_return_raises=True)
        await _apart(channel.initialize())
        return await channel.get_underlay_channel()

    async def unsubscribe(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await _apart(connection.close(), 5.0)

    async def watch(self, seconds: float) -> str | None:
        for task in self._tasks:
            if task.done():
                task.result()
        await self.sleep(seconds)
        if not self._channel.connection.is_opened:
            return "connection_lost"
        if self._channel.is_closed:
            return "channel_closed"
        # A cancel by the broker leaves no other trace in all versions of aiormq.
        return None if self._tag in self._channel.consumers else "cancelled"

    async def counts(self) -> tuple[int, int]:
        channel = await self._new_channel()
        found = await _apart(channel.queue_declare(self.queue, passive=True))
        await _apart(channel.close())
        return found.message_count, found.consumer_count

    async def acknowledge(self, delivery: Delivery) -> None:
        # On a channel that is gone: the broker has taken the message back.
        with contextlib.suppress(Exception):
            await _apart(delivery.channel.basic_ack(delivery.tag, wait=False))

    async def send(self, delivery: Delivery, to: DeadLetter, headers: dict[str, Any]) -> None:
        channel = await self._new_channel()
        try:
            await _apart(channel.basic_publish(
                delivery.raw.body, exchange=to.exchange, routing_key=to.routing_key, mandatory=True,
                properties=to.properties(delivery.raw.header.properties, headers)))
        finally:
            with contextlib.suppress(Exception):
                await _apart(channel.close())
