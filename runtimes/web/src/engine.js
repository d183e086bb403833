// ONNX Runtime: a session per piece, one call at a time. Works with onnxruntime-web and onnxruntime-node alike.

import { BackendError } from './errors.js';
import { pieceName } from './manifest.js';
import { firstLine } from './text.js';

/** @import { Bundle } from './bundle.js' */
/** @import { Piece, Tensor, TensorSpec, Weight } from './api.d.ts' */

/**
 * A piece that is ready to run.
 * @typedef {object} LoadedPiece
 * @property {(inputs: Tensor[]) => Promise<Tensor[]>} run inputs and outputs are in the manifest's order
 * @property {() => Promise<void>} release
 */

const ARRAYS = { float32: Float32Array, int8: Int8Array, uint8: Uint8Array };

let last = Promise.resolve();

/**
 * Calls `work` when all earlier calls are done. Sessions share one heap, and WebGPU breaks when two run at once
 * (https://github.com/microsoft/onnxruntime/issues/32561).
 * @template Result
 * @param {() => Promise<Result>} work
 * @returns {Promise<Result>}
 */
export function inTurn(work) {
  const result = last.then(work);
  last = result.then(() => {}, () => {});
  return result;
}

export class Engine {
  #ort;
  #bundle;
  #options;
  /** @type {Map<string, Promise<any>>} sessions of graphs that take weights as inputs, each made once */
  #swapping = new Map();

  /**
   * @param {any} ort the module onnxruntime-web or onnxruntime-node
   * @param {Bundle} bundle
   * @param {object} options of `InferenceSession.create`, such as executionProviders
   */
  constructor(ort, bundle, options) {
    this.#ort = ort;
    this.#bundle = bundle;
    this.#options = options;
  }

  /**
   * @param {Float32Array} data
   * @param {number[]} dims
   * @returns {Tensor}
   */
  tensor(data, dims) {
    return new this.#ort.Tensor('float32', data, dims);
  }

