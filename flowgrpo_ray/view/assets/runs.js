"use strict";
// The list of runs.

const ORDER = ["running", "starting", "stopping", "lost", "failed", "unreadable"];

function renderRuns({ root, runs }) {
  byId("runs-lead").textContent = runs.length ? `${plural(runs.length, "run")} below ${root}` : `No run below ${root} yet. This page shows one as soon as it starts.`;
  const rank = ({ state }) => (ORDER.indexOf(state) + ORDER.length + 1) % (ORDER.length + 1);
  const sorted = runs.toSorted((a, b) => rank(a) - rank(b) || (a.age ?? 0) - (b.age ?? 0));
  const working = runs.filter(({ state }) => ORDER.slice(0, 3).includes(state)).length;
  document.title = `${working ? `${working} running · ` : ""}Flow-GRPO runs`;
  show(byId("runs-list"), runs.length ? el("ul", { class: "runs" }, sorted.map(entry)) : null);
}

function entry(one) {
  const all = one.iterations;
  const share = all ? Math.min(1, one.iteration / all) : null;
  return el(
    "li",
    {},
    el(
      "a",
      { href: `/?${new URLSearchParams({ run: one.name })}` },
      el("span", { class: "who" }, el("b", {}, one.name), el("small", {}, one.message ?? one.stage ?? "")),
      el("span", { class: "state" }, chip(one.state), el("small", {}, isNumber(one.age) ? ago(one.age) : "")),
      el(
        "span",
        { class: "far" },
        isNumber(one.iteration) ? `${count(one.iteration)}${all ? ` / ${count(all)}` : ""}` : "–",
        share == null ? null : el("span", { class: "meter" }, el("i", { css: { width: `${100 * share}%` } })),
      ),
      el("span", { class: "curve" }, spark(one.spark ?? [])),
      figure_("reward", number(one.reward)),
      el("span", { class: "held" }, (one.held_out ?? []).map(({ name, values: [first, last] }) => figure_(name, first === last ? score(last) : `${score(first)} → ${score(last)}`))),
    ),
  );
}

const figure_ = (name, value) => el("span", { class: "figure" }, el("small", {}, name), el("b", {}, value));

// The trained reward over the iterations, without axes.
function spark(values) {
  const seen = known(values);
  if (seen.length < 2) return null;
  const [low, high] = [Math.min(...seen), Math.max(...seen)];
  const y = (value) => 26 - (24 * (value - low)) / (high - low || 1);
  const path = values.map((value, i) => (isNumber(value) ? `${(118 * i) / (values.length - 1) + 1} ${y(value)}` : null)).filter(Boolean);
  return svg("svg", { viewBox: "0 0 120 28", "aria-hidden": "true" }, svg("polyline", { points: path.join(" "), fill: "none", stroke: COLORS[0], "stroke-width": 1.6 }));
}
