"use strict";
// One run: its document, and the parts of its page that tell how well it learns.

let run = null;

// Take in a document: a whole one, or one with only what is new (reset false). Says what changed.
function take(document_) {
  const held = run && document_.reset === false ? run : { metrics: [], timings: [], samples: [], spec: null };
  const lists = {};
  for (const key of ["metrics", "timings", "samples"]) lists[key] = held[key].concat(document_[key]);
  const rows = !run || document_.reset !== false || document_.metrics.length + document_.timings.length > 0;
  const samples = !run || document_.reset !== false || document_.samples.length > 0;
  run = { ...document_, ...lists };
  run.train = run.metrics.filter((row) => row.kind === "train");
  run.evals = run.metrics.filter((row) => row.kind === "eval");
  run.timed = run.timings.filter((row) => row.kind === "train");
  run.last = Math.max(1, ...[run.train.at(-1), run.evals.at(-1)].map((row) => row?.iteration ?? 0));
  run.clock = clockOf(run.timings);
  return { rows, samples };
}

// Seconds since the first iteration began, evaluations included, starts not.
function clockOf(timings) {
  const [iterations, values] = [[0], [0]];
  let elapsed = 0;
  for (const row of timings) {
    if (row.kind === "start") continue;
    elapsed += row.seconds ?? 0;
    if (row.kind !== "train") continue;
    iterations.push(row.iteration);
    values.push(elapsed);
  }
  return values.length > 1 ? { iterations, values } : { iterations: [], values: [] };
}

const live = (path) => (run.live ? at(run.live, path) : null);
const active = () => ["starting", "running", "stopping"].includes(run.state);

// ---- header ----------------------------------------------------------------------------------------

function renderHeader(embedded) {
  const head = run.headline;
  const weights = head.weights ? ` with the ${head.weights === "ema" ? "EMA" : head.weights} weights` : "";
  const when = head.rewards.some((reward) => reward.after != null) ? (run.summary ? ", before and after training" : ", before training and at the last evaluation") : ", before training";
  const held = head.prompts == null ? "" : `Mean reward on ${plural(head.prompts, "held-out prompt")}${weights}${when}.`;
  show(
    byId("header"),
    el("p", { class: "eyebrow" }, embedded ? `${run.objective.called} run report, written ${moment(run.now)}` : `${run.objective.called} run`),
    el("h1", {}, run.name),
    el("p", { class: "status" }, chip(run.state), el("span", { class: "muted" }, doing())),
    alerts(),
    head.rewards.length ? el("div", { class: "headline" }, head.rewards.map(move)) : empty(waits("the first evaluation, of the model before training", "The run ended before its first evaluation.")),
    el("p", { class: "lead" }, held),
    definitions(facts(head)),
    run.notes.length ? el("ul", { class: "notes" }, run.notes.map((note) => el("li", {}, note))) : null,
  );
  show(byId("top-state"), chip(run.state));
  byId("top-name").textContent = run.name;
  const [done, all] = progress();
  byId("top-progress").textContent = all ? `${count(done)} / ${count(all)}` : count(done);
  byId("meter").hidden = !all;
  byId("meter").firstChild.style.setProperty("width", `${all ? (100 * done) / all : 0}%`);
  if (!embedded) document.title = `${all ? `${done}/${all} ` : ""}${run.name} · ${run.state}`;
}

const progress = () => [live("iteration") ?? run.headline.iterations, live("iterations")];

function move({ name, before, after }) {
  const to = after == null ? null : [el("span", { class: "arrow", "aria-label": "to" }, "→"), el("span", { class: "to" }, score(after))];
  return el("div", {}, el("div", { class: "name" }, name), el("div", { class: "move" }, el("span", { class: to ? "" : "to" }, score(before)), to));
}

// What it is doing, in words.
function doing() {
  const stage = live("stage");
  if (run.state === "unknown") return "no live.json tells what it is doing";
  if (active()) return stage || "";
  const [done, all] = progress();
  const ended = { finished: "", stopped: "may go on with --resume", failed: stage && `while ${stage}`, lost: stage && `last heard of while ${stage}` }[run.state];
  return [all ? `after ${count(done)} of ${plural(all, "iteration")}` : "", ended].filter(Boolean).join(", ");
}

