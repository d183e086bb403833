import assert from 'node:assert/strict';
import { test } from 'node:test';
import { BudgetError } from '../src/errors.js';
import { Residency, parseBytes } from '../src/residency.js';

/** Experts whose loading the test finishes by hand. */
class Shelf {
  loading = new Map();
  unloaded = [];
  load = (expert) => new Promise((resolve, reject) => this.loading.set(expert, { resolve: () => resolve(`tail ${expert}`), reject }));
  unload = async (loaded) => { this.unloaded.push(loaded); };
  residency = (options) => new Residency({ load: this.load, unload: this.unload, sizes: [10, 20, 30, 40], ...options });
}

const settle = () => new Promise((resolve) => setImmediate(resolve));
const quick = (options) => new Residency({ load: async (e) => e, unload: async () => {}, sizes: [10, 20, 30, 40], ...options });

test('an absent expert is loaded once, however many ask', async () => {
  const shelf = new Shelf();
  const residency = shelf.residency({});
  const asked = Array.from({ length: 8 }, () => residency.use(1, async (loaded) => loaded));
  await settle();
  assert.equal(shelf.loading.size, 1);
  shelf.loading.get(1).resolve();
  assert.deepEqual(await Promise.all(asked), Array(8).fill('tail 1'));
  const { hits, misses, resident, residentBytes } = residency.ledger();
  assert.deepEqual([hits, misses, resident, residentBytes], [7, 1, [1], 20]);
});

test('a failed load leaves no trace, and the next use tries again', async () => {
  const shelf = new Shelf();
  const residency = shelf.residency({});
  const first = residency.use(0, async () => {}), second = residency.use(0, async (loaded) => loaded);
  await settle();
  shelf.loading.get(0).reject(new Error('no network'));
  await assert.rejects(first, /no network/);
  await settle();
  shelf.loading.get(0).resolve();
  assert.equal(await second, 'tail 0');
  const { hits, misses } = residency.ledger();
  assert.deepEqual([hits, misses], [0, 2]);
});

test('the least recently used leave, pinned ones and those in use stay', async () => {
  const residency = quick({ memoryBudget: 70, pinned: [0] });
  for (const expert of [0, 1, 2]) await residency.use(expert, async () => {});
  await residency.use(1, async () => {});  // so that 2 is the least recent
  await residency.use(3, async () => {});
  assert.deepEqual(residency.ledger().resident, [0, 1, 3]);
  assert.equal(residency.ledger().evictions, 1);
});

test('a call that finds no room waits for one', async () => {
  const residency = quick({ maxResident: 1 });
  const order = [];
  let done;
  const first = residency.use(0, () => new Promise((resolve) => { done = resolve; })).then(() => order.push('first'));
  const second = residency.use(1, async () => order.push('second'));
  await settle();
  assert.deepEqual(order, []);
  done();
  await Promise.all([first, second]);
  assert.deepEqual(order, ['first', 'second']);
  assert.deepEqual(residency.ledger().resident, [1]);
});

test('the budget holds under many uses at once', async () => {
  let bytes = 0, most = 0;
  const sizes = [10, 20, 30, 40];
  const residency = new Residency({
    load: async (e) => { bytes += sizes[e]; most = Math.max(most, bytes); await settle(); return e; },
    unload: async (e) => { bytes -= sizes[e]; },
    sizes, memoryBudget: 60,
  });
  await Promise.all(Array.from({ length: 400 }, (_, i) => residency.use((i * 7) % 4, settle)));
  assert.ok(most <= 60, `${most}`);
  assert.equal(residency.ledger().hits + residency.ledger().misses, 400);
  await residency.clear();
  assert.equal(bytes, 0);
});

test('bounds that cannot hold an expert are refused', () => {
  assert.throws(() => quick({ memoryBudget: 39 }), BudgetError);
  assert.throws(() => quick({ memoryBudget: 49, pinned: [0] }), /expert_03 beside 1 pinned \(10 bytes\): needs at least 50/);
  assert.throws(() => quick({ maxResident: 1, pinned: [0] }), BudgetError);
});

test('sizes', () => {
  assert.deepEqual(['8MB', '8 MiB', '1.5kB', '512', 7].map(parseBytes), [8e6, 8 << 20, 1500, 512, 7]);
  for (const bad of ['', 'MB', '-1', '0', '8TB', null]) assert.throws(() => parseBytes(bad), BudgetError);
});
