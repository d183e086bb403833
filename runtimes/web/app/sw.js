// Keeps the page, the runtime and its engine, so that the app starts offline after the first visit. Bundles are not kept
// here: the runtime keeps their files itself, each by its sha256.
//
// The page registers this file as sw.js?version, so another version of any file installs another worker and another cache.

const PREFIX = 'mvmoe-app-';
const NAME = PREFIX + new URL(location.href).search.slice(1);
const PATIENCE = 2000;  // milliseconds before a server that does not answer counts as out of reach

self.addEventListener('install', (event) => event.waitUntil(install()));
self.addEventListener('activate', (event) => event.waitUntil(activate()));
self.addEventListener('fetch', (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== 'GET' || url.origin !== location.origin || url.pathname.includes('/bundles/')) return;
  event.respondWith(url.pathname.endsWith('/site.json') ? newest(request) : kept(request));
});

async function install() {
  const answer = await fetch('site.json', { cache: 'no-cache' });
  const { shell } = await answer.clone().json();
  const cache = await caches.open(NAME);
  await cache.put('site.json', answer);
  await cache.addAll(shell.map((path) => new Request(path, { cache: 'no-cache' })));
  await self.skipWaiting();
}

async function activate() {
  for (const name of await caches.keys()) if (name.startsWith(PREFIX) && name !== NAME) await caches.delete(name);
  await self.clients.claim();
}

/** What the server says now; out of its reach, what it said last. */
async function newest(request) {
  const cache = await caches.open(NAME);
  try {
    const answer = await fetch(request, { cache: 'no-cache', signal: AbortSignal.timeout(PATIENCE) });
    if (answer.ok) await cache.put('site.json', answer.clone());
    return answer;
  } catch {
    return (await cache.match('site.json')) ?? Response.error();
  }
}

async function kept(request) {
  const cache = await caches.open(NAME);
  const found = await cache.match(request, { ignoreSearch: true });
  if (found) return found;
  const answer = await fetch(request);
  // the engine for WebGPU is large, so it is kept only where it is used
  if (answer.ok && request.url.includes('/engine/')) await cache.put(request, answer.clone());
  return answer;
}
