"use strict";
// The page from the data that it holds: tables, filters, charts, and the trials behind a number.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = {
  device: 0, clock: "seconds", families: null, rulesets: null, search: "", variants: false, metric: "b", workload: 0,
  board: { column: "rank", down: false }, facts: { column: "rank", down: false },
  pinned: new Set(), pointed: null,
};
const UNIT = { seconds: "s", training: "s", steps: "steps" };
const device = () => data.devices[state.device];
const look = (name) => data.looks[name];
const row = (name) => device().rows.find((one) => one.contestant === name);
const trialLink = (key) => `${data.trials}/${key.slice(0, 2)}/${key}.json`;
const command = (pattern, key) => data.commands[pattern].replaceAll("{key}", key);
const titled = (name) => row(name)?.title ?? name;
// With one ruleset alone, places and scores are those among its contestants.
const own = (one) => {
  const scores = one.scores[state.clock];
  return scores && state.rulesets.size === 1 ? { ...scores, ...scores.own } : scores;
};

// A number that links to its trial; a press opens the dialog with all trials behind it.
function numberLink(text, key, open, extra = {}) {
  return h("a", {
    href: key ? trialLink(key) : "#board", ...extra,
    onclick: (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      open();
    },
  }, text);
}

function rowsShown() {
  const wanted = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  return device().rows.filter((one) => {
    const text = [one.contestant, one.title, one.family, one.fisher, one.damping, one.rate_rule].join(" ").toLowerCase();
    return state.families.has(one.family) && state.rulesets.has(one.ruleset) && wanted.every((word) => text.includes(word));
  });
}

// Sortable tables -------------------------------------------------------------------------------

// columns: {key, title, value(row): number | string | null, cell(row), text?, down?}
function drawTable(table, order, columns, rows, redraw, labels) {
  const column = columns.find((one) => one.key === order.column) ?? columns[0];
  const sign = order.down ? -1 : 1;
  const sorted = rows.map((one, index) => [column.value(one), index, one]).sort(([a, i], [b, j]) => {
    if (a === null || b === null) return (a === null) - (b === null) || i - j;
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b) || i - j;
  });
  const focused = document.activeElement?.closest?.(`#${table.id} th`)?.dataset.key;
  table.tHead.replaceChildren(h("tr", {}, columns.map((one) =>
    h("th", {
      scope: "col", class: one.text ? "text" : null, "data-key": one.key,
      "aria-sort": one === column ? (order.down ? "descending" : "ascending") : "none",
    }, h("button", {
      type: "button", title: one.hint,
      onclick: () => {
        order.down = one.key === order.column ? !order.down : Boolean(one.down);
        order.column = one.key;
        redraw();
      },
    }, one.title)))));
  table.tBodies[0].replaceChildren(...sorted.map(([, , one]) =>
    h("tr", { "data-who": one.contestant }, columns.map((item) => {
      const content = item.cell(one);
      return item.key === "contestant" ? h("th", { scope: "row" }, content)
        : h("td", { class: item.text ? "text" : null, "data-column": item.key, "data-label": labels ? item.title : null }, content);
    }))));
  if (focused) table.querySelector(`th[data-key="${focused}"] button`)?.focus();
}

const nameCell = (one) => h("span", { class: "name" }, sign(look(one.contestant)), h(one.refuted ? "s" : "span", {}, words(one.title)));

function timeCell(one, index) {
  const cell = one.cells[index], of = cell.trials.length, time = cell[state.clock];
  const open = () => showTrials(one, index);
  if (cell.status === "not run") return h("span", { class: "soft" }, "not run");
  if (cell.status !== "reached")
    return [
      numberLink(h("span", { class: `badge ${cell.status}` }, cell.status), cell.shown, open, { title: cell.reason || null }),
      cell.counts.reached ? h("small", {}, ` ${cell.counts.reached}/${of}`) : null,
    ];
  const first = device().workloads[index].winners[state.clock].includes(one.contestant);
  return [
    numberLink(clockTime(time, state.clock), cell.shown, open, { class: first ? "first" : null, title: first ? "fastest on this workload" : null }),
    cell.counts.reached < of ? h("small", {}, ` ${cell.counts.reached}/${of}`) : null,
  ];
}

