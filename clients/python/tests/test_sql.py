"""The pieces alone, in the caller's transaction: psycopg and SQLAlchemy, each in both kinds."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import World, eventually, url
from psycopg.rows import dict_row
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from watership import Message, claim, claim_many, emit, emit_bytes, forget, park, receive

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "python"


def dialect(of: str) -> str:
    return of.replace("postgresql://", "postgresql+psycopg://").replace(
        "postgres://", "postgresql+psycopg://")


def message(**changes: Any) -> Message:
    given = {"id": str(uuid.uuid4()), "body": b"{}", "occurred_at": datetime.now(timezone.utc),
             "key": "a", "properties": {"headers": {"x": 1}}}
    return Message(**{**given, **changes})


@pytest.fixture
def consumer() -> str:
    return "c-" + uuid.uuid4().hex[:12]


@pytest.fixture
def conn() -> Iterator[psycopg.Connection[Any]]:
    """Whatever its row factory, the pieces work."""
    with psycopg.connect(url("DATABASE_URL"), row_factory=dict_row) as conn:
        yield conn


@pytest.fixture(scope="session")
def outbox() -> None:
    """The producer's half, where the database has none."""
    with psycopg.connect(url("DATABASE_URL")) as conn:
        if conn.execute("SELECT to_regnamespace('watership')").fetchone() == (None,):
            for name in ("0001_schema", "0002_emit"):
                conn.execute((ROOT / "sql" / f"{name}.sql").read_bytes())


def test_a_message_is_claimed_once(conn: psycopg.Connection[Any], consumer: str) -> None:
    for one in (message(), message(occurred_at=None)):
        assert claim(conn, consumer, one) is True
        assert claim(conn.cursor(), consumer, one) is False
        assert claim(conn, consumer + "2", one) is True


def test_a_claim_that_is_rolled_back_leaves_nothing(conn: psycopg.Connection[Any],
                                                    consumer: str) -> None:
    one = message()
    assert claim(conn, consumer, one)
    conn.rollback()
    assert claim(conn, consumer, one)


def test_an_old_message_and_another_body_are_named_errors(conn: psycopg.Connection[Any],
                                                          consumer: str) -> None:
    with pytest.raises(psycopg.Error) as old:
        claim(conn, consumer, message(occurred_at=datetime(2001, 1, 1, tzinfo=timezone.utc)))
    assert old.value.sqlstate == "WI001"
    conn.rollback()
    one = message()
    assert claim(conn, consumer, one, body_hash=b"1")
    with pytest.raises(psycopg.Error) as other:
        claim(conn, consumer, one, body_hash=b"2", strict=True)
    assert other.value.sqlstate == "WI004"


def test_many_messages_are_claimed_at_once(conn: psycopg.Connection[Any], consumer: str) -> None:
    first, second, third = message(), message(), message()
    assert claim_many(conn, consumer, [first, second]) == {first.id, second.id}
    assert claim_many(conn, consumer, [second, third, third]) == {third.id}
    assert claim_many(conn, consumer, []) == set()


def test_a_key_is_parked_and_a_message_forgotten(conn: psycopg.Connection[Any],
                                                 consumer: str) -> None:
    first, second, other = message(), message(), message(key="b")
    assert receive(conn, consumer, first) == "handle"
    assert park(conn, consumer, first, "failed", "why\0") is True
    assert receive(conn, consumer, second) == "parked"
    assert receive(conn, consumer, second) == "duplicate"
    assert receive(conn, consumer, other) == "handle"
    assert forget(conn, consumer, other.id) is True
    assert forget(conn, consumer, other.id) is False
    assert receive(conn, consumer, other) == "handle"
    row = conn.execute("SELECT error, properties, body FROM watership_inbox.parked_messages "
                       "WHERE message_id = %s", (first.id,)).fetchone()
    assert row == {"error": "why\ufffd", "properties": first.properties, "body": b"{}"}


def outbox_rows(conn: psycopg.Connection[Any], *ids: uuid.UUID) -> list[dict[str, Any]]:
    return conn.execute(
        "SELECT aggregate_type, aggregate_id, event_type, payload, data, content_type, headers, "
        "traceparent FROM watership.outbox WHERE id = ANY(%s) ORDER BY aggregate_id",
        (list(ids),)).fetchall()


