// What a manifest may say, and what is refused before any other file is opened. docs/bundle-format.md has the rules; a
// test holds them against Python's.

import { BackendError, BundleError } from './errors.js';

/** @import { Manifest, Piece, Routing, TensorSpec } from './api.d.ts' */

export const READABLE = [1, 2, 3, 4, 5];
export const MAX_MANIFEST_BYTES = 32 << 20;
const ALIGNMENT = 64;

/** @typedef {(value: any, at: string) => void} Check throws a BundleError where a value is not as it should be */

/**
 * @param {string} at
 * @param {string} problem
 * @returns {never}
 */
function fail(at, problem) {
  throw new BundleError(`manifest.json: ${problem} - at ${at}`);
}

/** @type {(test: (value: any) => boolean, what: string) => Check} */
const is = (test, what) => (value, at) => { if (!test(value)) fail(at, `expected ${what}`); };

/** @type {(low: number, high: number) => Check} */
const whole = (low, high) => is((v) => Number.isInteger(v) && v >= low && v <= high, `a whole number from ${low} to ${high}`);

/** @type {(test: (value: number) => boolean, what: string) => Check} */
const number = (test, what) => is((v) => typeof v === 'number' && test(v), what);

/** @type {(...choices: (string | number)[]) => Check} */
const oneOf = (...choices) => is((v) => choices.includes(v), `one of ${choices.join(', ')}`);

/** @type {(check: Check) => Check} */
const orNull = (check) => (value, at) => { if (value !== null) check(value, at); };

/** @type {(item: Check, most?: number, least?: number) => Check} */
const list = (item, most = Infinity, least = 0) => (value, at) => {
  if (!Array.isArray(value)) fail(at, 'expected a list');
  if (value.length > most || value.length < least) fail(at, `expected ${least} to ${most} entries, there are ${value.length}`);
  value.forEach((each, i) => item(each, `${at}[${i}]`));
};

/** @type {(value: any) => boolean} */
const isMap = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);
const map = is(isMap, 'an object');
const text = is((v) => typeof v === 'string', 'a string');
const bool = is((v) => typeof v === 'boolean', 'true or false');

/** @type {(longest: number) => Check} */
const shortText = (longest) => is((v) => typeof v === 'string' && [...v].length <= longest, `a string of at most ${longest} characters`);

/**
 * An object with just these fields.
 * @type {(required: Record<string, Check>, optional?: Record<string, Check>) => Check}
 */
const record = (required, optional = {}) => {
  const known = new Map(Object.entries({ ...required, ...optional }));
  return (value, at) => {
    map(value, at);
    for (const [key, entry] of Object.entries(value)) {
      const check = known.get(key);
      if (check) check(entry, `${at}.${key}`);
      else fail(at, `unknown field ${JSON.stringify(key.slice(0, 100))}`);
    }
    for (const key of Object.keys(required)) if (!Object.hasOwn(value, key)) fail(at, `lacks the field ${key}`);
  };
};

const index = whole(0, 65535), atLeastOne = whole(1, 65535), count = whole(0, 2 ** 50), extent = whole(1, 2 ** 32);
const shape = list((value, at) => { if (typeof value !== 'string') extent(value, at); }, 8);
const hash = is((v) => typeof v === 'string' && /^[0-9a-f]{64}$/.test(v), '64 hexadecimal digits');
const tensor = record({ name: text, shape, dtype: text });
const three = (/** @type {Check} */ each) => list(each, 3, 3);

const manifestFields = record({
  format: oneOf('mvmoe-bundle'),
  version: oneOf(...READABLE),
  target: text,
  layout: text,
  precision: text,
  model: map,
  routing: orNull(record(
    { experts: atLeastOne, k: atLeastOne, moe_layers: atLeastOne, router: oneOf('fused', 'separate') },
    { gate: oneOf('softmax') },
  )),
  preprocessing: record({ size: whole(1, 4096) }, {
    crop: number((v) => v > 0 && v <= 1, 'a number above 0, at most 1'),
    interpolation: oneOf('bilinear', 'bicubic'),
    mean: three(number((v) => v >= 0 && v <= 1, 'a number from 0 to 1')),
    std: three(number((v) => v > 0 && v <= 1000, 'a number above 0, at most 1000')),
  }),
  class_ids: list(text),
  class_names: list(text),
  experts: list(record({ name: text, classes: list(index) })),
  files: list(record({ path: shortText(1024), bytes: count, sha256: hash })),
  pieces: list(record(
    {
      role: oneOf('model', 'trunk', 'router', 'tail', 'attention', 'expert_layer', 'head'),
      graph: text, files: list(text), inputs: list(tensor), outputs: list(tensor),
      parameters: count, weight_bytes: count, flops: orNull(count),
    },
    {
      expert: orNull(index), layer: orNull(index), function: orNull(text), optimised: bool,
      weights: list(record({ name: text, shape: list(extent, 8), file: text, offset: count }, { dtype: oneOf('float32', 'int8', 'uint8') })),
      shared_bytes: count,
    },
  )),
  verification: map,
  source: record({ checkpoint: text, sha256: text }),
  tools: (value, at) => {
    map(value, at);
    for (const [key, entry] of Object.entries(value)) text(entry, `${at}.${key}`);
  },
}, { options: map, selftest: orNull(text) });

