// Which experts are loaded: a budget, least-recently-used eviction, pinning, and one load per expert however many ask.

import { BudgetError } from './errors.js';

/**
 * @template Loaded
 * @typedef {{loaded: Loaded | null, users: number}} Slot an expert that is resident or being loaded
 */

/**
 * @template Loaded
 * @typedef {object} Options
 * @property {(expert: number) => Promise<Loaded>} load makes an expert ready to run
 * @property {(loaded: Loaded) => Promise<void>} unload frees what an expert takes
 * @property {number[]} sizes bytes of each expert
 * @property {number | null} [memoryBudget] largest total size of the resident experts, in bytes
 * @property {number | null} [maxResident] largest number of resident experts
 * @property {Iterable<number>} [pinned] experts that never leave once resident
 */

/**
 * Keeps experts resident within a budget. A caller uses one expert at a time, so that waiting for room always ends.
 * @template Loaded
 */
export class Residency {
  /** @type {Map<number, Slot<Loaded>>} in order of use, least recent first */
  #slots = new Map();
  #options;
  #pinned;
  #closed = false;
  #counts = { hits: 0, misses: 0, evictions: 0 };
  /** @type {(() => void)[]} */
  #waiting = [];

  /** @param {Options<Loaded>} options */
  constructor(options) {
    this.#options = options;
    this.#pinned = new Set(options.pinned);
    this.#checkBounds();
  }

  #checkBounds() {
    const { sizes, memoryBudget, maxResident } = this.#options;
    let largest = -1, pinnedBytes = 0;
    sizes.forEach((size, expert) => {
      if (this.#pinned.has(expert)) pinnedBytes += size;
      else if (largest < 0 || size > sizes[largest]) largest = expert;
    });
    const beside = this.#pinned.size ? ` beside ${this.#pinned.size} pinned (${pinnedBytes} bytes)` : '';
    const needed = pinnedBytes + (largest < 0 ? 0 : sizes[largest]);
    if (memoryBudget != null && needed > memoryBudget) {
      const what = largest < 0 ? 'the pinned experts' : `expert_${String(largest).padStart(2, '0')}${beside}`;
      throw new BudgetError(`memoryBudget of ${memoryBudget} bytes cannot hold ${what}: needs at least ${needed} bytes`);
    }
    const count = this.#pinned.size + Number(largest >= 0);
    if (maxResident != null && count > maxResident) {
      throw new BudgetError(`maxResident ${maxResident} cannot hold an expert${beside}: needs at least ${count}`);
    }
  }

  /**
   * Calls `work` with an expert, loading it first if needed; it stays resident until then.
   * @template Result
   * @param {number} expert
   * @param {(loaded: Loaded) => Promise<Result>} work
   */
  async use(expert, work) {
    const slot = await this.#acquire(expert);
    try {
      return await work(/** @type {Loaded} */ (slot.loaded));
    } finally {
      slot.users--;
      if (this.#closed && !slot.users) await this.#drop([expert]);
      this.#changed();
    }
  }

  /** @param {number} expert */
  async #acquire(expert) {
    let counted = false;
    for (;;) {
      const slot = this.#slots.get(expert);
      if (!slot) {
        const leaving = this.#roomFor(expert);
        if (leaving) {
          if (counted) this.#counts.hits--;  // the load that this call waited for failed, so this was no hit
          return this.#load(expert, leaving);
        }
      } else {
        if (!counted) this.#counts.hits++;
        counted = true;
        if (slot.loaded !== null) {
          slot.users++;
          this.#slots.delete(expert);
          this.#slots.set(expert, slot);
          return slot;
        }
      }
      await new Promise((wake) => this.#waiting.push(() => wake(null)));
    }
  }

  /**
   * @param {number} expert
   * @param {number[]} leaving
   */
  async #load(expert, leaving) {
    this.#counts.misses++;
    this.#counts.evictions += leaving.length;
    /** @type {Slot<Loaded>} */
    const slot = { loaded: null, users: 1 };
    this.#slots.set(expert, slot);
    try {
      await this.#drop(leaving);  // before the new expert takes its own memory
      slot.loaded = await this.#options.load(expert);
    } catch (error) {
      this.#slots.delete(expert);
      throw error;
    } finally {
      this.#changed();
    }
    return slot;
  }

  /**
   * The least recently used idle experts that have to leave for another; null if it does not fit even then.
   * @param {number} expert
   */
  #roomFor(expert) {
    const { sizes, memoryBudget, maxResident } = this.#options;
    let count = this.#slots.size + 1, total = this.#bytes() + sizes[expert];
    const leaving = [];
    const idle = [...this.#slots].filter(([other, slot]) => !slot.users && !this.#pinned.has(other));
    while ((maxResident != null && count > maxResident) || (memoryBudget != null && total > memoryBudget)) {
      const next = idle.shift();
      if (!next) return null;
      leaving.push(next[0]);
      count--;
      total -= sizes[next[0]];
    }
    return leaving;
  }

  /** @param {number[]} experts */
  async #drop(experts) {
    const slots = experts.map((expert) => this.#slots.get(expert));
    for (const expert of experts) this.#slots.delete(expert);
    for (const slot of slots) if (slot?.loaded != null) await this.#options.unload(slot.loaded);
  }

  #bytes() {
    return [...this.#slots.keys()].reduce((sum, expert) => sum + this.#options.sizes[expert], 0);
  }

  #changed() {
    for (const wake of this.#waiting.splice(0)) wake();
  }

  /**
   * Whether an expert is ready to run.
   * @param {number} expert
   */
  resident(expert) {
    return this.#slots.get(expert)?.loaded != null;
  }

  /** Counts so far, and what is resident, least recently used first. */
  ledger() {
    return { ...this.#counts, resident: [...this.#slots.keys()], residentBytes: this.#bytes() };
  }

  /** Drops every expert, one in use once it is no more. */
  async clear() {
    this.#closed = true;
    await this.#drop([...this.#slots].filter(([, slot]) => !slot.users).map(([expert]) => expert));
  }
}

/**
 * `8MB` (10⁶ bytes), `8 MiB` (2²⁰) or a number of bytes, as bytes.
 * @param {string | number} text
 */
export function parseBytes(text) {
  const found = /^\s*(\d+(?:\.\d+)?)\s*(k|M|G)?(i)?B?\s*$/i.exec(String(text));
  const value = found && Math.trunc(Number(found[1]) * (found[3] ? 1024 : 1000) ** ' kmg'.indexOf((found[2] ?? ' ').toLowerCase()));
  if (!value || value < 1) {
    throw new BudgetError(`memoryBudget ${JSON.stringify(text)}: expected a size such as '8MB', '8MiB' or a number of bytes above zero`);
  }
  return value;
}
