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
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload
from uuid import UUID

from .message import Message, plain

P = ParamSpec("P")
T = TypeVar("T")
Rows = Sequence[Sequence[Any]]
Call = tuple[str, dict[str, Any]]
# Of the arguments that are not text.
_TYPES = {"occurred_at": "timestamptz", "body": "bytea", "properties": "jsonb", "data": "bytea",
          "body_hash": "bytea", "ids": "text[]", "times": "timestamptz[]", "headers": "jsonb",
          "payload": "json", "id": "uuid", "retried": "bigint", "max_failures": "integer",
          "max_kills": "integer", **dict.fromkeys(
              ("strict", "has_id", "is_final", "dead_letters"), "boolean")}


class _Sync(Protocol):
    def __enter__(self) -> Any: ...
    def execute(self, statement: Any, /) -> Any: ...


class _Async(Protocol):
    async def __aenter__(self) -> Any: ...
    def execute(self, statement: Any, /) -> Any: ...


def ask(conn: Any, function: str, values: dict[str, Any],
        result: Callable[[Rows], Any] = lambda rows: rows[0] if rows else None) -> Any:
    """Calls a function of the database with named arguments."""
    is_psycopg = hasattr(conn, "cursor") or hasattr(conn, "fetchall")
    mark = "%({})s" if is_psycopg else ":{}"
    passed = (f"{name} => CAST({mark.format(name)} AS {_TYPES.get(name, 'text')})"
              for name in values)
    query: Any = f"SELECT * FROM {function}({', '.join(passed)})"
    if is_psycopg:
        from psycopg.rows import tuple_row
        # A cursor of our own: the caller's connection may have another row factory.
        conn = getattr(conn, "connection", conn).cursor(row_factory=tuple_row)
    else:
        from sqlalchemy import text
        query = text(query)
    answer = conn.execute(query, values)
    if not hasattr(answer, "__await__"):
        return result(answer.fetchall())

    async def later() -> Any:
        rows = (await answer).fetchall()
        return result(await rows if hasattr(rows, "__await__") else rows)
    return later()


def whole(message: Message) -> dict[str, Any]:
    """The arguments of functions that get a whole message."""
    return {"message_id": message.id, "occurred_at": message.occurred_at, "key": message.key,
            "body": message.body, "properties": json.dumps(message.properties)}


class Piece(Generic[P, T]):
    """A function of the database, typed for both kinds of connections."""

    def __init__(self, of: Callable[P, Call], result: Callable[[Rows], T]) -> None:
        self.of, self.result, self.__doc__ = of, result, of.__doc__

    @overload
    def __call__(self, conn: _Sync, /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def __call__(self, conn: _Async, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]: ...
    def __call__(self, conn: Any, /, *args: P.args, **kwargs: P.kwargs) -> T | Awaitable[T]:
        answer: T | Awaitable[T] = ask(conn, *self.of(*args, **kwargs), self.result)
        return answer


def _piece(result: Callable[[Rows], T]) -> Callable[[Callable[P, Call]], Piece[P, T]]:
    return lambda of: Piece(of, result)


def _truth(rows: Rows) -> bool:
    return bool(rows[0][0])


@_piece(_truth)
def claim(consumer: str, message: Message, *, body_hash: bytes | None = None,
          strict: bool = False) -> Call:
    """True the first time, False for a duplicate: then skip the work, commit and acknowledge.
    Raises SQLSTATE WI001 for a message older than the window; `receive` parks it instead.
    """
    timed = {"occurred_at": message.occurred_at, "body_hash": body_hash, "strict": strict}
    return "watership_inbox.claim", {"consumer": consumer, "message_id": message.id,
                                     **(timed if message.occurred_at else {})}


@_piece(lambda rows: {str(row[0]) for row in rows})
def claim_many(consumer: str, messages: Iterable[Message]) -> Call:
    """Claims all of them, and returns the ids of the new ones. Each needs a time of its own."""
    given = list(messages)
    return "watership_inbox.claim_many", {
        "consumer": consumer, "ids": [one.id for one in given],
        "times": [one.occurred_at for one in given]}


@_piece(lambda rows: str(rows[0][0]))
def receive(consumer: str, message: Message, *, body_hash: bytes | None = None) -> Call:
    """`handle`; or `duplicate`; or `parked`: stored behind an earlier message of its key."""
    return "watership_inbox.receive", {
        "consumer": consumer, **whole(message), "body_hash": body_hash}


@_piece(_truth)
def park(consumer: str, message: Message, reason: str, error: str | None = None) -> Call:
    """Parks a message whose handler failed. False if it was handled or parked meanwhile."""
    return "watership_inbox.park", {
        "consumer": consumer, **whole(message), "reason": reason, "error": plain(error)}


@_piece(_truth)
def forget(consumer: str, message_id: str) -> Call:
    """Lets a message have its effect a second time. True if it was known."""
    return "watership_inbox.forget", {"consumer": consumer, "message_id": message_id}


def _event(function: str, kind: str, id_of: object, event_type: str,
           headers: Mapping[str, str] | None, id: UUID | None, **body: Any) -> Call:
    return f"watership.{function}", {
        "aggregate_type": kind, "aggregate_id": str(id_of), "event_type": event_type, "id": id,
        "headers": None if headers is None else json.dumps(dict(headers)), **body}


@_piece(lambda rows: UUID(str(rows[0][0])))
def emit(aggregate_type: str, aggregate_id: object, event_type: str, payload: Any, *,
         headers: Mapping[str, str] | None = None, id: UUID | None = None) -> Call:
    """Writes an event into the outbox, and returns its id. `payload` is a str that holds JSON, or
    anything else that `json.dumps` takes. An `id` must never have been used before.
    """
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return _event("emit", aggregate_type, aggregate_id, event_type, headers, id, payload=text)


@_piece(lambda rows: UUID(str(rows[0][0])))
def emit_bytes(aggregate_type: str, aggregate_id: object, event_type: str, data: bytes,
               content_type: str, *, headers: Mapping[str, str] | None = None,
               id: UUID | None = None) -> Call:
    """As `emit`, for a body that is not JSON."""
    return _event("emit_bytes", aggregate_type, aggregate_id, event_type, headers, id, data=data,
                  content_type=content_type)