function scoreCell(one) {
  const result = own(one);
  if (one.refuted) return h("a", { href: "#history", class: "badge refuted" }, "refuted");
  if (!result) return h("span", { class: "soft" }, "skipped");
  const at = (value) => 60 * value;
  return [
    numberLink(result.score.toFixed(2), one.cells.find((cell) => cell.shown)?.shown, () => showScore(one)),
    g("svg", { class: `bar k${look(one.contestant).index}`, viewBox: "0 0 60 10", width: 60, height: 10, role: "img", "aria-label": `interval ${result.low.toFixed(2)} to ${result.high.toFixed(2)}` },
      g("title", {}, `${result.low.toFixed(2)} to ${result.high.toFixed(2)}`),
      g("rect", { x: 0, y: 3, width: 60, height: 4, class: "trough" }),
      g("rect", { x: 0, y: 3, width: at(result.score), height: 4, class: "fill" }),
      g("line", { x1: at(result.low), x2: at(result.high), y1: 5, y2: 5, class: "whisker" }),
      [result.low, result.high].map((end) => g("line", { x1: at(end), x2: at(end), y1: 2, y2: 8, class: "whisker" }))),
  ];
}

function drawBoard() {
  const shown = rowsShown(), total = device().workloads.length;
  const columns = [
    { key: "rank", title: "Rank", value: (one) => own(one)?.place ?? null, cell: (one) => own(one)?.rank ?? "–", hint: "= is a tie" },
    { key: "contestant", title: "Contestant", text: true, value: (one) => one.title, cell: nameCell },
    { key: "score", title: "Score", down: true, value: (one) => own(one)?.score ?? null, cell: scoreCell, hint: "area under the performance profile, with its interval" },
    { key: "reached", title: "Targets", down: true, value: (one) => one.ranked ? one.reached : null, cell: (one) => one.ranked ? `${one.reached}/${total}` : "–", hint: "targets reached by the median" },
    { key: "speed", title: "Speed-up", down: true, value: (one) => own(one)?.speed_up ?? null, hint: "over the best first-order contestant, geometric mean over the workloads that both reach",
      cell: (one) => own(one)?.speed_up ? [`${own(one).speed_up.toFixed(2)}×`, own(one).shared < total ? h("small", {}, ` on ${own(one).shared}`) : null] : "–" },
    ...device().workloads.map((workload, index) => ({
      key: `w${index}`, title: `${workload.name}, ${UNIT[state.clock]}`, value: (one) => one.cells[index][state.clock],
      cell: (one) => timeCell(one, index), hint: `${workload.title}: median ${data.clocks[state.clock]} until ${workload.metric} ${number(workload.target)}`,
    })),
    { key: "compile", title: "Compil\u00adation, s", value: (one) => one.compile, cell: (one) => one.compile === null ? "–" : clockTime(one.compile, "seconds"), hint: "median over all trials" },
    { key: "preparation", title: "Preparation, s", value: (one) => one.preparation, cell: (one) => one.preparation === null ? "–" : clockTime(one.preparation, "seconds"), hint: "theory of the learning rate; median over all trials" },
    { key: "ruleset", title: "Rules", text: true, value: (one) => one.ruleset || null, cell: (one) => one.ruleset || "–" },
    { key: "family", title: "Family", text: true, value: (one) => one.family, cell: (one) => one.family },
    { key: "fisher", title: "Fisher", text: true, value: (one) => one.fisher || null, cell: (one) => one.fisher || "–" },
    { key: "damping", title: "Damping", text: true, value: (one) => one.damping || null, cell: (one) => one.damping || "–" },
    { key: "rate", title: "Learning rate", text: true, value: (one) => one.rate_rule || null, cell: (one) => one.rate_rule || "–" },
  ];
  drawTable(byId("table"), state.board, columns, shown, drawBoard);
  const all = device().rows.length;
  byId("count").textContent = shown.length === all ? `${all || "No"} contestants.`
    : `${shown.length} of ${all} contestants; ranks are those among ${state.rulesets.size === 1 ? `the ${[...state.rulesets][0]} ones` : "all"}.`;
}

