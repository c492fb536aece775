"""What happens to broker, database and process: clients/README.md, "One consumer"."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, World, eventually
from proxy import Proxy

from watership import Message

Run = Callable[..., Awaitable[Any]]
EXAMPLES = Path(__file__).parents[3] / "examples" / "python"


@pytest.fixture
def broker(world: World) -> Iterator[Proxy]:
    proxy = Proxy(world.amqp, 5672)
    yield proxy
    proxy.close()


@pytest.fixture
def database(world: World) -> Iterator[Proxy]:
    proxy = Proxy(world.database, 5432)
    yield proxy
    proxy.close()


def session(running: Running) -> Any:
    """The subscription that it has now."""
    return getattr(running.inbox, "_session")


def works(world: World) -> None:
    """A message published now has its effect."""
    world.publish("probe")
    number = world._number
    eventually(lambda: number in world.effects())


def test_a_queue_that_is_deleted_and_made_again_is_consumed_again(world: World) -> None:
    running = world.start()
    works(world)
    world.channel.queue_delete(world.queue)
    time.sleep(1.5)
    world.declare()
    works(world)
    assert running.counted("resubscribed", 'cause="cancelled"') == 1


def test_a_channel_that_the_broker_closes_is_opened_again(world: World) -> None:
    running = world.start()
    works(world)
    # An acknowledgement of what was never delivered.
    running.in_loop(session(running).channel.basic_ack, 1_000_000)
    eventually(lambda: running.counted("resubscribed", 'cause="channel_closed"') == 1)
    works(world)


def test_a_connection_that_is_cut_is_opened_again(world: World, broker: Proxy) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def slow(message: Message, run: Run) -> None:
        begun.set()
        while not go_on.is_set():
            await run("SELECT pg_sleep(0.02)")
        await world.effect(message, run)

    running = world.start(slow, amqp=broker.url)
    for _ in range(20):
        world.publish("a")
    begun.wait(20)
    broker.refuses = True
    broker.cut()
    time.sleep(1)
    broker.refuses = False
    go_on.set()
    eventually(lambda: len(world.effects()) == 20)
    assert world.effects() == sorted(world.effects())
    works(world)
    assert running.counted("resubscribed", 'cause="connection_lost"') == 1
    assert world.nothing_left()


def test_a_connection_that_is_half_open_is_given_up(world: World, broker: Proxy) -> None:
    running = world.start(amqp=broker.url + "?heartbeat=1")
    works(world)
    broker.freeze()
    works(world)
    assert running.counted("resubscribed", 'cause="connection_lost"') == 1


def test_a_stop_closes_without_a_cancel_before_it(world: World, broker: Proxy) -> None:
    running = world.start(amqp=broker.url)
    works(world)
    running.stop()
    # Of AMQP's methods basic.consume is (60, 20), basic.cancel (60, 30), connection.close (10, 50).
    assert b"\0\x3c\0\x14" in broker.sent and b"\0\x0a\0\x32" in broker.sent
    assert b"\0\x3c\0\x1e" not in broker.sent


def test_a_watchdog_notices_that_nobody_consumes(world: World) -> None:
    running = world.start(watchdog=0.5)
    works(world)
    # As a client that does not notice.
    session(running).trouble = lambda: ""
    running.in_loop(session(running).channel.basic_cancel, session(running).tag)
    works(world)
    assert running.counted("resubscribed", 'cause="watchdog"') == 1


def test_a_watchdog_notices_that_its_queue_is_gone(world: World) -> None:
    running = world.start(watchdog=0.5)
    works(world)
    session(running).trouble = lambda: ""
    world.channel.queue_delete(world.queue)
    time.sleep(1.5)
    world.declare()
    works(world)
    assert running.counted("resubscribed", 'cause="watchdog"') == 1


def test_a_watchdog_notices_that_nothing_is_sent(world: World) -> None:
    """A consumer that the broker shows, and that has nothing in hand."""
    running = world.start(watchdog=0.5, idle=1.0)
    works(world)

    session(running).deliver = lambda *_: None
    # More than the prefetch, so that some are ready and the rest in nobody's hand.
    for _ in range(60):
        world.publish("a")
    eventually(lambda: len(world.effects("a")) == 60)
    assert running.counted("resubscribed", 'cause="watchdog"') == 1


def test_a_watchdog_leaves_a_slow_handler_alone(world: World) -> None:
    async def slow(message: Message, run: Run) -> None:
        await run("SELECT pg_sleep(3)")
        await world.effect(message, run)

    running = world.start(slow, watchdog=0.2, idle=0.2, prefetch=1)
    world.publish("a")
    world.publish("a")
    eventually(lambda: world.effects() == [1, 2])
    assert running.counted("resubscribed") == 0


def test_a_backend_that_is_terminated_costs_no_message(world: World) -> None:
    running = world.start(database=world.database + "?application_name=" + world.consumer)
    for number in range(300):
        world.publish(f"key-{number % 10}")
        if number in (100, 200):
            world.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                       "WHERE application_name = %s", world.consumer)
    eventually(lambda: len(world.effects()) == 300)
    for number in range(10):
        assert world.effects(f"key-{number}") == sorted(world.effects(f"key-{number}"))
    assert len(set(world.effects())) == 300
    assert running.counted("resubscribed", 'cause="database"') + running.counted("retries") >= 1
    assert world.parked() == [] and world.nothing_left()


def test_a_message_is_given_back_while_the_database_is_away(world: World, database: Proxy) -> None:
    running = world.start(database=database.url)
    works(world)
    database.refuses = True
    database.cut()
    for _ in range(5):
        world.publish("a")
    # In the queue, for another consumer to take.
    eventually(lambda: world.depth() == 5)
    time.sleep(1)
    assert world.depth() == 5
    database.refuses = False
    eventually(lambda: len(world.effects("a")) == 5)
    assert running.counted("resubscribed", 'cause="database"') == 1
    assert running.counted("failures") == 0


def test_an_unknown_error_of_the_inbox_is_no_failure_of_a_message(world: World) -> None:
    running, broken = world.start(max_failures=1), {"is": True}
    ask = getattr(running.inbox, "_ask")

    async def missing(conn: Any, function: str, *args: Any, **values: Any) -> Any:
        is_missing = broken["is"] and function == "receive_message"
        return await ask(conn, function + "_v2" if is_missing else function, *args, **values)

    setattr(running.inbox, "_ask", missing)
    world.publish("a")
    eventually(lambda: running.counted("resubscribed", 'cause="database"') >= 2)
    assert world.parked() == [] and running.counted("failures") == 0
    broken["is"] = False
    eventually(lambda: world.effects() == [1])
    assert world.nothing_left()


def test_a_consumer_can_start_before_its_servers(world: World, broker: Proxy,
                                                  database: Proxy) -> None:
    broker.refuses = database.refuses = True
    world.start(amqp=broker.url, database=database.url)
    time.sleep(1)
    database.refuses = False
    time.sleep(1)
    broker.refuses = False
    works(world)


class Processes:
    """Consumers that are killed and started again."""

    def __init__(self, world: World, *command: str, **environment: str) -> None:
        self._command = [sys.executable, *command]
        self._environment = {
            **os.environ, "QUEUE": world.queue, "CONSUMER": world.consumer, **environment}
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.all.append(subprocess.Popen(self._command, env=self._environment))

    def kill_one(self) -> None:
        victim = random.choice(self.all)
        victim.kill()
        victim.wait()
        self.all.remove(victim)
        self.start()

    def close(self) -> None:
        for process in self.all:
            process.kill()
            process.wait()


@pytest.mark.parametrize("ordered", [True, False])
def test_processes_that_are_killed_leave_each_effect_once_and_in_order(
        world: World, ordered: bool) -> None:
    if ordered:
        world.channel.queue_delete(world.queue)
        world.declare(**{"x-single-active-consumer": True, "x-delivery-limit": 1000})
    world.db.execute("CREATE SCHEMA IF NOT EXISTS watership_torture")
    world.db.execute("CREATE TABLE IF NOT EXISTS watership_torture.effect (id bigint PRIMARY KEY "
                     "GENERATED ALWAYS AS IDENTITY, message_id text, key text, number bigint)")
    example = "consumer.py" if world.flavour == "async" else "consumer_sync.py"
    processes = Processes(world, str(EXAMPLES / example), ORDERED=str(ordered).lower())
    expected: dict[str, list[int]] = {}
    prefix = world.consumer

    def effects() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for key, number in world.rows("SELECT key, number FROM watership_torture.effect "
                                      "WHERE key LIKE %s ORDER BY id", prefix + "%"):
            found.setdefault(key, []).append(number)
        return found

    try:
        for _ in range(3):
            processes.start()
        for number in range(800):
            key = f"{prefix}-{random.randrange(30)}"
            body = json.dumps({"key": key, "number": number}).encode()
            id = world.publish(key, body=body)
            if random.random() < 0.1:
                world.publish(key, id=id, body=body)
            expected.setdefault(key, []).append(number)
            if number % 100 == 50:
                time.sleep(random.uniform(1.5, 2.5))
                processes.kill_one()
        eventually(lambda: sum(map(len, effects().values())) >= 800, 120)
        time.sleep(1)
        found = effects()
        if not ordered:
            found = {key: sorted(numbers) for key, numbers in found.items()}
        assert found == expected
        assert world.parked() == []
    finally:
        processes.close()


POISON = """
import os, sys
sys.path.insert(0, {tests!r})
from conftest import World
import asyncio
from watership import aio, sync
options = dict(consumer=os.environ["CONSUMER"], queue=os.environ["QUEUE"], max_kills=3,
               amqp=os.environ["AMQP_URL"], database=os.environ["DATABASE_URL"])
