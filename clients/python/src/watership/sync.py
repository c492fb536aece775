"""The synchronous helper: psycopg 3 and pika. Handlers run in threads, with connections that block.

    def handle(message: Message, conn: psycopg.Connection) -> None: ...
    Inbox(consumer="billing", queue="billing", amqp=URL, database=URL).run(handle)
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import pika.data
import pika.spec
import psycopg
from pika.adapters.asyncio_connection import AsyncioConnection

from . import broker
from .broker import T, apart
from .consumer import Consumer, NotInstalled
from .message import LAST, DeadLetter, Message

__all__ = ["Handler", "Inbox", "NotInstalled"]
Handler = Callable[[Message, psycopg.Connection[Any]], None]


_decode_value: Any = pika.data.decode_value


def _lenient(encoded: bytes, offset: int) -> Any:
    """pika closes the connection at a time in a header that is out of range, at every delivery of
    such a message, which would block its queue.
    """
    try:
        return _decode_value(encoded, offset)
    except (ValueError, OverflowError, OSError):
        if encoded[offset:offset + 1] != b"T":
            raise
        return LAST, offset + 9


pika.data.decode_value = _lenient


async def called_back(start: Callable[[Callable[..., None]], Any],
                      seconds: float | None = 10.0) -> Any:
    """The last argument of the callback; raised if it is an error."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def settle(*given: Any) -> None:
        if not answer.done():
            is_error = isinstance(given[-1], BaseException)
            (answer.set_exception if is_error else answer.set_result)(given[-1])

    start(settle)
    return await apart(answer, seconds)


class Session(broker.Session):
    """With pika, which runs in the loop and never in the handlers' threads."""

    async def connect(self, url: str) -> None:
        def start(settle: Callable[..., None]) -> None:
            # Set at once, so that a connection that opens too late is closed, too.
            self.connection = AsyncioConnection(pika.URLParameters(url), settle, settle)

        await called_back(start)

    async def open(self) -> Any:
        return await called_back(lambda settle: self.connection.channel(
            on_open_callback=settle).add_on_close_callback(settle))

    async def call(self, method: Any, *args: Any, **named: Any) -> Any:
        def start(settle: Callable[..., None]) -> None:
            method.__self__.add_on_close_callback(settle)
            method(*args, callback=settle, **named)

        return (await called_back(start)).method

    def on_message(self, *args: Any) -> None:
        self.deliver(*args[1:])

    def state(self) -> tuple[bool, Collection[str]]:
        return self.connection.is_open, self.channel.consumer_tags

    async def publish(self, channel: Any, to: DeadLetter, properties: Any, body: bytes) -> None:
        def start(settle: Callable[..., None]) -> None:
            channel.add_on_close_callback(settle)
            channel.add_on_return_callback(lambda *_: settle(ConnectionError("no queue takes it")))
            channel.confirm_delivery(settle)
            channel.basic_publish(to.exchange, to.routing_key, body, properties, mandatory=True)

        if isinstance((await called_back(start)).method, pika.spec.Basic.Nack):
            raise ConnectionError("a queue does not take it")

    async def disconnect(self) -> None:
        def start(settle: Callable[..., None]) -> None:
            self.connection.add_on_close_callback(settle)
            self.connection.close()

        if self.channel is not None:
            # pika would cancel first, and the next consumer would start beside unfinished messages.
            self.channel.basic_cancel = lambda **_: None
        await called_back(start)


class Inbox(Consumer):
    """A consumer: its handler runs in a transaction, once for each message."""

    _new_session = Session
    _connect = staticmethod(psycopg.Connection[Any].connect)

    def run(self, handler: Handler) -> None:
        """Until SIGTERM, SIGINT (with `signals`, which needs the main thread) or `stop()`."""
        self._handler = handler
        asyncio.run(self._consume())

    async def _invoke(self, message: Message, conn: Any) -> None:
        self._handler(message, conn)

    async def _in_database(self, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()

        def start(settle: Callable[..., None]) -> None:
            def thread() -> None:
                outcome: Any
                # Everything in it blocks, so that it ends at once.
                try:
                    work.send(None)
                except StopIteration as end:
                    outcome = end.value
                except BaseException as error:
                    outcome = error
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(settle, outcome)

            # A daemon: one that is cut off does not keep the process alive.
            threading.Thread(target=thread, daemon=True).start()

        result: T = await called_back(start, None)
        return result
