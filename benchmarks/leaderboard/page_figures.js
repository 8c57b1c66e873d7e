"use strict";
// Performance profiles and loss curves, their legend, and what starts the page.

// Without "all variants" the best of each structure; the others are all there.
function contestantsDrawn() {
  const ranked = rowsShown().filter((one) => own(one)).sort((a, b) => own(b).score - own(a).score);
  const seen = new Set();
  return ranked.filter((one) => {
    if (state.variants || one.family !== "natural-gradient") return true;
    const first = !seen.has(one.structure);
    seen.add(one.structure);
    return first;
  });
}

// Redraws what stands out; a line is named in the headings of the charts that have it.
function highlight() {
  const chosen = new Set(state.pinned);
  if (state.pointed) chosen.add(state.pointed);
  document.body.classList.toggle("dim", chosen.size > 0);
  for (const line of document.querySelectorAll(".line"))
    line.classList.toggle("on", chosen.has(line.dataset.who));
  for (const item of document.querySelectorAll("#legend button")) {
    item.setAttribute("aria-pressed", String(state.pinned.has(item.dataset.who)));
    item.classList.toggle("on", chosen.has(item.dataset.who));
  }
  for (const note of document.querySelectorAll(".who")) {
    const name = state.pointed;
    note.textContent = name ? `${titled(name)}${note.dataset.workload ? outcome(name, Number(note.dataset.workload)) : ""}` : "";
  }
}
function outcome(name, index) {
  const cell = row(name)?.cells[index];
  if (!cell) return "";
  return cell.status === "reached" ? `: ${number(cell.steps, 4)} steps, ${clockTime(cell.seconds, "seconds")} s` : `: ${cell.status}`;
}
function point(name) {
  if (state.pointed === name) return;
  state.pointed = name;
  highlight();
}

function drawLegend() {
  byId("legend").replaceChildren(...contestantsDrawn().map((one) => h("li", {}, h("button", {
    type: "button", "data-who": one.contestant, "aria-pressed": "false",
    onclick: () => {
      if (!state.pinned.delete(one.contestant)) state.pinned.add(one.contestant);
      highlight();
    },
    onmouseenter: () => point(one.contestant), onmouseleave: () => point(null),
    onfocus: () => point(one.contestant), onblur: () => point(null),
  }, sign(look(one.contestant)), one.title))));
}

const size = (element, columns, gap = 24) => {
  const all = element.clientWidth || 900;
  const width = all >= 620 ? (all - gap * (columns - 1)) / columns : all;
  return { width: Math.round(width), height: Math.round(Math.min(360, Math.max(220, width * 0.62))) };
};

function drawProfile() {
  const figure = byId("profile"), limit = data.scoring.r_max, drawn = contestantsDrawn();
  const total = device().workloads.length;
  if (!drawn.length) return figure.replaceChildren(h("p", { class: "small" }, "No contestants."));
  const { width } = size(figure, 1), height = width > 620 ? 380 : 280;
  const lines = drawn.map((one, index) => {
    const ratios = own(one).ratios.filter((ratio) => ratio !== null && ratio <= limit).sort((a, b) => a - b);
    const points = [[1, ratios.filter((ratio) => ratio <= 1).length / total]], marks = [];
    ratios.forEach((ratio, rank) => {
      if (ratio > 1) points.push([ratio, points.at(-1)[1]], [ratio, (rank + 1) / total]);
      if (ratio > 1) marks.push([ratio, (rank + 1) / total]);
    });
    if (ratios.includes(1)) marks.unshift(points[0]);
    points.push([limit, points.at(-1)[1]]);
    // equal shares would lie on each other: a little apart
    return { who: one.contestant, look: look(one.contestant), points, marks, shift: 1.6 * (index - (drawn.length - 1) / 2) * Math.min(1, 8 / drawn.length) };
  });
  const shares = Array.from({ length: total + 1 }, (_, i) => i / total);
  figure.replaceChildren(
    h("figcaption", {}, h("b", {}, data.clocks[state.clock]), " ", h("span", { class: "who", "aria-hidden": "true" })),
    chart({
      label: `Performance profiles of ${drawn.length} contestants by ${data.clocks[state.clock]}`, width, height,
      x: linear(1, limit), y: linear(-0.04, 1.06), xTicks: [1, 1.5, 2, 2.5, 3, 3.5, 4].filter((tick) => tick <= limit),
      yTicks: total <= 10 ? shares : [0, 0.25, 0.5, 0.75, 1], xText: String, yText: (share) => `${Math.round(100 * share)} %`,
      xName: "τ, times as long as the fastest", yName: "share of workloads", lines: lines.reverse(),
    }));
}