INSERT = ("INSERT INTO watership_test_effect (consumer, message_id, key, number) "
          "VALUES (%s, %s, %s, %s)")
def values(message):
    if message.json().get("poison"):
        os._exit(9)
    return options["consumer"], message.id, message.key, message.json()["number"]
async def handle(message, conn):
    await conn.execute(INSERT, values(message))
def block(message, conn):
    conn.execute(INSERT, values(message))
if os.environ["FLAVOUR"] == "async":
    asyncio.run(aio.Inbox(**options).run(handle))
else:
    sync.Inbox(**options).run(block)
"""


def test_a_message_that_kills_the_process_is_parked_and_other_keys_go_on(
        world: World, tmp_path: Path) -> None:
    script = tmp_path / "poison.py"
    script.write_text(POISON.format(tests=str(Path(__file__).parent)))
    processes = Processes(world, str(script), FLAVOUR=world.flavour)
    poison = world.publish("bad", body=b'{"poison": true}')
    for number in range(40):
        world.publish(f"key-{number % 5}")
    behind = world.publish("bad")
    try:
        processes.start()
        deaths, deadline = 0, time.monotonic() + 90
        while len(world.effects()) < 40 or len(world.parked()) < 2:
            assert time.monotonic() < deadline
            if processes.all[0].poll() is not None:
                deaths += 1
                assert deaths < 20
                processes.all.clear()
                processes.start()
            time.sleep(0.1)
        assert world.parked() == [(poison, "killed"), (behind, "behind")]
        # The first time it is not marked as delivered before, so that time is not counted.
        assert deaths == 4
        processes.all[0].terminate()
        assert processes.all[0].wait(30) == 0
    finally:
        processes.close()


def test_a_signal_ends_the_process_after_its_handler(world: World, tmp_path: Path) -> None:
    script = tmp_path / "quiet.py"
    script.write_text(POISON.format(tests=str(Path(__file__).parent)))
    processes = Processes(world, str(script), FLAVOUR=world.flavour)
    try:
        processes.start()
        works(world)
        processes.all[0].terminate()
        assert processes.all[0].wait(30) == 0
    finally:
        processes.close()
