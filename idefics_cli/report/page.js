"use strict";
// Rows are columns in `D`, found by their number; `shown` are the numbers that pass the filters, in order. Only what is
// in view has elements. Whatever comes from a row is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const TEXT_SHOWN = 20000;
const PRINTED = 1000;
const TALLEST = 8e6; // pixels: browsers limit the height of an element

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// ---- data

const about = JSON.parse($("about").textContent);
const end = JSON.parse($("end").textContent);
const D = { kept: about.kept.map(() => []) };
const NAMES = ["id", "question", "link", "missing", "text", "score", "tokens", "error", "value"];
NAMES.push("text2", "score2", "tokens2", "error2", "value2");
for (const name of NAMES) D[name] = [];
const starts = [];
for (const element of document.querySelectorAll("script.rows")) {
  const chunk = JSON.parse(element.textContent);
  const size = chunk.id ? chunk.id.length : 0;
  starts.push(D.id.length);
  for (const name of NAMES) {
    const column = D[name], values = chunk[name];
    if (values) for (let i = 0; i < size; i++) column.push(values[i]);
    else for (let i = 0; i < size; i++) column.push(null);
  }
  chunk.kept.forEach((values, k) => { for (const value of values) D.kept[k].push(value); });
  element.remove();
}
const N = D.id.length;
const isCompared = about.other !== null;
const hasValues = D.value.some((value) => value !== null);
const hasImages = about.link ? D.link.some(Boolean) : D.missing.some((reason) => reason === null);
const usesTokens = D.tokens.some((value) => value !== null);
const words = (text) => (text ? text.slice(0, TEXT_SHOWN).split(/\s+/).filter(Boolean).length : null);
D.length = usesTokens ? D.tokens : D.text.map(words);
const lengthName = usesTokens ? "tokens" : "words";
const measureName = { vqa_accuracy: "VQA accuracy", exact_match: "exact match" }[about.measure] || "";

function lazy(kind) {
  const elements = [...document.querySelectorAll(`script.${kind}`)], parsed = new Map();
  return (i) => {
    let low = 0, high = starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= i) low = middle; else high = middle - 1;
    }
    if (!parsed.has(low)) {
      if (parsed.size > 40) parsed.delete(parsed.keys().next().value);
      parsed.set(low, JSON.parse(elements[low].textContent).rows);
    }
    return parsed.get(low)[i - starts[low]];
  };
}
const detailsOf = lazy("details");
const thumbnailOf = lazy("thumbnails");

function source(i) {
  if (about.link) return D.link[i];
  const thumbnail = D.missing[i] === null ? thumbnailOf(i) : null;
  return thumbnail ? `data:image/webp;base64,${thumbnail}` : null;
}

// ---- what the reader adds: marks and edited texts, kept by the browser for this page

const KEY = `idefics-report:${end.digest}`;
const marks = new Set(), edits = new Map();
const textOf = (i) => (edits.has(i) ? edits.get(i) : D.text[i]);

function stored(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { /* a browser may keep nothing for pages from files */ }
  return null;
}
function restore() {
  try {
    const kept = JSON.parse(stored(KEY) || "{}");
    for (const i of kept.marks || []) if (i < N) marks.add(i);
    for (const [i, text] of kept.edits || []) if (i < N) edits.set(i, text);
  } catch { /* not what this page has written */ }
}
function keep() {
  stored(KEY, JSON.stringify({ marks: [...marks], edits: [...edits] }));
  const pending = marks.size + edits.size;
  $("pending").hidden = !pending;
  $("pending").textContent = pending.toLocaleString("en");
}

// ---- texts

const CONTROL = /[\0-\x08\x0b-\x1f\x7f-\x9f]/g;
const visible = (text) => text.replace(CONTROL, (c) => {
  const code = c.charCodeAt(0);
  return code < 32 ? String.fromCharCode(0x2400 + code) : code === 127 ? "\u2421" : `\\x${code.toString(16)}`;
});
const brief = (text, most) => visible(text.length > most ? `${text.slice(0, most)}…` : text);
const number = (value) => value === null || value === undefined ? "–"
  : Number.isInteger(value) ? value.toLocaleString("en")
  : Math.abs(value) < 0.0005 ? value.toExponential(1) : value.toFixed(Math.abs(value) < 1 ? 3 : 2);
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const codeOf = (error) => (error ? error.split(":", 1)[0].slice(0, 40) : null);
const isRight = (value) => value > 0;

function differing(one, other) {
  // The words of `one` that are not in the longest part that it has in common with `other`.
  const a = one.split(/(\s+)/), b = other.split(/(\s+)/);
  if (a.length * b.length > 40000) return [one];
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length) {
    if (j < b.length && a[i] === b[j]) { parts.push(a[i++]); j++; }
    else if (j < b.length && length[i][j + 1] >= length[i + 1][j]) j++;
    else { parts.push(a[i].trim() ? h("mark", {}, a[i]) : a[i]); i++; }
  }
  return parts;
}

// ---- filters

const state = { query: "", sort: "", shown: [], cursor: 0, view: "gallery" };
const ranges = new Map(); // histogram -> [low, high]
const picked = new Map(); // facet -> the values wanted

let lower = null;
function searchable() {
  if (lower) return lower;
  const texts = [D.text, D.id];
  if (about.question) texts.push(D.question);
  if (isCompared) texts.push(D.text2);
  if (D.error.some(Boolean)) texts.push(D.error);
  for (const column of D.kept) if (column.some((value) => typeof value === "string")) texts.push(column);
  lower = new Array(N);
  for (let i = 0; i < N; i++) {
    let text = "";
    for (const column of texts) if (column[i] !== null) text += `${column[i]}\n`;
    lower[i] = text.toLowerCase();
  }
  return lower;
}

function tally(codes, size, rows) {
  // How many of these rows (null: of all) have each code; -1 is none.
  const counts = new Int32Array(size + 1);
  if (rows) for (let n = 0; n < rows.length; n++) counts[codes[rows[n]] + 1]++;
  else for (let i = 0; i < N; i++) counts[codes[i] + 1]++;
  return counts.subarray(1);
}

