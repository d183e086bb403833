// Files of a bundle behind an address, by fetch, which browsers and node share.

import { BundleError } from './errors.js';
import { firstLine } from './text.js';

/** @import { ReadOptions, Source } from './bundle.js' */

const ATTEMPTS = 3;

/** A transfer that broke and may go better the next time. */
class Broken extends Error {}

/**
 * @param {string} address of the bundle's folder
 * @param {{timeout?: number}} [options] seconds without a byte after which a transfer counts as broken
 * @returns {Source}
 */
export function httpSource(address, { timeout = 30 } = {}) {
  const base = address.replace(/[?#].*$/, '').replace(/\/+$/, '').replace(/\/manifest\.json$/, '');
  return {
    name: base,
    mayBeStale: true,
    async read(path, options) {
      const url = `${base}/${path.split('/').map(encodeURIComponent).join('/')}`;
      /** @type {Transfer} */
      const transfer = { url, path, chunks: [], got: 0, answered: false };
      for (let attempt = 1; ; attempt++) {
        try {
          return await receive(transfer, options, timeout);
        } catch (error) {
          if (!(error instanceof Broken)) throw error;
          if (attempt < ATTEMPTS && !options.signal.aborted && transfer.answered) continue;
          const reason = `${path}: cannot be fetched (${error.message}); check the connection and try again`;
          throw Object.assign(new BundleError(reason, { cause: error.cause }), { unreachable: !transfer.answered });
        }
      }
    },
  };
}

/** @typedef {{url: string, path: string, chunks: Uint8Array[], got: number, answered: boolean}} Transfer */

/**
 * Fetches a file, or the rest of one whose transfer broke.
 * @param {Transfer} transfer
 * @param {ReadOptions} options
 * @param {number} timeout
 */
async function receive(transfer, { most, fresh, signal, onprogress }, timeout) {
  const stalled = new AbortController();
  const give = () => stalled.abort(new Error(`no data for ${timeout} s`));
  let timer = setTimeout(give, 1000 * timeout);
  const forward = () => stalled.abort(signal.reason);
  signal.addEventListener('abort', forward);
  try {
    const headers = transfer.got ? { Range: `bytes=${transfer.got}-` } : undefined;
    const response = await attempt(() => fetch(transfer.url, { headers, cache: fresh ? 'no-cache' : 'default', signal: stalled.signal }));
    check(response, transfer);
    transfer.answered = true;  // when it breaks now, what had arrived may be lost on its way through the browser
    const reader = response.body?.getReader();
    for (;;) {
      const { done, value } = await attempt(async () => (await reader?.read()) ?? { done: true, value: undefined });
      if (done || !value) break;
      clearTimeout(timer);
      timer = setTimeout(give, 1000 * timeout);
      transfer.chunks.push(value);
      transfer.got += value.length;
      if (transfer.got > most) throw new BundleError(`${transfer.path}: is longer than the ${most} bytes expected; the file is damaged, copy it again`);
      onprogress?.(transfer.got);
    }
    const length = Number(response.headers.get('content-length'));
    // an encoded body is longer than its length says
    if (response.status === 200 && length > transfer.got && !response.headers.get('content-encoding')) throw new Broken('it ended early');
    return joined(transfer.chunks, transfer.got);
  } finally {
    clearTimeout(timer);
    signal.removeEventListener('abort', forward);
  }
}

/**
 * @template Result
 * @param {() => Promise<Result>} step
 */
async function attempt(step) {
  try {
    return await step();
  } catch (error) {
    throw new Broken(firstLine(error), { cause: error });
  }
}

/**
 * @param {Response} response
 * @param {Transfer} transfer
 */
function check(response, transfer) {
  if (response.status === 404 || response.status === 410) {
    const message = `${transfer.path}: missing from the bundle (HTTP ${response.status}); copy it there or export again`;
    throw Object.assign(new BundleError(message), { missing: true });
  }
  if (response.status >= 500) throw new Broken(`HTTP ${response.status}`);
  if (!response.ok) throw new BundleError(`${transfer.path}: HTTP ${response.status} from ${transfer.url}`);
  const start = /^bytes (\d+)-/.exec(response.headers.get('content-range') ?? '')?.[1];
  if (response.status !== 206 || Number(start) !== transfer.got) {
    transfer.chunks.length = transfer.got = 0;  // the server sends the whole file
    if (response.status === 206) throw new Broken('the server sent another part');
  }
}

/**
 * @param {Uint8Array[]} chunks
 * @param {number} length
 */
function joined(chunks, length) {
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}
