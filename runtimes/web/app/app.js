// The page: what a picture shows, which expert was asked and why, and what that saved.

import { isKept } from './mvmoe-deploy/caches.js';
import { load } from './mvmoe-deploy/index.js';

const $ = (id) => document.getElementById(id);

/** An element with text, a class and children. */
export function make(tag, { text, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

export const megabytes = (bytes) => (bytes < 950_000 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`);
export const percent = (share) => (share > 0.999 && share < 1 ? 'over 99.9' : (100 * share).toFixed(share < 0.1 ? 1 : 0)) + ' %';
export const milliseconds = (time) => (time < 1000 ? `${time.toFixed(time < 10 ? 1 : 0)} ms` : `${(time / 1000).toFixed(1)} s`);

/** The engine's module; this page has no import map, which a strict content policy would not allow. */
export const engine = (provider) => import(provider === 'webgpu' ? './engine/ort.webgpu.min.mjs' : './engine/ort.wasm.min.mjs');

let site, runtime, last, offline = true, needed = new Set(), busy = Promise.resolve();

/** Says what went wrong, and offers to do it again. */
function complain(error, again) {
  $('problem').hidden = false;
  $('problem').querySelector('p').textContent = error.message ?? String(error);
  const button = $('problem').querySelector('button');
  button.hidden = !again;
  button.onclick = () => { $('problem').hidden = true; again(); };
}

/** One thing after the other; a failure is shown, and what follows goes on. */
function inTurn(work, again) {
  busy = busy.then(work).catch((error) => complain(error, again)).finally(() => { $('progress').hidden = true; });
  return busy;
}

function showProgress({ file, loaded, total }) {
  $('progress').hidden = loaded === total;
  const [bar, words] = $('progress').children;
  if (total) Object.assign(bar, { max: total, value: loaded });
  else bar.removeAttribute('value');
  words.textContent = `Fetching ${file}: ${megabytes(loaded)}${total ? ` of ${megabytes(total)}` : ''}`;
}

async function openBundle() {
  $('problem').hidden = true;
  await runtime?.close();
  runtime = null;
  const { url, digest } = site.bundles[$('bundle').selectedIndex];
  const provider = $('provider').value;
  $('hint').textContent = 'Fetching what every picture needs …';
  runtime = await load(new URL(url, location.href), {
    digest,
    ort: await engine(provider),
    executionProvider: provider,
    maxResident: Number($('resident').value) || null,
    onprogress: showProgress,
  });
  needed = new Set();
  last = null;
  for (const id of ['answer', 'times-card']) $(id).hidden = true;
  $('hint').textContent = 'Take a photo or choose pictures. They stay on this device.';
  $('verdict').replaceChildren();
  await showExperts();
  showBytes();
  await showDevice();
}

/** The files of what every picture needs, and of each expert alone, as sets of paths. */
function parts() {
  const { pieces, routing } = runtime.manifest;
  const files = (chosen) => new Set(chosen.flatMap((piece) => piece.files));
  const trunk = files(pieces.filter((piece) => piece.expert == null));
  const experts = Array.from({ length: routing?.experts ?? 0 }, (_, e) => files(pieces.filter((piece) => piece.expert === e)));
  const shared = new Set([...experts[0] ?? []].filter((path) => experts.length > 1 && experts.every((own) => own.has(path))));
  return { trunk, shared, experts: experts.map((own) => own.difference ? own.difference(shared) : new Set([...own].filter((path) => !shared.has(path)))) };
}

function size(paths) {
  const sizes = new Map(runtime.manifest.files.map((file) => [file.path, file.bytes]));
  return [...paths].reduce((sum, path) => sum + sizes.get(path), 0);
}

async function predict(source, name, thumbnail) {
  const before = runtime.stats();
  const seen = await runtime.predict(source, { name, top: 3 });
  const came = runtime.stats().fetchedBytes - before.fetchedBytes;
  for (const expert of seen.experts) needed.add(expert);
  last = seen;
  $('problem').hidden = true;
  showAnswer(seen);
  await showExperts();
  if (seen.experts.length) $('choice').textContent = `${chosenWords(seen)} ${arrival(seen, came)}`;
  showBytes();
  showTimes(seen.timings);
  if (thumbnail) remember(seen, thumbnail);
  return seen;
}

function bar(label, share) {
  return make('div', { className: 'row' }, label, make('span', { className: 'share', text: percent(share) }),
    make('span', { className: 'track', ariaHidden: 'true' }, Object.assign(make('span'), { style: `width: ${100 * share}%` })));
}

function showAnswer({ label, top }) {
  $('answer').hidden = false;
  $('label').textContent = label;
  $('top').replaceChildren(...top.map((score) => make('li', {}, bar(make('span', { text: score.label }), score.probability))));
}

const numbered = (expert) => {
  const { name } = runtime.manifest.experts[expert];
  return name && name !== `expert ${expert}` ? `${expert}: ${name}` : `${expert}`;
};

/** Every expert: its share of the last picture, and where it is. */
async function showExperts() {
  const { routing, files } = runtime.manifest;
  $('experts-card').hidden = !routing;
  if (!routing) return;
  const { resident } = runtime.stats();
  const own = parts().experts;
  const sums = new Map(files.map((file) => [file.path, file.sha256]));
  const items = [];
  for (const [expert, paths] of own.entries()) {
    const kept = !resident.includes(expert) && (await Promise.all([...paths].map((path) => isKept(sums.get(path))))).every(Boolean);
    const state = resident.includes(expert) ? ['memory', 'in memory'] : kept ? ['device', 'on this device']
      : needed.has(expert) ? ['', 'dropped'] : ['', `not fetched, ${megabytes(size(paths))}`];
    const chosen = last?.experts.includes(expert);
    const name = make('span', { className: 'name' }, make('span', { text: `${chosen ? '▸ ' : ''}${numbered(expert)}` }),
      make('span', { className: `state ${state[0]}`, text: state[1] }));
    const item = make('li', { className: chosen ? 'chosen' : '' }, last ? bar(name, last.probabilities[expert]) : name);
    if (chosen) item.setAttribute('aria-current', 'true');
    items.push(item);
  }
  $('experts').replaceChildren(...items);
}

function chosenWords({ experts, gates }) {
  if (experts.length > 1) return `The router picked experts ${experts.map(numbered).join(' and ')}.`;
  return `The router gave expert ${numbered(experts[0])} a probability of ${percent(gates[0])}, the highest of ${runtime.manifest.routing.experts}.`;
}

function arrival({ timings }, came) {
  if (came) return `It was fetched for this picture: ${megabytes(came)}.`;
  return timings.load > 0.5 ? 'It came from this device.' : 'It was in memory already.';
}

function showBytes() {
  const { trunk, shared, experts } = parts();
  const always = [...trunk, ...(needed.size ? shared : [])];
  const segments = [[size(always), true], [needed.size ? 0 : size(shared), false], ...experts.map((own, e) => [size(own), needed.has(e)])];
  const total = segments.reduce((sum, [bytes]) => sum + bytes, 0);
  const had = segments.filter(([, fetched]) => fetched).reduce((sum, [bytes]) => sum + bytes, 0);
  $('bytes-bar').replaceChildren(...segments.filter(([bytes]) => bytes).map(([bytes, fetched]) =>
    Object.assign(make('span', { className: fetched ? 'fetched' : '' }), { style: `flex: ${bytes}` })));
  const saved = total - had, network = runtime.stats().fetchedBytes;
  const words = [`${megabytes(had)} of ${megabytes(total)} were needed so far.`];
  if (experts.length) {
    const unused = experts.length - needed.size;
    words.push(unused ? `${unused} of ${experts.length} experts were not: that saved ${megabytes(saved)} (${percent(saved / total)}).` : 'Every expert was.');
  }
  words.push(network ? `This visit, ${megabytes(network)} came over the network.` : 'This visit, nothing came over the network.');
  $('bytes').textContent = words.join(' ');
}

const STEPS = { preprocess: 'preparing the picture', trunk: 'trunk and router', load: 'loading the expert', tail: 'expert', model: 'model' };

function showTimes(timings) {
  const steps = Object.keys(STEPS).filter((step) => step in timings);
  const total = steps.reduce((sum, step) => sum + timings[step], 0);
  $('times-card').hidden = false;
  $('times-bar').replaceChildren(...steps.map((step) => Object.assign(make('span'), { style: `flex: ${timings[step] || 1e-6}` })));
  const list = steps.flatMap((step) => [make('dt', { text: STEPS[step] }), make('dd', { text: milliseconds(timings[step]) })]);
  list.push(make('dt', { className: 'total', text: 'together' }), make('dd', { className: 'total', text: milliseconds(total) }));
  $('times').replaceChildren(...list);
}

async function showDevice() {
  const { residentBytes, fixedBytes, resident } = runtime.stats();
  const { manifest } = runtime;
  const rows = [
    ['model', `${manifest.precision}, ${manifest.layout}`],
    ['engine', site.engine],
    ['weights in memory', megabytes(fixedBytes + residentBytes)],
    ['experts in memory', manifest.routing ? `${resident.length} of ${manifest.routing.experts}` : null],
    ['digest', runtime.digest.slice(0, 12) + '…'],
  ].filter(([, value]) => value);
  $('device').replaceChildren(...rows.flatMap(([name, value]) => [make('dt', { text: name }), make('dd', { text: value })]));
  showStore();
  $('selftest').disabled = !manifest.selftest;
}

function showStore() {
  $('store').textContent = !globalThis.isSecureContext
    ? 'Over plain HTTP nothing can be kept between visits. Every file is still compared with its sha256.'
    : offline ? 'What was fetched is kept on this device and works offline.'
      : 'What was fetched is kept on this device, but this page cannot start offline: the browser does not allow it here.';
}

/** Keeps a small copy of a picture in the list. */
async function remember({ label, probability, experts }, picture) {
  $('seen-card').hidden = false;
  const small = document.createElement('canvas');
  small.width = small.height = 96;
  const side = Math.min(picture.naturalWidth, picture.naturalHeight);
  small.getContext('2d').drawImage(picture, (picture.naturalWidth - side) / 2, (picture.naturalHeight - side) / 2, side, side, 0, 0, 96, 96);
  const by = experts.length ? `expert ${experts.map(numbered).join(', ')}` : '';
  $('seen').prepend(make('li', {}, make('img', { src: small.toDataURL(), alt: '' }),
    make('p', {}, `${label}, ${percent(probability)}`, make('br'), make('span', { className: 'quiet', text: by }))));
  while ($('seen').children.length > 24) $('seen').lastChild.remove();
}

function announce({ label, probability, experts }) {
  const by = experts.length ? ` Expert ${experts.map(numbered).join(' and ')}.` : '';
  $('announcement').textContent = `${label}, ${percent(probability)}.${by}`;
}

async function usePicture(file) {
  const url = URL.createObjectURL(file);
  try {
    stopCamera();
    const picture = $('picture');
    picture.src = url;
    picture.alt = file.name;
    await picture.decode().catch(() => {});
    picture.hidden = !picture.naturalWidth;
    $('hint').hidden = !picture.hidden;
    if (!runtime) await openBundle();
    $('hint').hidden = !picture.hidden;
    announce(await predict(file, file.name, picture.hidden ? null : picture));
    await showDevice();
  } finally {
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

function usePictures(files) {
  for (const file of files) inTurn(() => usePicture(file), () => inTurn(() => usePicture(file)));
}

let stream = null;

async function startCamera() {
  const video = $('video');
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
  } catch (error) {
    throw new Error(`The camera cannot be used (${error.message}). “Take photo” works without this permission.`);
  }
  video.srcObject = stream;
  await video.play();
  for (const id of ['picture', 'hint']) $(id).hidden = true;
  video.hidden = false;
  $('live').setAttribute('aria-pressed', 'true');
  watch();
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  $('video').hidden = true;
  $('live').setAttribute('aria-pressed', 'false');
}

/** Predicts what the camera shows, again and again; says it aloud once it has stayed the same for two seconds. */
async function watch() {
  let label = '', since = 0, said = '';
  while (stream) {
    await inTurn(async () => {
      if (!stream) return;
      const seen = await predict($('video'), 'camera');
      if (seen.label !== label) { label = seen.label; since = Date.now(); }
      if (label !== said && Date.now() - since > 2000) { announce(seen); said = label; }
    }, null);
    if (!$('problem').hidden) stopCamera();
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

async function selftest() {
  $('selftest').disabled = true;
  $('verdict').textContent = 'Testing …';
  try {
    const verdict = await runtime.selftest();
    $('verdict').replaceChildren(verdictTable(verdict));
    for (const { experts } of verdict.cases) for (const expert of experts) needed.add(expert);
    await showExperts();
    showBytes();
    await showDevice();
  } finally {
    $('selftest').disabled = false;
  }
}

const STAGES = { pixels: 'preparing the picture', route: 'choice of the expert', gate: 'router probability', logits: 'answer' };

export const verdictSentence = ({ passed, cases }) => (passed
  ? `This device answers all ${cases.length} test pictures as it should.`
  : 'This device departs from what it should answer.');

/** A verdict as a sentence and a table. */
export function verdictTable(verdict) {
  const { passed, stages } = verdict;
  const rows = stages.map(({ stage, passed: good, cases: all, departure, tolerance }) => make('tr', {},
    make('td', { text: STAGES[stage] }),
    make('td', { text: `${good} of ${all}`, className: good < all ? 'failed' : '' }),
    make('td', { text: departure === null ? 'exact' : `${departure.toExponential(0)} of ${tolerance.toExponential(0)}` })));
  return make('div', {}, make('p', { text: verdictSentence(verdict), className: passed ? '' : 'failed' }),
    make('table', {}, make('caption', { className: 'visually-hidden', text: 'Test of this device by stage' }), make('thead', {}, make('tr', {}, ...['stage', 'right', 'departs by, of allowed'].map((text) => make('th', { text, scope: 'col' })))), make('tbody', {}, ...rows)));
}

/** Keeps the app for the next visit, where the browser allows it; a new version replaces it at once. */
async function install() {
  if (!('serviceWorker' in navigator)) return;
  const replaced = Boolean(navigator.serviceWorker.controller);
  navigator.serviceWorker.addEventListener('controllerchange', () => { if (replaced && !needed.size) location.reload(); });
  try {
    await navigator.serviceWorker.register(`sw.js?${site.version}`);
    document.documentElement.dataset.kept = String(Boolean(await navigator.serviceWorker.ready));
    await navigator.storage?.persist?.();
  } catch {
    offline = false;  // a certificate that the browser does not trust, or a full disk
    showStore();
  }
}

function listen() {
  for (const id of ['camera', 'files']) {
    $(id).addEventListener('change', () => { usePictures([...$(id).files]); $(id).value = ''; });
  }
  for (const id of ['bundle', 'provider', 'resident']) $(id).addEventListener('change', () => inTurn(openBundle, () => inTurn(openBundle)));
  $('bundle').addEventListener('change', fillResident);
  $('live').addEventListener('click', () => (stream ? stopCamera() : inTurn(startCamera, null)));
  $('selftest').addEventListener('click', () => inTurn(selftest, null));
  const frame = $('frame');
  for (const [name, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
    frame.addEventListener(name, (event) => {
      event.preventDefault();
      frame.classList.toggle('over', over);
      if (name === 'drop') usePictures([...event.dataTransfer.files]);
    });
  }
  addEventListener('paste', (event) => usePictures([...event.clipboardData.files]));
  const network = () => { $('network').hidden = navigator.onLine; };
  for (const name of ['online', 'offline']) addEventListener(name, network);
  network();
}

function fillResident() {
  const { experts } = site.bundles[$('bundle').selectedIndex];
  const choices = [1, 2, 4].filter((count) => count < experts);
  $('resident').replaceChildren(...[...choices, 0].map((count) => make('option', { value: count, text: count || 'all used' })));
  $('resident').value = '0';
  $('resident').parentElement.hidden = !experts;
}

async function start() {
  site = await (await fetch('site.json')).json();
  if (site.measure) {
    $('measure').hidden = false;
    document.title = 'Measuring this device';
    await (await import('./measure.js')).offer(site);
    return;
  }
  $('demo').hidden = false;
  $('bundle').replaceChildren(...site.bundles.map(({ name }) => make('option', { text: name })));
  $('bundle-choice').hidden = site.bundles.length < 2;
  $('live').hidden = !navigator.mediaDevices?.getUserMedia;
  if (!navigator.gpu) $('provider').parentElement.hidden = true;
  fillResident();
  listen();
  await inTurn(openBundle, () => inTurn(openBundle));
  await install();
}

start().catch((error) => complain(error, () => location.reload()));