class Facet {
  constructor(name, of, order) {
    this.name = name;
    this.codes = new Int32Array(N);
    this.values = order ? [...order] : [];
    const known = new Map(this.values.map((value, code) => [value, code]));
    for (let i = 0; i < N; i++) {
      const value = of(i);
      if (value === null) { this.codes[i] = -1; continue; }
      if (!known.has(value)) { known.set(value, this.values.length); this.values.push(value); }
      this.codes[i] = known.get(value);
    }
    this.totals = this.count(null);
    if (!order) this.order = this.values.map((_, code) => code).sort((a, b) => this.totals[b] - this.totals[a]);
    else this.order = this.values.map((_, code) => code).filter((code) => this.totals[code]);
  }
  count(rows) {
    return tally(this.codes, this.values.length, rows);
  }
  draw(section) {
    this.list = h("div", { class: "values", role: "group", "aria-label": this.name });
    section.append(this.list);
    if (this.order.length > 12) {
      this.find = h("input", { type: "search", placeholder: "Find a value", "aria-label": `Find a value of ${this.name}`, oninput: () => this.update(this.counts) });
      section.insertBefore(this.find, this.list);
    }
  }
  update(counts) {
    this.counts = counts;
    const wanted = picked.get(this), find = this.find ? this.find.value.toLowerCase() : "";
    const most = find ? 50 : 12;
    const codes = this.order.filter((code) => (wanted && wanted.has(code)) || !find || String(this.values[code]).toLowerCase().includes(find)).slice(0, most);
    if (this.drawn !== codes.join()) {
      this.drawn = codes.join();
      this.list.replaceChildren(...codes.map((code) => {
        const label = String(this.values[code]);
        return h("button", { class: "value", "data-code": code, title: brief(label, 200), onclick: () => { this.pick(code); } },
          h("bdi", {}, label === "" ? "(empty)" : brief(label, 60)), h("small", {}));
      }));
    }
    for (const button of this.list.children) {
      const code = Number(button.dataset.code);
      button.setAttribute("aria-pressed", wanted && wanted.has(code) ? "true" : "false");
      button.lastChild.textContent = counts[code].toLocaleString("en");
      button.classList.toggle("none", !counts[code]);
    }
  }
  pick(code) {
    const wanted = picked.get(this) || new Set();
    if (!wanted.delete(code)) wanted.add(code);
    if (wanted.size) picked.set(this, wanted); else picked.delete(this);
    refresh();
  }
}

class Histogram {
  // Values beyond the outermost hundredths count in the first and the last bar.
  constructor(name, values) {
    this.name = name;
    this.values = values;
    const known = Float64Array.from(values.filter((value) => typeof value === "number")).sort();
    this.isWhole = known.every(Number.isInteger);
    this.low = known.length ? known[Math.floor(known.length * 0.005)] : 0;
    this.high = known.length ? known[Math.ceil(known.length * 0.995) - 1] : 0;
    const span = this.high - this.low;
    this.bars = this.isWhole && span < 40 ? span + 1 : 40;
    this.width = this.isWhole && span < 40 ? 1 : span / 40 || 1;
    this.bins = new Int16Array(N).fill(-1);
    for (let i = 0; i < N; i++)
      if (typeof values[i] === "number") this.bins[i] = Math.max(0, Math.min(this.bars - 1, Math.floor((values[i] - this.low) / this.width)));
    this.totals = this.count(null);
    this.most = Math.max(1, ...this.totals);
    this.from = 0;
    this.to = this.bars;
  }
  count(rows) { return tally(this.bins, this.bars, rows); }
  draw(section) {
    const NS = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${this.bars} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    this.rects = ["all", "some"].map((kind) => Array.from({ length: this.bars }, (_, bar) => {
      const rect = document.createElementNS(NS, "rect");
      rect.setAttribute("class", kind);
      rect.setAttribute("x", bar + 0.08);
      rect.setAttribute("width", 0.84);
      svg.append(rect);
      return rect;
    }));
    this.set(this.rects[0], this.totals);
    const handle = (which, label) => h("div", { class: "handle", role: "slider", tabindex: "0", "aria-label": `${label} ${this.name}`, "aria-orientation": "horizontal", onkeydown: (event) => this.key(event, which) });
    this.handles = [handle("from", "least"), handle("to", "greatest")];
    this.window = h("div", { class: "window" });
    this.plot = h("div", { class: "plot", "data-name": this.name, onpointerdown: (event) => this.drag(event), ondblclick: () => this.brush(0, this.bars) }, svg, this.window, ...this.handles);
    this.ends = [h("span", {}), h("span", {})];
    section.append(this.plot, h("p", { class: "ends" }, ...this.ends));
  }
  set(rects, counts) {
    rects.forEach((rect, bar) => {
      const height = counts[bar] ? Math.max(2, 100 * Math.sqrt(counts[bar] / this.most)) : 0;
      rect.setAttribute("y", 100 - height);
      rect.setAttribute("height", height);
    });
  }
  at(bar) { return this.low + bar * this.width; }
  label(which) {
    if (which === "from") return this.from === 0 ? number(this.low) : number(this.at(this.from));
    return this.to === this.bars ? number(this.high) : number(this.at(this.to) - (this.isWhole ? 1 : 0));
  }
  update(counts) {
    this.set(this.rects[1], counts);
    this.window.style.left = `${(100 * this.from) / this.bars}%`;
    this.window.style.right = `${100 - (100 * this.to) / this.bars}%`;
    this.plot.classList.toggle("brushed", ranges.has(this));
    ["from", "to"].forEach((which, side) => {
      const element = this.handles[side];
      element.style.left = `${(100 * this[which]) / this.bars}%`;
      element.setAttribute("aria-valuemin", number(this.low));
      element.setAttribute("aria-valuemax", number(this.high));
      element.setAttribute("aria-valuenow", number(this.at(this[which])));
      element.setAttribute("aria-valuetext", this.label(which));
      this.ends[side].textContent = this.label(which);
    });
  }
  brush(from, to) {
    this.from = Math.max(0, Math.min(this.bars - 1, from));
    this.to = Math.max(this.from + 1, Math.min(this.bars, to));
    if (this.from === 0 && this.to === this.bars) ranges.delete(this); else ranges.set(this, [this.from, this.to]);
    refresh();
  }
  drag(event) {
    const box = this.plot.getBoundingClientRect();
    const bar = (x) => Math.max(0, Math.min(this.bars, ((x - box.left) / box.width) * this.bars));
    const near = (x) => this.handles.findIndex((element) => Math.abs(element.getBoundingClientRect().left + 7 - x) < 12);
    const side = ranges.has(this) || event.target.classList.contains("handle") ? near(event.clientX) : -1;
    const fixed = side === 0 ? this.to : side === 1 ? this.from : bar(event.clientX);
    const move = (moved) => {
      const here = bar(moved.clientX);
      if (side < 0 && Math.abs(moved.clientX - event.clientX) < 4) return;
      this.brush(Math.floor(Math.min(fixed, here)), Math.ceil(Math.max(fixed, here)));
    };
    const up = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", up); };
    addEventListener("pointermove", move);
    addEventListener("pointerup", up);
    event.preventDefault();
  }
  key(event, which) {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5 }[event.key];
    const far = { Home: -this.bars, End: this.bars }[event.key];
    if (!step && !far) { if (event.key === "Escape") this.brush(0, this.bars); return; }
    event.preventDefault();
    event.stopPropagation();
    if (which === "from") this.brush(Math.min(this.to - 1, this.from + (step || far)), this.to);
    else this.brush(this.from, Math.max(this.from + 1, this.to + (step || far)));
  }
}