/**
 * Reads the bytes of `manifest.json`.
 * @param {Uint8Array} bytes
 * @returns {Manifest}
 */
export function parseManifest(bytes) {
  let raw;
  try {
    raw = JSON.parse(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes));
  } catch {
    throw new BundleError('manifest.json: damaged, not JSON; copy the bundle again or export again');
  }
  if (!isMap(raw) || raw.format !== 'mvmoe-bundle') {
    throw new BundleError('manifest.json: not a manifest of mvmoe-deploy (no format: "mvmoe-bundle")');
  }
  if (!READABLE.includes(raw.version)) {
    const version = String(JSON.stringify(raw.version)).slice(0, 20);
    throw new BundleError(`manifest.json: format version ${version}, this release reads ${READABLE.join(', ')}; export again`);
  }
  manifestFields(raw, '$');
  const problem = inconsistency(raw);
  if (problem) throw new BundleError(`manifest.json: ${problem}`);
  if (raw.target !== 'onnx') {
    throw new BackendError(`manifest.json: is an ${raw.target} bundle, and a browser runs onnx ones; export with --target onnx`);
  }
  return raw;
}

/**
 * A piece's name, as files and reports carry it.
 * @param {Pick<Piece, 'role' | 'expert' | 'layer'>} piece
 */
export function pieceName({ role, expert, layer }) {
  const of = `expert_${String(expert).padStart(2, '0')}`;
  if (role === 'tail') return of;
  if (role === 'expert_layer') return `${of}_layer_${layer}`;
  return role === 'attention' ? `attention_${layer}` : role;
}

/** @param {number[]} shape */
const size = (shape) => shape.reduce((product, each) => product * each, 1);

/** @type {(a: unknown, b: unknown) => boolean} */
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/**
 * Whether a path could lead out of the bundle, on any operating system.
 * @param {string} path
 */
function unsafe(path) {
  // eslint-disable-next-line no-control-regex
  return path.split('/').some((part) => ['', '.', '..'].includes(part)) || /[\\:\x00-\x1f]/.test(path);
}

/**
 * What is inconsistent in a manifest whose fields are of the right types; null if nothing is.
 * @param {Manifest} m
 * @returns {string | null}
 */
function inconsistency(m) {
  if (!['onnx', 'executorch', 'coreml'].includes(m.target)) return `target ${JSON.stringify(m.target.slice(0, 100))} is not known`;
  const sizes = new Map(m.files.map((file) => [file.path, file.bytes]));
  for (const path of [...sizes.keys(), ...m.pieces.map((piece) => piece.graph)]) {
    if (unsafe(path)) return `path ${JSON.stringify(path.slice(0, 200))} may lead outside the bundle`;
    const longest = Math.max(...path.split('/').map((part) => new TextEncoder().encode(part).length));
    if (longest > 255) return `path ${JSON.stringify(path.slice(0, 60))}… is longer than a file's name can be`;
  }
  if (sizes.size !== m.files.length) return 'lists a file twice';
  if (typeof m.selftest === 'string' && !sizes.has(m.selftest)) return `selftest ${m.selftest} is not among the files`;
  for (const piece of m.pieces) {
    const problem = fileProblem(piece, sizes) ?? weightProblem(piece, sizes) ?? signatureProblem(piece, m);
    if (problem) return `piece ${pieceName(piece)}: ${problem}`;
  }
  if (m.class_ids.length !== m.class_names.length) return `${m.class_ids.length} class_ids but ${m.class_names.length} class_names`;
  return routingProblem(m);
}

/**
 * @param {Piece} piece
 * @param {Map<string, number>} sizes
 */
function fileProblem({ role, expert, layer, files, graph }, sizes) {
  if ((expert != null) !== ['tail', 'expert_layer'].includes(role)) return `a ${role} ${expert == null ? 'needs an' : 'has no'} expert`;
  if ((layer != null) !== ['attention', 'expert_layer'].includes(role)) return `a ${role} ${layer == null ? 'needs a' : 'has no'} layer`;
  const unknown = files.find((path) => !sizes.has(path));
  if (unknown !== undefined || !files.length) return `uses ${unknown ?? 'no file'}, which is not among the files`;
  if (!files.some((path) => path === graph || path.startsWith(`${graph}/`))) return `does not list its graph ${graph} among its files`;
  return null;
}

/**
 * @param {Piece} piece
 * @param {Map<string, number>} sizes
 */
