"""What both helpers do: clients/README.md says it in words.

What they do in the database awaits nothing but the database and the handler: so `watership.sync`
can run it in a thread, with connections that block.
"""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import json
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .broker import Session, T, got
from .message import DeadLetter, Message, Permanent, parked, plain
from .sql import ask, whole

log = logging.getLogger("watership")
# Unless the URL says otherwise: a connection to a host that is gone is noticed.
_CONNECTION = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5,
               "keepalives_count": 3, "tcp_user_timeout": 30000}
_ENDED = "the handler ended the transaction (COMMIT or ROLLBACK): leave that to the inbox: "
# What a handler has done before a statement fails so, by SQLSTATE.
_SPOILT = {"25P01": _ENDED, "3B001": _ENDED, "25P02": "the handler hid an error of the database: "}


class Abandoned(Exception):
    """The message is left to its next delivery: the helper stops, or the subscription is lost."""


class NotInstalled(RuntimeError):
    """At start: the database has no inbox, or its user may not use it."""


@dataclass
class Job:
    """A message, and what is known of its attempts: `failure` ended the last one, and is not noted
    yet. `retried` is the number of one that was parked; `tag` is of another, with the properties as
    the client has them.
    """

    message: Message
    tag: int | None = None
    properties: Any = None
    retried: int | None = None
    begun: bool = False
    stage: Literal["", "handler", "commit"] = ""
    conflicts: int = 0
    failed: int = 0
    failure: Exception | None = None
    reason: str = ""
    error: str | None = None


def error_text(error: BaseException | None) -> str:
    return f"{_SPOILT.get(sqlstate(error), '')}{type(error).__name__}: {plain(str(error))}"


def sqlstate(error: BaseException | None) -> str:
    """Of the error, or of its cause, as of SQLAlchemy's errors; or empty."""
    while error is not None and not getattr(error, "sqlstate", None):
        error = error.__cause__
    return str(getattr(error, "sqlstate", ""))


def doubled(first: float, last: float, times: int) -> float:
    """`first` doubled so many times, at most `last`; seconds."""
    return min(last, first * 2.0 ** min(times, 30))