function drawCurves() {
  const box = byId("charts"), drawn = contestantsDrawn(), metric = state.metric;
  const { width, height } = size(box, 2);
  const alone = state.clock === "training";
  box.replaceChildren(...device().workloads.map((workload, index) => {
    const curves = drawn.map((one) => [one, one.cells[index].curve]).filter(([, curve]) => curve);
    const values = curves.flatMap(([, curve]) => curve[metric]).filter((value) => value > 0);
    if (metric === "b" && workload.target > 0) values.push(workload.target);
    if (!values.length) return h("p", { class: "small" }, `${workload.name}: no curves.`);
    const low = Math.min(...values) * 0.8, sorted = [...values].sort((a, b) => a - b);
    // a diverging curve leaves the picture at its top
    const high = Math.min(sorted.at(-1), 30 * sorted[Math.floor(sorted.length * 0.9)]) * 1.15;
    const start = (curve) => (alone ? 0 : curve.o);
    const after = curves.flatMap(([, curve]) => curve.t.map((t) => t + start(curve))).filter((t) => t > 0).sort((a, b) => a - b);
    const floor = (alone ? after[Math.floor(after.length * 0.04)] : after[0]) ?? 1e-3;
    const longest = Math.max(after.at(-1) ?? 0, 1.5 * floor);
    const most = Math.max(1, ...curves.flatMap(([, curve]) => curve.x));
    const draw = (kind) => {
      const at = (curve, i) => (kind === "steps" ? curve.x[i] : Math.max(floor, curve.t[i] + start(curve)));
      const clip = (value) => (value === null ? null : Math.min(Math.max(value, low), high));
      const lines = curves.map(([one, curve]) => {
        const hit = curve.s === null ? -1 : curve.x.findIndex((step) => step >= curve.s);
        const value = hit < 0 ? null : clip(curve[metric][hit]);
        return {
          who: one.contestant, look: look(one.contestant),
          points: curve.x.map((_, i) => (clip(curve[metric][i]) === null ? null : [at(curve, i), clip(curve[metric][i])])),
          marks: value === null ? [] : [[at(curve, hit), value]],
        };
      }).reverse();
      const steps = kind === "steps";
      const axis = steps
        ? { x: fromZero(most), xTicks: [0, ...powersOfTen(1, most, 5)], xText: (tick) => (tick < 1e4 ? String(tick) : tickText(tick)), xName: "steps" }
        : { x: logarithmic(floor, longest), xTicks: powersOfTen(floor, longest, 5), xText: tickText, xName: data.clocks[alone ? "training" : "seconds"] };
      return chart({
        label: `${workload.name}: loss against ${axis.xName}`, width, height, ...axis,
        y: logarithmic(low, high), yTicks: powersOfTen(low, high, 6), yText: tickText,
        yName: metric === "b" ? workload.metric : "training loss", lines, level: metric === "b" ? workload.target : null,
      });
    };
    return h("figure", { "data-workload": workload.name },
      h("figcaption", {}, h("b", {}, workload.name), " ", h("span", { class: "small" }, workload.title), " ", h("span", { class: "who", "data-workload": index, "aria-hidden": "true" })),
      h("div", { class: "pair" }, draw("steps"), draw("seconds")));
  }));
}

function drawFigures() {
  drawLegend();
  drawProfile();
  drawCurves();
  highlight();
}

// Boxes for the values that rows have of something, all of them checked.
function drawChoice(id, title, key) {
  const values = [...new Set(device().rows.map((one) => one[key]))].sort();
  state[id] = new Set(values);
  const boxes = values.map((value) => h("label", {}, h("input", {
    type: "checkbox", value, checked: true,
    onchange: (event) => {
      if (event.target.checked) state[id].add(value);
      else state[id].delete(value);
      drawBoard();
      drawFigures();
      drawFacts();
    },
  }), ` ${value || "not stated"}`));
  byId(id).replaceChildren(h("legend", {}, title), ...boxes);
}

function drawDevice() {
  const { verdict, environment, workloads, left_out: leftOut } = device();
  byId("answer").textContent = verdict.answer;
  byId("sentences").replaceChildren(...verdict.sentences.map((sentence) => h("li", {}, sentence)));
  byId("meta").textContent = `${device().trials} trials, ${device().tuning_trials} to tune · ${device().date.slice(0, 10)} · natgrad ${device().natgrad}, JAX ${environment.jax}`;
  drawChoice("families", "Family", "family");
  drawChoice("rulesets", "Rules", "ruleset");
  state.workload = 0;
  byId("which").replaceChildren(...workloads.map((workload, index) => h("option", { value: index }, workload.name)));
  const left = Object.entries(leftOut).filter(([, count]) => count).map(([why, count]) => `${count} ${why}`);
  const share = device().wall_seconds ? (100 * device().harness_seconds) / device().wall_seconds : 0;
  byId("environment").replaceChildren(
    h("p", { class: "small" }, `${device().name}; ${Object.entries(environment).filter(([name]) => !["device", "processor", "cores"].includes(name)).map(([name, version]) => `${name} ${version}`).join(", ")}; harness ${device().harnesses.map((digest) => digest.slice(0, 12)).join(", ")}.`),
    h("p", { class: "small" }, `The trials took ${number(device().wall_seconds)} s, of which the harness took ${number(share, 2)} %. ${left.length ? `Left out: trials ${left.join(", ")}.` : "No trial was left out."}`));
  drawClock();
}

function drawClock() {
  drawBoard();
  drawFigures();
  drawWinners();
  drawFacts();
}

for (const input of document.querySelectorAll("input[name=clock]"))
  input.addEventListener("change", () => { state.clock = input.value; drawClock(); });
for (const input of document.querySelectorAll("input[name=metric]"))
  input.addEventListener("change", () => { state.metric = input.value; drawCurves(); highlight(); });
byId("device").addEventListener("change", (event) => { state.device = Number(event.target.value); drawDevice(); });
byId("search").addEventListener("input", (event) => { state.search = event.target.value; drawBoard(); drawFigures(); });
byId("variants").addEventListener("change", (event) => { state.variants = event.target.checked; drawFigures(); });
byId("which").addEventListener("change", (event) => { state.workload = Number(event.target.value); drawFacts(); });
byId("dialog").addEventListener("click", (event) => { if (event.target === byId("dialog")) byId("dialog").close(); });
document.addEventListener("mouseover", (event) => {
  const line = event.target.closest?.(".line");
  if (line || event.target.closest?.(".chart")) point(line ? line.dataset.who : null);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.pinned.size) { state.pinned.clear(); highlight(); }
});
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return;
  lastWidth = innerWidth;
  drawProfile();
  drawCurves();
  highlight();
});
drawDevice();
