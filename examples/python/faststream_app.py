"""FastStream with its own subscriber, and the mark in the handler's transaction.

    pip install './clients/python[sqlalchemy]' 'psycopg[binary]' 'faststream[rabbit,cli]'
    AMQP_URL=... DATABASE_URL=postgresql+psycopg://... QUEUE=... faststream run faststream_app:app

An effect happens once, as with `watership.aio`. What else that helper does is not here:
- FastStream stands on aio-pika, which can lose a consumer without a sign when the broker cancels it
  (a deleted queue; a consumer timeout, from RabbitMQ 4.3 on). Watch the queue for messages and no
  consumer, and restart the service then.
- With more than one worker, messages of a key are handled side by side. This one takes one message
  at a time, and a failed message goes back to the queue: behind its successors, or in front, as the
  queue has it. Nothing is parked; a message that always fails comes back until the queue's
  delivery limit.
"""

import os

from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitMessage, RabbitQueue
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from watership import Message, claim

engine = create_async_engine(os.environ["DATABASE_URL"])
broker = RabbitBroker(os.environ["AMQP_URL"], default_channel=Channel(prefetch_count=1))
app = FastStream(broker)
queue = RabbitQueue(os.environ["QUEUE"], queue_type=QueueType.QUORUM, durable=True)


# The acknowledgement comes after the commit; an error gives the message back to the queue.
@broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
async def handle(body: dict[str, object], delivery: RabbitMessage) -> None:
    raw = delivery.raw_message
    message = Message.of(raw, raw.body, redelivered=raw.redelivered)
    if not message.has_id:
        raise ValueError("a message without an id cannot be told from its duplicates")
    async with AsyncSession(engine) as session, session.begin():
        if await claim(session, os.environ.get("CONSUMER", "faststream"), message):
            await session.execute(
                text("INSERT INTO watership_torture.effect (message_id, key, number)"
                     " VALUES (:id, :key, :number)"),
                {"id": message.id, "key": body["key"], "number": body["number"]})
