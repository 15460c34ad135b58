// The operator's page: asks the server how it is every second, and shows it.

import { showCharts } from "/static/charts.js";
import { byId, element } from "/static/elements.js";
import { watchPrompt } from "/static/prompt.js";
import { showRanks } from "/static/ranks.js";
import { ask, NoKey, setKey } from "/static/server.js";

const EVERY_MS = 1000;

async function poll() {
  try {
    const status = await (await ask("/status")).json();
    byId("key-form").hidden = true;
    show(status);
    if (byId("plan").hidden) await showPlan();
  } catch (error) {
    byId("key-form").hidden = !(error instanceof NoKey);
    setState(error instanceof NoKey ? "locked" : "no answer");
  }
  setTimeout(poll, EVERY_MS);
}

function show(status) {
  setState(status.state);
  byId("model").textContent = status.model;
  document.title = `${status.model}: ${status.state}`;
  const moved = status.idle_s === null ? "loading" : `engine moved ${status.idle_s.toFixed(1)} s ago`;
  byId("facts").textContent = `up ${duration(status.uptime_s)}, ${moved}`;
  byId("figures").replaceChildren(...figures(status).map(([name, value]) => figure(name, value)));
  showCharts(status);
  showRanks(status);
  byId("ended").replaceChildren(...Object.entries(status.requests).map(ended));
  if (!byId("ended").childElementCount) byId("ended").textContent = "none yet";
}

function figures(status) {
  const load = status.load ?? { num_running: 0, num_waiting: 0, cache_usage: 0, num_preempted: 0, prompt_tokens: 0, cached_tokens: 0 };
  const last = status.slots.find((slot) => slot.slots_ago === 1);
  const reused = load.prompt_tokens ? `${((100 * load.cached_tokens) / load.prompt_tokens).toFixed(0)} %` : "-";
  return [
    ["In the batch", `${load.num_running} of ${status.max_num_seqs}`],
    ["Waiting", `${load.num_waiting} of ${status.max_queue_size}`],
    ["Tokens a second", ((last?.tokens ?? 0) / status.slot_s).toFixed(1)],
    ["KV cache in use", `${(load.cache_usage * 100).toFixed(1)} %`],
    ["Prompt reused", reused],
    ["Gave way", load.num_preempted],
  ];
}

function figure(name, value) {
  return element("div", { className: "card figure" }, element("span", { className: "faint", textContent: name }), element("b", { textContent: value }));
}

function ended([reason, count]) {
  return element("div", {}, element("dt", { textContent: reason }), element("dd", { textContent: count }));
}

function setState(state) {
  const badge = byId("state");
  badge.textContent = state;
  badge.className = `badge ${["no answer", "stalled"].includes(state) ? "failed" : ["ready", "failed"].includes(state) ? state : ""}`;
}

// As an image, a drawing can run nothing.
async function showPlan() {
  const plan = byId("plan");
  plan.src = URL.createObjectURL(await (await ask("/status/plan.svg")).blob());
  plan.hidden = false;
}

function duration(total) {
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor((total % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(total)} s`;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
});
watchPrompt();
poll();