const A = isCompared ? "A" : "", B = "B";
function makeFilters() {
  const made = [];
  const add = (title, part) => made.push([title, part]);
  const histogram = (title, values) => { const part = new Histogram(title, values); if (part.low < part.high) add(title, part); };
  if (isCompared) {
    add("Comparison", new Facet("comparison", (i) => (D.text2[i] === null && !D.error2[i] ? "only in A" : D.text[i] === D.text2[i] ? "same text" : "different"), ["different", "same text", "only in A"]));
    if (hasValues) add("Closer to the references", new Facet("wins", winner, ["A wins", "B wins", "both alike"]));
  }
  histogram(isCompared ? "score of A" : "score", D.score);
  histogram(isCompared ? `${lengthName} of A` : lengthName, D.length);
  if (hasValues) add(measureName + (isCompared ? " of A" : ""), new Facet(measureName, (i) => (D.value[i] === null ? "no references" : D.value[i] >= 1 ? "right" : D.value[i] > 0 ? "partly right" : "wrong"), ["right", "partly right", "wrong", "no references"]));
  if (D.error.some(Boolean)) add("Errors", new Facet("error", (i) => codeOf(D.error[i]) || "none"));
  if (hasImages && D.missing.some((reason) => reason !== null)) add("Images", new Facet("image", (i) => (D.missing[i] === null ? "shown" : "not shown"), ["shown", "not shown"]));
  about.kept.forEach((name, k) => {
    const column = D.kept[k], distinct = new Set();
    for (let i = 0; i < N && distinct.size <= 12; i++) distinct.add(column[i]);
    if (distinct.size > 12 && column.every((value) => value === null || typeof value === "number")) histogram(name, column);
    else add(name, new Facet(name, (i) => (column[i] === null ? null : String(column[i]))));
  });
  return made;
}
function winner(i) {
  if (D.value[i] === null || D.value2[i] === null) return null;
  return D.value[i] > D.value2[i] ? "A wins" : D.value[i] < D.value2[i] ? "B wins" : "both alike";
}

// ---- order

const orders = new Map();
const SORTS = [];
function makeSorts() {
  const by = (name, label, column, sign) => SORTS.push([name, label, (a, b) => {
    const x = column[a], y = column[b];
    return x === y ? 0 : x === null ? 1 : y === null ? -1 : x < y ? -sign : sign; // null comes last
  }]);
  SORTS.push(["", "order of the file", null]);
  if (isCompared) {
    const same = Uint8Array.from({ length: N }, (_, i) => (D.text[i] === D.text2[i] ? 1 : 0));
    SORTS.unshift(["differing", "differing first", (a, b) => same[a] - same[b]]);
  }
  if (D.score.some((value) => value !== null)) {
    by("score-", "score, lowest first", D.score, 1);
    by("score", "score, highest first", D.score, -1);
  }
  by("length", `${lengthName}, most first`, D.length, -1);
  by("length-", `${lengthName}, fewest first`, D.length, 1);
  if (hasValues) by("value", `${measureName}, lowest first`, D.value, 1);
  by("id", "id", D.id, 1);
  about.kept.forEach((name, k) => by(`k${k}`, name, D.kept[k], 1));
  $("sort").append(...SORTS.map(([name, label]) => h("option", { value: name }, label)));
  state.sort = SORTS[0][0];
}
function ordered() {
  if (!orders.has(state.sort)) {
    const rows = Array.from({ length: N }, (_, i) => i);
    const compare = SORTS.find(([name]) => name === state.sort)[2];
    orders.set(state.sort, compare ? rows.sort(compare) : rows);
  }
  return orders.get(state.sort);
}

const filters = makeFilters();
const markFacet = { only: false };
function refresh() {
  const query = state.query.trim().toLowerCase(), texts = query ? searchable() : null;
  const shown = [], limits = [...ranges], wanted = [...picked];
  const all = ordered();
  rows: for (let n = 0; n < N; n++) {
    const i = all[n];
    if (texts && !texts[i].includes(query)) continue;
    if (markFacet.only && !marks.has(i) && !edits.has(i)) continue;
    for (const [part, codes] of wanted) if (!codes.has(part.codes[i])) continue rows;
    for (const [part, [from, to]] of limits) if (part.bins[i] < from || part.bins[i] >= to) continue rows;
    shown.push(i);
  }
  const at = state.shown[state.cursor];
  state.shown = shown;
  state.cursor = Math.max(0, at === undefined ? 0 : shown.indexOf(at));
  $("count").textContent = shown.length === N ? plural(N, "row") : `${shown.length.toLocaleString("en")} of ${plural(N, "row")}`;
  $("empty").hidden = shown.length > 0;
  $("view").scrollTop = 0;
  drawChips();
  draw();
  clearTimeout(refresh.later);
  refresh.later = setTimeout(drawFilters, N > 20000 ? 60 : 0);
}
function drawFilters() {
  for (const [, part] of filters) part.update(state.shown.length === N ? part.totals : part.count(state.shown));
}
function drawChips() {
  const chip = (label, remove) => h("button", { class: "chip", title: "Remove this filter", onclick: () => { remove(); refresh(); } }, h("bdi", {}, label), icon("close"));
  const chips = [];
  for (const [part, codes] of picked) for (const code of codes)
    chips.push(chip(`${part.name}: ${brief(String(part.values[code]), 40)}`, () => { codes.delete(code); if (!codes.size) picked.delete(part); }));
  for (const [part] of ranges)
    chips.push(chip(`${part.name}: ${part.label("from")} to ${part.label("to")}`, () => { part.from = 0; part.to = part.bars; ranges.delete(part); }));
  if (markFacet.only) chips.push(chip("marked or edited", () => { markFacet.only = false; }));
  $("chips").replaceChildren(...chips);
}
function clear() {
  picked.clear();
  for (const [part] of ranges) { part.from = 0; part.to = part.bars; }
  ranges.clear();
  markFacet.only = false;
  state.query = $("search").value = "";
  refresh();
}