function drawFacts() {
  const { structures, workloads } = device(), index = state.workload;
  const rows = structures.map((one) => ({ ...one, measure: one.measures[index], board: row(one.contestant) }));
  byId("no-facts").hidden = rows.length > 0;
  byId("facts").hidden = rows.length === 0;
  const measured = (one) => one.measure?.status === "measured";
  const fact = (key, title, read, hint, infinite = false) => ({
    key, title, hint, value: (one) => (measured(one) ? read(one.measure) : null),
    cell: (one) => !one.measure ? "–" : measured(one)
      ? numberLink(read(one.measure) === null && infinite ? "∞" : number(read(one.measure)), one.measure.key, () => showMeasure(one))
      : numberLink(h("span", { class: "badge skipped" }, one.measure.status), one.measure.key, () => showMeasure(one)),
  });
  const columns = [
    { key: "contestant", title: "Structure", text: true, value: (one) => one.title, cell: nameCell },
    { key: "rank", title: "Rank", value: (one) => (one.board && own(one.board)?.place) ?? null, cell: (one) => (one.board && own(one.board)?.rank) ?? "–", hint: "on the board" },
    { key: "time", title: `Time here, ${UNIT[state.clock]}`, value: (one) => one.board?.cells[index]?.[state.clock] ?? null, cell: (one) => one.board ? timeCell(one.board, index) : "–" },
    fact("condition", "Condition number", (m) => m.condition_number, "1 is isotropic", true),
    fact("alpha", "α", (m) => m.alpha, "mean eigenvalue; the learning rate is 1/α"),
    fact("deviation", "Deviation", (m) => m.deviation, "of the coefficient matrix from α times the identity, relative", true),
    fact("nonzeros", "Non-zeros of G", (m) => m.nonzeros),
    fact("stored", "Stored numbers", (m) => m.stored),
    fact("flops", "Flops a step", (m) => m.flops),
    fact("ratio", "Step\u00a0/ SGD step, flops", (m) => m.flops !== null && m.sgd_flops ? m.flops / m.sgd_flops : null),
    { key: "damping", title: "Damping", text: true, value: (one) => one.damping || null, cell: (one) => one.damping || "–" },
  ];
  if (workloads.length) drawTable(byId("facts"), state.facts, columns, rows, drawFacts);
}

function drawWinners() {
  const clock = state.clock, unit = UNIT[clock];
  byId("winners").tBodies[0].replaceChildren(...device().workloads.map((workload, index) => {
    const entry = (name) => {
      const one = row(name);
      return h("span", { class: "entry" }, nameCell(one), " ",
        numberLink(`${clockTime(one.cells[index][clock], clock)} ${unit}`, one.cells[index].shown, () => showTrials(one, index)));
    };
    const entries = (names) => names.length ? [names.slice(0, 3).map(entry), names.length > 3 ? h("small", {}, `and ${names.length - 3} more`) : null] : "nobody";
    return h("tr", {},
      h("th", { scope: "row" }, workload.name, h("small", {}, `${workload.title}; version ${workload.version}`),
        workload.question ? h("small", {}, workload.question) : null,
        workload.expectation ? h("small", {}, workload.expectation) : null,
        workload.came_true ? h("small", {}, h("b", {}, `${workload.came_true[0].toUpperCase()}${workload.came_true.slice(1)}.`)) : null),
      h("td", { class: "text", "data-label": "Target" }, h("b", {}, number(workload.target)), ` ${workload.metric}`, h("small", {}, workload.why_target)),
      h("td", { class: "text", "data-label": "Fastest" }, entries(workload.winners[clock])),
      h("td", { class: "text", "data-label": "Best first-order" }, entries(workload.first_order[clock].contestants)),
      h("td", { class: "text", "data-label": "Ours before it" }, h("b", {}, String(workload.faster[clock].length)), h("small", {}, words(workload.faster[clock].join(", ")))),
      h("td", { "data-label": "Reached by" }, `${workload.reached_by} of ${workload.of}`));
  }));
}