@dataclass(kw_only=True)
class Consumer(abc.ABC):
    """A consumer, but for how it talks to its servers. Times are in seconds."""

    consumer: str
    queue: str
    amqp: str
    database: str
    ordered: bool = False
    concurrency: int = 8
    prefetch: int = 50
    max_failures: int = 5
    max_kills: int = 10
    backoff: tuple[float, float] = (0.1, 10.0)
    on_failure: Literal["park"] | DeadLetter = "park"
    stop_timeout: float = 30.0
    watchdog: float = 15.0
    idle: float = 30.0
    signals: bool = True

    def __post_init__(self) -> None:
        for name in ("concurrency", "prefetch", "max_failures", "max_kills"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        self._counts: collections.Counter[str] = collections.Counter()
        self._counting = threading.Lock()
        self._stopped, self._session = asyncio.Event(), self._new_session(self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free, self._single = asyncio.Semaphore(self.concurrency), asyncio.Lock()
        self._handler: Any = None
        self._registered, self._maintained = False, -3600.0
        self._tasks: set[asyncio.Task[None]] = set()
        # The last task of each key. They outlive subscriptions: what comes again waits for what is
        # still being handled.
        self._lanes: dict[Hashable, asyncio.Task[None]] = {}

    def stop(self) -> None:
        """Begins no more messages; `run` returns when those in hand have ended. From any thread."""
        if self._loop is None or self._loop.is_closed():
            self._stop()
        else:
            self._loop.call_soon_threadsafe(self._stop)

    def metrics(self) -> str:
        """The counters, in the text format of Prometheus."""
        return "".join(f"{name} {value}\n" for name, value in sorted(self._counts.copy().items()))

    # What each helper does in its own way.

    # What a handler raises and is not made an error; asyncio cancels a task of this helper's own.
    _passed: ClassVar[tuple[type[BaseException], ...]] = (Exception, SystemExit, KeyboardInterrupt)
    _new_session: ClassVar[type[Session]]
    _connect: ClassVar[Callable[..., Any]]

    @abc.abstractmethod
    async def _invoke(self, message: Message, conn: Any) -> None:
        """Calls the handler."""

    @abc.abstractmethod
    async def _in_database(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs it where it may block, if it does."""

    # The subscription.

    async def _consume(self) -> None:
        """Subscribes, again and again, until the helper stops."""
        self._loop, cause, failures = asyncio.get_running_loop(), "", 0
        for number in (signal.SIGTERM, signal.SIGINT) if self.signals else ():
            self._loop.add_signal_handler(number, self._stop)
        while not self._stopped.is_set():
            session, began = self._new_session(self._deliver), time.monotonic()
            self._session = session
            try:
                await self._borrow(session, self._register)
                await session.subscribe(self.amqp, self.queue, self._prefetch)
                if cause:
                    self._tell("resubscribed", cause=cause)
                cause = ""
                self._spawn(session, self._upkeep(session))
                await self._watch(session)
            except Exception as error:
                if not self._registered and sqlstate(error)[:2] in ("3F", "42"):
                    raise NotInstalled(
                        f"consumer {self.consumer} cannot use the inbox: {error}; run `watership "
                        "inbox install`, and GRANT watership_consumer to its user") from error
                session.lose("connection_lost")
                log.warning("consumer %s: %s", self.consumer, error_text(error))
            finally:
                if self._stopped.is_set():
                    await self._finish()
                await session.close()
                while session.idle:
                    await got(session.idle.pop().close())
            cause = cause or session.cause
            failures = 0 if time.monotonic() - began > 10 else failures + 1
            await session.pause(doubled(0.05, 5.0, failures), self._stopped)
        # If it was stopped between two subscriptions.
        await self._finish()

    async def _register(self, conn: Any) -> None:
        await self._ask(conn, "register")
        # Fails if the inbox is older than this helper.
        await self._ask(conn, "suspect", message_id="")
        self._registered = True

    def _stop(self) -> None:
        self._stopped.set()
        self._session.over.set()

    async def _finish(self) -> None:
        """Waits for running handlers."""
        late = self._tasks and (await asyncio.wait(self._tasks, timeout=self.stop_timeout))[1]
        if late:
            log.error("consumer %s: %d handlers are cut off", self.consumer, len(late))
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=5)

    def _prefetch(self, version: str) -> int:
        """`version` is the broker's."""
        numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        if not self.ordered or numbers >= [4, 3]:
            return self.prefetch
        log.info("queue %s: prefetch is 1, because RabbitMQ %s can redeliver in another order",
                 self.queue, version or "(unknown)")
        return 1

    async def _watch(self, session: Session) -> None:
        """Returns when the subscription is lost."""
        checked = time.monotonic()
        while not session.over.is_set():
            await session.pause(0.5)
            now = time.monotonic()
            if cause := session.trouble():
                session.lose(cause)
            elif now - checked >= self.watchdog:
                checked = now
                try:
                    ready, consumers = await session.counts(self.queue)
                except Exception:
                    ready, consumers = 1, 0
                idle = not session.in_hand and now - session.heard >= self.idle
                if ready and (idle or not consumers):
                    session.lose("watchdog")

    def _tell(self, name: str, message: Message | None = None, text: str | None = None,
              **more: str) -> None:
        """Counts what happened, and logs it."""
        labels = {"consumer": self.consumer, **more}
        quoted = ",".join(f"{key}={json.dumps(value)}" for key, value in labels.items())
        with self._counting:
            self._counts[f"watership_inbox_{name}_total{{{quoted}}}"] += 1
        log.log(logging.WARNING if more or text else logging.DEBUG, "%s: %s, message %s, key %s %s",
                name, quoted, message and message.id, message and message.key, text or "")

    # Messages.

    def _deliver(self, session: Session, sent: Any, properties: Any, body: bytes) -> None:
        """The broker sent a message. Those of a key are handled one after the other."""
        message = Message.of(properties, body, exchange=sent.exchange,
                             routing_key=sent.routing_key, redelivered=sent.redelivered)
        if message.redelivered:
            self._tell("redelivered", message)
        lane: Hashable = object() if message.key is None else message.key
        job = Job(message, sent.delivery_tag, properties)
        session.heard, session.in_hand = time.monotonic(), session.in_hand + 1
        self._lanes[lane] = task = self._spawn(
            session, self._work(session, job, self._lanes.get(lane)))

        def done(_: Any) -> None:
            # The broker sends the next one when it has the acknowledgement.
            session.heard, session.in_hand = time.monotonic(), session.in_hand - 1
            if self._lanes.get(lane) is task:
                del self._lanes[lane]
        task.add_done_callback(done)

    def _spawn(self, session: Session, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except Abandoned:
                pass
            except BaseException as error:
                # Whatever it is: nothing may begin behind a message that is not acknowledged.
                session.lose("database")
                if not isinstance(error, Exception):
                    raise
                log.warning("consumer %s: %s", self.consumer, error_text(error))
        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _borrow(self, session: Session, work: Callable[[Any], Coroutine[Any, Any, T]],
                      alone: bool = False) -> T:
        """Does the work with a connection to the database; `alone`: while nothing else is done.
        What it raises is the database's failure, after which all connections are made again.
        """
        async with contextlib.AsyncExitStack() as slots:
            if alone:
                await slots.enter_async_context(self._single)
            for _ in range(self.concurrency if alone else 1):
                await slots.enter_async_context(self._free)
            if session.over.is_set():
                raise Abandoned
            # In the loop, not in a thread.
            conn = session.idle.pop() if session.idle else None
            try:
                return await self._in_database(self._connected(session, conn, work))
            except Exception:
                session.lose("database")
                raise

    async def _connected(self, session: Session, conn: Any,
                         work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        options: Any = {**_CONNECTION, **conninfo_to_dict(self.database), "autocommit": True}
        try:
            conn = conn or await got(self._connect(**options))
            result = await work(conn)
            if not (session.cause or conn.closed):
                session.idle.append(conn)
                conn = None
            return result
        finally:
            if conn is not None:
                await got(conn.close())

    async def _ask(self, conn: Any, function: str, message: Message | None = None,
                   **values: Any) -> Any:
        """The first row of a function of the inbox, for this consumer and the whole message."""
        return await got(ask(conn, f"watership_inbox.{function}", {
            "consumer": self.consumer, **(whole(message) if message else {}), **values}))

    async def _work(self, session: Session, job: Job,
                    before: asyncio.Task[None] | None = None) -> None:
        """One message to its end, and its acknowledgement."""
        if before is not None:
            await asyncio.wait({before})
        message, suspect, following, wait = job.message, False, "again", 0.0
        if message.redelivered:
            suspect, = await self._borrow(
                session, lambda conn: self._ask(conn, "suspect", message_id=message.id))
        while following in ("again", "dead_letter"):
            if wait:
                await session.pause(wait)
            following, wait = await (self._borrow(
                session, lambda conn: self._attempt(job, conn), alone=suspect)
                if following == "again" else self._dead_letter(session, job))
        if job.tag is not None:
            await session.acknowledge(job.tag)

    async def _attempt(self, job: Job, conn: Any) -> tuple[str, float]:
        """One transaction: what is to be done then, and after how many seconds."""
        try:
            following: str = await (self._fail if job.failure else self._receive)(job, conn)
        except Exception as error:
            if conn.closed and (job.failure or job.stage != "handler"):
                raise
            state = "" if isinstance(error, Permanent) else sqlstate(error)
            if state == "WI003" or state in ("40001", "40P01") and job.conflicts < 9:
                # Not a failure of the message: the inbox needs maintenance, or there was a conflict.
                await got(conn.execute("ROLLBACK"))
                job.conflicts += 1
                if state == "WI003":
                    await self._maintain(conn, job.message.occurred_at)
                    return "again", doubled(*self.backoff, job.conflicts)
                self._tell("retries", job.message)
                return "again", random.uniform(0, doubled(0.005, 0.2, job.conflicts))
            # Data, constraints and limits may be the message's fault; other errors are not.
            if job.failure or not job.stage and state[:2] not in ("22", "23", "54", "WI"):
                raise
            # In the same transaction, so that nothing of its key passes before it is parked.
            for statement in ("ROLLBACK TO SAVEPOINT watership_handler", "ROLLBACK"):
                with contextlib.suppress(psycopg.Error):
                    await got(conn.execute(statement))
                    break
            if conn.closed and not job.conflicts:
                # It was lost under the handler. Once that may be chance, and is not held against it.
                job.conflicts = 1
                self._tell("retries", job.message, error_text(error))
                return "again", random.uniform(0, self.backoff[0])
            job.failure, job.conflicts = error, job.conflicts if conn.closed else 0
            return ("again", 0.0) if conn.closed else await self._attempt(job, conn)
        if following == "parked":
            self._tell("parked", job.message, job.error, reason=job.reason)
        elif following in ("handle", "duplicate"):
            self._tell("handled" if following == "handle" else "duplicates", job.message)
        return following, random.uniform(0, doubled(*self.backoff, job.failed - 1))

    async def _receive(self, job: Job, conn: Any) -> str:
        message, following, job.stage = job.message, "handle", ""
        if not job.begun and (message.redelivered or not message.has_id):
            following, job.reason, job.error, job.failed = await self._ask(
                conn, "begin_message", message, retried=job.retried, has_id=message.has_id,
                max_kills=self.max_kills, dead_letters=self.on_failure != "park")
            job.begun = True
        if following == "handle":
            await got(conn.execute("BEGIN"))
            following, job.reason = await self._ask(
                conn, "receive_message", message, retried=job.retried)
            if following == "handle":
                await got(conn.execute("SAVEPOINT watership_handler"))
                job.stage = "handler"
                try:
                    await self._invoke(message, conn)
                except self._passed:
                    raise
                except BaseException as error:
                    raise RuntimeError(f"{type(error).__name__}: {error}") from error
                # An error if the handler ended its transaction, or hid an error of the database.
                await got(conn.execute("RELEASE SAVEPOINT watership_handler"))
                if job.begun:
                    await self._ask(conn, "end_message", message_id=message.id,
                                    retried=job.retried)
                job.stage = "commit"
            await got(conn.execute("COMMIT"))
        return following

    async def _fail(self, job: Job, conn: Any) -> str:
        job.error = error_text(job.failure)
        job.reason, following, job.failed = await self._ask(
            conn, "fail_message", job.message, retried=job.retried, error=job.error,
            is_final=isinstance(job.failure, Permanent), max_failures=self.max_failures,
            dead_letters=self.on_failure != "park")
        await got(conn.execute("COMMIT"))
        job.failure, job.begun = None, True
        self._tell("failures", job.message, job.error)
        return str(following)

    async def _dead_letter(self, session: Session, job: Job) -> tuple[str, float]:
        """Sends it to the dead letters; a failure is tried again."""
        text = job.error or ""
        if session.over.is_set():
            raise Abandoned
        try:
            await session.send(job.message.body, job.properties, self.on_failure, {
                "ws-dead-consumer": self.consumer, "ws-dead-reason": job.reason,
                "ws-dead-error": text.encode()[:1000].decode(errors="ignore"),
                "ws-dead-failures": job.failed})
        except Exception as error:
            log.warning("message %s cannot be sent to %s: %s", job.message.id, self.on_failure,
                        error_text(error))
            job.conflicts += 1
            return "dead_letter", doubled(*self.backoff, job.conflicts)
        # At a stop it is acknowledged all the same: the dead letter is sent.
        with contextlib.suppress(Abandoned):
            await self._borrow(session, lambda conn: self._ask(
                conn, "end_message", message_id=job.message.id))
        self._tell("dead_lettered", job.message, text, reason=job.reason)
        return "sent", 0.0

    # Parked messages, and housekeeping.

    async def _upkeep(self, session: Session) -> None:
        while True:
            if time.monotonic() - self._maintained >= 3600:
                self._maintained = time.monotonic()
                await self._borrow(session, self._maintain)
            found = await self._borrow(session, lambda conn: self._ask(conn, "next_retry"))
            await (self._work(session, Job(parked(*found[1:]), retried=found[0])) if found
                   else session.pause(1.0))

    async def _maintain(self, conn: Any, occurred_at: Any = None) -> None:
        # The last column says whether another call can do something now.
        while (await got(ask(conn, "watership_inbox.maintain", {"occurred_at": occurred_at})))[-1]:
            pass