// ---- the rows in view

const GAP = 14;
// Letters that nine of ten texts do not exceed, by which cards have room for one line or more.
const usual = (column) => {
  const lengths = [];
  for (let i = 0; i < N; i += Math.ceil(N / 2000)) lengths.push(column[i] === null ? 0 : column[i].length);
  return lengths.sort((a, b) => a - b)[Math.floor(lengths.length * 0.9)] || 0;
};
const letters = Math.max(usual(D.text), usual(D.text2)), lettersOfQuestion = about.question ? usual(D.question) : 0;
const layout = { columns: 1, width: 0, height: 0, image: 0, total: 0 };
const inView = new Map();
function measure() {
  const view = $("view"), width = view.clientWidth - 2 * GAP;
  const isNarrow = width < 520;
  if (state.view === "table") {
    Object.assign(layout, { columns: 1, width: view.clientWidth, height: isCompared && isNarrow ? 88 : 64, image: 0, gap: 0, left: 0 });
  } else {
    const least = isCompared ? (isNarrow ? 300 : 320) : isNarrow ? 150 : 216;
    const columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
    const card = (width - GAP * (columns - 1)) / columns;
    const image = hasImages ? Math.round(Math.min(card * 0.74, 230)) : 0;
    const lines = (count, room, most) => Math.max(1, Math.min(most, Math.ceil((count * 7.4) / room)));
    const runs = isCompared ? 2 * (7 + 21 * Math.max(1.2, lines(letters, card - 150, 3))) : 21 * lines(letters, card - 24, isNarrow ? 4 : 3);
    const text = 52 + runs + (about.question ? 5 + 17 * lines(lettersOfQuestion, card - 24, 2) : 0);
    Object.assign(layout, { columns, width: card, height: image + text + GAP, image, gap: GAP, left: GAP });
  }
}
function draw() {
  const view = $("view"), { columns, height } = layout;
  const lines = Math.ceil(state.shown.length / columns);
  layout.total = lines * height + layout.gap;
  const tall = Math.min(layout.total, TALLEST);
  $("pad").style.height = `${tall}px`;
  const room = view.clientHeight;
  // Where all rows are taller than an element may be, a pixel of the scroll bar stands for more than one of theirs.
  const ratio = layout.total > tall ? (layout.total - room) / (tall - room) : 1;
  layout.ratio = ratio;
  const top = view.scrollTop * ratio, shift = view.scrollTop - top;
  const first = Math.max(0, Math.floor(top / height) - 1) * columns;
  const last = Math.min(state.shown.length, (Math.ceil((top + room) / height) + 1) * columns);
  const needed = new Set();
  for (let place = first; place < last; place++) needed.add(state.shown[place]);
  const free = [];
  for (const [i, element] of inView) if (!needed.has(i)) { inView.delete(i); free.push(element); }
  for (let place = first; place < last; place++) {
    const i = state.shown[place];
    let element = inView.get(i);
    if (!element) {
      element = free.pop() || $("pad").appendChild(state.view === "table" ? makeLine() : makeCard());
      element.hidden = false;
      fill(element, i);
      inView.set(i, element);
    }
    element.place = place;
    const x = layout.left + (place % columns) * (layout.width + layout.gap);
    const y = Math.floor(place / columns) * height + layout.gap + shift;
    element.style.transform = `translate(${x}px, ${y}px)`;
    element.style.width = `${layout.width}px`;
    element.style.height = `${height - layout.gap}px`;
    element.classList.toggle("cursor", place === state.cursor);
    element.setAttribute(state.view === "table" ? "aria-rowindex" : "aria-posinset", place + (state.view === "table" ? 2 : 1));
    if (state.view !== "table") element.setAttribute("aria-setsize", state.shown.length);
  }
  for (const element of free) element.remove();
  const current = inView.get(state.shown[state.cursor]);
  if (current) view.setAttribute("aria-activedescendant", current.id); else view.removeAttribute("aria-activedescendant");
}
function redraw() {
  inView.clear();
  $("pad").replaceChildren();
  measure();
  $("view").setAttribute("role", state.view === "table" ? "grid" : "listbox");
  $("view").setAttribute("aria-label", `Rows of ${about.title}`);
  if (state.view === "table") { $("view").setAttribute("aria-rowcount", state.shown.length + 1); $("view").removeAttribute("aria-multiselectable"); }
  else { $("view").setAttribute("aria-multiselectable", "true"); $("view").removeAttribute("aria-rowcount"); }
  drawHead();
  draw();
}