// Dialogs ---------------------------------------------------------------------------------------

function show(title, ...body) {
  byId("dialog-title").textContent = title;
  byId("dialog-body").replaceChildren(...body.flat(3).filter((part) => part !== null));
  if (!byId("dialog").open) byId("dialog").showModal();
}
const jsonLink = (key) => h("a", { href: trialLink(key), title: key }, key.slice(0, 8));
const plainTable = (heads, rows) => h("div", { class: "scroll" }, h("table", {},
  h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
  h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell)))))));

function showTrials(one, index) {
  const cell = one.cells[index], workload = device().workloads[index];
  const seconds = (value) => clockTime(value, "seconds");
  const [low, high] = cell.learning_rates || [];
  const rate = low === undefined ? "" : `Learning rate ${low === high ? number(low) : `${number(low)} to ${number(high)}`} (${[one.rate_rule, cell.rate_note].filter(Boolean).join(", ")}).`;
  show(`${one.title} on ${workload.name}`,
    h("p", { class: "small" }, workload.title),
    h("p", {}, `${cell.counts.reached} of ${cell.trials.length} trials reached ${workload.metric} ${number(workload.target)}. ${rate} `, cell.reason ? `A trial says: ${cell.reason}.` : null),
    plainTable(["Seed", "Learning rate", "Outcome", "Seconds", "Training", "Compilation", "Preparation", "Steps", "JSON"], [
      ...cell.trials.map(([key, seed, status, total, training, steps, compile, preparation, , tried]) =>
        [String(seed), number(tried), status, seconds(total), seconds(training), seconds(compile), seconds(preparation), number(steps, 4), jsonLink(key)]),
      ["Median", "", cell.status, seconds(cell.seconds), seconds(cell.training), seconds(cell.compile), seconds(cell.preparation), number(cell.steps, 4), ""],
    ]),
    h("h4", {}, "To repeat them"),
    cell.trials.map((trial) => h("pre", {}, h("code", {}, command(trial[8], trial[0])))),
    cell.tuned_on.length ? [h("h4", {}, "Tuned on"), plainTable(["Seed", "Learning rate", "Outcome", "Best value", "JSON"],
      cell.tuned_on.map(([key, seed, value, status, best]) => [String(seed), number(value), status, number(best), jsonLink(key)]))] : null);
}

function showScore(one) {
  const result = own(one), limit = data.scoring.r_max, workloads = device().workloads;
  show(`Score of ${one.title}`,
    h("p", {}, `${result.score.toFixed(3)}, interval ${result.low.toFixed(3)} to ${result.high.toFixed(3)}, rank ${result.rank}, by ${data.clocks[state.clock]}. It is the mean of the parts: (${limit} − ratio) / ${limit - 1}, 0 beyond ${limit} times the fastest.`),
    plainTable(["Workload", `Median, ${UNIT[state.clock]}`, "Ratio to the fastest", "Part"], one.cells.map((cell, index) => {
      const ratio = result.ratios[index];
      return [workloads[index].name, timeCell(one, index), number(ratio), (ratio === null ? 0 : Math.max(0, limit - ratio) / (limit - 1)).toFixed(3)];
    })));
}

function showMeasure(one) {
  const m = one.measure;
  show(`${one.title} on ${device().workloads[state.workload].name}`,
    m.reason ? h("p", {}, m.reason) : null,
    h("p", {}, "Isotropy and cost: ", jsonLink(m.key)),
    h("h4", {}, "To repeat it"), h("pre", {}, h("code", {}, command(m.command, m.key))));
}
