/**
 * The last runs, kept by the browser: after a reload the monitors show them again. In IndexedDB, because a run of a large
 * model has more numbers than the other stores of a browser hold.
 */

import { Run } from "./runs.js";

const DATABASE = "styleinject";
const STORE = "router";
const KEY = "runs";
const MOST_KEPT = 8;

/** @returns {Promise<IDBDatabase>} */
function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} act
 * @returns {Promise<T>}
 */
async function inStore(mode, act) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const request = act(database.transaction(STORE, mode).objectStore(STORE));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } finally {
    database.close();
  }
}

/**
 * Keep the newest of these, instead of those kept before. A browser that refuses (a private window, a full disk) shows the
 * monitors empty after a reload, and nothing else.
 * @param {Run[]} runs oldest first
 */
export async function keep(runs) {
  const plain = runs.slice(-MOST_KEPT).map((run) => ({ ...run }));
  await inStore("readwrite", (store) => store.put(plain, KEY)).catch(() => undefined);
}

/** @returns {Promise<Run[]>} those kept, oldest first */
export async function recall() {
  const plain = await inStore("readonly", (store) => store.get(KEY)).catch(() => []);
  return Array.isArray(plain) ? plain.map((fields) => Object.assign(Object.create(Run.prototype), fields)) : [];
}
