"""A connection to Postgres, asynchronous or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row

from .sql import Statement

# Unless the URL says otherwise: a connection to a host that is gone is noticed.
_CONNECTION = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5,
               "keepalives_count": 3, "tcp_user_timeout": 30000}


async def _got(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


class Db:
    """A connection of psycopg, of either kind, and what is open in it: a transaction and, in it,
    a savepoint.
    """

    def __init__(self, connect: Callable[..., Any], url: str) -> None:
        self._connect, self._url, self._open = connect, url, list[Any]()
        self.conn: Any = None
        self.epoch = -1
        """The state of the database that it belongs to: see `Consumer.database_lost`."""

    @property
    def broken(self) -> bool:
        return self.conn is None or bool(self.conn.closed)

    async def connect(self) -> None:
        await self.close()
        given = conninfo_to_dict(self._url)
        options = {name: value for name, value in _CONNECTION.items() if name not in given}
        self.conn = await _got(self._connect(self._url, autocommit=True, **options))

    async def close(self) -> None:
        self._open.clear()
        if self.conn is not None:
            await _got(self.conn.close())

    async def rows(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        cursor = await _got(self.conn.cursor(row_factory=tuple_row).execute(query, values))
        found: list[tuple[Any, ...]] = await _got(cursor.fetchall())
        return found

    async def first(self, statement: Statement) -> tuple[Any, ...]:
        """The first row of what the function returns."""
        return (await self.rows(statement.text("%({})s"), **statement.values))[0]

    async def begin(self) -> None:
        block = self.conn.transaction()
        await _got((getattr(block, "__aenter__", None) or block.__enter__)())
        self._open.append(block)

    async def end(self, undo: bool = False) -> None:
        """Commits or rolls back the inner one of what `begin` began."""
        block, error = self._open.pop(), psycopg.Rollback() if undo else None
        leave = getattr(block, "__aexit__", None) or block.__exit__
        await _got(leave(error and psycopg.Rollback, error, None))

    async def reset(self) -> None:
        """Rolls back whatever is open."""
        while self._open:
            await self.end(undo=True)


def sqlstate(error: BaseException | None) -> str:
    """Of the error, of what SQLAlchemy wraps in it, or of its cause; or empty."""
    while error is not None:
        for of in (error, getattr(error, "orig", None)):
            if getattr(of, "sqlstate", None):
                return str(getattr(of, "sqlstate"))
        error = error.__cause__
    return ""
