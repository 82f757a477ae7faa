"use strict";
// Elements. All text goes in as text: nothing a run says is ever parsed as markup.

const view = {
  wall: false, // horizontal axis: wall time in place of iterations
  cursor: null, // iteration that every chart reads, or null
  left: 0, // evaluation on the left, by its place
  right: null, // on the right; null is always the newest
  mode: "pairs", // or "wipe", "row"
  wipe: 50, // per cent
  size: null, // of a pair of pictures, in pixels
  reward: null,
  filter: "all",
  all: false,
};

const byId = (id) => document.getElementById(id);
const SVG = byId("svg-seed").namespaceURI; // a name that looks like an address

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name === "css") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(3).filter((child) => child != null && child !== false && child !== ""));
  return node;
}
const el = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);
const empty = (text) => el("p", { class: "empty" }, text);

// Make what a holder shows equal to new content, and touch only what differs: focus, selected text
// and scroll positions stay. New content has no listeners, for those of the old would stay too.
function show(holder, ...content) {
  const fresh = el("div", {}, ...content);
  matchChildren(holder, fresh);
}

function matchChildren(old, fresh) {
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, i) => {
    const there = old.childNodes[i];
    if (!there) old.append(node);
    else if (there.nodeName !== node.nodeName) there.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) {
      if (there.data !== node.data) there.data = node.data;
    } else {
      matchAttributes(there, node);
      matchChildren(there, node);
    }
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

function matchAttributes(old, fresh) {
  for (const { name } of [...old.attributes])
    if (!fresh.hasAttribute(name) && name !== "style" && !(name === "open" && old.nodeName === "DETAILS"))
      old.removeAttribute(name);
  for (const { name, value } of fresh.attributes)
    if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (old.style.cssText !== fresh.style.cssText) old.style.cssText = fresh.style.cssText;
}

// Put nodes that live on, such as charts, into a holder; a holder that has them is left alone.
function place(holder, nodes) {
  const same = nodes.length === holder.childNodes.length && nodes.every((node, i) => holder.childNodes[i] === node);
  if (!same) holder.replaceChildren(...nodes);
}

// A group of buttons of which one is pressed. It stays the same element when its options change.
class Choice {
  constructor(label, pick) {
    this.pick = pick;
    this.buttons = new Map();
    this.node = el("span", { class: "choice", role: "group", "aria-label": label });
  }
  set(options, chosen) {
    place(this.node, options.map((option) => this.button(option, option.value === chosen)));
    return this.node;
  }
  button({ value, label, disabled }, pressed) {
    if (!this.buttons.has(value))
      this.buttons.set(value, el("button", { type: "button", click: () => this.pick(value) }));
    const button = this.buttons.get(value);
    button.disabled = Boolean(disabled);
    if (button.textContent !== label) button.textContent = label;
    button.setAttribute("aria-pressed", String(pressed));
    return button;
  }
}

// A list to choose from, whose options may grow while it is used.
class Select {
  constructor(label, pick) {
    this.list = el("select", { change: () => pick(this.list.value) });
    this.node = el("label", {}, el("span", { class: "muted" }, label), this.list);
  }
  set(options, chosen) {
    show(this.list, options.map(({ value, label }) => el("option", { value }, label)));
    this.list.value = String(chosen);
    return this.node;
  }
}

const table = (names, rows) =>
  el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, names.map((name, i) => el("th", { scope: "col", class: i ? "number" : "" }, name)))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) => el("td", { class: i ? "number" : "" }, cell))))),
    ),
  );

// A table whose last column is a bar: rows are {cells, share, color}.
function gauges(names, rows) {
  const whole = Math.max(1, largest(rows.map((row) => row.share)));
  const bar = ({ share, color }) =>
    el(
      "span",
      { class: "gauge", title: percent(share) },
      el("i", { css: { width: `${(100 * share) / whole}%`, background: color || COLORS[0] } }),
    );
  return table(names, rows.map((row) => [...row.cells, bar(row)]));
}

const titled = (title, ...content) => el("div", {}, el("h3", {}, title), content);
const definitions = (entries) =>
  el(
    "dl",
    { class: "facts" },
    entries.filter((entry) => entry && entry[1] != null).map(([name, value, title]) => el("div", { title }, el("dt", {}, name), el("dd", {}, value))),
  );

// A chip that says a run's state in words; its colour only repeats them.
const KINDS = {
  running: "good", starting: "good", stopping: "warn", stopped: "warn", finished: "done",
  failed: "bad", lost: "bad", unreadable: "bad",
};
const chip = (state) => el("span", { class: `chip ${KINDS[state] ?? ""}` }, state);

const COLORS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"].map((name) => `var(${name})`);
