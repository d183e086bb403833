// Answers requests in a browser; Python sends them through the driver.

import { answer } from './answer.mjs';
import { decode } from './src/decode.js';
import { load } from './src/index.js';
import { parseManifest } from './src/manifest.js';
import { toPixels } from './src/pixels.js';
import { sha256 } from './src/sha256.js';

const fetchBytes = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
const modules = { parseManifest, decode, load, toPixels, sha256, fetchBytes };

/** JSON, since a driver turns NaN and long lists into other values, slowly. */
export async function ask(requests) {
  const answers = [];
  for (const request of requests) {
    const here = HERE[request.ask];
    answers.push(await (here ? here(request) : answer(modules, request)));
  }
  return JSON.stringify(answers);
}

/** What only a browser can be asked. */
const HERE = {
  async webgpu() {
    return { available: Boolean(await navigator.gpu?.requestAdapter()) };
  },

  /** What the engine runs with. */
  async engine() {
    const { env } = await import('onnxruntime-web/wasm');
    const used = performance.getEntriesByType('resource').map((entry) => entry.name);
    return { isolated: globalThis.crossOriginIsolated, threads: env.wasm.numThreads, webgpu: used.some((url) => url.endsWith('asyncify.wasm')) };
  },

  /** Opens a bundle that has to be refused, and predicts an image if it is not refused yet. */
  async damaged({ bundle, image }) {
    let runtime;
    try {
      runtime = await load(bundle, { cache: false });
      if (image) await runtime.predict(new Blob([await fetchBytes(image)]));
      return { opened: true, error: null };
    } catch (error) {
      return { opened: Boolean(runtime), error: `${error.name}: ${error.message}` };
    } finally {
      await runtime?.close();
    }
  },

  /** Predictions that are all asked for before the first one is answered. */
  async atOnce({ bundle, options, images }) {
    const runtime = await load(bundle, options);
    const blobs = await Promise.all(images.map(async (image) => new Blob([await fetchBytes(image)])));
    const found = await Promise.all(blobs.map((blob) => runtime.predict(blob)));
    const answers = [];
    for (const [i, { experts, gates, logits }] of found.entries()) {
      answers.push({ pixels: await sha256(await runtime.pixels(blobs[i])), experts, gates, logits: Array.from(logits) });
    }
    const stats = runtime.stats();
    await runtime.close();
    return { answers, stats };
  },

  /** One image in every form that `predict` takes; and bundles that the user picked. */
  async kinds({ bundle, image }) {
    const bytes = await fetchBytes(image);
    const blob = new Blob([bytes]);
    const element = Object.assign(new Image(), { src: image });
    await element.decode();
    const canvas = Object.assign(document.createElement('canvas'), { width: element.naturalWidth, height: element.naturalHeight });
    canvas.getContext('2d').drawImage(element, 0, 0);
    const bitmap = await createImageBitmap(blob);
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const video = await playing(canvas);
    const runtime = await load(bundle, {});
    const answers = {};
    for (const [kind, source] of Object.entries({ blob, bytes, image: element, bitmap, canvas, pixels, video })) {
      answers[kind] = await one(runtime, source);
    }
    await runtime.close();
    const picked = await load(await filesOf(bundle), {});
    answers.files = await one(picked, blob);
    await picked.close();
    const opened = await load(await handleOf(bundle), {});
    answers.handle = await one(opened, blob);
    await opened.close();
    return answers;
  },

  /** Empties every store of this page. */
  async forget() {
    for (const name of await caches.keys()) await caches.delete(name);
    const root = await navigator.storage.getDirectory();
    for await (const name of root.keys()) await root.removeEntry(name, { recursive: true });
    return {};
  },

  /** Changes a byte of every file in the Cache API. */
  async alter() {
    let altered = 0;
    for (const name of await caches.keys()) {
      const cache = await caches.open(name);
      for (const request of await cache.keys()) {
        const bytes = new Uint8Array(await (await cache.match(request)).arrayBuffer());
        bytes[bytes.length >> 1] ^= 1;
        await cache.put(request, new Response(bytes));
        altered++;
      }
    }
    return { altered };
  },
};

async function one(runtime, source) {
  const { experts } = await runtime.predict(source);
  return { experts, pixels: await sha256(await runtime.pixels(source)) };
}

/** A video that shows what a canvas shows, as a camera would. */
async function playing(canvas) {
  const video = Object.assign(document.createElement('video'), { srcObject: canvas.captureStream(10), muted: true });
  const timer = setInterval(() => canvas.getContext('2d').drawImage(canvas, 0, 0), 50);
  await video.play();
  if (!video.videoWidth) await new Promise((resolve) => { video.onresize = resolve; });
  clearInterval(timer);
  return video;
}

async function pathsOf(bundle) {
  const manifest = await (await fetch(`${bundle}/manifest.json`)).json();
  return ['manifest.json', 'manifest.sha256', ...manifest.files.map((file) => file.path)];
}

/** A bundle's folder, as a handle that the user picked. */
async function handleOf(bundle) {
  const folder = await (await navigator.storage.getDirectory()).getDirectoryHandle('birds.mvmoe', { create: true });
  for (const path of await pathsOf(bundle)) {
    const writable = await (await folder.getFileHandle(path, { create: true })).createWritable();
    await writable.write(await fetchBytes(`${bundle}/${path}`));
    await writable.close();
  }
  return folder;
}

/** A bundle's files, as a folder that the user picked would give them. */
async function filesOf(bundle) {
  return Promise.all((await pathsOf(bundle)).map(async (path) => {
    const file = new File([await fetchBytes(`${bundle}/${path}`)], path.split('/').at(-1));
    Object.defineProperty(file, 'webkitRelativePath', { value: `birds.mvmoe/${path}` });
    return file;
  }));
}
