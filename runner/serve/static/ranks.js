// A row a rank: what it holds, and how its GPU is.

import { byId, bytes, element } from "/static/elements.js";

const OF_RANK = [
  ["Rank", (rank) => rank.rank],
  ["Stage", (rank) => rank.stage],
  ["TP rank", (rank) => rank.tp_rank],
  ["Device", (rank) => rank.device],
  ["Weights", (rank) => bytes(rank.weight_bytes)],
  ["Doing", (rank) => rank.doing ?? "-"],
];
const OF_GPU = [
  ["GPU", (gpu) => gpu.name],
  ["Use", (gpu) => unit(gpu.utilization_perc, "%")],
  ["Memory", (gpu) => (gpu.memory_total_bytes === null ? "-" : `${bytes(gpu.memory_total_bytes - gpu.memory_free_bytes)} of ${bytes(gpu.memory_total_bytes)}`)],
  ["Power", (gpu) => unit(gpu.power_w && Math.round(gpu.power_w), "W")],
  ["Temp.", (gpu) => unit(gpu.temperature_c, "°C")],
  ["Clocks held by", (gpu) => (gpu.throttle_reasons ? gpu.throttle_reasons.join(", ") || "nothing" : "-")],
  ["NVLinks", (gpu) => gpu.nvlinks_active ?? "-"],
  ["ECC", (gpu) => gpu.ecc_uncorrected_errors ?? "-"],
  ["XID", (gpu) => gpu.last_xid ?? "none"],
];

const unit = (value, name) => (value === null ? "-" : `${value} ${name}`);

export function showRanks(status) {
  const gpus = status.gpus.by_rank;
  const hasGpus = Object.keys(gpus).length > 0;
  const titles = hasGpus ? [...OF_RANK, ...OF_GPU] : OF_RANK;
  byId("rank-titles").replaceChildren(...titles.map(([title]) => element("th", { textContent: title })));
  byId("ranks").replaceChildren(...status.ranks.map((rank) => row(rank, gpus[rank.rank])));
  const note = byId("gpu-note");
  note.hidden = hasGpus;
  note.textContent = `No GPU is shown: ${status.gpus.reason ?? "the driver shows none for these ranks"}.`;
}

function row(rank, gpu) {
  const cells = OF_RANK.map(([, value]) => element("td", { textContent: value(rank) }));
  if (gpu?.fault) {
    cells.push(element("td", { className: "bad", colSpan: OF_GPU.length, textContent: `GPU lost: ${gpu.fault}` }));
  } else if (gpu) {
    cells.push(...OF_GPU.map(([, value]) => element("td", { textContent: value(gpu) })));
  }
  return element("tr", {}, ...cells);
}
