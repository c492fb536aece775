"""The synchronous helper: handlers run in threads, with connections of psycopg that block.

    def handle(message: Message, conn: psycopg.Connection) -> None: ...
    Inbox(consumer="billing", queue="billing", amqp=URL, database=URL).run(handle)
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg

from . import aio
from .aio import T
from .message import Message

Handler = Callable[[Message, psycopg.Connection[Any]], None]


class Inbox(aio.Inbox):
    """A consumer: its handler runs in a transaction, once for each message."""

    _connect = staticmethod(psycopg.Connection[Any].connect)  # type: ignore[assignment]

    def run(self, handler: Handler) -> None:  # type: ignore[override]
        """Until SIGTERM, SIGINT (with `signals`, which needs the main thread) or `stop()`."""
        self._handler = handler
        asyncio.run(self._consume())

    async def _invoke(self, message: Message, conn: Any) -> None:
        self._handler(message, conn)

    async def _in_database(self, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(way: Callable[[Any], None], outcome: Any) -> None:
            if not answer.done():
                way(outcome)

        def thread() -> None:
            # Everything in it blocks, so that it ends at once.
            try:
                work.send(None)
            except StopIteration as end:
                way, outcome = answer.set_result, end.value
            except BaseException as error:
                way, outcome = answer.set_exception, error
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, way, outcome)

        # A daemon: one that is cut off does not keep the process alive.
        threading.Thread(target=thread, daemon=True).start()
        result: T = await answer
        return result
