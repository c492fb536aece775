"""The small pieces alone: the SQL functions of Watership, in the caller's own transaction.

Each takes a connection or cursor of psycopg 3, or a session or connection of SQLAlchemy. With an
asynchronous one, await the result:

    with psycopg.connect(url) as conn:
        if claim(conn, "billing", message): ...
    async with AsyncSession(engine) as session, session.begin():
        await emit(session, "order", order.id, "created", {"total": 12.5})
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload
from uuid import UUID

from .message import Message, plain

P = ParamSpec("P")
T = TypeVar("T")
Rows = Sequence[Sequence[Any]]


class _Sync(Protocol):
    def __enter__(self) -> Any: ...
    def execute(self, statement: Any, /) -> Any: ...


class _Async(Protocol):
    async def __aenter__(self) -> Any: ...
    def execute(self, statement: Any, /) -> Any: ...


@dataclass(frozen=True)
class Statement:
    """A call of an SQL function: its name, and each argument's type and value."""

    function: str
    arguments: dict[str, tuple[str, Any]]

    def text(self, placeholder: str) -> str:
        """The SQL; `placeholder` says how the driver marks a parameter, as `%({})s`."""
        passed = (f"{name} => CAST({placeholder.format(name)} AS {kind})"
                  for name, (kind, _) in self.arguments.items())
        return f"SELECT * FROM {self.function}({', '.join(passed)})"

    @property
    def values(self) -> dict[str, Any]:
        """The arguments' values by name."""
        return {name: value for name, (_, value) in self.arguments.items()}


class Piece(Generic[P, T]):
    """A function of the database: `of` makes its statement, `result` reads its rows."""

    def __init__(self, of: Callable[P, Statement], result: Callable[[Rows], T]) -> None:
        self.of, self.result, self.__doc__ = of, result, of.__doc__

    @overload
    def __call__(self, conn: _Sync, /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def __call__(self, conn: _Async, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]: ...
    def __call__(self, conn: Any, /, *args: P.args, **kwargs: P.kwargs) -> T | Awaitable[T]:
        statement = self.of(*args, **kwargs)
        if hasattr(conn, "cursor") or hasattr(conn, "fetchall"):
            from psycopg.rows import tuple_row
            # A cursor of its own: the row factory of the given one is the caller's affair.
            cursor = getattr(conn, "connection", conn).cursor(row_factory=tuple_row)
            answer = cursor.execute(statement.text("%({})s"), statement.values)
        else:
            from sqlalchemy import text
            answer = conn.execute(text(statement.text(":{}")), statement.values)
        if not hasattr(answer, "__await__"):
            return self.result(answer.fetchall())

        async def later() -> T:
            rows = (await answer).fetchall()
            return self.result(await rows if hasattr(rows, "__await__") else rows)
        return later()


def _piece(result: Callable[[Rows], T]) -> Callable[[Callable[P, Statement]], Piece[P, T]]:
    return lambda of: Piece(of, result)


def _truth(rows: Rows) -> bool:
    return bool(rows[0][0])


def _word(rows: Rows) -> str:
    return str(rows[0][0])


def _uuid(rows: Rows) -> UUID:
    return UUID(str(rows[0][0]))


def _ids(rows: Rows) -> set[str]:
    return {str(row[0]) for row in rows}


def call(function: str, consumer: str, id: str, **more: tuple[str, Any]) -> Statement:
    """A function of the inbox for a message."""
    return Statement(f"watership_inbox.{function}",
                     {"consumer": ("text", consumer), "message_id": ("text", id), **more})


def _whole(message: Message) -> dict[str, tuple[str, Any]]:
    properties = json.dumps(message.properties)
    return {"occurred_at": ("timestamptz", message.occurred_at), "key": ("text", message.key),
            "body": ("bytea", message.body), "properties": ("jsonb", properties)}


@_piece(_truth)
def claim(consumer: str, message: Message, *, body_hash: bytes | None = None,
          strict: bool = False) -> Statement:
    """True the first time, False for a duplicate: then skip the work, commit and acknowledge.
    Raises SQLSTATE WI001 for a message older than the window; `receive` parks it instead.
    """
    if message.occurred_at is None:
        return call("claim", consumer, message.id)
    return call("claim", consumer, message.id, occurred_at=("timestamptz", message.occurred_at),
                body_hash=("bytea", body_hash), strict=("boolean", strict))


@_piece(_ids)
def claim_many(consumer: str, messages: Iterable[Message]) -> Statement:
    """Claims all of them, and returns the ids of the new ones. Each needs a time of its own."""
    pairs = [(message.id, message.occurred_at) for message in messages]
    return Statement("watership_inbox.claim_many", {
        "consumer": ("text", consumer), "ids": ("text[]", [pair[0] for pair in pairs]),
        "times": ("timestamptz[]", [pair[1] for pair in pairs])})


@_piece(_word)
def receive(consumer: str, message: Message, *, body_hash: bytes | None = None) -> Statement:
    """`handle`; or `duplicate`; or `parked`: stored behind an earlier message of its key."""
    return call("receive", consumer, message.id, **_whole(message), body_hash=("bytea", body_hash))


@_piece(_truth)
def park(consumer: str, message: Message, reason: str, error: str | None = None) -> Statement:
    """Parks a message whose handler failed. False if it was handled or parked meanwhile."""
    return call("park", consumer, message.id, **_whole(message), reason=("text", reason),
                error=("text", plain(error)))


@_piece(_truth)
def forget(consumer: str, message_id: str) -> Statement:
    """Lets a message have its effect a second time. True if it was known."""
    return call("forget", consumer, message_id)


def _event(aggregate_type: str, aggregate_id: object, event_type: str,
           headers: Mapping[str, str] | None, id: UUID | None) -> dict[str, tuple[str, Any]]:
    return {"aggregate_type": ("text", aggregate_type), "aggregate_id": ("text", str(aggregate_id)),
            "event_type": ("text", event_type), "id": ("uuid", id),
            "headers": ("jsonb", None if headers is None else json.dumps(dict(headers)))}


@_piece(_uuid)
def emit(aggregate_type: str, aggregate_id: object, event_type: str, payload: Any, *,
         headers: Mapping[str, str] | None = None, id: UUID | None = None) -> Statement:
    """Writes an event into the outbox, and returns its id. `payload` is a str that holds JSON, or
    anything else that `json.dumps` takes. An `id` must never have been used before.
    """
    text = payload if isinstance(payload, str) else json.dumps(payload)
    event = _event(aggregate_type, aggregate_id, event_type, headers, id)
    return Statement("watership.emit", {**event, "payload": ("json", text)})


@_piece(_uuid)
def emit_bytes(aggregate_type: str, aggregate_id: object, event_type: str, data: bytes,
               content_type: str, *, headers: Mapping[str, str] | None = None,
               id: UUID | None = None) -> Statement:
    """As `emit`, for a body that is not JSON."""
    event = _event(aggregate_type, aggregate_id, event_type, headers, id)
    return Statement("watership.emit_bytes", {
        **event, "data": ("bytea", data), "content_type": ("text", content_type)})
