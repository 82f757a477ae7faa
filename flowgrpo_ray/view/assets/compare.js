"use strict";
// Runs side by side: what differs, their curves over each other, the same prompts in columns.

let compared = null;
const asked = chosen.getAll("compare");
const picks = {
  wall: chosen.get("x") === "wall",
  smooth: Number(chosen.get("smooth") ?? 1),
  mean: chosen.has("mean"),
  shots: chosen.get("shots") ?? "ends",
  size: Number(chosen.get("size") ?? 128),
  reward: chosen.get("reward"),
  all: false,
};

function repick(change) {
  Object.assign(picks, change);
  if (!compared.embedded)
    remember([
      ...asked.map((name) => ["compare", name]),
      ["x", picks.wall && "wall"], ["smooth", picks.smooth > 1 && picks.smooth], ["mean", picks.mean],
      ["shots", picks.shots !== "ends" && picks.shots], ["size", picks.size !== 128 && picks.size], ["reward", picks.reward],
    ]);
  drawComparison();
}

const dials = {
  wall: new Choice("Horizontal axis", (wall) => repick({ wall })),
  smooth: new Select("Training, mean of the last", (smooth) => repick({ smooth: Number(smooth) })),
  mean: new Choice("Seeds", (mean_) => repick({ mean: mean_ })),
  shots: new Choice("Evaluations", (shots_) => repick({ shots: shots_ })),
  reward: new Choice("Score", (reward) => repick({ reward })),
  size: el("input", { type: "range", min: 48, max: 384, step: 16, "aria-label": "Size of the pictures", input: () => repick({ size: Number(dials.size.value) }) }),
  all: el("button", { type: "button", class: "plain", click: () => repick({ all: !picks.all }) }),
};
dials.sized = el("label", {}, el("span", { class: "muted" }, "Size"), dials.size);

function renderCompare(document_, embedded) {
  if (!document_.runs) return; // nothing is new
  const unreadable = document_.runs.filter(({ state }) => state === "unreadable");
  compared = { ...document_, embedded, runs: document_.runs.filter(({ state }) => state !== "unreadable") };
  byId("runs-view").hidden = byId("run-view").hidden = true;
  byId("compare-view").hidden = false;
  compared.lacks = [...unreadable.map((one) => `${one.name} is not readable: ${one.message}`), ...document_.missing.map((name) => `${name} is no longer there.`)];
  document.title = `${plural(compared.runs.length, "run")} compared`;
  byId("top-name").textContent = document.title;
  drawComparison();
}

function drawComparison() {
  const { runs, keys } = compared;
  byId("compare-title").textContent = `${plural(runs.length, "run")} compared`;
  show(byId("compare-who"), el("ul", { class: "whos" }, runs.map(who)), compared.lacks.length ? el("ul", { class: "notes" }, compared.lacks.map((text) => el("li", {}, text))) : null);
  show(byId("compare-results"), resultsTable(runs));
  show(byId("compare-keys"), keys.length ? keysTable(runs, keys) : empty("Their specs are the same."));
  drawCurves();
  drawColumns();
}

const colorOf = (i) => COLORS[i % COLORS.length];
const dashOf = (i) => (i < COLORS.length ? null : "6 4");
const swatch = (i) => el("span", { class: "swatch", css: { background: colorOf(i) } });

function who(one, i) {
  const rest = asked.filter((name) => name !== one.name).map((name) => ["compare", name]);
  const name = compared.embedded ? one.name : el("a", { href: `/?${new URLSearchParams({ run: one.name })}` }, one.name);
  const less = compared.embedded || rest.length < 1 ? null : el("a", { class: "less", href: `/?${new URLSearchParams(rest)}`, "aria-label": `Compare without ${one.name}` }, "×");
  return el("li", {}, swatch(i), name, chip(one.state), less);
}

// ---- tables ----------------------------------------------------------------------------------------

const named_ = (runs) => runs.map((one, i) => el("span", { class: "named" }, swatch(i), one.name));

