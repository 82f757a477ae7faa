"use strict";
// Many runs: a table to sort, filter, group and hide in, from which those to compare are ticked.

const ORDER = ["running", "starting", "stopping", "lost", "failed", "unreadable"];
const FEW_KEYS = 6; // of the specs, as columns
const list = { data: null, drawn: "", at: 0, keys: false, gone: false, ticked: new Set(), open: new Set(), hidden: null };
const chosen = new URLSearchParams(location.search);
Object.assign(list, { filter: chosen.get("filter") ?? "", sort: chosen.get("sort"), down: chosen.has("down"), grouped: chosen.has("seeds") });

// The address says what is chosen, so that a link, or a reload, brings it back.
function remember(entries) {
  const kept = entries.filter(([, value]) => value != null && value !== false && value !== "");
  const query = new URLSearchParams(kept.map(([key, value]) => [key, value === true ? "" : value]));
  history.replaceState(null, "", kept.length ? `?${query}` : location.pathname);
}

function relist(change) {
  Object.assign(list, change);
  list.drawn = "";
  remember([["filter", list.filter], ["sort", list.sort], ["down", list.down], ["seeds", list.grouped]]);
  renderRuns(list.data);
}

// Hidden are runs of this root, in this browser only.
const place_ = () => `flowgrpo hidden ${list.data.root}`;
function hide(names, hidden) {
  for (const name of names) list.hidden[hidden ? "add" : "delete"](name);
  localStorage.setItem(place_(), JSON.stringify([...list.hidden]));
  list.ticked.clear();
  relist({});
}

const tools = {
  filter: el("input", { type: "search", placeholder: "name, state, key=value", "aria-label": "Filter runs", value: list.filter, input: () => relist({ filter: tools.filter.value }) }),
  grouped: new Choice("Runs that differ in their seed alone", (grouped) => relist({ grouped })),
  compare: el("a", { class: "button" }),
  hide: el("button", { type: "button", class: "plain", click: () => hide(list.ticked, true) }, "Hide"),
  none: el("button", { type: "button", class: "plain", click: () => (list.ticked.clear(), relist({})) }, "Untick"),
  gone: el("button", { type: "button", class: "plain", click: () => relist({ gone: !list.gone }) }),
  back: el("button", { type: "button", class: "plain", click: () => hide([...list.hidden], false) }, "Hide none"),
  keys: el("button", { type: "button", class: "plain", click: () => relist({ keys: !list.keys }) }),
};

function renderRuns(data) {
  list.data = data;
  list.hidden ??= new Set(JSON.parse(localStorage.getItem(place_()) ?? "[]"));
  const { root, runs } = data;
  byId("runs-lead").textContent = runs.length ? `${plural(runs.length, "run")} below ${root}. Tick some to compare them.` : `No run below ${root} yet. This page shows one as soon as it starts.`;
  const working = runs.filter(({ state }) => ORDER.slice(0, 3).includes(state)).length;
  document.title = `${working ? `${working} running · ` : ""}Flow-GRPO runs`;
  const said = JSON.stringify(data, (key, value) => (key === "age" ? undefined : value));
  if (said === list.drawn && Date.now() - list.at < 30000) return; // ages alone may wait
  Object.assign(list, { drawn: said, at: Date.now() });
  const shown = runs.filter((one) => matches(one) && (list.gone || !list.hidden.has(one.name)));
  renderTools(data);
  if (!runs.length) return show(byId("runs-list"), null);
  const columns = columnsOf(data, shown);
  show(byId("runs-list"), shown.length ? overviewTable(columns, entriesOf(data, shown, columns)) : empty("No run is like that."));
  for (const box of byId("runs-list").querySelectorAll("input")) {
    const names = namesOf(box);
    box.checked = names.every((name) => list.ticked.has(name));
    box.indeterminate = !box.checked && names.some((name) => list.ticked.has(name));
  }
}