function facts(head) {
  const [done, all] = progress();
  const pace = mean(run.timed.slice(-20).map((row) => row.images_per_second));
  const checkpoint = live("checkpoint");
  const dashboard = live("ray.dashboard");
  const link = typeof dashboard === "string" && /^https?:/.test(dashboard) && active();
  return [
    ["Iterations", all ? `${count(done)} / ${count(all)}` : count(head.iterations)],
    ["Images", count(head.images)],
    ["Updates", count(head.updates)],
    ["Time", isNumber(head.seconds) ? duration(head.seconds) : null],
    ["Left, about", active() && all > done ? left(all - done) : null],
    ["Images per second", pace == null ? null : number(pace), "mean of the last 20 iterations"],
    [`Largest gate |${symbol()}|`, head.gate == null ? null : number(head.gate)],
    ["Last checkpoint", checkpoint ? `iteration ${count(checkpoint.iteration)}${active() ? `, ${ago(run.now - checkpoint.at)}` : ""}` : active() ? "none yet" : null],
    ["Best checkpoint", run.best ? `iteration ${count(run.best.iteration)}, ${run.best.reward} ${score(run.best.value)}` : null, "by checkpoint.best; commands take --iteration best"],
    ["Ray", link ? el("a", { href: dashboard, target: "_blank", rel: "noreferrer" }, "dashboard ↗") : null],
  ];
}

// Time left, from the last iterations and the share of time that evaluations took.
function left(iterations) {
  const each = mean(run.timed.slice(-20).map((row) => row.seconds));
  if (each == null) return null;
  const trained = sum(run.timed.map((row) => row.seconds));
  const whole = run.clock.values.at(-1) ?? trained;
  return duration(iterations * each * (whole / trained));
}

// What an empty part says: what a run that goes on waits for, or how it is.
const waits = (what, otherwise) => (active() || run.state === "unknown" ? `Waits for ${what}.` : otherwise);
const started = (what) => waits(what, "The run ended before its first iteration.");

const alert_ = (kind, title, ...lines) => el("div", { class: `alert ${kind}`, role: "note" }, el("p", {}, el("b", {}, title)), lines.filter(Boolean).map((text) => el("p", {}, text)));

function alerts() {
  const found = [];
  const resume = run.resume && ["Find the cause, then continue from the last checkpoint: ", el("code", {}, run.resume)];
  if (run.state === "failed") found.push(alert_("", "The run failed", live("message") ?? "It did not say why.", resume));
  if (run.state === "lost") {
    const quiet = `Not heard of for ${duration(run.now - live("updated"))}: the driver, process ${live("pid")} on ${live("host")}, was probably killed.`;
    found.push(alert_("", "The run is lost", quiet, "Read the end of its output and of its logs.", resume));
  }
  found.push(...run.watch.filter((watched) => watched.spans.length).map(alertOf));
  const told = run.timings.findLast((row) => row.kind === "start")?.warnings ?? [];
  return told.length ? [...found, alert_("past", "Told at the start", ...told)] : found;
}

// A watched reward that fell while the trained one rose: at the end of the run, or earlier only.
function alertOf(watched) {
  const spans = watched.spans.map(({ from, to }) => (from === to ? count(from) : `${count(from)}–${count(to)}`));
  const last = watched.spans.at(-1);
  const earlier = spans.slice(0, -1).join(", ");
  const title = watched.diverging
    ? `Over-optimization since iteration ${count(last.from)}`
    : `Over-optimization in iterations ${spans.join(", ")}, no longer at the end`;
  const more = watched.diverging && earlier ? ` Earlier in iterations ${earlier}.` : "";
  const none = watched.diverging && !watched.export && "No checkpoint is from before: in the next run lower checkpoint.every, or end it in time with --set watch.action=stop.";
  const before = watched.export ? ["The model from before is written by ", el("code", {}, watched.export)] : none;
  return alert_(watched.diverging ? "" : "past", title, `${last.says}.${more}`, before);
}

// ---- rewards ---------------------------------------------------------------------------------------

// On the curve of a watched reward: its best windows, and from where to where it diverged.
function marksOf(watched) {
  if (!watched) return [];
  const bests = [...watched.spans.map((span) => span.best), [watched.best_from, watched.best_iteration]];
  const windows = new Map(bests.map(([from, to]) => [to, { kind: "best", name: "best window", from, to }]));
  const spans = watched.spans.map(({ from, to }) => ({ kind: "diverging", name: "diverging", from, to }));
  const says = ({ from, to }) => (from === to ? count(from) : `${count(from)}–${count(to)}`);
  return [...windows.values(), ...spans].map((mark) => ({ ...mark, says: says(mark) }));
}

