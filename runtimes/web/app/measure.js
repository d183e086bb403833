// Measures bundles on this device, and sends what it found to the command that serves this page.

import { engine, make, megabytes, milliseconds, verdictSentence, verdictTable } from './app.js';
import { load } from './mvmoe-deploy/index.js';
import { decodePng } from './mvmoe-deploy/png.js';
import { normalise } from './mvmoe-deploy/pixels.js';

const $ = (id) => document.getElementById(id);
const WINDOW = 10;  // rounds, whose medians are compared to see whether times have settled
const SETTLED = 0.05;
const MOST_WARMUP = 5000;  // milliseconds
const STEPS_OF_CLOCK = 20;  // that a sample has to be long
const MEMORY_PATIENCE = 60_000;  // milliseconds; Chrome answers after its next garbage collection
const USED = 100;  // predictions before memory is looked at again

const browserName = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
let plan, bundles, hidden = false;

/** Shows what will be measured, and waits for a tap. */
export async function offer(site) {
  plan = site.measure;
  bundles = site.bundles;
  const names = bundles.map(({ name }) => name);
  $('measure-about').textContent = `${names.join(', ')}: ${plan.rounds} rounds on ${plan.provider === 'webgpu' ? 'the graphics processor' : 'the processor'}. `
    + 'Keep this page in sight. Charge the phone and close other apps for steady times.';
  $('measure-start').addEventListener('click', () => measure(site));
}

async function measure(site) {
  $('measure-start').hidden = true;
  $('measure-progress').hidden = false;
  $('measure-status').textContent = 'Measuring …';
  $('measure-status').className = '';
  hidden = document.hidden;
  document.addEventListener('visibilitychange', () => { hidden ||= document.hidden; });
  const lock = await navigator.wakeLock?.request('screen').catch(() => null);
  try {
    const report = await everything(site);
    const { verdicts, ...sent } = report;
    const answer = await send('results', sent);
    if (!answer.ok) throw new Error(`the command refused the results: ${(await answer.json()).error}`);
    show(report);
    $('measure-status').textContent = 'Done. The results are on the computer that serves this page.';
  } catch (error) {
    $('measure-status').textContent = error.message;
    $('measure-status').className = 'failed';
    $('measure-start').hidden = false;
    if (!error.elsewhere) await send('failure', { error: `${error.name}: ${error.message}`.slice(0, 900) }).catch(() => {});
  } finally {
    $('measure-progress').hidden = true;
    await lock?.release();
  }
}

const send = (kind, body) => fetch(`${plan.report}/${browserName}/${kind}`, {
  method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body),
});

let told = 0;

/** Says how far it is, here and to the command, which thereby knows that this browser is at work. */
async function progress(what, done, total) {
  const [bar, words] = $('measure-progress').children;
  Object.assign(bar, { max: total, value: done });
  words.textContent = `${what}: ${done} of ${total}`;
  if (performance.now() - told < 500 && done) return;
  told = performance.now();
  const answer = await send('progress', { what, done, total });
  if (answer.status === 409) throw Object.assign(new Error((await answer.json()).error), { elsewhere: true });
  await new Promise((resolve) => setTimeout(resolve));  // lets the page draw
}

async function everything(site) {
  await progress('getting ready', 0, 1);
  const ort = await engine(plan.provider);
  const options = { ort, executionProvider: plan.provider, threads: plan.threads };
  const clock = clockStep();
  const models = [];
  for (const bundle of bundles) models.push({ ...bundle, url: new URL(bundle.url, location.href).href, pictures: await pictures(bundle.images) });
  const device = await describe(site);

  const found = new Map(models.map(({ name, digest }) => [name, { name, digest, selftest: [], hit: null, switch: null, memory: null }]));
  const kept = await selftests(models, found, options);
  const warm = await together(models, options, kept, clock);
  for (const [name, times] of warm) found.get(name).warm = times;
  for (const [key, times] of await hitAndSwitch(models, options, kept, clock)) {
    const [kind, name] = key;
    found.get(name)[kind] = times;
  }
  for (const [name, starts] of await coldStarts(models, options)) found.get(name).cold = starts;
  for (const model of models) found.get(model.name).memory = await memory(model, options);
  return {
    device, clock, hidden, threads: globalThis.crossOriginIsolated ? plan.threads : 1,
    bundles: [...found.values()].map(({ verdict, ...measured }) => measured),
    verdicts: [...found.values()].map(({ name, verdict }) => ({ name, verdict })),
  };
}

/** The smallest step of this page's clock, in milliseconds; browsers make it coarse. */
function clockStep() {
  let least = Infinity;
  for (let i = 0; i < 20; i++) {
    const before = performance.now();
    let after;
    do after = performance.now(); while (after === before);
    least = Math.min(least, after - before);
  }
  return least;
}

async function pictures(urls) {
  const decoded = [];
  for (const url of urls) {
    const { data, width, height } = await decodePng(new Uint8Array(await (await fetch(url)).arrayBuffer()), url);
    decoded.push({ data, width, height });
  }
  return decoded;
}