function resultsTable(runs) {
  const moved = ({ before, after } = {}) => (after == null ? score(before) : `${score(before)} → ${score(after)}`);
  const best = (reward) => (isNumber(reward?.best) ? `${score(reward.best)} at ${count(reward.best_iteration)}` : "–");
  const watched = (one) => Object.entries(one.watch).map(([name, when]) => `${name}, ${when}`).join("; ") || "–";
  const lines = [
    ["Iterations", (one) => `${count(one.iteration)}${one.iterations ? ` / ${count(one.iterations)}` : ""}`],
    ...rewardNames(runs).flatMap((name) => [[`${name}, held-out`, (one) => moved(one.rewards[name])], [`${name}, best`, (one) => best(one.rewards[name])]]),
    ["Images per second", (one) => number(one.images_per_second)],
    ["Time", (one) => duration(one.seconds)],
    ["GPU time", (one) => duration(one.gpu_seconds)],
    ["Over-optimization", watched],
  ];
  const rows = lines.map(([name, get]) => [name, ...runs.map(get)]).filter(([, ...cells]) => cells.some((cell) => cell !== "–"));
  return table(["", ...named_(runs)], rows);
}

const keysTable = (runs, keys) => table(["Key", ...named_(runs)], keys.map((key) => [el("code", {}, key), ...runs.map((one) => said_(one.values[key]))]));

// ---- curves ----------------------------------------------------------------------------------------

// What a curve is drawn of: each run, or the runs of a group together.
function linesOf(runs) {
  const lines = new Map();
  for (const one of runs) {
    const together = picks.mean && compared.groups[one.group];
    const name = together ? `${one.group} and other seeds` : one.name;
    lines.set(name, [...(lines.get(name) ?? []), one]);
  }
  return [...lines].map(([name, of]) => ({ name, of, place: runs.indexOf(of[0]) }));
}

// Means over the runs of a line, by iteration, of {iteration, seconds, value}; with several of them
// their standard deviation as a band.
function together(line, pointsOf) {
  const found = new Map();
  for (const one of line.of) for (const point of pointsOf(one)) found.set(point.iteration, [...(found.get(point.iteration) ?? []), point]);
  const points = [...found.values()].map((of) => {
    const values = known(of.map(({ value }) => value));
    const y = mean(values);
    const spread_ = values.length > 1 ? Math.sqrt(sum(values.map((value) => (value - y) ** 2)) / (values.length - 1)) : null;
    return { it: picks.wall ? mean(of.map(({ seconds: time }) => time)) : of[0].iteration, y, ...around(y, spread_) };
  });
  return points.filter(({ it }) => it != null).sort((a, b) => a.it - b.it);
}

// The mean of the last values; of the first, of those that there are.
const smoothed = (values, size) => (size > 1 ? values.map((value, i) => (isNumber(value) ? mean(values.slice(Math.max(0, i - size + 1), i + 1)) : value)) : values);

function overlay(title, unit, kind, pointsOf, floor) {
  const series = linesOf(compared.runs).map((line) => ({ name: line.name, color: colorOf(line.place), dash: dashOf(line.place), kind, near: true, points: together(line, pointsOf) }));
  return chart({ id: `compare ${title}`, title, unit, floor, series, own: true, time: picks.wall, height: 240 });
}

function drawCurves() {
  const { runs, groups } = compared;
  const timed = runs.every(({ curves }) => curves.seconds.every(isNumber));
  if (!timed) picks.wall = false;
  const several = Object.values(groups).length > 0;
  place(
    byId("compare-controls"),
    [
      dials.wall.set([{ value: false, label: "Iteration" }, { value: true, label: "Wall time", disabled: !timed }], picks.wall),
      dials.smooth.set([1, 5, 20, 50, 100].map((size) => ({ value: size, label: size > 1 ? `${size} iterations` : "none" })), picks.smooth),
      several && dials.mean.set([{ value: false, label: "Each run" }, { value: true, label: "Seeds together" }], picks.mean),
    ].filter(Boolean),
  );
  const training = (get) => ({ curves }) => {
    const values = smoothed(get(curves) ?? [], picks.smooth);
    return values.map((value, i) => ({ iteration: curves.iterations[i], seconds: curves.seconds[i], value }));
  };
  const heldOut = (name) => ({ curves }) => curves.evals.map((row) => ({ iteration: row.iteration, seconds: row.seconds, value: row.rewards[name]?.mean }));
  const known_ = (get) => runs.some(({ curves }) => (get(curves) ?? []).some(isNumber));
  const names = [...new Set(runs.flatMap(({ curves }) => Object.keys(curves.rewards)))];
  const more = [
    ["Weighted total, training", "reward", (curves) => curves.total, names.length > 1],
    ["KL to the base model", "KL", (curves) => curves.kl, true],
    ["Images per second", "images per second", (curves) => curves.pace, true],
  ].filter(([, , get, wanted]) => wanted && known_(get));
  const all = names.flatMap((name) => [
    overlay(`${name}, held-out`, "reward", "dots", heldOut(name)),
    ...(known_((curves) => curves.rewards[name]) ? [overlay(`${name}, training`, "reward", "line", training((curves) => curves.rewards[name]))] : []),
  ]);
  place(byId("compare-charts"), [...all, ...more.map(([title, unit, get]) => overlay(title, unit, "line", training(get), unit === "reward" ? undefined : 0))]);
}