// All words of the filter: in the name or the state, or as key=value the end of a key and its value.
function matches(one) {
  const values = () => Object.entries(one.values ?? {}).map(([key, value]) => `${key}=${said_(value)}`);
  const texts = [one.name, one.state, ...values()].map((text) => text.toLowerCase());
  const words = list.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => texts.some((text) => (word.includes("=") ? text.endsWith(word) : text.includes(word))));
}

function renderTools({ runs, groups, keys }) {
  const ticked = runs.filter(({ name }) => list.ticked.has(name)).map(({ name }) => name);
  tools.compare.href = `?${new URLSearchParams(ticked.map((name) => ["compare", name]))}`;
  tools.compare.textContent = `Compare ${count(ticked.length)}`;
  const hidden = runs.filter(({ name }) => list.hidden.has(name)).length;
  tools.gone.textContent = list.gone ? "Leave out hidden runs" : `Show ${count(hidden)} hidden`;
  tools.keys.textContent = list.keys ? `First ${FEW_KEYS} keys` : `All ${count(keys.length)} keys that differ`;
  const seeds = [{ value: false, label: "Each run" }, { value: true, label: "Seeds together" }];
  place(
    byId("runs-tools"),
    [
      runs.length && tools.filter,
      Object.keys(groups).length && tools.grouped.set(seeds, list.grouped),
      keys.length > FEW_KEYS && tools.keys,
      hidden && tools.gone,
      hidden && list.gone && tools.back,
      ticked.length && tools.compare,
      ticked.length && tools.hide,
      ticked.length && tools.none,
    ].map((one) => one?.node ?? one).filter(Boolean),
  );
}

// ---- columns ---------------------------------------------------------------------------------------

const said_ = (value) => (value == null ? "–" : typeof value === "string" ? value : JSON.stringify(value));
const rank = ({ state }) => (ORDER.indexOf(state) + ORDER.length + 1) % (ORDER.length + 1);
const share_ = (one) => (one.iterations ? Math.min(1, one.iteration / one.iterations) : null);
const rewardNames = (runs) => [...new Set(runs.flatMap((one) => Object.keys(one.rewards ?? {})))];

// A column is {id, label, value, cell, mean}: what it is sorted by, what it shows of a run, and of a
// group of runs, by the group's mean.
function columnsOf({ keys, runs }, shown) {
  const told = (key) => (one) => (isNumber(one[key]) ? one[key] : null);
  const spread = ({ mean: middle, std }, says) => (middle == null ? "–" : `${says(middle)}${isNumber(std) ? ` ± ${says(std)}` : ""}`);
  const amount = (id, label, says) => ({ id, label, value: told(id), cell: (one) => says(one[id]), mean: (group) => spread(group[id], says), number: true });
  const few = list.keys ? keys : keys.slice(0, FEW_KEYS);
  const rewards = rewardNames(runs).map((name) => {
    const scale = scaleOf(shown, name);
    return {
      id: `reward ${name}`, label: name,
      value: (one) => one.rewards?.[name]?.after ?? one.rewards?.[name]?.before,
      cell: (one) => rewardCell(one.rewards?.[name], one.watch?.[name], scale),
      mean: ({ rewards: all }) => all[name] && [el("b", {}, `${spread(all[name].before, score)} → ${spread(all[name].after, score)}`), el("small", {}, `best ${spread(all[name].best, score)}`)],
    };
  });
  return [
    { id: "state", label: "State", value: rank, cell: (one) => [chip(one.state), el("small", {}, isNumber(one.age) ? ago(one.age) : "")] },
    { id: "progress", label: "Progress", value: share_, cell: progressCell },
    ...rewards,
    amount("images_per_second", "Images / s", number),
    amount("seconds", "Time", duration),
    ...(runs.some((one) => isNumber(one.gpu_seconds)) ? [amount("gpu_seconds", "GPU time", duration)] : []),
    ...few.map((key) => ({ id: `key ${key}`, label: key, value: (one) => one.values?.[key], cell: (one) => said_(one.values?.[key]), key: true })),
  ];
}

