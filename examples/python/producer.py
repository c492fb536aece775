"""A producer with SQLAlchemy: the order and its event, in one transaction.

    pip install './clients/python[sqlalchemy]' 'psycopg[binary]'
    DATABASE_URL=postgresql+psycopg://... python examples/python/producer.py

The event is there exactly when the order is. The relay publishes it. The user of the application
needs the role watership_app (docs/emitting.md).
"""

import os
from decimal import Decimal

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from watership import emit


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total: Mapped[Decimal]


def place_order(session: Session, customer: str, total: Decimal) -> Order:
    """In the caller's transaction."""
    order = Order(customer=customer, total=total)
    session.add(order)
    # Now: it gives the order its number.
    session.flush()
    emit(session, "order", order.id, "created", {"customer": customer, "total": str(total)})
    return order


if __name__ == "__main__":
    engine = create_engine(os.environ["DATABASE_URL"])
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        print("order", place_order(session, "Fiver", Decimal("12.50")).id)
