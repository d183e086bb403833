import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { sizeOf } from '../src/headers.js';
import { bestClasses, logitsAreFine, probabilityProblem, topK } from '../src/routing.js';
import { logitsDeparture } from '../src/selftest.js';
import { ownSha256 } from '../src/sha256.js';

test("the sha256 of pages without SubtleCrypto is node's", () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 10_000]) {
    const bytes = randomBytes(length);
    assert.deepEqual(Buffer.from(ownSha256(new Uint8Array(bytes))), createHash('sha256').update(bytes).digest(), `${length}`);
  }
});

test('among equals the lower index comes first', () => {
  assert.deepEqual(topK(Float32Array.of(0.2, 0.4, 0.4, 0), 2), [1, 2]);
  assert.deepEqual(bestClasses(Float32Array.of(1, 1, -1e4), 2).map((best) => best.probability), [0.5, 0.5]);
});

test('what cannot be an answer is refused', () => {
  assert.equal(probabilityProblem(Float32Array.of(0.5, 0.5)), null);
  for (const bad of [[0.5, 0.4], [1.1, -0.1], [NaN, 1], [Infinity, 0]]) assert.ok(probabilityProblem(Float32Array.from(bad)), `${bad}`);
  assert.ok(logitsAreFine(Float32Array.of(1, -Infinity)));
  for (const bad of [[1, NaN], [Infinity, 1], [-Infinity, -Infinity]]) assert.ok(!logitsAreFine(Float32Array.from(bad)), `${bad}`);
});

test('logits are compared in spreads, without their mean and without masked classes', () => {
  const expected = Float32Array.of(0, 2, -1e4);
  assert.equal(logitsDeparture(Float32Array.of(5, 7, -3), expected), 0);
  assert.equal(logitsDeparture(Float32Array.of(0, 2.5, -1e4), expected), 0.25);
  assert.equal(logitsDeparture(Float32Array.of(NaN, 2, 0), expected), Infinity);
});

test('an image\'s size is known from its header', () => {
  const jpeg = [0xff, 0xd8, 0xff, 0xe0, 0, 4, 1, 2, 0xff, 0xff, 0xc2, 0, 17, 8, 0, 30, 0, 40, 3];
  assert.deepEqual(sizeOf(Uint8Array.from(jpeg)), { width: 40, height: 30 });
  assert.equal(sizeOf(Uint8Array.from(jpeg.slice(0, 12))), null);
  const ascii = (text) => Array.from(text, (c) => c.charCodeAt(0));
  assert.deepEqual(sizeOf(Uint8Array.from([...ascii('GIF89a'), 3, 1, 2, 0])), { width: 259, height: 2 });
  const webp = [...ascii('RIFF0000WEBPVP8X'), 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 1, 7, 0, 0];
  assert.deepEqual(sizeOf(Uint8Array.from(webp)), { width: 65546, height: 8 });
});
