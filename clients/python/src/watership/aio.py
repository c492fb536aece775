"""The asynchronous helper: psycopg 3 and aio-pika.

    async def handle(message: Message, conn: psycopg.AsyncConnection) -> None: ...
    await Inbox(consumer="billing", queue="billing", amqp=URL, database=URL).run(handle)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import aiormq
import psycopg
from pamqp import decode

from . import broker
from .broker import T, apart
from .consumer import Consumer, NotInstalled
from .message import LAST, DeadLetter, Message

__all__ = ["Handler", "Inbox", "NotInstalled"]
Handler = Callable[[Message, psycopg.AsyncConnection[Any]], Coroutine[Any, Any, None]]


def _lenient(methods: Any, kind: str | bytes, instead: Callable[[bytes], tuple[int, Any]]) -> None:
    """Over a value that it cannot represent, pamqp gives up the connection; each time that such a
    message is delivered, so that its queue would stand still.
    """
    given = methods[kind]

    def lenient(value: bytes) -> Any:
        try:
            return given(value)
        except (ValueError, OverflowError, OSError):
            return instead(value)
    methods[kind] = lenient


# With NUL an id counts as none; the end of the calendar lies ahead, so the inbox parks it.
_lenient(decode.METHODS, "shortstr", lambda value: (
    value[0] + 1, value[1:value[0] + 1].decode(errors="replace") + "\0"))
_lenient(decode.METHODS, "timestamp", lambda _: (8, LAST))
_lenient(decode.TABLE_MAPPING, b"T", lambda _: (8, LAST))


class Session(broker.Session):
    """With aiormq, the client that is beneath aio-pika."""

    async def connect(self, url: str) -> None:
        self.connection = await apart(aiormq.connect(url))

    async def open(self) -> Any:
        return await apart(self.connection.channel(on_return_raises=True))

    async def call(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return await apart(method(*args, **named))

    async def on_message(self, *args: Any) -> None:
        # Nothing in here waits: aiormq ends this task when the channel closes.
        self.deliver(args[0].delivery, args[0].header.properties, args[0].body)

    def state(self) -> tuple[bool, Collection[str]]:
        return self.connection.is_opened, self.channel.consumers

    async def publish(self, channel: Any, to: DeadLetter, properties: Any, body: bytes) -> None:
        await apart(channel.basic_publish(
            body, exchange=to.exchange, routing_key=to.routing_key, mandatory=True,
            properties=properties))

    async def disconnect(self) -> None:
        await self.connection.close()


class Inbox(Consumer):
    """A consumer: its handler runs in a transaction, once for each message."""

    _new_session = Session
    _passed = (*Consumer._passed, asyncio.CancelledError)
    _connect = staticmethod(psycopg.AsyncConnection[Any].connect)

    async def run(self, handler: Handler) -> None:
        """Until SIGTERM, SIGINT (with `signals`) or `stop()`."""
        self._handler = handler
        await self._consume()

    async def _invoke(self, message: Message, conn: Any) -> None:
        await apart(self._handler(message, conn), None)

    async def _in_database(self, work: Coroutine[Any, Any, T]) -> T:
        return await work
