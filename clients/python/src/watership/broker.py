"""The broker's side: aiormq, the client that is beneath aio-pika."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from datetime import datetime, timezone
from typing import Any, TypeVar

import aiormq
from pamqp import decode
from yarl import URL

from .message import Message

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


async def apart(work: Coroutine[Any, Any, T], seconds: float | None = 10.0) -> T:
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
        raise ConnectionError("no answer in time" if is_late else "cancelled")
    return task.result()


class Session:
    """One life of the connections: from the subscription until it is lost, or the helper stops."""

    def __init__(self) -> None:
        self.over, self.cause = asyncio.Event(), ""
        self.in_hand, self.heard = 0, time.monotonic()
        # Connections to the database that nobody uses.
        self.idle: list[Any] = []
        self.connection: Any = None
        self.channel: Any = None

    def lose(self, cause: str) -> None:
        """Begins nothing more."""
        self.cause = self.cause or cause
        self.over.set()

    async def pause(self, seconds: float, over: asyncio.Event | None = None) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for((over or self.over).wait(), seconds)

    async def subscribe(self, url: str, queue: str, prefetch: Callable[[str], int],
                        deliver: Callable[[Session, Message, Any], None]) -> None:
        """Connects and consumes; `prefetch` is chosen by the broker's version."""
        self.connection = await apart(aiormq.connect(
            URL(url) if "heartbeat" in URL(url).query else URL(url).update_query(heartbeat="10")))
        self.channel = await apart(self.connection.channel())
        version = str(self.connection.server_properties.get("version", ""))
        await apart(self.channel.basic_qos(prefetch_count=prefetch(version)))

        async def on_message(raw: Any) -> None:
            # Nothing in here waits: aiormq ends this task when the channel closes.
            sent = raw.delivery
            deliver(self, Message.of(raw.header.properties, raw.body, exchange=sent.exchange,
                                     routing_key=sent.routing_key, redelivered=sent.redelivered),
                    raw)

        self.tag = (await apart(self.channel.basic_consume(queue, on_message))).consumer_tag

    def trouble(self) -> str:
        """Why nothing can come any more; or empty."""
        if not self.connection.is_opened:
            return "connection_lost"
        if self.channel.is_closed:
            return "channel_closed"
        # A cancel by the broker leaves no other trace in all versions of aiormq.
        return "" if self.tag in self.channel.consumers else "cancelled"

    @contextlib.asynccontextmanager
    async def aside(self) -> Any:
        """A channel beside the one that consumes."""
        if self.connection.is_closed:
            raise ConnectionError("not connected to the broker")
        channel: Any = await apart(self.connection.channel(on_return_raises=True))
        try:
            yield channel
        finally:
            with contextlib.suppress(Exception):
                await apart(channel.close())

    async def counts(self, queue: str) -> tuple[int, int]:
        """The queue's ready messages and consumers."""
        async with self.aside() as channel:
            found = await apart(channel.queue_declare(queue, passive=True))
            return found.message_count, found.consumer_count

    async def acknowledge(self, raw: Any) -> None:
        # On a channel that is gone: the broker has taken the message back.
        with contextlib.suppress(Exception):
            await apart(self.channel.basic_ack(raw.delivery.delivery_tag, wait=False))

    async def send(self, raw: Any, to: Any, headers: dict[str, Any]) -> None:
        """Publishes the message once more, and waits for the confirm."""
        async with self.aside() as channel:
            await apart(channel.basic_publish(
                raw.body, exchange=to.exchange, routing_key=to.routing_key, mandatory=True,
                properties=to.properties(raw.header.properties, headers)))

    async def close(self) -> None:
        """Closes the connection, without a cancel before it. Never an error."""
        if self.connection is not None:
            with contextlib.suppress(Exception):
                await apart(self.connection.close(), 5.0)