const axis = new Choice("Horizontal axis", (wall) => {
  view.wall = wall;
  renderRewards();
});

function renderRewards() {
  const options = [
    { value: false, label: "Iteration" },
    { value: true, label: "Wall time", disabled: !run.clock.values.length },
  ];
  place(byId("rewards-controls"), [axis.set(options, view.wall)]);
  byId("rewards-more").textContent = run.watch.length
    ? "Of a reward that is only watched, the best window is marked, and where it diverged."
    : "";
  const panel = (title, ...series) => {
    const marks = marksOf(run.watch.find((watched) => watched.name === title));
    return chart({ id: `reward ${title}`, title, unit: "reward", wall: true, height: 220, series: drawn(series), marks });
  };
  const training = (get) => line("training", COLORS[0], run.train, (row) => get(row)?.mean, (row) => around(get(row)?.mean, get(row)?.std));
  const panels = run.rewards.map((name) => {
    const get = (row) => row.rewards?.[name];
    const measured = line("held-out", COLORS[1], run.evals, (row) => get(row)?.mean, (row) => ({ spread: get(row)?.std }));
    return panel(name, training(get), { ...measured, kind: "dots" });
  });
  if (run.rewards.length > 1 && run.train.length) panels.push(panel("weighted total", training((row) => row.reward)));
  place(byId("rewards-charts"), panels.length ? panels : [empty(started("the first evaluation and the first iteration"))]);
  place(byId("header-chart"), panels.length ? [trainedChart(training)] : []);
}

const drawn = (series) => series.filter((one) => one.points.some((point) => isNumber(point.y)));

// What is trained: the one reward of a weight, or their weighted total.
function trainedChart(training) {
  const trained = run.rewards.filter((name) => run.weights[name]);
  const one = trained.length === 1 ? trained[0] : run.rewards.length === 1 ? run.rewards[0] : null;
  const get = (row) => (one ? row.rewards?.[one] : row.reward);
  const measured = line("held-out", COLORS[1], run.evals, (row) => get(row)?.mean, (row) => ({ spread: get(row)?.std }));
  return chart({ id: "trained", title: one ? `${one}, which is trained` : "Weighted total, which is trained", unit: "reward", wall: true, height: 300, series: drawn([training(get), { ...measured, kind: "dots" }]) });
}

// ---- ratio -----------------------------------------------------------------------------------------

// The quantity of the objective that has to be 0 before an iteration's first update.
const symbol = () => run.objective.gate.symbol.replaceAll("rho", "ρ");
const gated = (rest) => `${run.objective.gate.name}.${rest}`;

// The charts of what the objective reports beside it: penalties of the loss, or the others.
const objectiveCharts = (penalty) => run.objective.charts.filter((wanted) => wanted.penalty === penalty).map(({ title, unit, lines }) => {
  const colors = lines.length > 1 ? [COLORS[1], COLORS[0], ...COLORS.slice(2)] : COLORS;
  return chart({ title, unit, floor: 0, series: lines.map(({ label, path }, i) => line(label, colors[i % colors.length], run.train, path)) });
});

function renderRatio() {
  byId("ratio-title").textContent = run.objective.gate.title;
  byId("ratio-meaning").textContent = run.objective.gate.meaning;
  const { gate, gates } = run.headline;
  const apart = run.objective.gated === "first" && gates > 0;
  const good = gate === 0 && (apart || gates === run.train.length);
  const all = apart ? `${gates === 1 ? "the one iteration" : `the ${count(gates)} iterations`} whose samples are of the weights it trained` : gates === 1 ? "the one iteration" : `all ${count(gates)} iterations`;
  const verdict = byId("ratio-verdict");
  if (!run.train.length) verdict.textContent = started("the first iteration: the ratio is taken before its first update");
  else if (gate == null) verdict.textContent = "The gate was not recorded.";
  else verdict.textContent = good ? `The gate is exactly 0 in ${all}.` : `The gate is at most ${number(gate)}, recorded in ${count(gates)} of ${plural(run.train.length, "iteration")}.`;
  verdict.className = `verdict ${good ? "" : "open"}`;
  if (!run.train.length) return place(byId("ratio-charts"), []);
  const size = run.objective.gate.signed ? symbol() : `|${symbol()}|`;
  const spread = (row) => around(at(row, gated("mean")), at(row, gated("std")));
  const steps = run.objective.steps ? perStep() : [];
  place(byId("ratio-charts"), [
    chart({
      title: `Largest |${symbol()}|`, unit: `|${symbol()}|`, floor: 0, rule: { y: 0, label: "required of the gate: 0" },
      series: [line("after updates", COLORS[0], run.train, gated("max_abs")), line("gate", COLORS[1], run.train, gated("gate"))],
    }),
    chart({ title: `Mean ${size}`, unit: size, series: [line("mean ± spread", COLORS[0], run.train, gated("mean"), spread)] }),
    ...objectiveCharts(false),
    ...(steps.length ? [stepChart(steps)] : []),
  ]);
  show(byId("ratio-tables"), steps.length ? stepTable(steps) : null);
}

