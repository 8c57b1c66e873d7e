"use strict";
// Elements, numbers, and charts as inline SVG. Text goes in as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3))
    if (child !== null && child !== undefined) element.append(child);
  return element;
}
const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
const g = (tag, attributes, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

// text that breaks between words only, never after a hyphen
const words = (text) => text.split(" ").flatMap((word, i) => [i ? " " : null, h("span", { class: "word" }, word)]);

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const superscript = (integer) => [...String(integer)].map((sign) => SUPERSCRIPTS[sign]).join("");

// powers of ten outside of 10^-3 to 10^5, as in the report of natgrad
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) {
    const text = size >= 10 ** digits ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
    return text.replace("-", "−");
  }
  const [mantissa, exponent] = value.toExponential(digits - 2).split("e");
  return `${mantissa.replace("-", "−")} × 10${superscript(Number(exponent))}`;
}
// the same number of digits in a column, so that times can be compared by eye
function clockTime(value, clock) {
  if (value === null) return "–";
  if (clock === "steps") return number(value, 4);
  if (value < 5e-5) return "0";
  if (value < 0.01) return String(Number(value.toPrecision(2)));
  return value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0);
}

function markerPath(shape, x, y, r) {
  const at = (radius, angle) => [x + radius * Math.sin(angle), y - radius * Math.cos(angle)];
  const polygon = (points) => `M${points.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L")}Z`;
  const regular = (count, radius, turn = 0) =>
    polygon(Array.from({ length: count }, (_, i) => at(radius, turn + (2 * Math.PI * i) / count)));
  if (shape === "P" || shape === "X") {
    const turn = shape === "X" ? Math.PI / 4 : 0;
    const corners = [0, 1, 2, 3].flatMap((i) => {
      const angle = turn + (i * Math.PI) / 2;
      return [at(1.2 * r, angle - 0.36), at(1.2 * r, angle + 0.36), at(0.55 * r, angle + Math.PI / 4)];
    });
    return polygon(corners);
  }
  if (shape === "s") return regular(4, 1.25 * r, Math.PI / 4);
  if (shape === "D") return regular(4, 1.3 * r);
  if (shape === "^") return regular(3, 1.35 * r);
  if (shape === "v") return regular(3, 1.35 * r, Math.PI);
  if (shape === "p") return regular(5, 1.15 * r);
  if (shape === "h") return regular(6, 1.15 * r);
  return regular(24, r);
}
const marker = (look, x, y, r = 4) =>
  g("path", { d: markerPath(look.marker, x, y, r), class: look.open ? "mark open" : "mark" });

function sign(look) {
  return g("svg", { class: `sign k${look.index}`, viewBox: "0 0 34 12", width: 34, height: 12, "aria-hidden": "true" },
    g("line", { x1: 0, x2: 34, y1: 6, y2: 6, class: "stroke", "stroke-dasharray": look.dash || null }),
    marker(look, 17, 6, 4));
}

// Scales: from values to [0, 1]
const linear = (low, high) => (value) => (value - low) / (high - low);
const logarithmic = (low, high) => (value) =>
  (Math.log(Math.max(value, low)) - Math.log(low)) / (Math.log(high) - Math.log(low));
const fromZero = (high) => (value) => Math.log1p(value) / Math.log1p(high);

function powersOfTen(low, high, most) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first + 1) / most));
  const ticks = [];
  for (let power = first; power <= last; power += every) ticks.push(10 ** power);
  if (ticks.length >= 2) return ticks;
  // less than two decades: digits between them as well
  const digits = high / low < 4 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5], finer = [];
  for (let power = first - 1; power <= last + 1; power++)
    for (const digit of digits) finer.push(digit * 10 ** power);
  return finer.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}
function tickText(value) {
  if (value >= 0.01 && value < 1e4) return String(Number(value.toPrecision(2)));
  const power = Math.floor(Math.log10(value) + 1e-9), digit = Number((value / 10 ** power).toPrecision(2));
  return `${digit > 1 ? `${digit}·` : ""}10${superscript(power)}`;
}

// A chart. lines: {who, look, points: [[x, y] | null], marks: [[x, y]], shift}; null breaks a line.
function chart({ label, width, height, x, y, xTicks, yTicks, xText, yText, xName, yName, lines, level }) {
  const left = 56, right = 12, top = 8, bottom = 38;
  const across = (value) => left + (width - left - right) * x(value);
  const up = (value) => height - bottom - (height - top - bottom) * y(value);
  const middle = (top + height - bottom) / 2;
  const root = g("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  for (const tick of yTicks)
    root.append(
      g("line", { class: "grid", x1: left, x2: width - right, y1: up(tick), y2: up(tick) }),
      g("text", { class: "tick", x: left - 6, y: up(tick) + 4, "text-anchor": "end" }, yText(tick)));
  for (const tick of xTicks)
    root.append(
      g("line", { class: "grid", x1: across(tick), x2: across(tick), y1: top, y2: height - bottom }),
      g("text", { class: "tick", x: across(tick), y: height - bottom + 15, "text-anchor": "middle" }, xText(tick)));
  root.append(
    g("text", { class: "axis", x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, xName),
    g("text", { class: "axis", transform: `translate(11 ${middle}) rotate(-90)`, "text-anchor": "middle" }, yName));
  if (level !== undefined && level !== null) {
    root.append(
      g("line", { class: "target", x1: left, x2: width - right, y1: up(level), y2: up(level) }),
      g("text", { class: "tick strong", x: left + 4, y: up(level) + 13 }, `target ${number(level)}`));
  }
  for (const line of lines) {
    const move = line.shift || 0;
    let path = "", pen = false;
    for (const point of line.points) {
      if (point) path += `${pen ? "L" : "M"}${across(point[0]).toFixed(1)} ${(up(point[1]) + move).toFixed(1)}`;
      pen = Boolean(point);
    }
    root.append(
      g("g", { class: `line k${line.look.index}`, "data-who": line.who },
        g("path", { d: path, class: "hit" }),
        g("path", { d: path, class: "stroke", "stroke-dasharray": line.look.dash || null }),
        line.marks.map(([a, b]) => marker(line.look, across(a), up(b) + move))));
  }
  return root;
}
