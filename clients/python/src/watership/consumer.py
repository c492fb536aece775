"""What the two helpers share: all of clients/README.md that is not I/O of one client library.

It is written once, as coroutines. `watership.aio` runs them in an event loop. `watership.sync`
runs each in a thread, and lets everything in them block, so that they never suspend.
"""

from __future__ import annotations

import collections
import logging
import random
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from psycopg.pq import TransactionStatus

from . import sql
from .database import Db, sqlstate
from .lanes import Delivery, Lanes
from .message import DeadLetter, Message, Permanent, plain
from .sql import Statement

log = logging.getLogger("watership")
_RETRY_NEXT = """
    SELECT id, message_id, CAST(extract(epoch FROM occurred_at) AS bigint), key, body, properties
    FROM watership_inbox.retry_next(%(consumer)s)"""
_KILLED = """
    SELECT 1 FROM watership_inbox.unfinished_attempts
    WHERE consumer = %(consumer)s AND message_id = %(message_id)s AND killed > 0"""
_PARKED_FOR = """
    SELECT reason FROM watership_inbox.parked_messages
    WHERE consumer = %(consumer)s AND message_id = %(message_id)s"""


class Abandoned(Exception):
    """The message is left to another delivery: the helper stops, or the channel is gone."""


class DatabaseAway(Exception):
    """The inbox cannot be read or written."""


class NotInstalled(RuntimeError):
    """At start: the database has no inbox, or its user may not use it."""


def error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {plain(str(error))}"


def _curable(error: BaseException, times: int) -> bool:
    """No failure of the message: a conflict, until the tenth in a row; or nobody maintains the
    inbox.
    """
    state = "" if isinstance(error, Permanent) else sqlstate(error)
    return state == "WI003" or state in ("40001", "40P01") and times < 9


def doubled(first: float, last: float, times: int) -> float:
    """`first` doubled so many times, at most `last`; seconds."""
    return min(last, first * 2.0 ** min(times, 30))


class Io(Protocol):
    """What each helper does in its own way."""

    async def sleep(self, seconds: float) -> None:
        """Ends early when the helper stops."""
    def make_ready(self, lane: Hashable) -> None: ...
    async def next_lane(self) -> Hashable | None: ...
    async def invoke(self, message: Message, conn: Any) -> None: ...
    async def subscribe(self) -> None:
        """Connects, opens a channel, sets its prefetch and consumes."""
    async def unsubscribe(self) -> None:
        """Closes channel and connection, without a cancel before it. Never an error."""
    async def watch(self, seconds: float) -> str | None:
        """Waits so long, or until the subscription is lost: then its cause."""
    async def counts(self) -> tuple[int, int]:
        """The queue's ready messages and consumers, asked on a channel of its own."""
    async def acknowledge(self, delivery: Delivery) -> None: ...
    async def send(self, delivery: Delivery, to: DeadLetter, headers: dict[str, Any]) -> None: ...


