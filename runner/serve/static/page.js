// The operator's page: asks the server how it is every second, and shows it.

import { showCharts } from "/static/charts.js";
import { byId, element } from "/static/elements.js";
import { KINDS } from "/static/kinds.js";
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
  const moved = status.idle_s === null ? "loading" : `ranks moved ${status.idle_s.toFixed(1)} s ago`;
  byId("facts").textContent = `up ${duration(status.uptime_s)}, ${moved}`;
  const kind = KINDS[status.kind];
  byId("figures").replaceChildren(...kind.figures(status).map(([name, value]) => figure(name, value)));
  byId("try-section").hidden = !kind.hasPrompt;
  showCharts(status, kind.charts);
  showRanks(status);
  byId("ended").replaceChildren(...Object.entries(status.requests).map(ended));
  if (!byId("ended").childElementCount) byId("ended").textContent = "none yet";
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
