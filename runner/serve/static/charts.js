// What happened in the last minutes, a small line chart for each figure.

import { byId, element, svg } from "/static/elements.js";

const WIDTH = 300;
const HEIGHT = 84;

export function showCharts(status, charts) {
  const bySlot = new Map(status.slots.map((slot) => [slot.slots_ago, slot]));
  byId("charts").replaceChildren(...charts.map((chart) => draw(chart, bySlot, status)));
}

function draw(chart, bySlot, status) {
  // The slot of this moment is not over yet.
  const agos = Array.from({ length: status.num_slots - 1 }, (_, i) => status.num_slots - 1 - i);
  const read = (value) => agos.map((ago) => (bySlot.has(ago) ? value(bySlot.get(ago), status) : chart.empty));
  const values = read(chart.value);
  const seconds = chart.second ? read(chart.second) : [];
  const top = Math.max(...values, ...seconds, 0) || 1;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": chart.title });
  picture.append(svg("line", { class: "floor", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }));
  if (chart.empty === 0) picture.append(svg("path", { class: "area", d: `${path(values, top)} V ${HEIGHT} H 0 Z` }));
  picture.append(svg("path", { class: "line second", d: path(seconds, top) }), svg("path", { class: "line", d: path(values, top) }));
  const known = values.concat(seconds).filter((value) => value !== null);
  const last = values.findLast((value) => value !== null) ?? null;
  const peak = known.length ? chart.show(Math.max(...known)) : "none yet";
  return element(
    "figure",
    { className: "card chart" },
    element("figcaption", {}, element("span", { textContent: chart.title }), element("b", { textContent: chart.show(last) })),
    element("div", { className: "faint", textContent: chart.second ? `mean; orange: longest, ${peak}` : `highest ${peak}` }),
    picture,
  );
}

// A line through slots that follow one another, a dot where one stands alone; none across a gap.
function path(values, top) {
  const step = WIDTH / (values.length - 1);
  return values
    .map((value, i) => {
      if (value === null) return "";
      const point = `${(i * step).toFixed(1)} ${(HEIGHT - (value / top) * (HEIGHT - 4)).toFixed(1)}`;
      const [before, after] = [values[i - 1] ?? null, values[i + 1] ?? null];
      return (before === null ? `M ${point}` : `L ${point}`) + (before === null && after === null ? " h 0" : "");
    })
    .filter(Boolean)
    .join(" ");
}