// ---- pictures --------------------------------------------------------------------------------------

// Keys by which pictures of one prompt and one noise differ, besides the weights.
const DRAWN_BY = /^(model\.|prompts\.evaluate|sampling\.(size|guidance|kernel)|evaluation\.(steps|solver|micro_batch))/;

function columnsChosen() {
  const pick = { ends: (shots_) => (shots_.length > 1 ? [shots_[0], shots_.at(-1)] : shots_), last: (shots_) => shots_.slice(-1), all: (shots_) => shots_ }[picks.shots];
  return compared.runs.flatMap((one, i) => (pick ?? ((shots_) => shots_))(one.samples).map((shot) => ({ one, i, shot })));
}

let drawnColumns = "";
function drawColumns() {
  const columns = columnsChosen();
  const rewards = [...new Set(columns.flatMap(({ shot }) => Object.keys(shot.scores)))];
  view.reward = rewards.includes(picks.reward) ? picks.reward : (rewards[0] ?? null);
  const apart = compared.keys.filter((key) => DRAWN_BY.test(key));
  byId("compare-says").textContent = columns.length
    ? `The same held-out prompts, from the same noise in every run and at every evaluation.${apart.length ? ` The runs differ in ${apart.join(", ")} too, which changes pictures by itself.` : ""}`
    : "No evaluation has drawn pictures yet.";
  const prompts = columns[0]?.shot.prompts ?? [];
  dials.size.value = picks.size;
  dials.all.textContent = picks.all ? `Show the first ${FIRST_CARDS}` : `Show all ${prompts.length} prompts`;
  place(
    byId("compare-dials"),
    columns.length
      ? [
          dials.shots.set([{ value: "ends", label: "First and last" }, { value: "last", label: "Last" }, { value: "all", label: "All" }], picks.shots),
          rewards.length > 1 && dials.reward.set(rewards.map((name) => ({ value: name, label: name })), view.reward),
          dials.sized,
          prompts.length > FIRST_CARDS && dials.all,
        ].filter(Boolean)
      : [],
  );
  byId("compare-pictures").style.setProperty("--tile", `${picks.size}px`);
  const wanted = JSON.stringify([columns.map(({ shot }) => shot.image), view.reward, picks.all]);
  if (wanted === drawnColumns) return;
  drawnColumns = wanted;
  waiting.clear();
  byId("compare-pictures").replaceChildren(columns.length ? columnsTable(columns, prompts.slice(0, picks.all ? undefined : FIRST_CARDS)) : "");
  for (const { shot } of columns) decode(shot.image);
}

function columnsTable(columns, prompts) {
  const runs = [...new Set(columns.map(({ one }) => one))];
  const over = runs.map((one) => el("th", { scope: "colgroup", class: "first", colspan: columns.filter((column) => column.one === one).length }, swatch(compared.runs.indexOf(one)), one.name));
  const first = (column, k) => (column.one === columns[k - 1]?.one ? "" : "first");
  const heads = columns.map((column, k) => el("th", { scope: "col", class: first(column, k) }, `iteration ${count(column.shot.iteration)}`));
  const content = ({ shot }, prompt, i) => (shot.prompts[i] === prompt ? [tile(shot, i), el("small", {}, score(points(shot, i, view.reward)))] : "–");
  const cell = (column, k, prompt, i) => el("td", { class: first(column, k) }, content(column, prompt, i));
  const row = (prompt, i) => el("tr", {}, el("th", { scope: "row" }, prompt), columns.map((column, k) => cell(column, k, prompt, i)));
  return el("div", { class: "scroll" }, el("table", { class: "columns" }, el("thead", {}, el("tr", {}, el("td", {}), over), el("tr", {}, el("td", {}), heads)), el("tbody", {}, prompts.map(row))));
}

// Printed are all prompts.
addEventListener("beforeprint", () => compared && !picks.all && (repick({ all: true }), addEventListener("afterprint", () => repick({ all: false }), { once: true })));