function imagePart() {
  const image = h("img", { alt: "", decoding: "async", draggable: "false" });
  image.addEventListener("error", () => { if (image.hasAttribute("src")) { image.hidden = true; image.parentNode.classList.add("missing"); } });
  return h("div", { class: "image" }, image, h("div", { class: "why" }, icon("broken"), h("span", {})));
}
function fillImage(part, i) {
  const [image, why] = part.children, found = source(i);
  image.hidden = !found;
  part.classList.toggle("missing", !found);
  if (found) image.src = found; else image.removeAttribute("src");
  why.lastChild.textContent = found ? "the file cannot be shown" : codeOf(D.missing[i]) || "no image";
}
function badge(value) {
  if (value === null) return null;
  const kind = value >= 1 ? "right" : value > 0 ? "partly" : "wrong";
  const label = { right: "right", partly: `${Math.round(100 * value)} %`, wrong: "wrong" }[kind];
  return h("span", { class: `badge ${kind}`, title: `${measureName} ${percent(value)}` }, icon(kind === "wrong" ? "cross" : "check"), label);
}
function markButton() {
  return h("button", { class: "tick", tabindex: "-1", "aria-label": "Mark", title: "Mark (m)" }, icon("mark"));
}
function makeCard() {
  return h("article", { class: "card", role: "option" }, layout.image ? imagePart() : null, markButton(), h("div", { class: "words" }));
}
function runLine(i, run, other) {
  const text = run === B ? D.text2[i] : textOf(i), error = run === B ? D.error2[i] : D.error[i];
  const value = run === B ? D.value2[i] : D.value[i];
  const against = run === B ? textOf(i) : D.text2[i];
  const shown = text === null ? null : brief(text, 400);
  const content = text === null ? brief(error || (run === B ? "no such row" : "no text"), 200)
    : against !== null && against !== text ? differing(shown, brief(against, 400)) : shown;
  return h("div", { class: `run ${run === B ? "b" : "a"}${text === null ? " failed" : ""}` }, h("b", { class: "name" }, run), h("p", { dir: "auto" }, content), other ? null : badge(value));
}
function fill(element, i) {
  element.row = i;
  element.id = `r${i}`;
  element.classList.toggle("marked", marks.has(i));
  element.classList.toggle("edited", edits.has(i));
  element.classList.toggle("failed", textOf(i) === null);
  element.setAttribute("aria-selected", marks.has(i) ? "true" : "false");
  if (state.view === "table") { fillLine(element, i); return; }
  const part = element.querySelector(".image");
  if (part) { part.style.height = `${layout.image}px`; fillImage(part, i); }
  element.querySelector(".words").replaceChildren(...wordsOf(i));
}
function wordsOf(i) {
  const parts = [], text = textOf(i);
  if (about.question) parts.push(h("p", { class: "question", dir: "auto" }, brief(D.question[i] || "", 200)));
  if (isCompared) parts.push(runLine(i, A), runLine(i, B));
  else if (text === null) parts.push(h("p", { class: "text error", dir: "auto" }, brief(D.error[i] || "no text", 300)));
  else parts.push(h("p", { class: "text", dir: "auto" }, brief(text, 500)));
  parts.push(h("div", { class: "foot" }, h("span", { class: "id", dir: "auto", title: brief(D.id[i], 300) }, h("bdi", {}, brief(D.id[i], 120))),
    edits.has(i) ? h("span", { class: "badge changed" }, "edited") : null,
    isCompared ? null : badge(D.value[i]),
    D.score[i] === null ? null : h("span", { class: "score", title: `score ${D.score[i]}, ${plural(D.length[i] || 0, lengthName.slice(0, -1))}` }, number(D.score[i]))));
  return parts;
}

// The table: its columns, what stands in them, and by what they sort.
function columnsOfTable() {
  const isNarrow = $("view").clientWidth < 620;
  const cell = (content, name) => h("div", { class: `cell ${name || ""}`, role: "gridcell" }, content);
  const columns = [];
  columns.push(["", "36px", (i) => cell(markButton(), "tick-cell"), null]);
  if (hasImages) columns.push(["image", "72px", (i) => { const part = imagePart(); fillImage(part, i); return cell(part); }, null]);
  if (!isNarrow) columns.push(["id", "minmax(90px, 1fr)", (i) => cell(h("bdi", { title: brief(D.id[i], 300) }, brief(D.id[i], 120)), "id"), "id"]);
  if (about.question) columns.push(["question", "minmax(110px, 2fr)", (i) => cell(h("bdi", {}, brief(D.question[i] || "", 200)), "question"), null]);
  const said = (run) => (i) => {
    const line = runLine(i, run);
    if (!isCompared) line.firstChild.remove();
    return cell(line, "said");
  };
  columns.push([isCompared ? `A: ${about.title}` : about.text, "minmax(130px, 4fr)", said(A), null]);
  if (isCompared) columns.push([`B: ${about.other}`, "minmax(130px, 4fr)", said(B), null]);
  if (!isNarrow) about.kept.slice(0, 4).forEach((name, k) => columns.push([name, "minmax(70px, 1fr)", (i) => cell(h("bdi", {}, D.kept[k][i] === null ? "–" : brief(String(D.kept[k][i]), 120)), "kept"), `k${k}`]));
  columns.push(["score", "68px", (i) => cell(number(D.score[i]), "figure"), "score"]);
  if (!isNarrow) columns.push([lengthName, "68px", (i) => cell(number(D.length[i]), "figure"), "length"]);
  return columns;
}
let columns = [];
function drawHead() {
  $("head").hidden = state.view !== "table";
  if (state.view !== "table") return;
  columns = columnsOfTable();
  root.style.setProperty("--columns", columns.map((column) => column[1]).join(" "));
  const direction = (key) => (state.sort === key ? "descending" : state.sort === `${key}-` ? "ascending" : null);
  $("head").replaceChildren(h("div", { class: "line", role: "row" }, columns.map(([label, , , key]) => h("div", { class: "cell", role: "columnheader", "aria-sort": key && direction(key) },
    key && SORTS.some(([name]) => name === key) ? h("button", { onclick: () => sortBy(state.sort === key && SORTS.some(([name]) => name === `${key}-`) ? `${key}-` : key) }, label, direction(key) ? (direction(key) === "descending" ? " ↓" : " ↑") : "") : label))));
}
function makeLine() { return h("div", { class: "line", role: "row" }); }
function fillLine(element, i) { element.replaceChildren(...columns.map((column) => column[2](i))); }

function update(i) {
  const element = inView.get(i);
  if (element) fill(element, i);
  keep();
}
function toggleMark(i) {
  if (!marks.delete(i)) marks.add(i);
  update(i);
  if ($("detail").open && open.row === i) drawMark(i);
}

// ---- moving

function show(place) {
  const view = $("view"), line = Math.floor(place / layout.columns) * layout.height;
  const top = view.scrollTop * layout.ratio, room = view.clientHeight;
  let wanted = top;
  if (line < top) wanted = line;
  else if (line + layout.height + layout.gap > top + room) wanted = line + layout.height + layout.gap - room;
  if (wanted !== top) view.scrollTop = Math.max(0, wanted) / layout.ratio;
}
function moveTo(place) {
  if (!state.shown.length) return;
  state.cursor = Math.max(0, Math.min(state.shown.length - 1, place));
  show(state.cursor);
  draw();
}
function onViewKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(1, Math.floor($("view").clientHeight / layout.height)) * layout.columns;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -layout.columns, ArrowDown: layout.columns, PageUp: -page, PageDown: page }[event.key];
  if (step) moveTo(state.cursor + step);
  else if (event.key === "Home") moveTo(0);
  else if (event.key === "End") moveTo(state.shown.length - 1);
  else if (event.key === "Enter" && state.shown.length) open(state.cursor);
  else if (event.key === " " && state.shown.length) toggleMark(state.shown[state.cursor]);
  else return;
  event.preventDefault();
}

// ---- one row

