"""Headers and properties: what a message of each client is read as."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest
from pamqp import commands
from pika import BasicProperties
from psycopg.errors import SerializationFailure
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from watership import Message
from watership.consumer import doubled, sqlstate
from watership.sync import Inbox

SECONDS = 1_767_225_600
TIME = datetime(2026, 1, 1, tzinfo=timezone.utc)
HEADERS = {"ws-key": "order/7", "ws-position": "00000001-x", "traceparent": "00-1-2-01"}


@pytest.mark.parametrize("properties", [
    BasicProperties(message_id="id", timestamp=SECONDS, type="paid", headers=dict(HEADERS)),
    commands.Basic.Properties(message_id="id", timestamp=TIME.replace(microsecond=5),
                              message_type="paid", headers=dict(HEADERS)),
])
def test_both_clients_give_the_same_message(properties: object) -> None:
    message = Message.of(properties, b'{"a": 1}', exchange="events", routing_key="order")
    assert message == Message("id", b'{"a": 1}', TIME, "order/7", {
        "type": "paid", "exchange": "events", "routing_key": "order", "headers": HEADERS})
    assert (message.type, message.position, message.traceparent, message.json()) == (
        "paid", "00000001-x", "00-1-2-01", {"a": 1})


def test_a_message_without_properties_has_the_hash_of_its_body_for_an_id() -> None:
    message = Message.of(BasicProperties(), b"x")
    assert message.id == ("sha256-"
                          "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")
    assert not message.has_id and message.key is None and message.occurred_at is None
    assert message.traceparent is None


@pytest.mark.parametrize(("count", "redelivered"), [
    (None, False), (0, False), (3, True), ("x", False)])
def test_a_delivery_count_says_that_it_came_back(count: object, redelivered: bool) -> None:
    properties = BasicProperties(message_id="id", headers={"x-delivery-count": count})
    assert Message.of(properties, b"").redelivered == redelivered


def test_every_header_becomes_json_that_postgres_takes() -> None:
    headers = {"nul\0": "a\0b", "bytes": b"\xff", "number": Decimal("1.50"), "nan": float("nan"),
               "big": 2**63, "time": TIME, "list": [None, True, {"x": float("inf")}], "float": 0.5}
    message = Message.of(BasicProperties(message_id="id", headers=headers), b"")
    text = json.dumps(message.properties, allow_nan=False)
    assert json.loads(text)["headers"] == {
        "nul\ufffd": "a\ufffdb", "bytes": "/w==", "number": "1.50", "nan": "nan", "big": 2**63,
        "time": str(TIME), "list": [None, True, {"x": "inf"}], "float": 0.5}


def raised(error: Exception) -> Any:
    raise error


def test_an_sqlstate_is_found_in_what_wraps_it() -> None:
    inner = SerializationFailure()
    engine = create_engine("postgresql+psycopg://", creator=lambda: raised(inner))
    with pytest.raises(OperationalError) as outer:
        engine.connect()
    cause = Exception()
    cause.__cause__ = outer.value
    assert [sqlstate(error) for error in (inner, outer.value, cause, Exception())] == [
        "40001", "40001", "40001", ""]


def test_waiting_doubles_up_to_a_limit() -> None:
    assert [doubled(0.1, 10.0, times) for times in (0, 1, 6, 7, 10**6)] == [
        0.1, 0.2, 6.4, 10.0, 10.0]


@pytest.mark.parametrize(("ordered", "version", "prefetch"), [
    (False, "3.10.8", 50), (True, "3.10.8", 1), (True, "4.2.9", 1), (True, "", 1),
    (True, "4.3.0", 50), (True, "4.10.1", 50), (True, "5.0.0", 50)])
def test_the_prefetch_of_an_ordered_queue_is_1_where_the_broker_needs_it(
        ordered: bool, version: str, prefetch: int) -> None:
    core = Inbox(consumer="c", queue="q", amqp="", database="", ordered=ordered)
    assert getattr(core, "_prefetch")(version) == prefetch


@pytest.mark.parametrize(("helper", "other"), [("aio", "pika"), ("sync", "aiormq")])
def test_a_helper_needs_no_other_client_than_its_own(helper: str, other: str) -> None:
    script = f"import sys; sys.modules[{other!r}] = None; import watership.{helper}"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_option_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="concurrency is 0, and must be at least 1"):
        Inbox(consumer="c", queue="q", amqp="", database="", concurrency=0)
