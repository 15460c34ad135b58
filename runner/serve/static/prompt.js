// The prompt box: sends what is written, and shows the answer as it comes.

import { byId } from "/static/elements.js";
import { ask } from "/static/server.js";

let running = null;

export function watchPrompt() {
  byId("prompt-form").addEventListener("submit", send);
  byId("stop").addEventListener("click", () => running?.abort());
}

async function send(event) {
  event.preventDefault();
  running = new AbortController();
  const [answer, note] = [byId("answer"), byId("answer-note")];
  answer.textContent = note.textContent = "";
  answer.hidden = false;
  setBusy(true);
  const started = performance.now();
  try {
    for await (const text of stream(running.signal)) answer.textContent += text;
    note.textContent = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  } catch (error) {
    note.textContent = running.signal.aborted ? "stopped" : error.message;
  } finally {
    setBusy(false);
  }
}

function setBusy(busy) {
  byId("send").disabled = busy;
  byId("stop").hidden = !busy;
}

async function* stream(signal) {
  const prompt = byId("prompt").value;
  const isChat = byId("kind").value === "chat";
  const asked = isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = JSON.stringify({ ...asked, max_tokens: Number(byId("max-tokens").value), stream: true });
  const answer = await ask(isChat ? "/v1/chat/completions" : "/v1/completions", { method: "POST", body, signal });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    yield isChat ? (event.choices[0].delta.content ?? "") : event.choices[0].text;
  }
  throw new Error("the answer broke off");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield part.slice("data: ".length);
  }
}