def test_an_event_is_emitted(conn: psycopg.Connection[Any], outbox: None) -> None:
    given = uuid.uuid4()
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    first = emit(conn, "order", 1, "created", {"total": 12.5}, id=given,
                 headers={"tenant": "t1", "traceparent": traceparent})
    second = emit(conn, "order", "2", "created", '{"b":  1}')
    third = emit_bytes(conn, "order", uuid.UUID(int=3), "scanned", b"\0\xff", "image/png")
    assert first == given
    rows = outbox_rows(conn, first, second, third)
    assert [row["aggregate_id"] for row in rows] == [str(uuid.UUID(int=3)), "1", "2"]
    assert rows[0]["data"] == b"\0\xff" and rows[0]["content_type"] == "image/png"
    assert rows[1]["payload"] == {"total": 12.5} and rows[1]["headers"] == {"tenant": "t1"}
    assert rows[1]["traceparent"] == traceparent
    text = conn.execute("SELECT payload::text FROM watership.outbox WHERE id = %s", (second,))
    assert text.fetchone() == {"payload": '{"b":  1}'}


def test_an_asynchronous_connection_is_awaited(consumer: str, outbox: None) -> None:
    async def work() -> None:
        conn = await psycopg.AsyncConnection.connect(url("DATABASE_URL"))
        async with conn:
            one = message()
            assert await claim(conn, consumer, one) is True
            assert await claim(conn.cursor(), consumer, one) is False
            assert await receive(conn, consumer, message()) == "handle"
            assert isinstance(await emit(conn, "order", 1, "created", {}), uuid.UUID)
    asyncio.run(work())


def test_a_session_claims_and_emits_in_its_transaction(
        conn: psycopg.Connection[Any], consumer: str, outbox: None) -> None:
    engine = create_engine(dialect(url("DATABASE_URL")))
    one = message()
    with Session(engine) as session:
        assert claim(session, consumer, one) is True
        lost = emit(session, "order", 1, "created", {})
        session.rollback()
        assert claim(session, consumer, one) is True
        assert claim_many(session, consumer, [message(), one]) != {one.id}
        assert park(session, consumer, message(), "failed") is True
        kept = emit(session, "order", 1, "created", {"a": [1]}, headers={"x": "y"})
        blob = emit_bytes(session, "order", 2, "scanned", b"1", "text/plain")
        session.commit()
    with engine.begin() as connection:
        assert claim(connection, consumer, one) is False
    engine.dispose()
    assert len(outbox_rows(conn, lost, kept, blob)) == 2


def test_an_asynchronous_session_claims_and_emits(
        conn: psycopg.Connection[Any], consumer: str, outbox: None) -> None:
    async def work() -> uuid.UUID:
        engine = create_async_engine(dialect(url("DATABASE_URL")))
        one = message()
        async with AsyncSession(engine) as session, session.begin():
            assert await claim(session, consumer, one) is True
            assert await claim(session, consumer, one) is False
            id = await emit(session, "order", 1, "created", {})
        await engine.dispose()
        return id
    assert len(outbox_rows(conn, asyncio.run(work()))) == 1


def test_the_example_of_a_producer_writes_order_and_event(
        conn: psycopg.Connection[Any], outbox: None) -> None:
    environment = {**os.environ, "DATABASE_URL": dialect(url("DATABASE_URL"))}
    run = subprocess.run([sys.executable, str(EXAMPLES / "producer.py")], capture_output=True,
                         text=True, env=environment)
    assert run.returncode == 0, run.stderr
    number = run.stdout.split()[1]
    row = conn.execute("SELECT payload FROM watership.outbox WHERE aggregate_id = %s AND "
                       "event_type = 'created' ORDER BY created_at DESC LIMIT 1", (number,))
    assert row.fetchone() == {"payload": {"customer": "Fiver", "total": "12.50"}}


def test_the_example_with_faststream_has_an_effect_once() -> None:
    world = World("sync")
    world.db.execute("CREATE SCHEMA IF NOT EXISTS watership_torture")
    world.db.execute("CREATE TABLE IF NOT EXISTS watership_torture.effect (id bigint PRIMARY KEY "
                     "GENERATED ALWAYS AS IDENTITY, message_id text, key text, number bigint)")
    world.declare()
    id = world.publish("a", content_type="application/json")
    world.publish("a", id=id, content_type="application/json", body=json.dumps(
        {"key": "a", "number": 1}).encode())
    process = subprocess.Popen(
        [sys.executable, "-m", "faststream", "run", "faststream_app:app"], cwd=EXAMPLES,
        env={**os.environ, "DATABASE_URL": dialect(world.database), "QUEUE": world.queue,
             "CONSUMER": world.consumer})
    try:
        rows = "SELECT number FROM watership_torture.effect WHERE message_id = %s"
        eventually(lambda: world.rows(rows, id))
        eventually(lambda: world.rows("SELECT 1 FROM watership_inbox.duplicates "
                                      "WHERE message_id = %s", id))
        time.sleep(0.2)
        assert world.rows(rows, id) == [(1,)]
    finally:
        process.terminate()
        process.wait(30)
        assert world.nothing_left()
        world.close()
