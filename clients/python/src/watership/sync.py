"""The synchronous helper: psycopg 3 and pika. Handlers run in threads.

    def handle(message: Message, conn: psycopg.Connection) -> None: ...
    Inbox(consumer="billing", queue="billing", amqp=URL, database=URL).run(handle)
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

import pika
import psycopg

from .consumer import Consumer, log
from .database import Db
from .lanes import Delivery
from .message import DeadLetter, Message

Handler = Callable[[Message, psycopg.Connection[Any]], None]


def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine in which everything blocks and nothing waits."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError("a coroutine of the synchronous helper was suspended")


class Inbox(Consumer):
    """A consumer. Its handler runs in a transaction, once for each message."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stopped, self._cancelled = threading.Event(), False
        self._ready: queue.SimpleQueue[Hashable | None] = queue.SimpleQueue()
        self._connection: Any = None
        self._died: list[BaseException] = []

    def run(self, handler: Handler) -> None:
        """Until SIGTERM, SIGINT (with `signals`, which needs the main thread) or `stop()`."""
        self._handler = handler
        if self.signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                # In a thread: the main one may hold the locks that `stop` takes.
                signal.signal(number, lambda *_: threading.Thread(target=self.stop).start())
        first, *dbs = [Db(psycopg.Connection.connect, self.database)
                       for _ in range(self.concurrency + 3)]
        jobs = [self.worker(db) for db in dbs[2:]] + [self.upkeep(dbs[0], dbs[1])]
        threads = [threading.Thread(target=self._job, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            _finish(self.supervise(first))
        finally:
            self.stop()
            for _ in threads:
                self._ready.put(None)
            deadline = time.monotonic() + self.stop_timeout
            while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
                self._events(0.05)
            if any(thread.is_alive() for thread in threads):
                log.error("consumer %s: handlers are cut off", self.consumer)
            else:
                for db in [first, *dbs]:
                    _finish(db.close())
            self._events(0)
            _finish(self.unsubscribe())
        if self._died:
            raise self._died[0]

    def _job(self, job: Coroutine[Any, Any, None]) -> None:
        try:
            _finish(job)
        except BaseException as error:
            # As SystemExit in a handler: `run` raises it.
            self._died.append(error)
            self.stop()

    def stop(self) -> None:
        """Begins no more messages; `run` returns when those in hand have ended. From any thread."""
        self.no_more()
        self._stopped.set()

    async def sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def make_ready(self, lane: Hashable) -> None:
        self._ready.put(lane)

    async def next_lane(self) -> Hashable | None:
        return self._ready.get()

    async def invoke(self, message: Message, conn: Any) -> None:
        self._handler(message, conn)

    def _connect(self) -> Any:
        parameters = pika.URLParameters(self.amqp)
        if "heartbeat=" not in self.amqp:
            parameters.heartbeat = 10
        return pika.BlockingConnection(parameters)

    async def subscribe(self) -> None:
        self._connection, self._cancelled = self._connect(), False
        channel = self._channel = self._connection.channel()
        # pika shows the broker's version nowhere else.
        properties = getattr(getattr(self._connection, "_impl", None), "server_properties", None)
        version = str((properties or {}).get("version", ""))
        channel.basic_qos(prefetch_count=self.chosen_prefetch(version))

        def on_cancel(_: Any) -> None:
            self._cancelled = True

        def on_message(_: Any, sent: Any, properties: Any, body: bytes) -> None:
            message = Message.of(properties, body, exchange=sent.exchange,
                                 routing_key=sent.routing_key, redelivered=sent.redelivered)
            self.deliver(Delivery(message, sent.delivery_tag, channel, (properties, body)))

        channel.add_on_cancel_callback(on_cancel)
        channel.basic_consume(self.queue, on_message)

    async def unsubscribe(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def _events(self, seconds: float) -> None:
        try:
            self._connection.process_data_events(time_limit=seconds)
        except Exception as error:
            # What is lost, the state of channel and connection says.
            log.debug("pika: %r", error)
            time.sleep(0.01)

    async def watch(self, seconds: float) -> str | None:
        self._events(seconds)
        if self._connection.is_closed:
            return "connection_lost"
        if self._channel.is_closed:
            return "channel_closed"
        return "cancelled" if self._cancelled else None

    async def counts(self) -> tuple[int, int]:
        channel = self._connection.channel()
        found = channel.queue_declare(self.queue, passive=True).method
        channel.close()
        return found.message_count, found.consumer_count

    async def acknowledge(self, delivery: Delivery) -> None:
        def ack() -> None:
            # On a channel that is gone: the broker has taken the message back.
            with contextlib.suppress(Exception):
                delivery.channel.basic_ack(delivery.tag)

        with contextlib.suppress(Exception):
            delivery.channel.connection.add_callback_threadsafe(ack)

    async def send(self, delivery: Delivery, to: DeadLetter, headers: dict[str, Any]) -> None:
        properties, body = delivery.raw
        # A connection of its own: that of the subscription belongs to another thread.
        connection = self._connect()
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish(to.exchange, to.routing_key, body, mandatory=True,
                                  properties=to.properties(properties, headers))
        finally:
            with contextlib.suppress(Exception):
                connection.close()