function longText(text, className) {
  const box = h("div", { class: className, dir: "auto" });
  box.textContent = brief(text, TEXT_SHOWN);
  if (text.length <= TEXT_SHOWN) return box;
  const more = h("button", { onclick: () => { box.textContent = visible(text); more.remove(); } }, `Show all ${text.length.toLocaleString("en")} characters`);
  return h("div", {}, box, more);
}
function section(title, ...children) {
  return h("section", {}, h("h3", {}, title), ...children);
}
function candidatesPart(candidates, name) {
  const scores = candidates.map((each) => each[1]).filter((value) => value !== null);
  const best = Math.max(...scores), share = (value) => (value === null ? 0 : Math.exp(Math.max(-30, value - best)));
  return section(name, h("ol", { class: "candidates" }, candidates.map(([text, score, tokens]) => {
    const bar = h("i", { class: "share", "aria-hidden": "true" });
    bar.style.width = `${100 * share(score)}%`;
    return h("li", {}, bar, h("bdi", { class: "said" }, brief(text === null ? "" : text, 2000)),
      h("span", { class: "figure", title: score === null ? "" : String(score) }, number(score)), h("span", { class: "figure" }, tokens === null ? "" : plural(tokens, "token")));
  })));
}
function saidPart(i, run) {
  const isB = run === B, text = isB ? D.text2[i] : textOf(i), error = isB ? D.error2[i] : D.error[i];
  const against = isB ? textOf(i) : D.text2[i];
  const name = isB ? about.other : about.title;
  const value = isB ? D.value2[i] : D.value[i], score = isB ? D.score2[i] : D.score[i], tokens = isB ? D.tokens2[i] : D.tokens[i];
  const box = text === null ? h("div", { class: "text error", dir: "auto" }, brief(error || "no such row", TEXT_SHOWN)) : longText(text, "text");
  if (isCompared && text !== null && against !== null && against !== text && text.length < 4000 && against.length < 4000)
    box.replaceChildren(...[differing(visible(text), visible(against))].flat());
  const facts = [];
  if (score !== null) facts.push(h("span", { title: String(score) }, `score ${number(score)}`));
  if (tokens !== null) facts.push(h("span", {}, plural(tokens, "token")));
  return h("div", { class: `said-by ${isB ? "b" : "a"}`, id: isB ? null : "said" },
    isCompared ? h("h3", {}, h("b", { class: "name" }, run), ` ${name}`) : null,
    box,
    !isB && edits.has(i) ? h("p", { class: "was", dir: "auto" }, h("b", {}, "was "), brief(D.text[i] === null ? "no text" : D.text[i], 2000)) : null,
    h("p", { class: "facts" }, badge(value), ...facts));
}
function open(place) {
  if (place < 0 || place >= state.shown.length) return;
  const i = state.shown[place];
  state.cursor = place;
  open.row = i;
  open.place = place;
  const details = detailsOf(i);
  $("detail-id").textContent = brief(D.id[i], 300);
  $("place").textContent = `${(place + 1).toLocaleString("en")} / ${state.shown.length.toLocaleString("en")}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === state.shown.length - 1;
  const side = h("div", { class: "side" });
  if (about.question && D.question[i] !== null) side.append(h("p", { class: "question", dir: "auto" }, brief(D.question[i], TEXT_SHOWN)));
  side.append(h("div", { class: isCompared ? "runs" : "" }, saidPart(i, A), isCompared ? saidPart(i, B) : null));
  if (details.references) side.append(section("References", h("ul", { class: "references" }, details.references.map(([text, times, met]) =>
    h("li", { class: met ? "right" : "wrong" }, icon(met ? "check" : "cross"), h("bdi", {}, brief(text, 2000)), times > 1 ? h("small", {}, `×${times}`) : null,
      h("span", { class: "unseen" }, met ? " (met)" : " (not met)"))))));
  if (details.choices) side.append(section("Choices", h("p", { class: "choices" }, details.choices.map((choice) => h("span", { class: choice === D.text[i] ? "taken" : "" }, h("bdi", {}, brief(choice, 500)))))));
  if (details.candidates) side.append(candidatesPart(details.candidates, isCompared ? "Candidates of A" : "Candidates"));
  if (details.candidates2) side.append(candidatesPart(details.candidates2, "Candidates of B"));
  const facts = [];
  const fact = (name, value) => facts.push(h("dt", {}, name), h("dd", { dir: "auto" }, value));
  if (D.error[i]) fact("error", brief(D.error[i], 2000));
  about.kept.forEach((name, k) => { if (D.kept[k][i] !== null) fact(name, brief(String(D.kept[k][i]), 2000)); });
  if (details.image) fact("image", brief(details.image, 2000));
  if (D.missing[i] && D.missing[i] !== D.error[i]) fact("not shown", brief(D.missing[i], 2000));
  if (facts.length) side.append(section("Row", h("dl", { class: "facts-of-row" }, facts)));
  $("content").replaceChildren(figure(i, details), side);
  $("content").scrollTop = 0;
  drawMark(i);
  if (!$("detail").open) $("detail").showModal();
  show(place);
  draw();
}
function figure(i, details) {
  const small = source(i), large = D.link[i];
  const box = h("figure", { class: "full" });
  if (!small && !large) {
    box.append(h("div", { class: "image missing" }, h("div", { class: "why" }, icon("broken"), h("span", {}, brief(D.missing[i] || "no image", 600)))));
    return box;
  }
  const image = h("img", { alt: `Image of ${brief(D.id[i], 200)}`, src: small || large });
  box.append(image);
  if (large && small && large !== small) { // the whole file, where it is still at its place
    const whole = new Image();
    whole.onload = () => { image.src = whole.src; box.classList.add("whole"); };
    whole.src = large;
  }
  if (large) box.append(h("figcaption", {}, [large, ...(details.links || [])].map((link, n) => h("a", { href: link, target: "_blank", rel: "noopener noreferrer" }, n ? `file ${n + 1}` : "open the file"))));
  return box;
}
function drawMark(i) {
  $("mark").setAttribute("aria-pressed", marks.has(i) ? "true" : "false");
  $("mark").lastChild.textContent = marks.has(i) ? "Marked" : "Mark";
}
function edit(i) {
  const box = $("said");
  if (!box || box.querySelector("textarea")) return;
  const area = h("textarea", { "aria-label": `Text of ${brief(D.id[i], 200)}`, dir: "auto", rows: "5", spellcheck: "true" });
  area.value = textOf(i) || "";
  const done = (text) => {
    if (text !== null) {
      if (text === (D.text[i] || "")) edits.delete(i); else edits.set(i, text);
      update(i);
    }
    open(open.place);
    $("edit").focus();
  };
  area.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); done(area.value); }
    if (event.key === "Escape") { event.preventDefault(); done(null); }
  });
  box.querySelector(".text").replaceWith(h("div", { class: "editing" }, area, h("div", { class: "buttons" },
    h("button", { class: "primary", onclick: () => done(area.value) }, "Keep"), h("button", { onclick: () => done(null) }, "Cancel"),
    edits.has(i) ? h("button", { onclick: () => done(D.text[i] || "") }, "Back to the run's") : null)));
  area.focus();
}

// ---- export

function download(name, parts, type) {
  const address = URL.createObjectURL(new Blob(parts, { type }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
const jsonLines = (rows) => rows.map((row) => `${JSON.stringify(row)}\n`);
const stem = about.title.split("/").pop().replace(/\.[^.]*(\.gz)?$/, "") || "report";
function manifestRow(i) {
  const row = { id: D.id[i], image: detailsOf(i).image || null };
  if (about.question) row.question = D.question[i];
  return row;
}
function textRow(i) {
  const row = manifestRow(i);
  row[about.text] = textOf(i);
  return row;
}
const CRC = Uint32Array.from({ length: 256 }, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1; return n; });
function crc32(bytes) {
  let sum = ~0;
  for (const byte of bytes) sum = CRC[(sum ^ byte) & 255] ^ (sum >>> 8);
  return ~sum >>> 0;
}
const MOST_FILES = 65535; // of a zip archive
function zipped(files) {
  // A zip archive without compression: names are UTF-8.
  const parts = [], directory = [], encoder = new TextEncoder();
  let place = 0;
  const block = (size, fields) => {
    const view = new DataView(new ArrayBuffer(size));
    for (const [at, bytes, value] of fields) if (bytes === 2) view.setUint16(at, value, true); else view.setUint32(at, value, true);
    return new Uint8Array(view.buffer);
  };
  for (const [name, text] of files) {
    const path = encoder.encode(name), data = encoder.encode(text), sum = crc32(data);
    const common = (at) => [[at, 2, 20], [at + 2, 2, 0x800], [at + 8, 2, 0x21], [at + 10, 4, sum], [at + 14, 4, data.length], [at + 18, 4, data.length], [at + 22, 2, path.length]];
    parts.push(block(30, [[0, 4, 0x04034b50], ...common(4)]), path, data);
    directory.push(block(46, [[0, 4, 0x02014b50], [4, 2, 20], ...common(6), [42, 4, place]]), path);
    place += 30 + path.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0), count = directory.length / 2;
  return [...parts, ...directory, block(22, [[0, 4, 0x06054b50], [8, 2, count], [10, 2, count], [12, 4, size], [16, 4, place]])];
}
const imagePath = (i) => {
  // Below the folder that was captioned, where the id says so, else as the row has it; it leads out of no folder.
  const image = String(detailsOf(i).image || D.id[i]), id = D.id[i];
  const parts = (image.endsWith(`/${id}`) ? id : image).split("/").filter((part) => part && part !== "." && part !== "..");
  return parts.map((part) => part.replace(/[\0-\x1f\\:*?"<>|]/g, "_")).join("/") || "row";
};
const bare = (path) => path.replace(/([^/])\.[^./]+$/, "$1");
let stems = null; // how many names of all images are this one, or this one with a suffix
function sharesStem(path) {
  if (!stems) {
    stems = new Map();
    const paths = new Set(Array.from({ length: N }, (_, i) => imagePath(i)));
    for (const each of paths) for (const name of new Set([each, bare(each)])) stems.set(name, (stems.get(name) || 0) + 1);
  }
  return stems.get(bare(path)) > 1;
}
function sidecars(rows) {
  // Each text is where --sidecar writes it: beside its image; of images with one stem each keeps its suffix.
  const used = new Set();
  return rows.filter((i) => textOf(i) !== null).slice(0, MOST_FILES).map((i) => {
    const path = imagePath(i), own = sharesStem(path) ? path : bare(path);
    let name = own;
    for (let again = 2; used.has(name); again++) name = `${path}-${again}`;
    used.add(name);
    return [`${name}.txt`, `${textOf(i)}\n`];
  });
}
function openExport() {
  const inOrder = (rows) => [...rows].sort((a, b) => a - b);
  const marked = inOrder(marks), edited = inOrder(edits.keys());
  const others = () => Array.from({ length: N }, (_, i) => i).filter((i) => !marks.has(i));
  const line = (rows, title, about_, ...buttons) => h("section", { class: rows ? "" : "none" }, h("h3", {}, title, h("small", {}, ` ${rows.toLocaleString("en")}`)), h("p", {}, about_),
    h("div", { class: "buttons" }, buttons.map(([name, act]) => h("button", { disabled: !rows, "data-export": name, onclick: act }, name))));
  const ids = (rows) => rows.map((i) => `${D.id[i]}\n`);
  const NOTE = "text/plain", LINES = "application/x-ndjson";
  $("exports").replaceChildren(
    line(marked.length, "Marked rows", "Ids, a line each; or a manifest of these rows, to redo them.",
      ["ids .txt", () => download(`${stem}-marked.txt`, ids(marked), NOTE)],
      ["manifest .jsonl", () => download(`${stem}-marked.jsonl`, jsonLines(marked.map(manifestRow)), LINES)]),
    line(marks.size ? N - marked.length : 0, "All but the marked", "What remains where the marked rows are left out.",
      ["other ids .txt", () => download(`${stem}-others.txt`, ids(others()), NOTE)],
      ["other rows .jsonl", () => download(`${stem}-others.jsonl`, jsonLines(others().map(textRow)), LINES)]),
    line(edited.length, "Edited texts", "As rows; or a text file for each image, in an archive to be unpacked over their folder.",
      ["edited .jsonl", () => download(`${stem}-edited.jsonl`, jsonLines(edited.map(textRow)), LINES)],
      ["edited .txt files", () => download(`${stem}-edited.zip`, zipped(sidecars(edited)), "application/zip")]),
    line(state.shown.length, "Rows in view", `All rows that pass the filters, with edited texts${state.shown.length > MOST_FILES ? `; the archive has the first ${MOST_FILES.toLocaleString("en")}` : ""}.`,
      ["rows .jsonl", () => download(`${stem}-rows.jsonl`, jsonLines(state.shown.map(textRow)), LINES)],
      ["rows .txt files", () => download(`${stem}-texts.zip`, zipped(sidecars(state.shown)), "application/zip")]),
    h("p", { class: "later" }, h("button", { disabled: !marks.size && !edits.size, onclick: () => { markFacet.only = true; $("export").close(); refresh(); } }, "Show marked and edited rows"),
      h("button", { disabled: !marks.size && !edits.size, onclick: () => { if (confirm("Remove all marks and edits?")) { marks.clear(); edits.clear(); keep(); redraw(); openExport(); } } }, "Remove all marks and edits")));
  if (!$("export").open) $("export").showModal();
}

// ---- the page

function summary() {
  const failed = D.error.reduce((sum, error) => sum + (error ? 1 : 0), 0);
  const mean = (column) => { let sum = 0, count = 0; for (const value of column) if (value !== null) { sum += value; count++; } return count ? sum / count : null; };
  const parts = [plural(N, "row"), failed ? `${failed.toLocaleString("en")} failed` : null];
  if (isCompared) {
    let differ = 0;
    for (let i = 0; i < N; i++) if (D.text[i] !== D.text2[i]) differ++;
    parts.push(`${differ.toLocaleString("en")} differ`);
    if (hasValues) {
      const wins = { "A wins": 0, "B wins": 0 };
      for (let i = 0; i < N; i++) { const who = winner(i); if (who in wins) wins[who]++; }
      parts.push(`A wins ${wins["A wins"].toLocaleString("en")}`, `B wins ${wins["B wins"].toLocaleString("en")}`, `${measureName} A ${percent(mean(D.value))}, B ${percent(mean(D.value2) || 0)}`);
    }
    if (end.unmatched) parts.push(`${plural(end.unmatched, "row")} only in B, not shown`);
    parts.push(`A is ${about.title}, B is ${about.other}`);
  } else {
    if (hasValues) parts.push(`${measureName} ${percent(mean(D.value))}`);
    const score = mean(D.score);
    if (score !== null) parts.push(`mean score ${number(score)}`);
  }
  $("summary").replaceChildren(...parts.filter(Boolean).map((part) => h("span", {}, part)));
}
function setView(view) {
  state.view = view;
  $("as-gallery").setAttribute("aria-pressed", view === "gallery" ? "true" : "false");
  $("as-table").setAttribute("aria-pressed", view === "table" ? "true" : "false");
  $("view").scrollTop = 0;
  redraw();
  moveTo(state.cursor);
}
function sortBy(name) {
  state.sort = $("sort").value = name;
  refresh();
  drawHead();
}
function setTheme(theme) {
  if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
  $("theme").setAttribute("aria-label", `Theme: ${theme || "as the system"}`);
  stored("idefics-report-theme", theme);
}
function toggleFilters(wanted) {
  const isOpen = root.classList.toggle("filters-open", wanted);
  $("open-filters").setAttribute("aria-expanded", isOpen ? "true" : "false");
  if (isOpen) { const first = $("filters").querySelector("button, input, [tabindex]"); if (first) first.focus(); }
}
function onPageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape" && event.target === $("search")) { state.query = $("search").value = ""; refresh(); $("view").focus(); return; }
  if (event.key === "Escape" && root.classList.contains("filters-open")) { toggleFilters(false); return; }
  if (isTyping) { if (event.key === "Enter" && event.target === $("search")) $("view").focus(); return; }
  if ($("detail").open) {
    if (event.key === "ArrowLeft") open(open.place - 1);
    else if (event.key === "ArrowRight") open(open.place + 1);
    else if (event.key === "m") toggleMark(open.row);
    else if (event.key === "e") edit(open.row);
    else return;
    event.preventDefault();
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  const here = state.shown[state.cursor];
  const act = {
    "/": () => $("search").focus(), v: () => setView(state.view === "table" ? "gallery" : "table"), f: () => toggleFilters(), x: openExport, c: clear,
    d: () => $("theme").click(), "?": () => $("help").showModal(), m: () => here !== undefined && toggleMark(here), e: () => { if (here !== undefined) { open(state.cursor); edit(here); } },
  }[event.key];
  if (act) { act(); event.preventDefault(); }
}
function listen() {
  const search = $("search"), view = $("view");
  search.addEventListener("input", () => { state.query = search.value; refresh(); });
  $("sort").addEventListener("input", () => sortBy($("sort").value));
  $("as-gallery").addEventListener("click", () => setView("gallery"));
  $("as-table").addEventListener("click", () => setView("table"));
  $("open-filters").addEventListener("click", () => toggleFilters());
  $("open-export").addEventListener("click", openExport);
  $("open-help").addEventListener("click", () => $("help").showModal());
  $("clear").addEventListener("click", clear);
  $("theme").addEventListener("click", () => setTheme({ "": "dark", dark: "light", light: "" }[root.dataset.theme || ""]));
  let waiting = false;
  view.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }, { passive: true });
  view.addEventListener("keydown", onViewKey);
  view.addEventListener("click", (event) => {
    const element = event.target.closest(".card, .line");
    if (!element) return;
    state.cursor = element.place;
    if (event.target.closest(".tick")) { toggleMark(element.row); draw(); } else open(element.place);
  });
  document.addEventListener("keydown", onPageKey);
  $("close").addEventListener("click", () => $("detail").close());
  $("previous").addEventListener("click", () => open(open.place - 1));
  $("next").addEventListener("click", () => open(open.place + 1));
  $("mark").addEventListener("click", () => toggleMark(open.row));
  $("edit").addEventListener("click", () => edit(open.row));
  $("detail").addEventListener("close", () => view.focus());
  for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  new ResizeObserver(() => { const at = state.cursor; redraw(); if (at) moveTo(at); }).observe(view);
  addEventListener("beforeprint", () => {
    const cards = state.shown.slice(0, PRINTED).map((i) => h("article", { class: "card" }, source(i) ? h("img", { src: source(i), alt: "" }) : null, h("div", { class: "words" }, wordsOf(i))));
    $("print").replaceChildren(h("h1", {}, about.title), $("summary").cloneNode(true), ...cards,
      state.shown.length > PRINTED ? h("p", {}, `The first ${PRINTED.toLocaleString("en")} of ${plural(state.shown.length, "row")}.`) : "");
    $("print").hidden = false;
  });
  addEventListener("afterprint", () => { $("print").hidden = true; $("print").replaceChildren(); });
}

restore();
makeSorts();
for (const [title, part] of filters) {
  const box = h("section", { class: part instanceof Histogram ? "histogram" : "facet" }, h("h2", {}, title));
  part.draw(box);
  $("filters").append(box);
}
setTheme(stored("idefics-report-theme") || "");
summary();
listen();
measure();
refresh();
redraw();
keep();
root.dataset.ready = String(Math.round(performance.now()));
setTimeout(searchable, 200);
