// The cases that a bundle carries, and the verdict on them: decoding and resampling by hash, the route, the gate, and
// the logits within the bundle's own tolerance.

import { AnswerError, BundleError } from './errors.js';
import { normalise } from './pixels.js';
import { sha256 } from './sha256.js';

/** @import { CaseResult, Stage, Verdict } from './api.d.ts' */
/** @import { Runtime } from './runtime.js' */

/** @typedef {{image: string, pixels: string, experts: number[], gates: number[], logits: Float32Array}} Case */

/** A class whose expected logit lies further below the best one is not compared: its probability is 0 in float32. */
const FAR_BELOW = 100;

const MAX_BYTES = 32 << 20;

/**
 * @param {Runtime} runtime
 * @param {(path: string) => Promise<Uint8Array>} read
 * @returns {Promise<Verdict>}
 */
export async function selftest(runtime, read) {
  const { manifest } = runtime;
  if (!manifest.selftest) throw new BundleError('the bundle has no self-test; export it again');
  const size = manifest.files.find((file) => file.path === manifest.selftest)?.bytes ?? 0;
  if (size > MAX_BYTES) throw new BundleError(`${manifest.selftest}: is larger than 32 MiB; not a self-test`);
  const { cases, tolerance } = parse(await read(manifest.selftest), manifest);
  /** @type {Record<Stage, number>} */
  const limits = { pixels: 0, route: 0, ...tolerance };
  /** @type {Stage[]} */
  const stages = manifest.routing ? ['pixels', 'route', 'gate', 'logits'] : ['pixels', 'logits'];
  /** @type {Record<Stage, number>[]} */
  const departures = [];
  const results = [];
  for (const each of cases) {
    const { result, departure } = await judge(runtime, each, await read(each.image));
    const failed = stages.find((stage) => !(departure[stage] <= limits[stage])) ?? null;  // NaN fails too
    results.push({ ...result, failed });
    departures.push(departure);
  }
  const judged = stages.map((stage) => ({
    stage,
    cases: cases.length,
    passed: departures.filter((departure) => departure[stage] <= limits[stage]).length,
    departure: stage in tolerance ? Math.max(...departures.map((departure) => departure[stage])) : null,
    tolerance: stage in tolerance ? limits[stage] : null,
  }));
  const failed = judged.find((stage) => stage.passed < stage.cases)?.stage ?? null;
  return { passed: failed === null, failed, stages: judged, cases: results };
}

/**
 * @param {Runtime} runtime
 * @param {Case} wanted
 * @param {Uint8Array} image
 */
async function judge(runtime, wanted, image) {
  const pixels = await runtime.pixels(new Blob([/** @type {BlobPart} */ (image)]), wanted.image);
  const { experts, gates, logits } = await answer(runtime, normalise(pixels, runtime.manifest.preprocessing));
  const departure = {
    pixels: Number((await sha256(pixels)) !== wanted.pixels),
    route: Number(String(experts) !== String(wanted.experts)),
    gate: gates.length < wanted.gates.length ? Infinity : Math.max(0, ...gates.map((gate, i) => Math.abs(gate - wanted.gates[i]))),
    logits: logitsDeparture(logits, wanted.logits),
  };
  /** @type {Omit<CaseResult, 'failed'>} */
  const result = { image: wanted.image, pixels: !departure.pixels, experts, expected: wanted.experts, gate: departure.gate, logits: departure.logits };
  return { result, departure };
}

/**
 * What the runtime answers; what cannot be an answer is judged, too.
 * @param {Runtime} runtime
 * @param {Float32Array} input
 */
async function answer(runtime, input) {
  try {
    const { experts: [experts], gates: [gates], logits } = await runtime.run(input);
    return { experts, gates, logits };
  } catch (error) {
    if (!(error instanceof AnswerError)) throw error;
    return { experts: error.experts, gates: error.gates, logits: new Float32Array(runtime.manifest.class_names.length).fill(NaN) };
  }
}

/**
 * @param {Uint8Array} bytes
 * @param {import('./api.d.ts').Manifest} manifest
 * @returns {{cases: Case[], tolerance: {gate: number, logits: number}}}
 */
function parse(bytes, { selftest: path, routing, class_names: names, files }) {
  const known = new Set(files.map((file) => file.path));
  const experts = routing?.experts ?? 0, k = routing?.k ?? 0;
  const bound = (/** @type {any} */ value) => typeof value === 'number' && value > 0 && value <= 10;
  const fits = (/** @type {any} */ each) => has(each, 'image', 'pixels', 'experts', 'gates', 'logits')
    && known.has(each.image) && typeof each.pixels === 'string' && /^[0-9a-f]{64}$/.test(each.pixels)
    && each.experts.length === k && each.experts.every((/** @type {any} */ e) => Number.isInteger(e) && e >= 0 && e < experts)
    && each.gates.length === k && each.gates.every((/** @type {any} */ g) => typeof g === 'number' && g >= 0 && g <= 1.001)
    && each.logits.length === names.length && Number.isFinite(each.logits.reduce((/** @type {number} */ a, /** @type {number} */ b) => Math.max(a, b), -Infinity));
  try {
    const read = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
    const { cases, tolerance } = read;
    for (const each of cases) each.logits = floats(each.logits);
    if (has(read, 'cases', 'tolerance') && has(tolerance, 'gate', 'logits') && bound(tolerance.gate) && bound(tolerance.logits)
      && cases.length && cases.every(fits)) return { cases, tolerance };
  } catch {
    // said below
  }
  throw new BundleError(`${path}: not a self-test of this bundle; export again`);
}

/**
 * Whether an object has just these fields.
 * @param {any} value
 * @param {string[]} fields
 */
function has(value, ...fields) {
  return Object.keys(value).length === fields.length && fields.every((field) => Object.hasOwn(value, field));
}

/**
 * @param {string} base64 little-endian float32
 * @returns {Float32Array}
 */
function floats(base64) {
  return new Float32Array(Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer);
}

/**
 * The largest departure of a logit, after its own mean is taken from either side, in units of the standard deviation of the
 * expected ones.
 * @param {Float32Array} found
 * @param {Float32Array} expected
 */
export function logitsDeparture(found, expected) {
  const least = expected.reduce((peak, value) => Math.max(peak, value), -Infinity) - FAR_BELOW;
  let compared = [...expected.keys()].filter((i) => expected[i] >= least);
  if (compared.length < 2) compared = [...expected.keys()].filter((i) => Number.isFinite(expected[i]));
  const wanted = centred(compared.map((i) => expected[i]));
  const got = centred(compared.map((i) => found[i]));
  if (!got.every(Number.isFinite)) return Infinity;
  const worst = Math.max(0, ...got.map((value, i) => Math.abs(value - wanted[i])));
  const spread = Math.sqrt(wanted.reduce((sum, value) => sum + value * value, 0) / wanted.length);
  return spread > 0 ? worst / spread : worst ? Infinity : 0;
}

/** @param {number[]} values */
function centred(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return values.map((value) => value - mean);
}
