// Reads requests from standard input, a JSON value per line, and writes an answer for each. Runs beside a copy of src/.

import { readFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { answer } from './answer.mjs';
import { parseManifest } from './src/manifest.js';
import { decode, load } from './src/node.js';
import { toPixels } from './src/pixels.js';
import { sha256 } from './src/sha256.js';

const fetchBytes = async (path) => new Uint8Array(await readFile(path));
const modules = { parseManifest, decode, load, toPixels, sha256, fetchBytes };
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await answer(modules, JSON.parse(line))));
}
