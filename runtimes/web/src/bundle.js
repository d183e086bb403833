// A bundle's files, wherever they come from: each is compared with the manifest before anything is made of it.

import { BundleError } from './errors.js';
import { MAX_MANIFEST_BYTES, parseManifest, pieceName } from './manifest.js';
import { sha256 } from './sha256.js';

/** @import { Cache, Manifest, Piece, Progress } from './api.d.ts' */

/**
 * Where files come from.
 * @typedef {object} Source
 * @property {string} name what to call the bundle in messages
 * @property {(path: string, options: ReadOptions) => Promise<Uint8Array>} read rejects with a BundleError that names the
 *   path; one whose `unreachable` is true means that the source itself cannot be reached just now
 * @property {boolean} [mayBeStale] whether something in between may keep old files, which `fresh` goes past
 */

/**
 * @typedef {object} ReadOptions
 * @property {number} most bytes above which the file is refused
 * @property {boolean} [fresh]
 * @property {AbortSignal} signal
 * @property {(loaded: number) => void} [onprogress]
 */

/**
 * @typedef {object} BundleOptions
 * @property {string} [digest] sha256 that `manifest.json` must have
 * @property {Cache | null} [cache]
 * @property {(progress: Progress) => void} [onprogress]
 */

const decoder = new TextDecoder();

export class Bundle {
  #source;
  #options;
  /** @type {Map<string, Promise<Uint8Array>>} files that are being read, and those that several pieces need */
  #reading = new Map();
  #abort = new AbortController();
  #files = new Map();
  fetchedBytes = 0;
  /** @type {Manifest} */
  manifest = /** @type {any} */ (null);
  digest = '';

  /**
   * @param {Source} source
   * @param {BundleOptions} options
   */
  constructor(source, options) {
    this.#source = source;
    this.#options = options;
  }

  get name() {
    return this.#source.name;
  }

  /**
   * Reads and checks the manifest; no other file is read.
   * @param {Source} source
   * @param {BundleOptions} [options]
   */
  static async open(source, options = {}) {
    const bundle = new Bundle(source, options);
    const bytes = await bundle.#readManifest();
    bundle.manifest = parseManifest(bytes);
    for (const file of bundle.manifest.files) bundle.#files.set(file.path, file);
    return bundle;
  }

  async #readManifest() {
    const { cache, digest } = this.#options;
    const key = `manifest of ${this.name}`;
    const kept = (await cache?.get(key)) ?? null;
    if (digest && kept && (await sha256(kept)) === digest.toLowerCase()) return this.#identify(kept);
    let bytes, recorded;
    try {
      bytes = await this.#download('manifest.json', MAX_MANIFEST_BYTES, true);
      recorded = await this.#recordedDigest(bytes);
    } catch (error) {
      if (!kept || !(/** @type {any} */ (error).unreachable)) throw error;
      return this.#identify(kept);  // it was checked when it was kept
    }
    await this.#identify(bytes);
    if (recorded !== null && recorded !== this.digest) {
      throw new BundleError('manifest.json: sha256 differs from manifest.sha256; the file is damaged, export again');
    }
    await cache?.put(key, bytes);
    return bytes;
  }

  /** @param {Uint8Array} bytes */
  async #identify(bytes) {
    this.digest = await sha256(bytes);
    const wanted = this.#options.digest;
    if (wanted && wanted.toLowerCase() !== this.digest) {
      throw new BundleError(`manifest.json: has sha256 ${this.digest}, but ${wanted} is asked for; it is another bundle, or damaged`);
    }
    return bytes;
  }

  /**
   * The digest in `manifest.sha256`, empty if the file has another form; null where an old bundle has no such file.
   * @param {Uint8Array} manifest
   */
  async #recordedDigest(manifest) {
    let line;
    try {
      line = decoder.decode(await this.#download('manifest.sha256', 1024, true));
    } catch (error) {
      const old = /"version"\s*:\s*[12]\b/.test(decoder.decode(manifest.subarray(0, 4096)));
      if (old && /** @type {any} */ (error).missing) return null;
      throw error;
    }
    return /^([0-9a-f]{64}) [ *]manifest\.json\r?\n?$/.exec(line)?.[1] ?? '';
  }

  /**
   * A piece of a role, expert and layer; the manifest was checked to have it.
   * @param {string} name as {@link pieceName} gives it
   * @returns {Piece}
   */
  piece(name) {
    return /** @type {Piece} */ (this.manifest.pieces.find((piece) => pieceName(piece) === name));
  }

  /**
   * A file's bytes, which have the manifest's size and sha256. A file that several pieces need is read once.
   * @param {string} path
   * @returns {Promise<Uint8Array>}
   */
  async read(path) {
    let reading = this.#reading.get(path);
    if (!reading) {
      reading = this.#readChecked(path);
      this.#reading.set(path, reading);
      const forget = () => this.#reading.delete(path);
      reading.then(this.manifest.pieces.filter((piece) => piece.files.includes(path)).length > 1 ? () => {} : forget, forget);
    }
    return reading;
  }

  /** @param {string} path */
  async #readChecked(path) {
    const file = this.#files.get(path);
    const { cache } = this.#options;
    const kept = await cache?.get(file.sha256);
    if (kept && (await sha256(kept)) === file.sha256) return kept;
    let bytes = await this.#download(path, file.bytes);
    if (this.#source.mayBeStale && (await this.#problem(bytes, file))) bytes = await this.#download(path, file.bytes, true);
    const problem = await this.#problem(bytes, file);
    if (problem) throw new BundleError(`${path}: ${problem}; the file is damaged, copy it again or export again`);
    await cache?.put(file.sha256, bytes);
    return bytes;
  }

  /**
   * @param {Uint8Array} bytes
   * @param {{bytes: number, sha256: string}} file
   */
  async #problem(bytes, file) {
    if (bytes.length !== file.bytes) return `has ${bytes.length} bytes, manifest.json says ${file.bytes}`;
    return (await sha256(bytes)) === file.sha256 ? null : 'sha256 differs from manifest.json';
  }

  /**
   * @param {string} path
   * @param {number} most
   * @param {boolean} [fresh]
   */
  async #download(path, most, fresh = false) {
    const { onprogress } = this.#options;
    const bytes = await this.#source.read(path, {
      most,
      fresh,
      signal: this.#abort.signal,
      onprogress: (loaded) => onprogress?.({ file: path, loaded, total: this.#files.get(path)?.bytes ?? null }),
    });
    this.fetchedBytes += bytes.length;
    return bytes;
  }

  /** Ends what is being read, and forgets what is kept. */
  close() {
    this.#abort.abort();
    this.#reading.clear();
  }
}
