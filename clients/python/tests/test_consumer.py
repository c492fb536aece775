"""What becomes of a message: clients/README.md, "One message"."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pika.data
import psycopg
import pytest
from conftest import Handler, World, eventually

from watership import DeadLetter, Message, Permanent
from watership.aio import NotInstalled
from watership.broker import Session

Run = Callable[..., Awaitable[Any]]


def failing(world: World, fails: Callable[[Message], bool],
            error: Exception | None = None) -> Handler:
    """The usual effect, and then an error for the messages chosen."""
    async def handle(message: Message, run: Run) -> None:
        await world.effect(message, run)
        if fails(message):
            raise error or ValueError("refused\0 by the handler")
    return handle


def test_a_message_has_its_effect_and_is_acknowledged(world: World) -> None:
    world.start()
    for _ in range(20):
        world.publish("a")
    eventually(lambda: len(world.effects()) == 20)
    assert world.effects() == sorted(world.effects())
    assert world.nothing_left()
    assert world.running[0].counted("handled") == 20


def test_a_duplicate_has_no_second_effect(world: World) -> None:
    running = world.start()
    id = world.publish("a")
    for _ in range(3):
        world.publish("a", id=id)
    eventually(lambda: running.counted("duplicates") == 3)
    assert world.effects() == [1]
    assert world.nothing_left()


def test_a_duplicate_of_another_consumer_at_the_same_time_waits_for_the_first(world: World) -> None:
    begun, go_on, calls = threading.Event(), threading.Event(), []

    async def slow(message: Message, run: Run) -> None:
        calls.append(message.id)
        await world.effect(message, run)
        begun.set()
        while not go_on.is_set():
            await run("SELECT pg_sleep(0.05)")

    id = world.publish("a", at=None)
    # One message each.
    world.start(slow, prefetch=1)
    begun.wait(20)
    other = world.start(slow, prefetch=1)
    world.publish("a", id=id, at=None)
    # The second one waits for the first one's transaction.
    eventually(lambda: world.rows(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s",
        "%watership_inbox.receive%"))
    go_on.set()
    eventually(lambda: sum(one.counted("duplicates") for one in (world.running[0], other)) == 1)
    assert calls == [id] and world.effects() == [1]
    assert world.nothing_left()


def test_a_redelivered_message_is_counted_and_its_attempt_ends(world: World) -> None:
    world.publish("a")
    method, _, _ = world.channel.basic_get(world.queue)
    world.channel.basic_reject(method.delivery_tag, requeue=True)
    running = world.start()
    eventually(lambda: world.effects() == [1])
    assert eventually(lambda: running.counted("redelivered") == 1)
    assert world.rows("SELECT 1 FROM watership_inbox.unfinished_attempts WHERE consumer = %s",
                      world.consumer) == []


def test_a_failing_message_is_retried_and_parked_and_its_key_behind_it(world: World) -> None:
    calls: list[str] = []

    async def handle(message: Message, run: Run) -> None:
        calls.append(message.id)
        await failing(world, lambda message: message.id == first)(message, run)

    first = world.publish("a", headers={"x": b"\xff\0", "y": "with \0 in it"})
    behind = [world.publish("a") for _ in range(3)]
    world.publish("b")
    running = world.start(handle)
    eventually(lambda: len(world.parked()) == 4)
    eventually(lambda: world.effects() == [5])
    assert world.parked() == [(first, "failed")] + [(id, "behind") for id in behind]
    assert calls.count(first) == 5
    assert running.counted("failures") == 5
    assert running.counted("parked", 'reason="failed"') == 1
    assert eventually(lambda: running.counted("parked", 'reason="behind"') == 3)
    error, properties = world.rows(
        "SELECT error, properties FROM watership_inbox.parked_messages WHERE message_id = %s",
        first)[0]
    assert error == "ValueError: refused\ufffd by the handler"
    assert properties["headers"] == {"ws-key": "a", "x": "/wA=", "y": "with \ufffd in it"}
    assert world.nothing_left()


def test_a_failure_that_passes_leaves_order_and_no_attempt_behind(world: World) -> None:
    failures = {"left": 3}

    async def handle(message: Message, run: Run) -> None:
        await world.effect(message, run)
        if message.id == first and failures["left"]:
            failures["left"] -= 1
            raise ValueError("not yet")

    first = world.publish("a")
    for _ in range(4):
        world.publish("a")
    world.start(handle)
    eventually(lambda: len(world.effects()) == 5)
    assert world.effects() == [1, 2, 3, 4, 5]
    assert world.rows("SELECT 1 FROM watership_inbox.unfinished_attempts WHERE consumer = %s",
                      world.consumer) == []


def test_keys_go_on_beside_one_that_waits_for_its_next_attempt(world: World) -> None:
    first = world.publish("a")
    for _ in range(10):
        world.publish("b")
    running = world.start(failing(world, lambda message: message.id == first), backoff=(60.0, 60.0))
    eventually(lambda: len(world.effects("b")) == 10)
    assert world.parked() == [] and world.effects("a") == []
    # The one that waits is left to the next consumer.
    running.stop()
    eventually(lambda: world.depth() == 1)


def test_a_permanent_error_is_not_retried(world: World) -> None:
    calls: list[str] = []

    async def handle(message: Message, run: Run) -> None:
        calls.append(message.id)
        raise Permanent("no such customer")

    id = world.publish("a")
    world.start(handle)
    assert eventually(world.parked) == [(id, "failed")]
    assert calls == [id]
    assert world.nothing_left()


def test_one_attempt_only_can_be_chosen(world: World) -> None:
    id = world.publish("a")
    running = world.start(failing(world, lambda _: True), max_failures=1)
    assert eventually(world.parked) == [(id, "failed")]
    eventually(lambda: running.counted("failures") == 1)


def test_an_operator_retries_a_key_and_it_is_live_again(world: World) -> None:
    broken = {"is": True}
    first = world.publish("a", type="paid", headers={"traceparent": "00-1-2-01"})
    seen: list[tuple[str | None, str | None, bytes]] = []

    async def handle(message: Message, run: Run) -> None:
        await world.effect(message, run)
        if message.id == first:
            seen.append((message.type, message.traceparent, message.body))
            if broken["is"]:
                raise ValueError("the other service is down")

    for _ in range(3):
        world.publish("a")
    running = world.start(handle)
    eventually(lambda: len(world.parked()) == 4)
    world.rows("SELECT watership_inbox.retry(%s, key => 'a')", world.consumer)
    eventually(lambda: world.rows(
        "SELECT 1 FROM watership_inbox.parked_messages WHERE consumer = %s AND last_error LIKE %s",
        world.consumer, "%is down"))
    assert len(world.parked()) == 4
    broken["is"] = False
    world.rows("SELECT watership_inbox.retry(%s, key => 'a')", world.consumer)
    eventually(lambda: world.parked() == [])
    world.publish("a")
    eventually(lambda: len(world.effects()) == 5)
    assert world.effects() == [1, 2, 3, 4, 5]
    assert len(set(seen)) == 1 and seen[0][:2] == ("paid", "00-1-2-01")
    assert eventually(lambda: running.counted("handled") == 5)


def test_a_conflict_while_a_parked_message_is_retried_is_no_failure(world: World) -> None:
    state = {"parked": False, "conflicts": 3}

    async def handle(message: Message, run: Run) -> None:
        if not state["parked"]:
            raise Permanent("park it")
        await world.effect(message, run)
        if state["conflicts"]:
            state["conflicts"] -= 1
            await run("DO $$BEGIN RAISE SQLSTATE '40P01'; END$$")

    id = world.publish("a")
    running = world.start(handle)
    eventually(world.parked)
    state["parked"] = True
    world.rows("SELECT watership_inbox.retry(%s, message_id => %s)", world.consumer, id)
    eventually(lambda: world.effects() == [1])
    assert running.counted("retries") == 3 and world.parked() == []


def test_a_retry_that_must_be_alone_does_not_wait_for_those_who_wait_for_its_key(
        world: World) -> None:
    state, waits = {"parked": False}, threading.Event()

    async def handle(message: Message, run: Run) -> None:
        if not state["parked"]:
            raise Permanent("park it")
        await world.effect(message, run)

    first = world.publish("a")
    running = world.start(handle)
    eventually(world.parked)
    state["parked"] = True
    borrow = getattr(running.inbox, "_borrow")

    async def late(session: Any, work: Any, alone: bool = False) -> Any:
        if alone and not waits.is_set():
            waits.set()
            await session.pause(2)
        return await borrow(session, work, alone)

    setattr(running.inbox, "_borrow", late)
    world.rows("SELECT watership_inbox.attempt_started(%s, %s)", world.consumer, first)
    world.rows("SELECT watership_inbox.retry(%s, key => 'a')", world.consumer)
    waits.wait(20)
    world.publish("a")
    eventually(lambda: world.effects() == [1, 2])
    assert world.nothing_left() and running.error is None


@pytest.mark.parametrize("reason", ["failed", "killed"])
def test_a_message_is_dead_lettered_with_the_reason(world: World, reason: str) -> None:
    dead = world.queue + "-dead"
    world.channel.queue_declare(dead, durable=True)
    id = world.publish("a", type="paid", app_id="shop", user_id="guest", expiration="600000",
                       headers={"tenant": "t1", "CC": ["nowhere"]})
    if reason == "killed":
        for _ in range(2):
            world.rows("SELECT watership_inbox.attempt_started(%s, %s)", world.consumer, id)
        method, _, _ = world.channel.basic_get(world.queue)
        world.channel.basic_reject(method.delivery_tag, requeue=True)
    world.publish("a")
    text = "\u00e9" * 600
    running = world.start(failing(world, lambda message: message.id == id, ValueError(text)),
                          on_failure=DeadLetter("", dead), max_failures=3, max_kills=2)
    eventually(lambda: running.counted("dead_lettered", f'reason="{reason}"') == 1)
    eventually(lambda: world.effects() == [2])
    properties, body = eventually(lambda: world.get(dead))
    assert (properties.message_id, properties.type, properties.app_id) == (id, "paid", "shop")
    assert properties.timestamp and json.loads(body) == {"key": "a", "number": 1}
    headers = properties.headers
    assert headers["tenant"] == "t1" and headers["ws-key"] == "a"
    assert (headers["ws-dead-consumer"], headers["ws-dead-reason"]) == (world.consumer, reason)
    if reason == "failed":
        assert headers["ws-dead-error"] == ("ValueError: " + text)[:506]
        assert headers["ws-dead-failures"] == 3
    # Its id is not recorded, nor its failures: it has its effect when it is moved back.
    running.stop()
    world.channel.basic_publish("", world.queue, body, properties)
    world.start()
    eventually(lambda: world.effects() == [2, 1])
    assert world.nothing_left()
    world.channel.queue_delete(dead)


def test_a_dead_letter_that_is_sent_while_the_consumer_stops_is_sent_once(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = world.queue + "-dead"
    world.channel.queue_declare(dead, durable=True)
    send = Session.send

    async def send_and_stop(session: Session, *args: Any) -> None:
        await send(session, *args)
        world.running[0].ask_to_stop()
        await session.over.wait()

    monkeypatch.setattr(Session, "send", send_and_stop)
    world.publish("a")
    world.start(failing(world, lambda message: True), on_failure=DeadLetter("", dead),
                max_failures=1)
    eventually(lambda: world.running[0].counted("dead_lettered") == 1)
    assert world.nothing_left() and world.get(dead) and not world.get(dead)
    world.channel.queue_delete(dead)


@pytest.mark.parametrize("why", ["no queue", "no exchange", "full"])
def test_a_message_that_cannot_be_dead_lettered_stays(world: World, why: str) -> None:
    full = world.queue + "-full"
    world.channel.queue_declare(full, exclusive=True, arguments={
        "x-max-length": 0, "x-overflow": "reject-publish"})
    to = {"no queue": DeadLetter("", "no-such-queue"), "no exchange": DeadLetter("none", full),
          "full": DeadLetter("", full)}
    world.publish("a")
    world.publish("b")
    running = world.start(failing(world, lambda message: message.key == "a"), max_failures=1,
                          on_failure=to[why])
    eventually(lambda: world.effects() == [2])
    time.sleep(0.5)
    assert running.counted("dead_lettered") == 0
    running.stop()
    eventually(lambda: world.depth() == 1)


def test_a_message_beyond_the_window_is_parked(world: World) -> None:
    old = world.publish("a", at=1_000_000_000)
    behind = world.publish("a")
    future = world.publish("b", at=int(time.time()) + 5 * 86400)
    running = world.start()
    eventually(lambda: len(world.parked()) == 3)
    assert dict(world.parked()) == {old: "beyond_window", behind: "behind",
                                    future: "beyond_tomorrow"}
    assert eventually(lambda: running.counted("parked", 'reason="beyond_window"') == 1)
    world.rows("SELECT watership_inbox.retry(%s, all_keys => true, beyond_window => true)",
               world.consumer)
    eventually(lambda: len(world.effects()) == 3)
    assert world.effects("a") == [1, 2]


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_a_conflict_is_retried_and_is_no_failure(world: World, state: str) -> None:
    conflicts = {"left": 9}

    async def handle(message: Message, run: Run) -> None:
        await world.effect(message, run)
        if conflicts["left"]:
            conflicts["left"] -= 1
            await run(f"DO $$BEGIN RAISE SQLSTATE '{state}'; END$$")

    world.publish("a")
    running = world.start(handle, max_failures=1)
    eventually(lambda: world.effects() == [1])
    assert eventually(lambda: running.counted("handled") == 1)
    assert (running.counted("retries"), running.counted("failures")) == (9, 0)


def test_a_tenth_conflict_is_a_failure(world: World) -> None:
    async def handle(message: Message, run: Run) -> None:
        await run("DO $$BEGIN RAISE SQLSTATE '40001'; END$$")

    id = world.publish("a")
    running = world.start(handle, max_failures=2)
    assert eventually(world.parked) == [(id, "failed")]
    assert eventually(lambda: running.counted("retries") == 18)


LOSES = {"timeout": ("SET LOCAL idle_in_transaction_session_timeout = '100ms'",),
         "terminated": ("SELECT pg_terminate_backend(pg_backend_pid())",)}


@pytest.mark.parametrize("how", ["timeout", "terminated", "hidden"])
@pytest.mark.parametrize("goes", ["parked", "dead_lettered"])
def test_a_message_that_costs_its_handler_the_connection_fails_and_others_go_on(
        world: World, how: str, goes: str) -> None:
    async def handle(message: Message, run: Run) -> None:
        if message.key == "bad":
            await run(*LOSES.get(how, LOSES["timeout"]))
            # Longer than the server waits.
            time.sleep(0.5)
            if how == "hidden":
                raise ValueError("of something else")
        await world.effect(message, run)

    dead = world.queue + "-dead"
    world.channel.queue_declare(dead, durable=True)
    id = world.publish("bad")
    for _ in range(10):
        world.publish("good")
    running = world.start(handle, max_failures=2, concurrency=2,
                          on_failure="park" if goes == "parked" else DeadLetter("", dead))
    eventually(lambda: running.counted(goes, 'reason="failed"') == 1)
    eventually(lambda: len(world.effects()) == 10)
    assert world.parked() == ([(id, "failed")] if goes == "parked" else [])
    assert (running.counted("retries"), running.counted("failures")) == (1, 2)
    assert running.counted("resubscribed") == 0 and world.nothing_left()
    world.channel.queue_delete(dead)


def test_a_connection_that_is_lost_once_under_a_handler_is_no_failure(world: World) -> None:
    state = {"left": 1}

    async def handle(message: Message, run: Run) -> None:
        await world.effect(message, run)
        if state["left"]:
            state["left"] -= 1
            await run(*LOSES["terminated"])

    for _ in range(3):
        world.publish("a")
    running = world.start(handle, max_failures=1)
    eventually(lambda: len(world.effects()) == 3)
    assert world.effects() == [1, 2, 3] and running.counted("failures") == 0
    assert running.counted("resubscribed") == 0 and world.nothing_left()


def test_a_conflict_at_the_commit_is_retried(world: World) -> None:
    """A constraint that is checked at the commit says that the commit can fail."""
    conflicts = {"left": 2}
    table = f"deferred_{world.consumer.replace('-', '_')}"
    world.db.execute(f"CREATE TABLE {table} (id int)")
    world.db.execute(f"""CREATE FUNCTION {table}_check() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN IF NEW.id > 0 THEN RAISE SQLSTATE '40001'; END IF; RETURN NULL; END $$""")
    world.db.execute(f"CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {table} DEFERRABLE INITIALLY "
                     f"DEFERRED FOR EACH ROW EXECUTE FUNCTION {table}_check()")

    async def handle(message: Message, run: Run) -> None:
        await world.effect(message, run)
        await run(f"INSERT INTO {table} VALUES (%s)", (conflicts["left"],))
        conflicts["left"] = max(0, conflicts["left"] - 1)

    world.publish("a")
    running = world.start(handle)
    eventually(lambda: world.effects() == [1])
    assert running.counted("retries") == 2
    world.db.execute(f"DROP TABLE {table}; DROP FUNCTION {table}_check")


@pytest.mark.parametrize("what", ["swallowed", "committed", "rolled back"])
def test_a_handler_that_spoils_its_transaction_fails_and_the_error_says_how(
        world: World, what: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(message: Message, run: Run) -> None:
        if message.key == "good":
            return await world.effect(message, run)
        if what == "swallowed":
            try:
                await run("SELECT 1 / 0")
            except psycopg.Error:
                pass
        else:
            await run("COMMIT" if what == "committed" else "ROLLBACK")

    world.publish("bad")
    world.publish("good")
    running = world.start(handle)
    eventually(lambda: world.effects() == [2])
    if what == "committed":
        # The claim was committed with it.
        eventually(lambda: running.counted("duplicates") == 1)
        assert "the handler ended the transaction" in caplog.text
    else:
        eventually(lambda: [reason for _, reason in world.parked()] == ["failed"])
        (error,), = world.rows("SELECT error FROM watership_inbox.parked_messages "
                               "WHERE consumer = %s", world.consumer)
        said = "hid an error of the database" if what == "swallowed" else "ended the transaction"
        assert error.startswith(f"the handler {said}"), error


def test_a_message_without_an_id_is_parked(world: World) -> None:
    id = world.publish("a", id=None)
    bad = world.publish("b", id="with\0nul", body=b'{"number": 7}')
    running = world.start()
    eventually(lambda: len(world.parked()) == 2)
    assert {reason for _, reason in world.parked()} == {"no_message_id"}
    assert id in dict(world.parked()) and bad not in dict(world.parked())
    world.publish(id=None, body=b'{"number": 7}')
    eventually(lambda: running.counted("duplicates") == 1)
    assert world.nothing_left()


def test_a_message_without_a_time_has_its_effect_once(world: World) -> None:
    running = world.start()
    id = world.publish("a", at=None)
    world.publish("a", id=id, at=None)
    eventually(lambda: running.counted("duplicates") == 1)
    assert world.effects() == [1]


@pytest.mark.parametrize("time", [400_000_000_000_000, 2**63])
def test_a_time_that_no_calendar_has_is_parked(world: World, time: int) -> None:
    id = world.publish("a", at=time)
    world.publish("b")
    world.start()
    eventually(lambda: world.effects() == [2])
    assert eventually(world.parked) == [(id, "beyond_tomorrow")]


def test_texts_that_are_not_utf8_stop_nothing(world: World) -> None:
    # As bytes pika does not send them, so the frame is made by hand.
    encode = pika.data.encode_short_string
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pika.data, "encode_short_string", lambda pieces, value: (
            encode(pieces, value) if value != "bad" else pieces.append(b"\3b\xffd") or 4))
        world.publish("a", id="bad", app_id="bad")
    world.publish("b")
    world.start()
    eventually(lambda: world.effects() == [2])
    assert [reason for _, reason in eventually(world.parked)] == ["no_message_id"]


def test_a_time_in_a_header_that_no_calendar_has_stops_nothing(world: World) -> None:
    # In a table in a table, made by hand as above.
    encode, value = pika.data.encode_value, struct.pack(">cQ", b"T", 2**63)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pika.data, "encode_value", lambda pieces, given: (
            encode(pieces, given) if given != "bad" else pieces.append(value) or len(value)))
        id = world.publish("a", headers={"x": {"y": "bad", "z": 1}})
    dead = world.queue + "-dead"
    world.channel.queue_declare(dead, durable=True)
    running = world.start(failing(world, lambda message: message.id == id), max_failures=1,
                          on_failure=DeadLetter("", dead))
    world.publish("b")
    eventually(lambda: world.effects() == [2])
    eventually(lambda: running.counted("dead_lettered") == 1)
    assert running.counted("resubscribed") == 0 and world.nothing_left()
    world.channel.queue_delete(dead)


def test_a_message_that_killed_the_process_too_often_is_not_called(world: World) -> None:
    id = world.publish("a")
    for _ in range(3):
        world.rows("SELECT watership_inbox.attempt_started(%s, %s)", world.consumer, id)
    method, _, _ = world.channel.basic_get(world.queue)
    world.channel.basic_reject(method.delivery_tag, requeue=True)
    eventually(lambda: world.depth() == 1)
    world.publish("a")
    world.publish("b")
    world.start(max_kills=3)
    eventually(lambda: world.effects() == [3])
    eventually(lambda: len(world.parked()) == 2)
    assert world.parked()[0] == (id, "killed")
    # Not called at a retry either, if it dies in there as often.
    world.rows("SELECT watership_inbox.retry(%s, key => 'a')", world.consumer)
    eventually(lambda: world.effects() == [3, 1, 2])


def test_nobody_maintains_the_inbox_but_the_helper(world: World) -> None:
    running = world.start()
    world.publish("a")
    eventually(lambda: world.effects() == [1])
    # As weeks later: no slot is left for today.
    world.db.execute("UPDATE watership_inbox.ring SET emptied_before = emptied_before - 40, "
                     "first_day = first_day - 40")
    world.publish("a")
    eventually(lambda: world.effects() == [1, 2])
    assert running.counted("failures") == 0


def test_a_running_handler_may_end_when_the_consumer_stops(world: World) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def slow(message: Message, run: Run) -> None:
        begun.set()
        while not go_on.is_set():
            await run("SELECT pg_sleep(0.05)")
        await world.effect(message, run)

    for _ in range(5):
        world.publish("a")
    running = world.start(slow)
    begun.wait(20)
    running.ask_to_stop()
    time.sleep(0.5)
    go_on.set()
    running.stop()
    assert running.error is None and world.effects() == [1]
    eventually(lambda: world.depth() == 4)


def test_a_handler_that_does_not_end_is_cut_off_and_its_message_stays(world: World) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def stuck(message: Message, run: Run) -> None:
        begun.set()
        while not go_on.is_set():
            await run("SELECT pg_sleep(0.05)")
        raise RuntimeError("cut off")

    world.publish("a")
    running = world.start(stuck, stop_timeout=0.5)
    begun.wait(20)
    running.stop()
    eventually(lambda: world.depth() == 1)
    go_on.set()
    assert world.effects() == []


def test_a_database_without_the_inbox_is_an_error_at_start(world: World) -> None:
    name = world.consumer.replace("-", "_")
    world.db.execute(f"CREATE DATABASE {name}")
    try:
        url = world.database.replace(world.db.info.dbname, name)
        running = world.start(database=url)
        eventually(lambda: running.error)
        assert isinstance(running.error, NotInstalled)
        assert "watership inbox install" in str(running.error)
    finally:
        running.stop()
        world.db.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Odd(BaseException):
    """As gevent.Timeout and trio.Cancelled."""


@pytest.mark.parametrize("kind", [Odd, asyncio.CancelledError, GeneratorExit])
def test_a_handler_that_raises_what_is_no_exception_has_failed_and_its_key_waits(
        world: World, kind: type[BaseException]) -> None:
    state, calls = {"broken": True}, []

    async def handle(message: Message, run: Run) -> None:
        calls.append(message.id)
        if message.id == first and state["broken"]:
            raise kind("odd")
        await world.effect(message, run)

    first = world.publish("a")
    behind = [world.publish("a") for _ in range(3)]
    for key in "bcdefghijklm":
        world.publish(key)
    running = world.start(handle, max_failures=3)
    eventually(lambda: len(world.effects()) == 12)
    eventually(lambda: len(world.parked()) == 4)
    assert world.parked() == [(first, "failed")] + [(id, "behind") for id in behind]
    assert calls.count(first) == 3 and not set(calls) & set(behind)
    assert running.counted("failures") == 3 and running.counted("resubscribed") == 0
    (error,), = world.rows("SELECT error FROM watership_inbox.parked_messages "
                           "WHERE message_id = %s", first)
    assert error in (f"RuntimeError: {kind.__name__}: odd", "ConnectionError: cancelled"), error
    state["broken"] = False
    world.rows("SELECT watership_inbox.retry(%s, key => 'a')", world.consumer)
    eventually(lambda: world.effects("a") == [1, 2, 3, 4])
    assert world.nothing_left()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_handler_that_ends_the_process_ends_it_and_nothing_of_its_key_begins(
        world: World, kind: type[BaseException]) -> None:
    calls: list[str] = []

    async def handle(message: Message, run: Run) -> None:
        calls.append(message.id)
        raise kind(3)

    first = world.publish("a")
    for _ in range(3):
        world.publish("a")
    running = world.start(handle)
    eventually(lambda: running.error)
    assert isinstance(running.error, kind)
    if world.flavour == "async":
        running.loop_ends(1.0)
    assert calls == [first] and world.effects() == []
