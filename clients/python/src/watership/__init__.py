"""Consumers and producers of Watership: an effect once, in order within its key.

`watership.aio` and `watership.sync` hold the consumers.
"""

from .message import DeadLetter, Message, Permanent
from .sql import claim, claim_many, emit, emit_bytes, forget, park, receive

__all__ = ["DeadLetter", "Message", "Permanent", "claim", "claim_many", "emit", "emit_bytes",
           "forget", "park", "receive"]
