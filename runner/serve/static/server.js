// Requests to the server that this page came from, with the key if it asks for one.

const KEY = "shardline-key";

export class NoKey extends Error {}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) throw new NoKey("the server asks for a key");
  if (!answer.ok) throw new Error(await messageOf(answer));
  return answer;
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}