function progressCell(one) {
  const share = share_(one);
  return [
    isNumber(one.iteration) ? `${count(one.iteration)}${one.iterations ? ` / ${count(one.iterations)}` : ""}` : "–",
    share == null ? null : el("span", { class: "meter" }, el("i", { css: { width: `${100 * share}%` } })),
  ];
}

const OVER = { now: ["bad", "over-optimized"], earlier: ["warn", "over-optimized earlier"] };
function rewardCell(reward, watch, scale) {
  if (!reward) return "–";
  const { before, after, best, best_iteration: where } = reward;
  return [
    spark(reward, scale),
    el("b", {}, after == null ? score(before) : `${score(before)} → ${score(after)}`),
    isNumber(best) && after != null ? el("small", {}, `best ${score(best)} at ${count(where)}`) : null,
    watch ? el("span", { class: `chip ${OVER[watch][0]}` }, OVER[watch][1]) : null,
  ];
}

// One scale for all runs: a reward's lowest and highest mean, and the longest run.
function scaleOf(runs, name) {
  const points = runs.flatMap((one) => [one.rewards?.[name]?.curve ?? [], one.rewards?.[name]?.train ?? []].flat());
  const values = known(points.map(([, value]) => value));
  return { low: Math.min(...values), high: Math.max(...values), last: Math.max(1, ...points.map(([iteration]) => iteration)) };
}

// Training means as a faint line, held-out means over it.
function spark({ curve: held, train }, { low, high, last }) {
  const place = ([iteration, value]) => `${(1 + (108 * iteration) / last).toFixed(1)} ${(26 - (24 * (value - low)) / (high - low || 1)).toFixed(1)}`;
  const path = (points) => points.filter(([, value]) => isNumber(value)).map(place).join(" ");
  const draw = (points, more) => svg("polyline", { points: path(points), fill: "none", ...more });
  return svg("svg", { class: "spark", viewBox: "0 0 110 28", "aria-hidden": "true" }, draw(train, { stroke: "var(--c0)", opacity: 0.4 }), draw(held, { stroke: "var(--c1)", "stroke-width": 1.8, "stroke-linecap": "round" }));
}

// ---- rows ------------------------------------------------------------------------------------------

// Of runs that differ in their seed: as the overview's `groups`, but of these alone.
function meanOf(runs) {
  const spread = (get) => {
    const values = known(runs.map(get));
    const middle = mean(values);
    return { mean: middle, std: values.length > 1 ? Math.sqrt(sum(values.map((value) => (value - middle) ** 2)) / (values.length - 1)) : null };
  };
  const rewards = rewardNames(runs).map((name) => [name, Object.fromEntries(["before", "after", "best"].map((what) => [what, spread((one) => one.rewards?.[name]?.[what])]))]);
  const whole = ["images_per_second", "seconds", "gpu_seconds"].map((key) => [key, spread((one) => one[key])]);
  return { size: runs.length, rewards: Object.fromEntries(rewards), ...Object.fromEntries(whole) };
}

// Runs and groups in the order of the chosen column: {one} or {group, runs}.
function entriesOf({ groups }, shown, columns) {
  const column = columns.find(({ id }) => id === list.sort);
  const compare_ = (a, b) => {
    const [x, y] = [a, b].map(column.value);
    if (x == null || y == null) return (x == null) - (y == null);
    return (typeof x === typeof y && x < y ? -1 : typeof x === typeof y && x > y ? 1 : 0) * (list.down ? -1 : 1);
  };
  const usual = (a, b) => rank(a) - rank(b) || (a.age ?? 0) - (b.age ?? 0);
  const sorted = shown.toSorted(list.sort === "name" ? (a, b) => a.name.localeCompare(b.name) * (list.down ? -1 : 1) : column ? compare_ : usual);
  if (!list.grouped) return sorted.map((one) => ({ one }));
  const entries = new Map();
  for (const one of sorted) {
    const group = groups[one.group] ? one.group : null;
    const key = group ?? ` ${one.name}`;
    if (!entries.has(key)) entries.set(key, group ? { group, runs: [] } : { one });
    entries.get(key).runs?.push(one);
  }
  return [...entries.values()].map((entry) => (entry.runs?.length === 1 ? { one: entry.runs[0] } : entry));
}

