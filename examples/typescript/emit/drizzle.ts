// Drizzle: the event is there exactly when the change of the order is.
import { eq, sql } from 'drizzle-orm';
import type { NodePgDatabase } from 'drizzle-orm/node-postgres';
import { pgTable, serial, text } from 'drizzle-orm/pg-core';

export const orders = pgTable('example_order', {
  id: serial().primaryKey(),
  state: text().notNull(),
});

export async function pay(db: NodePgDatabase, id: number): Promise<void> {
  await db.transaction(async (tx) => {
    await tx.update(orders).set({ state: 'paid' }).where(eq(orders.id, id));
    const payload = JSON.stringify({ id, by: 'drizzle' });
    await tx.execute(sql`SELECT watership.emit('order', ${id}::bigint, 'paid', ${payload}::text)`);
  });
}
