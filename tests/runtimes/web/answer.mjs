// What the tests ask of the runtime, in node and in a browser alike. Python knows the right answers.

/** Answers a request; what the package throws on purpose is an answer too. */
export async function answer(modules, request) {
  try {
    return await QUESTIONS[request.ask](modules, request);
  } catch (error) {
    return { error: `${error.name}: ${error.message}` };
  }
}

const QUESTIONS = {
  /** Whether a manifest is accepted. */
  async manifest({ parseManifest }, { text }) {
    parseManifest(new TextEncoder().encode(text));
    return { accepted: true };
  },

  /** The pixels of images, as the model sees them. */
  async pixels({ toPixels, sha256, decode, fetchBytes }, { image, preprocessing }) {
    const decoded = await decode(new Blob([await fetchBytes(image)]), image.split('/').at(-1));
    const pixels = toPixels(decoded, preprocessing);
    return { sha256: await sha256(pixels), pixels: pixels.length < 4000 ? Array.from(pixels) : null };
  },

  /** Predictions for images with one runtime, each with its pixels' hash. */
  async predict({ load, sha256, fetchBytes }, { bundle, options, images }) {
    const runtime = await load(bundle, options);
    const answers = [];
    for (const image of images) answers.push(await one(runtime, image, sha256, fetchBytes));
    const stats = runtime.stats();
    await runtime.close();
    return { answers, stats };
  },

  async selftest({ load }, { bundle, options }) {
    const runtime = await load(bundle, options);
    const verdict = await runtime.selftest();
    await runtime.close();
    return verdict;
  },
};

async function one(runtime, image, sha256, fetchBytes) {
  const name = image.split('/').at(-1);
  try {
    const blob = new Blob([await fetchBytes(image)]);
    const { experts, gates, logits, label, top } = await runtime.predict(blob, { name });
    return { pixels: await sha256(await runtime.pixels(blob, name)), experts, gates, logits: Array.from(logits), label, top };
  } catch (error) {
    return { error: `${error.name}: ${error.message}` };
  }
}
