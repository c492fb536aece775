// Prisma: the event is there exactly when the change of the order is.
import { emit, type Queryable } from 'watership';
import type { Prisma, PrismaClient } from './generated/client.js';

/** A transaction of Prisma's, as `emit` wants it. */
function queryable(tx: Prisma.TransactionClient): Queryable {
  return {
    async query(text, values = []) {
      return { rows: await tx.$queryRawUnsafe<unknown[]>(text, ...values) };
    },
  };
}

export async function pay(prisma: PrismaClient, id: number): Promise<void> {
  await prisma.$transaction(async (tx) => {
    await tx.order.update({ where: { id }, data: { state: 'paid' } });
    await emit(queryable(tx), {
      aggregateType: 'order', aggregateId: id, eventType: 'paid', payload: { id, by: 'prisma' },
    });
  });
}
