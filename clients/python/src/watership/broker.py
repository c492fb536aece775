"""The broker's side, for both clients. They name AMQP's methods alike; how to wait for the answer,
and what else differs, a subclass of `Session` says.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, TypeVar

from .message import DeadLetter

T = TypeVar("T")


async def apart(work: Awaitable[T], seconds: float | None = 10.0) -> T:
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


async def got(value: Any) -> Any:
    """Awaits what only one of the two clients returns as an awaitable."""
    return await value if hasattr(value, "__await__") else value


class Session(abc.ABC):
    """One life of the connections: from the subscription until it is lost, or the helper stops."""

    def __init__(self, deliver: Callable[[Any, Any, Any, bytes], None]) -> None:
        """`deliver` gets this, how a message was sent, its properties and its body."""
        self.deliver = functools.partial(deliver, self)
        self.over, self.cause = asyncio.Event(), ""
        self.in_hand, self.heard = 0, time.monotonic()
        # Connections to the database that nobody uses.
        self.idle: list[Any] = []
        self.connection: Any = None
        self.channel: Any = None

    def lose(self, cause: str) -> None:
        """Ends this life: nothing new is begun."""
        self.cause = self.cause or cause
        self.over.set()

    async def pause(self, seconds: float, over: asyncio.Event | None = None) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for((over or self.over).wait(), seconds)

    @abc.abstractmethod
    async def connect(self, url: str) -> None:
        """Sets `connection`."""

    @abc.abstractmethod
    async def open(self) -> Any:
        """A new channel."""

    @abc.abstractmethod
    async def call(self, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """The broker's answer to a method of a channel; an error if the channel is closed."""

    @abc.abstractmethod
    def on_message(self, *args: Any) -> Any:
        """The callback for the client; it calls `deliver`."""

    @abc.abstractmethod
    def state(self) -> tuple[bool, Collection[str]]:
        """Is the connection open, and which consumers has the channel?"""

    @abc.abstractmethod
    async def publish(self, channel: Any, to: DeadLetter, properties: Any, body: bytes) -> None:
        """Publishes with the mandatory flag, and waits for the confirm."""

    @abc.abstractmethod
    async def disconnect(self) -> None:
        """Closes the connection, without a cancel before it."""

    async def subscribe(self, url: str, queue: str, prefetch: Callable[[str], int]) -> None:
        """Connects and consumes; `prefetch` is chosen by the broker's version."""
        given = "" if "heartbeat=" in url else ("&" if "?" in url else "?") + "heartbeat=10"
        self.url = url + given
        await self.connect(self.url)
        self.channel = await self.open()
        version = str(self.connection.server_properties.get("version", ""))
        await self.call(self.channel.basic_qos, prefetch_count=prefetch(version))
        self.tag = (await self.call(
            self.channel.basic_consume, queue, self.on_message)).consumer_tag

    def trouble(self) -> str:
        """Why no more messages can arrive; empty if they can."""
        is_open, tags = self.state()
        if not is_open:
            return "connection_lost"
        if self.channel.is_closed:
            return "channel_closed"
        # A cancel by the broker leaves no other trace in all versions of aiormq.
        return "" if self.tag in tags else "cancelled"

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[Any]:
        """A channel beside the one that consumes."""
        channel = await self.open()
        try:
            yield channel
        finally:
            with contextlib.suppress(Exception):
                await apart(got(channel.close()))

    async def counts(self, queue: str) -> tuple[int, int]:
        """The queue's ready messages and consumers."""
        async with self.aside() as channel:
            found = await self.call(channel.queue_declare, queue, passive=True)
            return found.message_count, found.consumer_count

    async def acknowledge(self, tag: int) -> None:
        # If the channel is gone, the broker has taken the message back.
        with contextlib.suppress(Exception):
            await apart(got(self.channel.basic_ack(tag)))

    async def send(self, body: bytes, properties: Any, to: Any, headers: dict[str, Any]) -> None:
        """Publishes a message once more, with these headers; on a connection of its own, because
        the broker stops reading one that publishes when it has no room, also acknowledgements.
        """
        other = type(self)(lambda *_: None)
        try:
            await other.connect(self.url)
            async with other.aside() as channel:
                await other.publish(channel, to, to.properties(properties, headers), body)
        finally:
            await other.close()

    async def close(self) -> None:
        """Closes everything; never raises."""
        if self.connection is not None:
            with contextlib.suppress(Exception):
                await apart(self.disconnect(), 5.0)