/** Runs each bundle's self-test, and keeps its files in memory for what follows. */
async function selftests(models, found, options) {
  const kept = new Map();
  const cache = { get: async (key) => kept.get(key), put: async (key, bytes) => { kept.set(key, bytes); } };
  for (const [i, model] of models.entries()) {
    await progress('self-test', i, models.length);
    const runtime = await load(model.url, { ...options, digest: model.digest, cache, preload: 'all' });
    try {
      if (!runtime.manifest.selftest) continue;
      const verdict = await runtime.selftest();
      Object.assign(found.get(model.name), { selftest: verdict.stages, verdict });
    } finally {
      await runtime.close();
    }
  }
  return cache;
}

/** All bundles in turn, every expert resident. */
async function together(models, options, cache, clock) {
  const runtimes = [];
  try {
    const candidates = new Map();
    for (const model of models) {
      const runtime = await load(model.url, { ...options, digest: model.digest, cache, preload: 'all' });
      runtimes.push(runtime);
      candidates.set(model.name, (number) => runtime.predict(model.pictures[number % model.pictures.length]));
    }
    return await interleave(candidates, 'latency', clock);
  } finally {
    for (const runtime of runtimes) await runtime.close();
  }
}

/** Forced experts: always the same one, or always another one, with room for one image's. */
async function hitAndSwitch(models, options, cache, clock) {
  const runtimes = [];
  try {
    const candidates = new Map();
    for (const { name, url, digest, k, experts, pictures } of models) {
      if (experts < 2 * k || !k) continue;
      for (const kind of ['hit', 'switch']) {
        const runtime = await load(url, { ...options, digest, cache, maxResident: k });
        runtimes.push(runtime);
        const inputs = pictures.map((picture) => normalise(rgb(picture), runtime.manifest.preprocessing));
        candidates.set([kind, name], (number) => {
          const first = kind === 'hit' ? 0 : number * k;
          const chosen = Array.from({ length: k }, (_, i) => (first + i) % experts);
          return runtime.run(inputs[number % inputs.length], { experts: [chosen] });
        });
      }
    }
    return candidates.size ? await interleave(candidates, 'hit and switch', clock) : new Map();
  } finally {
    for (const runtime of runtimes) await runtime.close();
  }
}

function rgb({ data, width, height }) {
  const result = new Uint8Array(3 * width * height);
  for (let i = 0, to = 0; i < data.length; i++) if ((i & 3) !== 3) result[to++] = data[i];
  return result;
}

/**
 * Times candidates in turn, in another order every round, so that whatever else the device does affects all alike. A
 * sample is the mean of as many calls as the clock's step needs.
 */
async function interleave(candidates, what, clock) {
  const keys = [...candidates.keys()];
  const counts = new Map(keys.map((key) => [key, 0]));
  const once = async (key) => {
    const number = counts.get(key);
    counts.set(key, number + 1);
    const before = performance.now();
    await candidates.get(key)(number);
    return performance.now() - before;
  };
  const round = async (repeats, into) => {
    for (const key of shuffled(keys)) {
      const number = counts.get(key), calls = repeats.get(key);
      counts.set(key, number + calls);
      const before = performance.now();
      for (let i = 0; i < calls; i++) await candidates.get(key)(number + i);
      into.get(key).push((performance.now() - before) / calls);
    }
  };
  const empty = () => new Map(keys.map((key) => [key, []]));

  const first = new Map();
  for (const key of keys) first.set(key, await once(key));
  const trial = empty();
  for (let i = 0; i < 5; i++) for (const key of shuffled(keys)) trial.get(key).push(await once(key));
  const least = (values) => Math.min(...values);  // a sample has to be long enough for the clock on a quiet device too
  const repeats = new Map(keys.map((key) => [key, Math.min(1000, Math.max(1, Math.ceil(STEPS_OF_CLOCK * clock / Math.max(least(trial.get(key)), clock / 5))))]));

  const warmup = empty(), began = performance.now();
  let stable = false, rounds = 0;
  while (!stable && (rounds < 2 * WINDOW || performance.now() - began < MOST_WARMUP)) {
    await progress(`${what}: warming up`, Math.min(rounds, 2 * WINDOW - 1), 2 * WINDOW);
    await round(repeats, warmup);
    rounds++;
    stable = rounds % WINDOW === 0 && keys.every((key) => settled(warmup.get(key)));
  }
  const samples = empty();
  for (let i = 0; i < plan.rounds; i++) {
    await progress(what, i, plan.rounds);
    await round(repeats, samples);
  }
  return new Map(keys.map((key) => [key, {
    first: first.get(key), warmup: 6 + rounds * repeats.get(key), stable, samples: samples.get(key), repeats: repeats.get(key),
  }]));
}

