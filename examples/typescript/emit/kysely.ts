// Kysely: the event is there exactly when the change of the order is.
import { CompiledQuery, type Generated, type Kysely, type Transaction } from 'kysely';
import { emit, type Queryable } from 'watership';

export interface Shop {
  example_order: { id: Generated<number>; state: string };
}

/** A transaction of Kysely's, as `emit` wants it. */
function queryable<DB>(trx: Transaction<DB>): Queryable {
  return { query: (text, values = []) => trx.executeQuery(CompiledQuery.raw(text, values)) };
}

export async function pay(db: Kysely<Shop>, id: number): Promise<void> {
  await db.transaction().execute(async (trx) => {
    await trx.updateTable('example_order').set({ state: 'paid' }).where('id', '=', id)
      .executeTakeFirstOrThrow();
    await emit(queryable(trx), {
      aggregateType: 'order', aggregateId: id, eventType: 'paid', payload: { id, by: 'kysely' },
    });
  });
}
