// Trunk → router → the resident tail of the expert that the router picked.

import { AnswerError, BackendError, BudgetError, ImageError } from './errors.js';
import { pieceName } from './manifest.js';
import { normalise, toPixels } from './pixels.js';
import { Residency, parseBytes } from './residency.js';
import { bestClasses, logitsAreFine, probabilityProblem, topK } from './routing.js';
import { selftest } from './selftest.js';

/** @import { Bundle } from './bundle.js' */
/** @import { Engine, LoadedPiece } from './engine.js' */
/** @import { Image } from './pixels.js' */
/** @import { Batch, Piece, Prediction, ResidencyOptions, Runtime as Api, Tensor } from './api.d.ts' */

/**
 * Decodes whatever the platform's `predict` takes.
 * @typedef {(source: any, name: string) => Promise<Image & {close?: () => void}>} Decode
 */

/**
 * What one call has to know; it travels through the steps.
 * @typedef {{trunk: number, load: number, tail: number}} Times
 */

/** @implements {Api} */
export class Runtime {
  #bundle;
  #engine;
  #decode;
  #residency;
  /** @type {Map<string, LoadedPiece>} */
  #fixed = new Map();
  /** @type {Piece[][]} */
  #expertPieces;
  #closed = false;

  /**
   * Use {@link openRuntime}.
   * @param {Bundle} bundle
   * @param {Engine} engine
   * @param {Decode} decode
   * @param {ResidencyOptions} options
   */
  constructor(bundle, engine, decode, options) {
    this.#bundle = bundle;
    this.#engine = engine;
    this.#decode = decode;
    const { routing, pieces } = bundle.manifest;
    this.#expertPieces = Array.from({ length: routing?.experts ?? 0 }, (_, expert) => pieces.filter((piece) => piece.expert === expert));
    this.#residency = new Residency({
      load: (expert) => this.#loadAll(this.#expertPieces[expert]),
      unload: async (/** @type {LoadedPiece[]} */ loaded) => { for (const piece of loaded) await piece.release(); },
      sizes: this.#expertPieces.map((own) => own.reduce((sum, piece) => sum + piece.weight_bytes, 0)),
      memoryBudget: options.memoryBudget == null ? null : parseBytes(options.memoryBudget),
      maxResident: options.maxResident,
      pinned: options.pin,
    });
  }

  /**
   * Loads what every image needs, then what is pinned and preloaded.
   * @param {ResidencyOptions} options
   */
  async start({ pin = [], preload = [] }) {
    const experts = this.#expertPieces.length;
    const wanted = new Set([...[...pin].sort((a, b) => a - b), ...(preload === 'all' ? this.#expertPieces.keys() : preload)]);
    for (const expert of wanted) {
      if (!(expert in this.#expertPieces)) throw new BudgetError(`expert ${expert}: the bundle has ${experts} experts, 0 to ${experts - 1}`);
    }
    for (const piece of this.#bundle.manifest.pieces) {
      if (piece.expert == null) this.#fixed.set(pieceName(piece), await this.#engine.load(piece));
    }
    for (const expert of wanted) await this.load(expert);
  }

  get manifest() {
    return this.#bundle.manifest;
  }

  get digest() {
    return this.#bundle.digest;
  }

  /** @param {number} expert */
  async load(expert) {
    this.#checkOpen();
    if (!(expert in this.#expertPieces)) throw new BudgetError(`expert ${expert}: the bundle has ${this.#expertPieces.length} experts`);
    await this.#residency.use(expert, async () => {});
  }

  /** @param {Piece[]} pieces */
  async #loadAll(pieces) {
    const loaded = [];
    try {
      for (const piece of pieces) loaded.push(await this.#engine.load(piece));
    } catch (error) {
      for (const piece of loaded) await piece.release();
      throw error;
    }
    return loaded;
  }

  /**
   * @param {any} source
   * @param {{top?: number, name?: string}} [options]
   * @returns {Promise<Prediction>}
   */
  async predict(source, { top = 5, name = 'image' } = {}) {
    this.#checkOpen();
    const { class_ids: ids, class_names: names, experts, routing } = this.manifest;
    const started = performance.now();
    const input = normalise(await this.pixels(source, name), this.manifest.preprocessing);
    const preprocess = performance.now() - started;
    const { logits, routed, times } = await this.#run(input, 1, null);
    const best = bestClasses(logits, Math.max(1, top)).map(({ index, probability }) => ({
      label: names[index], classId: ids[index], probability,
    }));
    const [expert = null] = routed.experts[0];
    return {
      label: best[0].label,
      probability: best[0].probability,
      top: best,
      expert,
      expertName: expert === null ? null : experts[expert].name,
      gate: routed.gates[0][0] ?? null,
      experts: routed.experts[0],
      gates: routed.gates[0],
      probabilities: routed.probabilities,
      logits,
      timings: routing ? { preprocess, ...times } : { preprocess, model: times.trunk },
    };
  }

  /**
   * @param {any} source
   * @param {string} [name]
   * @returns {Promise<Uint8Array>} RGB `[S, S, 3]`
   */
  async pixels(source, name = 'image') {
    const image = await this.#decode(source, name);
    try {
      return toPixels(image, this.manifest.preprocessing);
    } finally {
      image.close?.();
    }
  }

  /**
   * @param {Float32Array} batch
   * @param {{experts?: number[][]}} [options]
   * @returns {Promise<Batch>}
   */
  async run(batch, { experts } = {}) {
    this.#checkOpen();
    const side = this.manifest.preprocessing.size;
    const count = batch.length / (3 * side * side);
    if (!(batch instanceof Float32Array) || !Number.isInteger(count)) {
      throw new ImageError(`batch: expected a Float32Array of a multiple of 3 × ${side} × ${side} values`);
    }
    if (!batch.every(Number.isFinite)) throw new ImageError('batch: has values that are NaN or infinite');
    if (experts) this.#checkExperts(experts, count);
    if (!count) return { logits: new Float32Array(0), probabilities: null, experts: [], gates: [] };
    const { logits, routed } = await this.#run(batch, count, experts ?? null);
    return { logits, ...routed };
  }

  /**
   * @param {number[][]} experts
   * @param {number} count
   */
  #checkExperts(experts, count) {
    const { routing } = this.manifest;
    if (!routing) throw new ImageError('experts: a dense model has no experts to choose');
    const fine = experts.length === count && experts.every((chosen) =>
      chosen.length === routing.k && new Set(chosen).size === routing.k && chosen.every((expert) => expert in this.#expertPieces));
    if (!fine) throw new ImageError(`experts: expected ${routing.k} different ones of 0 to ${routing.experts - 1} for each of ${count} images`);
  }

  /**
   * @param {Float32Array} batch
   * @param {number} count
   * @param {number[][] | null} forced
   */
  async #run(batch, count, forced) {
    const { preprocessing: { size }, routing, class_names: names } = this.manifest;
    const started = performance.now();
    const times = { trunk: 0, load: 0, tail: 0 };
    const images = this.#engine.tensor(batch, [count, 3, size, size]);
    /** @type {{probabilities: Float32Array | null, experts: number[][], gates: number[][]}} */
    let routed = { probabilities: null, experts: Array(count).fill([]), gates: Array(count).fill([]) };
    let logits;
    if (!routing) {
      logits = values((await this.#fixed.get('model')?.run([images]))?.[0]);
      times.trunk = performance.now() - started;
    } else {
      const [tokens, fused] = await this.#piece('trunk').run([images]);
      const [probabilities] = fused ? [fused] : await this.#piece('router').run([tokens]);
      routed = this.#route(values(probabilities), count, forced);
      times.trunk = performance.now() - started;
      const run = routing.k === 1 ? this.#runTails : this.#runSegments;
      logits = await run.call(this, tokens, routed.experts, routed.gates, times);
    }
    for (let i = 0; i < count; i++) {
      if (!logitsAreFine(logits.subarray(i * names.length, (i + 1) * names.length))) throw this.#noAnswer(routed.experts[i], routed.gates[i]);
    }
    return { logits, routed, times };
  }

  /**
   * @param {Float32Array} probabilities
   * @param {number} count
   * @param {number[][] | null} forced
   */
  #route(probabilities, count, forced) {
    const { experts: number, k, router } = /** @type {import('./api.d.ts').Routing} */ (this.manifest.routing);
    const experts = [], gates = [];
    for (let i = 0; i < count; i++) {
      const row = probabilities.subarray(i * number, (i + 1) * number);
      const problem = probabilityProblem(row);
      if (problem) {
        const piece = this.#bundle.piece(router === 'fused' ? 'trunk' : 'router');
        throw new AnswerError(`${piece.graph}: ${pieceName(piece)} does not return probabilities: ${problem}; export again`);
      }
      experts.push(forced ? forced[i] : topK(row, k));
      gates.push(experts[i].map((expert) => row[expert]));
    }
    return { probabilities, experts, gates };
  }

  /**
   * k = 1: each expert's tail runs the images that were routed to it.
   * @param {Tensor} tokens
   * @param {number[][]} experts
   * @param {number[][]} gates
   * @param {Times} times
   */
  async #runTails(tokens, experts, gates, times) {
    const classes = this.manifest.class_names.length;
    const logits = new Float32Array(experts.length * classes);
    for (const expert of this.#residentFirst(experts)) {
      const rows = chosenBy(experts, expert);
      const [found] = await this.#use(expert, 0, [this.#rows(tokens, rows), this.#gates(rows, gates)], times);
      rows.forEach(({ image }, i) => logits.set(values(found).subarray(i * classes, (i + 1) * classes), image * classes));
    }
    return logits;
  }

  /**
   * k > 1: the chosen experts' outputs add up within each MoE layer.
   * @param {Tensor} tokens
   * @param {number[][]} experts
   * @param {number[][]} gates
   * @param {Times} times
   */
  async #runSegments(tokens, experts, gates, times) {
    const { moe_layers: layers } = /** @type {import('./api.d.ts').Routing} */ (this.manifest.routing);
    for (let layer = 0; layer < layers; layer++) {
      const [stream, input] = await this.#piece(`attention_${layer}`).run([tokens]);
      const sum = Float32Array.from(values(stream));
      const each = sum.length / experts.length;
      for (const expert of this.#residentFirst(experts)) {
        const rows = chosenBy(experts, expert);
        const [addend] = await this.#use(expert, layer, [this.#rows(input, rows), this.#gates(rows, gates)], times);
        rows.forEach(({ image }, i) => { for (let n = 0; n < each; n++) sum[image * each + n] += values(addend)[i * each + n]; });
      }
      tokens = this.#engine.tensor(sum, [...stream.dims]);
    }
    const [logits] = await this.#piece('head').run([tokens]);
    return values(logits);
  }

  /**
   * Runs one layer of an expert (a tail is layer 0), loading the expert first if needed.
   * @param {number} expert
   * @param {number} layer
   * @param {Tensor[]} inputs
   * @param {Times} times
   */
  async #use(expert, layer, inputs, times) {
    const started = performance.now();
    return this.#residency.use(expert, async (loaded) => {
      const ready = performance.now();
      const outputs = await loaded[layer].run(inputs);
      times.load += ready - started;
      times.tail += performance.now() - ready;
      return outputs;
    });
  }

  /**
   * Each expert of a batch once, resident ones first: loading another could evict them.
   * @param {number[][]} experts
   */
  #residentFirst(experts) {
    const each = [...new Set(experts.flat())].sort((a, b) => a - b);
    return each.sort((a, b) => Number(this.#residency.resident(b)) - Number(this.#residency.resident(a)));
  }

  /**
   * @param {Tensor} tensor
   * @param {{image: number}[]} rows
   */
  #rows(tensor, rows) {
    if (rows.length === tensor.dims[0]) return tensor;
    const each = values(tensor).length / tensor.dims[0];
    const result = new Float32Array(rows.length * each);
    rows.forEach(({ image }, i) => result.set(values(tensor).subarray(image * each, (image + 1) * each), i * each));
    return this.#engine.tensor(result, [rows.length, ...tensor.dims.slice(1)]);
  }

  /**
   * @param {{image: number, choice: number}[]} rows
   * @param {number[][]} gates
   */
  #gates(rows, gates) {
    return this.#engine.tensor(Float32Array.from(rows, ({ image, choice }) => gates[image][choice]), [rows.length]);
  }

  /** @param {string} name */
  #piece(name) {
    return /** @type {LoadedPiece} */ (this.#fixed.get(name));
  }

  /**
   * @param {number[]} experts
   * @param {number[]} gates
   */
  #noAnswer(experts, gates) {
    const { routing } = this.manifest;
    const last = routing?.k === 1 ? pieceName({ role: 'tail', expert: experts[0] }) : routing ? 'head' : 'model';
    const where = this.#bundle.piece(last).graph;
    return new AnswerError(`${where}: ${last} returned logits that are NaN or infinite; export again`, experts, gates);
  }

  /** Runs the bundle's self-test; see the API. */
  selftest() {
    this.#checkOpen();
    return selftest(this, (path) => this.#bundle.read(path));
  }

  /** What this runtime has done and holds. */
  stats() {
    const fixed = this.manifest.pieces.filter((piece) => piece.expert == null).reduce((sum, piece) => sum + piece.weight_bytes, 0);
    // in the swappable layout, what all experts share is loaded with the first one and then kept
    const shared = new Map(this.#expertPieces.flat().map((piece) => [piece.graph, piece.shared_bytes ?? 0]));
    const fixedBytes = [...shared.values()].reduce((sum, each) => sum + each, fixed);
    return { ...this.#residency.ledger(), fixedBytes, fetchedBytes: this.#bundle.fetchedBytes };
  }

  #checkOpen() {
    if (this.#closed) throw new BackendError('this runtime was closed');
  }

  /** Frees everything that is loaded. */
  async close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#bundle.close();
    await this.#residency.clear();
    for (const piece of this.#fixed.values()) await piece.release();
    await this.#engine.close();
  }
}

/**
 * Makes a runtime ready; what was loaded is freed if that fails.
 * @param {Bundle} bundle
 * @param {Engine} engine
 * @param {Decode} decode
 * @param {ResidencyOptions} options
 */
export async function openRuntime(bundle, engine, decode, options) {
  const runtime = new Runtime(bundle, engine, decode, options);
  try {
    await runtime.start(options);
  } catch (error) {
    await runtime.close();
    throw error;
  }
  return runtime;
}

/**
 * @param {Tensor | undefined} tensor
 * @returns {Float32Array}
 */
const values = (tensor) => /** @type {Float32Array} */ (tensor?.data);

/**
 * The images that chose an expert, and as which choice.
 * @param {number[][]} experts
 * @param {number} expert
 */
function chosenBy(experts, expert) {
  return experts.map((chosen, image) => ({ image, choice: chosen.indexOf(expert) })).filter(({ choice }) => choice >= 0);
}