function overviewTable(columns, entries) {
  const sorted = (id) => (list.sort === id ? (list.down ? "descending" : "ascending") : null);
  // A key may break after its dots.
  const broken = (label) => label.split(/(?<=[._])/).flatMap((part) => [part, el("wbr", {})]);
  const head = ({ id, label, number: right }) =>
    el("th", { scope: "col", class: right ? "number" : "", "aria-sort": sorted(id) }, el("button", { type: "button", "data-sort": id }, broken(label)));
  const rows = entries.flatMap((entry) => (entry.one ? [runRow(columns, entry.one)] : [groupRow(columns, entry), ...(list.open.has(entry.group) ? entry.runs.map((one) => runRow(columns, one, true)) : [])]));
  return el("div", { class: "scroll overview" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}), head({ id: "name", label: "Run" }), columns.map(head))), el("tbody", {}, rows)));
}

const cellOf = (column, content) => el("td", { "data-label": column.label, class: `${column.number ? "number" : column.key ? "key" : ""} ${content === "–" ? "none" : ""}` }, content);

function runRow(columns, one, inside) {
  const box = el("input", { type: "checkbox", "data-run": one.name, "aria-label": `Compare ${one.name}` });
  const who = el("td", { class: "who" }, el("a", { href: `/?${new URLSearchParams({ run: one.name })}` }, one.name), el("small", {}, one.message ?? one.stage ?? ""));
  return el("tr", { class: `${inside ? "inside" : ""} ${list.hidden.has(one.name) ? "hidden" : ""}` }, el("td", { class: "tick" }, box), who, columns.map((column) => cellOf(column, column.cell(one))));
}

function groupRow(columns, { group, runs }) {
  const of = meanOf(runs.filter(({ name }) => !list.hidden.has(name)));
  const box = el("input", { type: "checkbox", "data-group": group, "aria-label": `Compare all seeds of ${group}` });
  const opener = el("button", { type: "button", class: "opener", "data-open": group, "aria-expanded": String(list.open.has(group)) }, group);
  const alike = (column) => (new Set(runs.map(column.value)).size === 1 ? column.cell(runs[0]) : "…");
  const states = Object.entries(Object.groupBy(runs, ({ state }) => state)).map(([state, alike_]) => `${count(alike_.length)} ${state}`);
  const content = (column) => (column.id === "state" ? states.join(", ") : column.mean ? column.mean(of) : column.key ? alike(column) : "");
  return el("tr", { class: "group" }, el("td", { class: "tick" }, box), el("td", { class: "who" }, opener, el("small", {}, `mean ± spread of ${plural(of.size, "seed")}`)), columns.map((column) => cellOf(column, content(column))));
}

const namesOf = (box) => (box.dataset.run ? [box.dataset.run] : list.data.runs.filter((one) => one.group === box.dataset.group && (list.gone || !list.hidden.has(one.name))).map(({ name }) => name));

byId("runs-list").addEventListener("change", ({ target }) => {
  for (const name of namesOf(target)) list.ticked[target.checked ? "add" : "delete"](name);
  relist({});
});
byId("runs-list").addEventListener("click", ({ target }) => {
  const sort = target.closest("[data-sort]")?.dataset.sort;
  const open = target.closest("[data-open]")?.dataset.open;
  if (sort) relist(list.sort === sort ? (list.down ? { sort: null, down: false } : { down: true }) : { sort, down: false });
  if (open) {
    if (!list.open.delete(open)) list.open.add(open);
    relist({});
  }
});