function weightProblem({ files, inputs, weights = [] }, sizes) {
  for (const { name, file, offset, shape, dtype } of weights) {
    if (!files.includes(file)) return `weight ${name} is in ${file}, which the piece does not list`;
    if (offset % ALIGNMENT || offset + (dtype === 'int8' || dtype === 'uint8' ? 1 : 4) * size(shape) > (sizes.get(file) ?? 0)) {
      return `weight ${name} lies outside ${file}, or across its alignment`;
    }
  }
  const names = [...inputs, ...weights].map((each) => each.name);
  return new Set(names).size === names.length ? null : 'names an input twice';
}

/**
 * What a piece's role does not allow in its inputs and outputs, which are used by their places.
 * @param {Piece} piece
 * @param {Manifest} m
 */
function signatureProblem({ role, inputs, outputs }, m) {
  const classes = m.class_names.length, experts = m.routing?.experts ?? 0, side = m.preprocessing.size;
  /** @type {Record<string, number[]>} */
  const shapes = { images: [3, side, side], logits: [classes], probabilities: [experts] };
  for (const { name, shape } of [...inputs, ...outputs]) {
    if (Object.hasOwn(shapes, name) && !same(shape.slice(1), shapes[name])) return `${name} is [${shape.slice(1)}], the rest says [${shapes[name]}]`;
  }
  const fused = role === 'trunk' && m.routing?.router === 'fused';
  const ins = ['tail', 'expert_layer'].includes(role) ? 2 : 1;
  if (inputs.length !== ins || !inputs.every((spec) => spec.shape.length)) return `a ${role} has ${ins} inputs, each with a shape`;
  const outs = { trunk: [fused ? 2 : 1], router: [1], attention: [2], expert_layer: [1] }[/** @type {string} */ (role)] ?? [1, 3];
  if (!outs.includes(outputs.length) || !outputs.every((spec) => spec.shape.length)) {
    return `a ${role} has ${outs.join(' or ')} outputs, each with a shape`;
  }
  const [first, ...ranked] = outputs.map((spec) => spec.shape.slice(1));
  if (role === 'router' || fused) {
    const last = ranked.at(-1) ?? first;
    if (!same(last, [experts])) return `its probabilities are [${last}], there are ${experts} experts`;
  } else if (['model', 'tail', 'head'].includes(role)) {
    if (!same(first, [classes])) return `its logits are [${first}], there are ${classes} classes`;
    const n = Number(ranked[0]?.[0]);
    if (ranked.length && !(same(ranked[0], [n]) && same(ranked[1], [n]) && n >= 1 && n <= Math.min(classes, 64))) {
      return `it ranks [${ranked[0]}] and [${ranked[1]}] of ${classes} classes`;
    }
  }
  const types = outputs.length === 3 ? ['float32', 'float32', 'int64'] : outputs.map(() => 'float32');
  const fits = inputs.every((spec) => spec.dtype === 'float32') && same(outputs.map((spec) => spec.dtype), types);
  return fits ? null : `its types are not ${types.join(', ')}, or an input is not float32`;
}

/** @param {Manifest} m */
function routingProblem(m) {
  const names = new Set(m.pieces.map(pieceName));
  const routing = m.routing;
  if (routing) {
    if (routing.k > routing.experts) return `routing: k is ${routing.k}, but there are only ${routing.experts} experts`;
    if (m.experts.length !== routing.experts) return `describes ${m.experts.length} experts, routing has ${routing.experts}`;
    const classes = m.class_names.length;
    if (m.experts.some((expert) => expert.classes.some((each) => each >= classes))) return 'an expert names a class that does not exist';
  }
  // counted first, because a list of all pieces of an absurd routing would not fit in memory
  const needed = routing ? expectedCount(routing) : 1;
  if (needed !== m.pieces.length) return `pieces do not fit the routing: there are ${m.pieces.length}, it needs ${needed}`;
  const missing = (routing ? expectedPieces(routing) : ['model']).find((name) => !names.has(name));
  return missing ? `pieces do not fit the routing: lacks ${missing}` : null;
}

/** @param {Routing} routing */
function expectedCount({ experts, k, moe_layers: layers, router }) {
  return 1 + Number(router === 'separate') + (k === 1 ? experts : layers * (1 + experts) + 1);
}

/** @param {Routing} routing */
function expectedPieces({ experts, k, moe_layers: layers, router }) {
  const names = ['trunk', ...(router === 'separate' ? ['router'] : [])];
  for (let layer = 0; layer < (k === 1 ? 1 : layers); layer++) {
    if (k > 1) names.push(`attention_${layer}`);
    for (let expert = 0; expert < experts; expert++) {
      names.push(pieceName(k === 1 ? { role: 'tail', expert } : { role: 'expert_layer', expert, layer }));
    }
  }
  return k === 1 ? names : [...names, 'head'];
}