// log ρ by stochastic step: [{step, color, points: {it, mean, std}}], the noisiest step first.
function perStep() {
  const steps = new Map();
  for (const row of run.train) {
    const { step = [], mean: means = [], std = [] } = at(row, gated("per_step")) ?? {};
    step.forEach((name, i) => {
      if (!steps.has(name)) steps.set(name, []);
      steps.get(name).push({ it: row.iteration, mean: means[i], std: std[i] });
    });
  }
  const names = [...steps.keys()].sort((a, b) => a - b);
  const share = (i) => (names.length > 1 ? Math.round((100 * i) / (names.length - 1)) : 0);
  return names.map((step, i) => ({ step, color: `color-mix(in oklab, var(--c1) ${share(i)}%, var(--c0))`, points: steps.get(step) }));
}

function stepChart(steps) {
  const series = steps.map(({ step, color, points }) => ({ name: `step ${step}`, color, kind: "line", points: points.map(({ it, std }) => ({ it, y: std })) }));
  return chart({ title: "Spread of log ρ by step", unit: "standard deviation of log ρ", floor: 0, series });
}

function stepTable(steps) {
  const rows = steps.map(({ step, color, points }) => {
    const valid = points.filter((point) => isNumber(point.mean) && isNumber(point.std));
    const middle = mean(valid.map((point) => point.mean));
    const square = mean(valid.map((point) => point.std ** 2 + point.mean ** 2));
    return { step, color, seen: points.length, middle, std: square == null ? null : Math.sqrt(Math.max(0, square - middle ** 2)) };
  });
  const most = largest(rows.map((row) => row.std));
  const entries = rows.map((row) => ({ cells: [String(row.step), count(row.seen), number(row.middle), number(row.std)], share: most ? row.std / most : 0, color: row.color }));
  return titled("log ρ by stochastic step, over all iterations", gauges(["Step", "Iterations", "Mean", "Spread", "Of the largest"], entries));
}

// ---- learning --------------------------------------------------------------------------------------

function renderUpdate() {
  if (!run.train.length) return place(byId("update-charts"), [empty(started("the first iteration"))]);
  const norms = (row) => known([row.grad_norm ?? []].flat());
  const ends = (row) => (norms(row).length > 1 ? { low: Math.min(...norms(row)), high: Math.max(...norms(row)) } : {});
  const without = run.train.map((row) => ({ it: row.iteration, parts: [at(row, "groups.no_spread"), at(row, "groups.dropped")] }));
  const groups = binned(without, ["no spread", "dropped"]);
  const refilled = line("refilled", "var(--ink)", run.train, "groups.refilled");
  const more = refilled.points.some((point) => point.y > 0);
  if (more) groups.series.push(refilled);
  const most = count(largest(run.train.map((row) => at(row, "groups.total"))));
  const float16 = run.train.some((row) => row.loss_scale);
  place(byId("update-charts"), [
    ...objectiveCharts(true),
    chart({ title: "Gradient norm", unit: "norm before clipping", floor: 0, series: [line("mean of the updates", COLORS[0], run.train, (row) => mean(norms(row)), ends)] }),
    chart({ title: "Loss", unit: "loss", series: [line("total", COLORS[0], run.train, "loss"), line("policy", COLORS[1], run.train, "policy_loss")] }),
    chart({ id: "groups", title: `Groups without effect, of ${more ? "up to " : ""}${most}`, unit: "groups", floor: 0, whole: true, ...groups }),
    chart({ title: "Learning rate", unit: "learning rate", floor: 0, series: [line("learning rate", COLORS[0], run.train, "learning_rate")] }),
    ...(float16 ? [chart({ title: "Loss scale", unit: "factor", floor: 0, series: [line("scale", COLORS[0], run.train, "loss_scale.last"), line("overflows", COLORS[1], run.train, "loss_scale.overflows")] })] : []),
  ]);
}
