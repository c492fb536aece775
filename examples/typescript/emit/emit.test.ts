// Runs the examples on DATABASE_URL, a database with the outbox: sql/0*.sql.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { PrismaPg } from '@prisma/adapter-pg';
import { drizzle } from 'drizzle-orm/node-postgres';
import { Kysely, PostgresDialect } from 'kysely';
import pg from 'pg';
import * as byDrizzle from './drizzle.js';
import { PrismaClient } from './generated/client.js';
import * as byKysely from './kysely.js';
import * as byPrisma from './prisma.js';

const connectionString = process.env['DATABASE_URL'];
if (!connectionString) throw new Error('DATABASE_URL is not set: a database with sql/0*.sql');
const pool = new pg.Pool({ connectionString });
const kysely = new Kysely<byKysely.Shop>({ dialect: new PostgresDialect({ pool }) });
const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString }) });

before(() => pool.query('CREATE TABLE example_order (id serial PRIMARY KEY, state text NOT NULL)'));
after(async () => {
  await pool.query('DROP TABLE example_order');
  await prisma.$disconnect();
  await kysely.destroy();
});

const examples = {
  kysely: (id: number) => byKysely.pay(kysely, id),
  drizzle: (id: number) => byDrizzle.pay(drizzle(pool), id),
  prisma: (id: number) => byPrisma.pay(prisma, id),
};

for (const [name, pay] of Object.entries(examples)) {
  test(`${name} emits the event in the transaction of the change`, async () => {
    const { rows: [{ id }] } = await pool.query(
      "INSERT INTO example_order (state) VALUES ('new') RETURNING id");
    await pay(id);
    const { rows } = await pool.query(
      'SELECT o.state, e.aggregate_id, e.event_type, e.payload, o.xmin::text = e.xmin::text AS same '
      + 'FROM example_order AS o JOIN watership.outbox AS e ON e.aggregate_id = o.id::text '
      + "AND e.payload ->> 'by' = $2 WHERE o.id = $1 ORDER BY e.seq DESC LIMIT 1", [id, name]);
    assert.deepEqual(rows, [{ state: 'paid', aggregate_id: String(id), event_type: 'paid',
      payload: { id, by: name }, same: true }]);
  });
}