@dataclass(kw_only=True)
class Consumer(Io):
    """A consumer: its options, and what it does with them. Times are in seconds."""

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
        self.lanes, self.epoch, self.stopping = Lanes(), 0, False
        self.cause: str | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._counting = threading.Lock()
        self._registered, self._maintained, self._busy_at = False, -3600.0, 0.0

    def count(self, name: str, **label: str) -> None:
        quoted = (f'{key}="' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
                  for key, value in {"consumer": self.consumer, **label}.items())
        with self._counting:
            self._counts[f"watership_inbox_{name}_total{{{','.join(quoted)}}}"] += 1

    def metrics(self) -> str:
        """The counters, in the text format of Prometheus."""
        with self._counting:
            return "".join(f"{name} {value}\n" for name, value in sorted(self._counts.items()))

    def call(self, function: str, id: str, **more: tuple[str, Any]) -> Statement:
        return sql.call(function, self.consumer, id, **more)

    # The subscription.

    def deliver(self, delivery: Delivery) -> None:
        """The broker sent a message."""
        self._busy_at = time.monotonic()
        lane = self.lanes.add(delivery)
        if lane is not None:
            self.make_ready(lane)

    def lost(self, cause: str) -> None:
        """The subscription has to end."""
        self.lanes.drop()
        self.cause = self.cause or cause

    def database_lost(self, db: Db) -> None:
        """All connections are opened again, once for each time that the database is away."""
        if db.epoch == self.epoch:
            self.epoch += 1
            self.lost("database")

    def no_more(self) -> None:
        """Stops. In this order: a worker that sees `stopping` must find nothing in its lane."""
        self.lanes.drop()
        self.stopping = True

    def chosen_prefetch(self, version: str) -> int:
        """`version` is the broker's."""
        numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        if not self.ordered or numbers >= [4, 3]:
            return self.prefetch
        log.info("queue %s: prefetch is 1, because RabbitMQ %s can redeliver in another order",
                 self.queue, version or "(unknown)")
        return 1

    async def supervise(self, db: Db) -> None:
        """Subscribes, again and again, until the helper stops."""
        failures, cause = 0, ""
        while not self.stopping:
            began, self.cause = time.monotonic(), None
            try:
                await self.prepare(db)
                self.lanes.open = True
                await self.subscribe()
                if cause:
                    self.count("resubscribed", cause=cause)
                log.info("consumer %s is subscribed to %s", self.consumer, self.queue)
                cause = why = ""
                cause = await self.subscribed()
            except NotInstalled:
                raise
            except Exception as error:
                cause = cause or self.cause or (
                    "database" if isinstance(error, DatabaseAway) else "connection_lost")
                why = error_text(error)
            self.lanes.drop()
            if self.stopping:
                return
            log.warning("consumer %s is not subscribed to %s (%s) %s", self.consumer, self.queue,
                        cause, why)
            await self.unsubscribe()
            failures = 0 if time.monotonic() - began > 10 else failures
            await self.sleep(doubled(0.1, 5.0, failures))
            failures += 1

    async def prepare(self, db: Db) -> None:
        try:
            await self.ready(db)
            await db.rows("SELECT watership_inbox.register(%(name)s)", name=self.consumer)
            self._registered = True
        except Exception as error:
            if not self._registered and sqlstate(error)[:2] in ("3F", "42"):
                raise NotInstalled(
                    f"consumer {self.consumer} cannot use the inbox: {error}; run `watership inbox "
                    "install`, and GRANT watership_consumer to the database's user") from error
            raise DatabaseAway(error_text(error)) from error

    async def subscribed(self) -> str:
        """Returns why it ended."""
        checked = self._busy_at = time.monotonic()
        while not self.stopping:
            cause = self.cause or await self.watch(0.5)
            if cause:
                return cause
            now = time.monotonic()
            if now - checked >= self.watchdog:
                checked = now
                try:
                    ready, consumers = await self.counts()
                except Exception as error:
                    log.warning("queue %s: %s", self.queue, error_text(error))
                    return "watchdog"
                idle = not self.lanes and now - self._busy_at >= self.idle
                if ready and (idle or not consumers):
                    return "watchdog"
        return ""

    # Messages.

    async def ready(self, db: Db) -> None:
        """Connects, again if the database was away."""
        if db.epoch != self.epoch or db.broken:
            # First: what fails from here on belongs to this state.
            db.epoch = self.epoch
            await db.connect()

    async def worker(self, db: Db) -> None:
        """Handles what is in hand, one message after the other, until the helper stops."""
        while (lane := await self.next_lane()) is not None:
            delivery, generation = self.lanes.take(lane)
            try:
                if delivery is not None:
                    await self.ready(db)
                    await self.handle(db, delivery, generation)
                    await self.acknowledge(delivery)
            except Abandoned:
                pass
            except Exception as error:
                log.warning("message %s is left to another delivery: %s",
                            delivery and delivery.message.id, error_text(error))
                self.database_lost(db)
            self.lanes.leave(db)
            # The broker sends the next one when it has the acknowledgement.
            self._busy_at = time.monotonic()
            if self.lanes.done(lane):
                self.make_ready(lane)

    async def enter(self, db: Db, message: Message) -> None:
        """A message that the process did not survive is handled while no other is: so it is the
        only one whose count of kills rises.
        """
        alone = message.redelivered and bool(await db.rows(
            _KILLED, consumer=self.consumer, message_id=message.id))
        while not self.lanes.enter(db, alone):
            await self.pause(0.01)

    async def pause(self, seconds: float, generation: int | None = None) -> None:
        await self.sleep(seconds)
        if self.stopping or generation not in (None, self.lanes.generation):
            raise Abandoned

    async def maintain(self, db: Db, occurred_at: Any = None) -> bool:
        """True if another call can do something now."""
        at = {"occurred_at": ("timestamptz", occurred_at)}
        return bool((await db.first(Statement("watership_inbox.maintain", at)))[-1])

    async def cured(self, db: Db, error: BaseException, times: int, occurred_at: Any) -> bool:
        """True, after some waiting, if the message may be tried again as if nothing had been."""
        if db.broken:
            raise DatabaseAway(error_text(error)) from error
        if not _curable(error, times):
            return False
        if sqlstate(error) == "WI003":
            log.warning("consumer %s: %s", self.consumer, error)
            while await self.maintain(db, occurred_at):
                pass
            await self.pause(doubled(*self.backoff, times))
        else:
            self.count("retries")
            await self.pause(random.uniform(0, doubled(0.005, 0.2, times)))
        return True

    async def alone(self, db: Db, statement: Statement) -> tuple[Any, ...]:
        """A call in a transaction of its own."""
        times = 0
        while True:
            try:
                return await db.first(statement)
            except Exception as error:
                if not await self.cured(db, error, times, statement.values.get("occurred_at")):
                    raise DatabaseAway(error_text(error)) from error
                times += 1

    async def run_handler(self, db: Db, message: Message) -> None:
        await self.invoke(message, db.conn)
        # COMMIT of an aborted transaction rolls back, and is no error.
        state = db.conn.info.transaction_status
        if state != TransactionStatus.INTRANS:
            raise RuntimeError(f"the handler left its transaction in the state {state.name}: it "
                               "must neither end it nor hide an error of the database")

    async def handle(self, db: Db, delivery: Delivery, generation: int) -> None:
        """One message to its end: when this returns, it is to be acknowledged."""
        message, failed, times, recorded = delivery.message, 0, 0, False
        if self.stopping:
            raise Abandoned
        if not message.has_id:
            return await self.park(db, message, "no_message_id", None)
        await self.enter(db, message)
        if message.redelivered:
            self.count("redelivered")
            _, failed, killed = await self.alone(db, self.call("attempt_started", message.id))
            recorded = True
            if killed >= self.max_kills:
                text = f"the process did not survive {killed} attempts"
                return await self.give_up(db, delivery, generation, "killed", text, failed)
        while True:
            try:
                return await self.attempt(db, message, recorded, failed + 1, times)
            except Exception as error:
                await db.reset()
                if await self.cured(db, error, times, message.occurred_at):
                    times += 1
                    continue
                text, final = error_text(error), isinstance(error, Permanent)
            failed, = await self.alone(db, self.call("attempt_failed", message.id,
                                                     error=("text", text)))
            recorded, times = True, 0
            self.failure(message, text, failed)
            if final or failed >= self.max_failures:
                return await self.give_up(db, delivery, generation, "failed", text, failed)
            self.lanes.leave(db)
            await self.pause(random.uniform(0, doubled(*self.backoff, failed - 1)), generation)
            await self.enter(db, message)

    async def attempt(self, db: Db, message: Message, recorded: bool, nth: int, times: int) -> None:
        """One transaction. The last attempt parks what fails, before anybody else has the key."""
        last = self.on_failure == "park" and nth >= self.max_failures
        await db.begin()
        verdict, = await db.first(sql.receive.of(self.consumer, message))
        reason = text = None
        if verdict == "handle":
            if last:
                await db.begin()
            try:
                await self.run_handler(db, message)
                if last:
                    await db.end()
            except Exception as error:
                if not last or db.broken or _curable(error, times):
                    raise
                await db.end(undo=True)
                reason, text = "failed", error_text(error)
                await db.first(sql.park.of(self.consumer, message, reason, text))
        elif verdict == "parked":
            (reason,), = await db.rows(_PARKED_FOR, consumer=self.consumer, message_id=message.id)
        if recorded:
            await db.first(self.call("attempt_ended", message.id))
        await db.end()
        if text is not None:
            self.failure(message, text, nth)
        if reason is not None:
            self.parked(message, reason, text)
        else:
            self.count("handled" if verdict == "handle" else "duplicates")

    def failure(self, message: Message, text: str, times: int) -> None:
        self.count("failures")
        log.warning("message %s, key %s failed, %d times: %s", message.id, message.key, times, text)

    def parked(self, message: Message, reason: str, text: str | None) -> None:
        self.count("parked", reason=reason)
        log.warning("message %s, key %s is parked (%s): %s", message.id, message.key, reason, text)

    async def park(self, db: Db, message: Message, reason: str, text: str | None) -> None:
        if (await self.alone(db, sql.park.of(self.consumer, message, reason, text)))[0]:
            self.parked(message, reason, text)
        else:
            self.count("duplicates")

    async def give_up(self, db: Db, delivery: Delivery, generation: int, reason: str, text: str,
                      failed: int) -> None:
        message, to, times = delivery.message, self.on_failure, 0
        if not isinstance(to, DeadLetter):
            return await self.park(db, message, reason, text)
        headers = {"ws-dead-consumer": self.consumer, "ws-dead-reason": reason,
                   "ws-dead-error": text.encode()[:1000].decode(errors="ignore"),
                   "ws-dead-failures": failed}
        self.lanes.leave(db)
        while True:
            await self.pause(0, generation)
            try:
                await self.send(delivery, to, headers)
                break
            except Exception as error:
                log.warning("message %s, key %s cannot be sent to exchange %s, routing key %s: %s",
                            message.id, message.key, to.exchange, to.routing_key, error_text(error))
            await self.pause(doubled(*self.backoff, times), generation)
            times += 1
        await self.alone(db, self.call("attempt_ended", message.id))
        self.count("dead_lettered", reason=reason)
        log.warning("message %s, key %s is dead-lettered (%s): %s", message.id, message.key, reason,
                    text)

    # Parked messages, and housekeeping.

    async def upkeep(self, db: Db, aside: Db) -> None:
        while not self.stopping:
            try:
                await self.ready(db)
                await self.ready(aside)
                while await self.retry_parked(db, aside):
                    self.lanes.leave(db)
                if time.monotonic() - self._maintained >= 3600:
                    self._maintained = time.monotonic()
                    await self.maintain(aside)
            except Abandoned:
                return
            except Exception as error:
                await db.reset()
                log.warning("consumer %s: retries, maintenance: %s", self.consumer,
                            error_text(error))
                if db.broken or aside.broken:
                    self.database_lost(db)
            self.lanes.leave(db)
            await self.sleep(1.0)

    async def retry_parked(self, db: Db, aside: Db) -> bool:
        """One parked message that an operator marked, in one transaction. False: there is none."""
        entered, killed, times = "", -1, 0
        while not self.stopping:
            await db.begin()
            found = await db.rows(_RETRY_NEXT, consumer=self.consumer)
            if not found:
                # Committed: it may have found that all messages of a key are handled.
                await db.end()
                return False
            which, message = ("bigint", found[0][0]), Message.parked(*found[0][1:])
            if entered != message.id:
                # Without the lock on the key: a worker that waits for it may be who is waited for.
                await db.reset()
                self.lanes.leave(db)
                entered, killed = message.id, -1
                await self.enter(db, message)
                continue
            if killed < 0:
                *_, killed = await self.alone(aside, self.call("attempt_started", message.id))
            try:
                if killed >= self.max_kills:
                    raise Permanent(f"the process did not survive {killed} attempts")
                await self.run_handler(db, message)
                await db.first(Statement("watership_inbox.retry_done", {"id": which}))
                await db.end()
                self.count("handled")
                return True
            except Exception as error:
                await db.reset()
                if await self.cured(db, error, times, message.occurred_at):
                    times += 1
                    continue
                text = error_text(error)
            await self.alone(db, Statement("watership_inbox.retry_failed",
                                           {"id": which, "error": ("text", text)}))
            self.failure(message, text, 1)
            return True
        return False