  /**
   * Reads a piece's files and makes it ready to run.
   * @param {Piece} piece
   * @returns {Promise<LoadedPiece>}
   */
  async load(piece) {
    if (!piece.weights?.length) {
      const session = await this.#session(piece);
      return { run: (inputs) => this.#run(piece, session, inputs, {}), release: () => inTurn(() => session.release()) };
    }
    let making = this.#swapping.get(piece.graph);
    if (!making) {
      making = this.#session(piece);
      this.#swapping.set(piece.graph, making);
      making.catch(() => this.#swapping.delete(piece.graph));
    }
    const session = await making;
    const weights = await this.#weights(piece.weights);
    return { run: (inputs) => this.#run(piece, session, inputs, weights), release: async () => {} };
  }

  /** @param {Piece} piece */
  async #session(piece) {
    const swapped = new Set(piece.weights?.map((weight) => weight.file));
    const folder = piece.graph.slice(0, piece.graph.lastIndexOf('/') + 1);
    const graph = await this.#bundle.read(piece.graph);
    const externalData = [];
    for (const path of piece.files) {
      if (path === piece.graph || swapped.has(path)) continue;
      // the engine finds the data by the path that the graph gives, which is relative to the graph
      externalData.push({ path: path.startsWith(folder) ? path.slice(folder.length) : path, data: await this.#bundle.read(path) });
    }
    const options = {
      ...this.#options,
      externalData,
      graphOptimizationLevel: piece.optimised ? 'disabled' : 'all',
      logSeverityLevel: 3,  // errors: it warns of every initialiser that the graph also lists as an input
    };
    let session;
    try {
      session = await inTurn(() => this.#ort.InferenceSession.create(graph, options));
    } catch (error) {
      throw new BackendError(`${piece.graph}: onnxruntime cannot load it (${firstLine(error)})`, { cause: error });
    }
    this.#checkSignature(piece, session);
    return session;
  }

  /**
   * @param {Piece} piece
   * @param {any} session
   */
  #checkSignature(piece, session) {
    const inputs = [...piece.inputs, ...(piece.weights ?? [])];
    for (const [what, found, specs] of [['takes inputs', session.inputNames, inputs], ['has outputs', session.outputNames, piece.outputs]]) {
      const names = specs.map((/** @type {{name: string}} */ spec) => spec.name);
      if (String(found) !== String(names)) throw new BackendError(`${piece.graph}: ${what} ${found}, manifest.json says ${names}`);
    }
  }

  /** @param {Weight[]} weights */
  async #weights(weights) {
    /** @type {Record<string, Tensor>} */
    const tensors = {};
    const files = new Map();
    for (const { file } of weights) if (!files.has(file)) files.set(file, await this.#bundle.read(file));
    for (const { name, file, offset, shape, dtype = 'float32' } of weights) {
      const bytes = files.get(file);
      const count = shape.reduce((product, each) => product * each, 1);
      tensors[name] = new this.#ort.Tensor(dtype, new ARRAYS[dtype](bytes.buffer, bytes.byteOffset + offset, count), shape);
    }
    return tensors;
  }

  /**
   * @param {Piece} piece
   * @param {any} session
   * @param {Tensor[]} inputs
   * @param {Record<string, Tensor>} weights
   * @returns {Promise<Tensor[]>}
   */
  async #run(piece, session, inputs, weights) {
    const batch = inputs[0].dims[0];
    if (piece.inputs[0].shape[0] === 1 && batch > 1) return this.#runOneByOne(piece, session, inputs, weights);
    const feeds = { ...weights };
    piece.inputs.forEach((spec, i) => { feeds[spec.name] = inputs[i]; });
    let outputs;
    try {
      outputs = await inTurn(() => session.run(feeds));
    } catch (error) {
      throw new BackendError(`${piece.graph}: ${pieceName(piece)} failed in onnxruntime (${firstLine(error)})`, { cause: error });
    }
    const results = piece.outputs.map((spec) => outputs[spec.name]);
    const bad = piece.outputs.find((spec, i) => !matches(results[i], spec, batch));
    if (bad) throw new BackendError(`${piece.graph}: ${pieceName(piece)} returned another ${bad.name} than manifest.json says; export again`);
    return results;
  }

  /**
   * Runs a batch through a graph that takes one image at a time.
   * @param {Piece} piece
   * @param {any} session
   * @param {Tensor[]} inputs
   * @param {Record<string, Tensor>} weights
   * @returns {Promise<Tensor[]>}
   */
  async #runOneByOne(piece, session, inputs, weights) {
    const batch = inputs[0].dims[0];
    /** @type {Tensor[][]} */
    const parts = [];
    for (let i = 0; i < batch; i++) {
      const one = inputs.map(({ data, dims }) => {
        const values = /** @type {Float32Array} */ (data), size = values.length / batch;
        return this.tensor(values.subarray(i * size, (i + 1) * size), [1, ...dims.slice(1)]);
      });
      parts.push(await this.#run(piece, session, one, weights));
    }
    return parts[0].map(({ type, data, dims }, output) => {
      const size = /** @type {any} */ (data).length, joined = new /** @type {any} */ (data).constructor(batch * size);
      parts.forEach((part, i) => joined.set(part[output].data, i * size));
      return new this.#ort.Tensor(type, joined, [batch, ...dims.slice(1)]);
    });
  }

  /** Frees the graphs that experts share. */
  async close() {
    const making = [...this.#swapping.values()];
    this.#swapping.clear();
    for (const session of await Promise.all(making)) await inTurn(() => session.release());
  }
}

/**
 * @param {Tensor} tensor
 * @param {TensorSpec} spec
 * @param {number} batch
 */
function matches(tensor, { shape, dtype }, batch) {
  const dims = [batch, ...shape.slice(1)];
  return tensor.type === dtype && tensor.dims.length === dims.length && tensor.dims.every((each, i) => each === dims[i] || typeof dims[i] === 'string');
}
