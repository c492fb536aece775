"""Messages in hand, and whose turn it is. Pure."""

from __future__ import annotations

import collections
import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

from .message import Message


class Delivery(NamedTuple):
    """A message in hand. `tag` and `channel` acknowledge it; `raw` is as the client gave it."""

    message: Message
    tag: int
    channel: Any
    raw: Any


class Lanes:
    """Messages in hand: one of each key is handled at a time, in the order of delivery."""

    def __init__(self) -> None:
        self.generation, self.open = 0, False
        self._inside, self._alone, self._wanted = set[object](), False, False
        self._waiting: dict[Hashable, collections.deque[Delivery]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, delivery: Delivery) -> Hashable | None:
        """The lane, if a worker may take it now."""
        key = delivery.message.key
        lane: Hashable = object() if key is None else key
        with self._lock:
            is_new = self.open and lane not in self._waiting
            if self.open:
                self._waiting.setdefault(lane, collections.deque()).append(delivery)
            return lane if is_new else None

    def take(self, lane: Hashable) -> tuple[Delivery | None, int]:
        """The next message, unless it was dropped, and its generation."""
        with self._lock:
            waiting = self._waiting[lane]
            return waiting.popleft() if waiting else None, self.generation

    def done(self, lane: Hashable) -> bool:
        """True if a worker may take the lane again."""
        with self._lock:
            has_more = bool(self._waiting[lane])
            if not has_more:
                del self._waiting[lane]
            return has_more

    def enter(self, worker: object, alone: bool) -> bool:
        """True: the worker may call the handler; `alone`: while no other does. Until one that asks
        for that has it, nobody begins.
        """
        with self._lock:
            self._wanted = self._wanted or alone
            if self._alone or (self._inside if alone else self._wanted):
                return False
            self._inside.add(worker)
            self._alone, self._wanted = alone, False
            return True

    def leave(self, worker: object) -> None:
        with self._lock:
            if worker in self._inside:
                self._inside.remove(worker)
                self._alone = False

    def drop(self) -> None:
        """Forgets what nobody has begun, and takes nothing until `open` is set again. The broker
        delivers all of it once more; to go on with later ones first would break the order.
        """
        with self._lock:
            self.generation, self.open = self.generation + 1, False
            for waiting in self._waiting.values():
                waiting.clear()
