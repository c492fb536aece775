"""A message as the handler sees it. Pure: no I/O."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

# AMQP's properties that are kept with a parked message, under AMQP's names.
_KEPT = ("content_type", "content_encoding", "delivery_mode", "priority", "correlation_id",
         "reply_to", "expiration", "type", "user_id", "app_id")
# A time that Python cannot hold counts as one that lies ahead, which the inbox parks.
LAST = datetime(9999, 12, 31, tzinfo=timezone.utc)


class Permanent(Exception):
    """Raised by a handler: the message will never succeed, so it is given up without a retry."""


@dataclass(frozen=True)
class DeadLetter:
    """For `on_failure`: where messages go that are given up."""

    exchange: str
    routing_key: str

    def properties(self, of: Any, headers: dict[str, Any]) -> Any:
        """The message's own and these headers; without what is about its delivery, which would let
        it expire, be refused or be copied elsewhere.
        """
        changed = copy.copy(of)
        changed.headers = {**(of.headers or {}), **headers}
        for name in ("CC", "BCC", "x-delivery-count"):
            changed.headers.pop(name, None)
        changed.expiration = changed.user_id = None
        return changed


def plain(value: Any) -> Any:
    """The value as JSON can hold it, and Postgres: without NUL, NaN and infinities."""
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {plain(str(name)): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    is_number = isinstance(value, (int, float)) and value - value == 0
    return value if value is None or is_number else str(value)


def _time(value: Any) -> datetime | None:
    """AMQP's timestamp: whole seconds, UTC. pika gives a number, aio-pika a datetime."""
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return None if seconds is None else datetime.fromtimestamp(
        min(int(seconds), int(LAST.timestamp())), timezone.utc)


@dataclass(frozen=True)
class Message:
    """One message. `properties` holds AMQP's properties, among them `headers`, as plain JSON."""

    id: str
    body: bytes
    occurred_at: datetime | None = None
    key: str | None = None
    properties: dict[str, Any] = field(default_factory=dict)
    redelivered: bool = False
    """It was delivered before, to whomever."""
    has_id: bool = True
    """False: the sender gave no message_id, and `id` stands for the body."""

    @classmethod
    def of(cls, properties: Any, body: bytes, *, exchange: str | None = None,
           routing_key: str | None = None, redelivered: bool | None = None) -> Message:
        """Reads what a client has for properties: pika's object, aiormq's, a message of aio-pika
        (which is `message.raw_message` in FastStream).
        """
        headers: dict[str, Any] = plain(dict(properties.headers or {}))
        found = {name: getattr(properties, name, None) for name in _KEPT}
        found["type"] = found["type"] or getattr(properties, "message_type", None)
        found.update(exchange=exchange, routing_key=routing_key)
        kept = {name: plain(value) for name, value in found.items() if value is not None}
        given, key = properties.message_id, headers.get("ws-key")
        count = headers.get("x-delivery-count")
        has_id = isinstance(given, str) and given != "" and "\0" not in given
        return cls(
            id=given if has_id else "sha256-" + hashlib.sha256(body).hexdigest(),
            body=bytes(body), occurred_at=_time(properties.timestamp),
            key=None if key is None else str(key), properties={**kept, "headers": headers},
            redelivered=bool(redelivered) or isinstance(count, int) and count > 0, has_id=has_id)

    def header(self, name: str) -> str | None:
        """A header, if it is a text."""
        value = self.properties.get("headers", {}).get(name)
        return value if isinstance(value, str) else None

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context of the event, to continue its trace."""
        return self.header("traceparent")

    @property
    def position(self) -> str | None:
        """The place of the event in the order of commits: compare as text, within one `app_id`."""
        return self.header("ws-position")

    @property
    def type(self) -> str | None:
        """The type of the event."""
        return self.properties.get("type")

    def json(self) -> Any:
        """The body, parsed as JSON."""
        return json.loads(self.body)


def parked(id: str, seconds: int | None, key: str | None, body: bytes,
           properties: dict[str, Any]) -> Message:
    """One that was parked and is tried again; `seconds` since 1970 is its time."""
    return Message(id, body, _time(seconds), key, properties, redelivered=True)
