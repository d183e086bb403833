// A fresh frame: its own modules, its own engine, its own memory. measure.js opens one for each start that it times.

const now = () => performance.timeOrigin + performance.now();
const began = now();
let runtime;

/** Opens a bundle and predicts; returns milliseconds of each step since `asked`, and the bytes fetched. */
globalThis.start = async ({ asked, bundle, image, options }) => {
  const { load } = await import('./mvmoe-deploy/index.js');
  const ort = await import(options.executionProvider === 'webgpu' ? './engine/ort.webgpu.min.mjs' : './engine/ort.wasm.min.mjs');
  const imported = now();
  runtime = await load(bundle, { ...options, ort, cache: false });
  const loaded = now();
  await runtime.predict(image);
  const done = now();
  return {
    frame: Math.max(0, began - asked), imports: Math.max(0, imported - began),
    load: Math.max(0.001, loaded - imported), first_run: Math.max(0.001, done - loaded),
    bytes: runtime.stats().fetchedBytes,
  };
};

/** Opens a bundle for a look at the frame's memory. */
globalThis.open = async ({ bundle, options }) => {
  const { load } = await import('./mvmoe-deploy/index.js');
  const ort = await import(options.executionProvider === 'webgpu' ? './engine/ort.webgpu.min.mjs' : './engine/ort.wasm.min.mjs');
  runtime = await load(bundle, { ...options, ort, cache: false });
};

globalThis.predict = (image) => runtime.predict(image);

/** What the runtime says that it holds. */
globalThis.held = () => {
  const { resident, residentBytes, fixedBytes } = runtime.stats();
  return { resident: resident.length, ledger: residentBytes + fixedBytes };
};