function shuffled(values) {
  const result = [...values];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function settled(values) {
  if (values.length < 2 * WINDOW) return false;
  return Math.abs(median(values.slice(-WINDOW)) / median(values.slice(-2 * WINDOW, -WINDOW)) - 1) <= SETTLED;
}

/** Starts in frames of their own, with bundles taking turns. */
async function coldStarts(models, options) {
  const { ort, ...plain } = options;
  const starts = new Map(models.map(({ name }) => [name, []]));
  const total = (plan.coldStarts + 1) * models.length;
  let done = 0;
  for (let i = -1; i < plan.coldStarts; i++) {
    for (const { name, url, digest, pictures } of shuffled(models)) {
      await progress('cold start', done++, total);
      const asked = performance.timeOrigin + performance.now();
      const frame = await openFrame();
      try {
        const steps = await frame.contentWindow.start({ asked, bundle: url, image: pictures[0], options: { ...plain, digest } });
        if (i >= 0) starts.get(name).push(steps);  // the first one fills the browser's cache with the engine
      } finally {
        frame.remove();
      }
    }
  }
  return starts;
}

let frames = 0;

async function openFrame() {
  const frame = make('iframe', { src: `frame.html?${++frames}`, className: 'visually-hidden', title: 'a fresh frame to measure in', tabIndex: -1 });
  const ready = new Promise((resolve, reject) => {
    frame.onload = resolve;
    frame.onerror = () => reject(new Error('a frame to measure in cannot be opened'));
  });
  document.body.append(frame);
  await ready;
  return frame;
}

/** Memory of a fresh frame, once loaded and after 100 predictions; null where the browser does not tell. */
async function memory({ name, url, digest, k, pictures }, options) {
  if (!plan.memory || !globalThis.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const { ort, ...plain } = options;
  const frame = await openFrame();
  const moment = async (step) => {
    await progress(`memory of ${name}, which takes up to a minute`, step, 2);
    const asked = performance.measureUserAgentSpecificMemory().catch(() => null);
    const told = await Promise.race([asked, new Promise((resolve) => setTimeout(resolve, MEMORY_PATIENCE, null))]);
    if (!told) return null;
    const own = told.breakdown.filter(({ attribution }) => attribution.some((each) => each.url === frame.contentWindow.location.href));
    const { resident, ledger } = frame.contentWindow.held();
    return { resident, ledger, bytes: own.reduce((sum, { bytes }) => sum + bytes, 0) };
  };
  try {
    await frame.contentWindow.open({ bundle: url, options: { ...plain, digest, ...(k ? { maxResident: k } : {}) } });
    const loaded = await moment(0);
    for (let i = 0; i < USED; i++) await frame.contentWindow.predict(pictures[i % pictures.length]);
    const used = loaded && await moment(1);
    return used && [loaded, used];
  } finally {
    frame.remove();
  }
}

/** What the browser tells of itself. Most of it is a claim that a browser may make vague. */
async function describe(site) {
  const wanted = ['model', 'platform', 'platformVersion', 'architecture', 'bitness', 'fullVersionList'];
  const hints = await navigator.userAgentData?.getHighEntropyValues?.(wanted).catch(() => null);
  const brand = hints?.fullVersionList?.findLast(({ brand }) => !/not.?a.?brand/i.test(brand));
  let adapter = null;
  if (plan.provider === 'webgpu') adapter = (await navigator.gpu?.requestAdapter())?.info;
  const system = hints ? `${hints.platform} ${hints.platformVersion}`.trim() : /\(([^)]*)\)/.exec(navigator.userAgent)?.[1];
  return {
    processor: hints?.model || [hints?.architecture, hints?.bitness].filter(Boolean).join(' ') || null,
    device: hints?.model || null,
    system: system ?? null,
    browser: brand ? `${brand.brand} ${brand.version}` : navigator.userAgent,
    cores: navigator.hardwareConcurrency ?? null,
    memory_gigabytes_at_least: navigator.deviceMemory ?? null,
    graphics: adapter ? [adapter.vendor, adapter.architecture, adapter.description].filter(Boolean).join(' ') : null,
    engine: site.engine,
    isolated: globalThis.crossOriginIsolated,
  };
}

/** The results, for whoever holds the phone. */
function show({ bundles: measured, verdicts }) {
  const base = measured[0].warm.samples;
  const ratio = (samples) => median(samples.map((sample, i) => sample / base[i])).toFixed(2);
  const parts = measured.flatMap(({ name, warm, switch: switched, cold, memory: held }, i) => {
    const rows = [
      ['a picture', milliseconds(median(warm.samples))],
      [`beside ${measured[0].name}`, i ? `× ${ratio(warm.samples)}` : null],
      ['with another expert', switched && milliseconds(median(switched.samples))],
      ['cold start', milliseconds(median(cold.map((each) => each.frame + each.imports + each.load + each.first_run)))],
      ['fetched at first', megabytes(cold[0].bytes)],
      ['memory', held && megabytes(held[1].bytes)],
    ].filter(([, value]) => value);
    const { verdict } = verdicts[i];
    return [
      make('h3', { text: name }),
      make('dl', {}, ...rows.flatMap(([what, value]) => [make('dt', { text: what }), make('dd', { text: value })])),
      ...(verdict ? [verdict.passed ? make('p', { text: verdictSentence(verdict) }) : verdictTable(verdict)] : []),
    ];
  });
  $('measure-results').replaceChildren(...parts);
}
