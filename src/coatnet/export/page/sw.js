// Keeps the page for visits without a network. A new version waits until no tab has the old one open.

const NAME = `${self.registration.scope} ${"VERSION"}`; // caches belong to the whole address, this one to its folder
const FILES = ["./", ..."FILES".split(" ")];

self.addEventListener("install", (event) => {
  const requests = FILES.map((file) => new Request(file, { cache: "no-cache" })); // asks whether it is still the same
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => {
  const isOld = (name) => name.startsWith(`${self.registration.scope} `) && name !== NAME;
  event.waitUntil(caches.keys().then((names) => Promise.all(names.filter(isOld).map((name) => caches.delete(name)))));
});

self.addEventListener("fetch", (event) => {
  const found = caches.open(NAME).then((cache) => cache.match(event.request, { ignoreSearch: true }));
  event.respondWith(found.then((kept) => kept ?? fetch(event.request)));
});
