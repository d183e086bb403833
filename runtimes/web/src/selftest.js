// The cases that a bundle carries, and the verdict on them: decoding and resampling by hash, the route, the gate, and
// the logits within the bundle's own tolerance.

import { BundleError } from './errors.js';
import { normalise } from './pixels.js';
import { sha256 } from './sha256.js';

/** @import { CaseResult, Stage, Verdict } from './api.d.ts' */
/** @import { Runtime } from './runtime.js' */

/** @typedef {{image: string, pixels: string, experts: number[], gates: number[], logits: Float32Array}} Case */

/** A class whose expected logit lies further below the best one is not compared: its probability is 0 in float32. */
const FAR_BELOW = 100;

/**
 * @param {Runtime} runtime
 * @param {(path: string) => Promise<Uint8Array>} read
 * @returns {Promise<Verdict>}
 */
export async function selftest(runtime, read) {
  const { manifest } = runtime;
  if (!manifest.selftest) throw new BundleError('the bundle has no self-test; export it again');
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
  const found = await runtime.run(normalise(pixels, runtime.manifest.preprocessing));
  const [experts] = found.experts;
  const departure = {
    pixels: Number((await sha256(pixels)) !== wanted.pixels),
    route: Number(String(experts) !== String(wanted.experts)),
    gate: Math.max(0, ...found.gates[0].map((gate, i) => Math.abs(gate - wanted.gates[i]))),
    logits: logitsDeparture(found.logits, wanted.logits),
  };
  /** @type {Omit<CaseResult, 'failed'>} */
  const result = { image: wanted.image, pixels: !departure.pixels, experts, expected: wanted.experts, gate: departure.gate, logits: departure.logits };
  return { result, departure };
}

/**
 * @param {Uint8Array} bytes
 * @param {import('./api.d.ts').Manifest} manifest
 * @returns {{cases: Case[], tolerance: {gate: number, logits: number}}}
 */
function parse(bytes, { selftest: path, routing, class_names: names, files }) {
  const known = new Set(files.map((file) => file.path));
  try {
    const { cases, tolerance } = JSON.parse(new TextDecoder().decode(bytes));
    const read = cases.map((/** @type {any} */ each) => ({ ...each, logits: floats(each.logits) }));
    const k = routing?.k ?? 0;
    const fits = read.every((/** @type {Case} */ each) => known.has(each.image) && each.experts.length === k && each.gates.length === k
      && each.logits.length === names.length && typeof each.pixels === 'string');
    if (fits && read.length && tolerance.gate > 0 && tolerance.logits > 0) return { cases: read, tolerance };
  } catch {
    // said below
  }
  throw new BundleError(`${path}: not a self-test of this bundle; export again`);
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
