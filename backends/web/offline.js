/** Service worker: the page itself from the network, or without one as it was last seen. Models store themselves. */

const CACHE = "sylvester-page";
const PAGE = /\.(html|css|svg|js|mjs)$|^report\.json$/;
const MODEL = /\/(weights|code)\/|\/(manifest|weights|tokenizer)\.json$/;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim().then(remember)));

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== location.origin || MODEL.test(url.pathname)) return;
  event.respondWith(answer(request));
});

/** What the open pages loaded before this worker was there. */
async function remember() {
  const cache = await caches.open(CACHE);
  const { files } = await (await fetch("manifest.json")).json();
  const names = ["./", "manifest.json", ...Object.keys(files).filter((name) => PAGE.test(name))];
  await Promise.all(names.map((name) => cache.add(name).catch(() => {})));
}

async function answer(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok && response.status === 200) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const known = await cache.match(request, { ignoreSearch: true });
    if (known) return known;
    throw error;
  }
}
