"use strict";
// Where the time goes, what runs where, and the files behind it all.

const LEDGER = 10; // iterations
const STATES = { busy: "var(--c0)", loading: "var(--c1)", waiting: "var(--wait)", overhead: "var(--c3)" };

function renderTime() {
  const rows = run.timed;
  const starts = run.timings.filter((row) => row.kind === "start");
  const recent = rows.slice(-LEDGER);
  const kinds = ledgerOf(recent);
  renderVerdict(recent.filter((row) => row.bottleneck));
  show(byId("time-ledger"), kinds.length ? ledger(kinds, recent.length) : null);
  if (rows.length) place(byId("time-charts"), timeCharts(rows, kinds.map(({ kind }) => kind)));
  else place(byId("time-charts"), [empty(started(starts.length ? "the first iteration; the start is below" : "the end of the start, and the first iteration"))]);
  show(byId("time-tables"), kinds.length ? ledgerTable(kinds) : null, rows.length ? slowestTable(rows) : null, starts.map(startTable));
  show(byId("time-recent"), recent.length ? recentTable(recent) : null);
}

// The stage that was slowest most of the time, and what would change that.
function renderVerdict(rows) {
  const verdict = byId("time-verdict");
  verdict.hidden = !rows.length;
  if (!rows.length) return;
  const times = (stage) => rows.filter((row) => row.bottleneck.stage === stage).length;
  const last = rows.toSorted((a, b) => times(b.bottleneck.stage) - times(a.bottleneck.stage) || b.iteration - a.iteration)[0].bottleneck;
  const often = `Slowest in ${count(times(last.stage))} of the last ${plural(rows.length, "iteration")}`;
  verdict.textContent = `${often}: ${last.stage}, ${seconds(last.seconds)} of work for each of its actors. ${last.advice ?? ""}`;
  verdict.className = `verdict ${Object.keys(last.change ?? {}).length ? "open" : ""}`;
}

// Each kind of actor: mean seconds of a process by state and what it was, in the order of STATES.
function ledgerOf(rows) {
  const kinds = [...new Set(rows.flatMap((row) => Object.keys(row.ledger ?? {})))];
  return kinds.map((kind) => {
    const mine = rows.filter((row) => row.ledger?.[kind]);
    const entries = Object.keys(STATES).flatMap((state) => {
      const names = [...new Set(mine.flatMap((row) => Object.keys(row.ledger[kind][state] ?? {})))];
      const of = names.map((what) => ({ state, what, value: sum(mine.map((row) => row.ledger[kind][state]?.[what])) / mine.length }));
      return of.filter(({ value }) => value > 0).sort((a, b) => b.value - a.value);
    });
    const whole = sum(entries.map(({ value }) => value));
    return { kind, processes: mine.at(-1).processes?.[kind], entries: entries.map((one) => ({ ...one, share: whole ? one.value / whole : 0 })) };
  });
}

const spentOn = ({ state, what }) => ({ loading: `${what} weights`, waiting: `waiting for ${what}` })[state] ?? what;

function ledger(kinds, iterations) {
  const segment = (one) => {
    const said = one.share > 0.12;
    return el("i", { class: `${one.state} ${said ? "said" : ""}`, css: { width: `${100 * one.share}%` }, title: `${spentOn(one)}: ${seconds(one.value)}` }, said ? spentOn(one) : null);
  };
  const bar = ({ kind, processes, entries }) =>
    el(
      "div",
      { class: "line" },
      el("span", {}, kind, isNumber(processes) ? el("small", {}, ` × ${number(processes)}`) : null),
      el("div", { class: "spent", role: "img", "aria-label": `${kind}: ${entries.map((one) => `${spentOn(one)} ${percent(one.share)}`).join(", ")}` }, entries.map(segment)),
    );
  const legend = Object.entries(STATES).map(([state, color]) => el("span", {}, el("span", { class: "swatch bar", css: { background: color } }), state));
  return el("figure", { class: "ledger" }, el("figcaption", {}, el("h3", {}, `Ledger of the last ${plural(iterations, "iteration")}: a process of each kind`)), el("div", { class: "legend" }, legend), kinds.map(bar));
}

function ledgerTable(kinds) {
  const entries = kinds.flatMap(({ kind, entries: of }) =>
    of.map((one) => ({ cells: [kind, el("span", { class: "spent-on" }, spentOn(one)), seconds(one.value), percent(one.share)], share: one.share, color: STATES[one.state] })),
  );
  return titled("Ledger in seconds", gauges(["Actors", "Spent on", "Mean", "Share", "Of an iteration"], entries));
}

function timeCharts(rows, ledgers) {
  const kinds = [...new Set(rows.flatMap((row) => Object.keys(row.busy ?? {})))];
  const rewards = [...new Set(rows.flatMap((row) => Object.keys(row.rewards ?? {})))];
  const each = (names, get) => names.map((name, i) => line(name, COLORS[i % COLORS.length], rows, (row) => get(row, name)));
  const answer = ({ rewards: all }, name) => (all?.[name]?.calls ? all[name].seconds / all[name].calls : null);
  return [
    chart({ title: "Seconds per iteration", unit: "seconds", floor: 0, series: [line("iteration", COLORS[0], rows, "seconds")] }),
    ...(kinds.length ? [chart({ title: "Busy", unit: "share of the iteration", floor: 0, series: each(kinds, (row, kind) => row.busy?.[kind]) })] : []),
    chart({ title: "Images per second", unit: "images per second", floor: 0, series: [line("images per second", COLORS[0], rows, "images_per_second")] }),
    ...(rewards.length ? [chart({ title: "Answer time of rewards", unit: "seconds per call", floor: 0, series: each(rewards, answer) })] : []),
    ...ledgers.map((kind) => ledgerChart(rows, kind)),
  ];
}

// A kind's states over the run, one on the other.
function ledgerChart(rows, kind) {
  const states = Object.keys(STATES);
  const total = (entries) => (entries ? sum(Object.values(entries)) : 0);
  const parts = (row) => states.map((state) => (row.ledger?.[kind] ? total(row.ledger[kind][state]) : null));
  const stack = binned(rows.map((row) => ({ it: row.iteration, parts: parts(row) })), states);
  for (const one of stack.series) one.color = STATES[one.name];
  return chart({ id: `ledger ${kind}`, title: `Ledger of ${kind}`, unit: "seconds", floor: 0, ...stack });
}

// How often each stage was the slowest.
function slowestTable(rows) {
  const seen = rows.filter((row) => row.bottleneck);
  if (!seen.length) return null;
  const names = [...new Set(seen.map((row) => row.bottleneck.stage))];
  const entries = names.map((name) => {
    const mine = seen.filter((row) => row.bottleneck.stage === name);
    return { cells: [name, count(mine.length), seconds(mean(mine.map((row) => row.bottleneck.seconds)))], share: mine.length / seen.length, times: mine.length };
  });
  entries.sort((a, b) => b.times - a.times);
  return titled("Slowest stage", gauges(["Stage", "Iterations", "Work of each actor", "Of all"], entries));
}

function startTable(row, i) {
  const entries = Object.entries(row.phases ?? {}).map(([phase, value]) => ({ cells: [phase, seconds(value)], share: row.seconds ? value / row.seconds : 0 }));
  return titled(`${i ? `Resume ${i}` : "Start-up"}, ${seconds(row.seconds)}`, gauges(["Phase", "Seconds", "Of the start"], entries));
}

function recentTable(rows) {
  const kinds = [...new Set(rows.flatMap((row) => Object.keys(row.busy ?? {})))];
  const names = ["Iteration", "Whole", ...kinds.map((kind) => `${kind} busy`), "Slowest"];
  const cells = rows.toReversed().map((row) => [
    count(row.iteration), seconds(row.seconds), ...kinds.map((kind) => percent(row.busy?.[kind])), row.bottleneck?.stage ?? "–",
  ]);
  return titled(`The last ${plural(rows.length, "iteration")}`, table(names, cells));
}

// ---- cluster ---------------------------------------------------------------------------------------

function renderCluster() {
  byId("cluster").hidden = !run.live;
  if (!run.live) return;
  const when = active() ? `told ${ago(run.now - live("updated"))}` : `told last, ${moment(live("updated"))}`;
  byId("cluster-lead").textContent = `What the driver, process ${live("pid")} on ${live("host")}, ${when}.`;
  const rewards = Object.entries(live("rewards") ?? {});
  const workers = live("workers") ?? [];
  show(
    byId("cluster-body"),
    el(
      "div",
      { class: "tables" },
      rewards.length ? titled("Rewards", table(["Deployment", "State", "Replicas", "Queue", "Calls", "Failures", "Mean answer"], rewards.map(deployment))) : null,
      workers.length ? titled("Workers", table(["Worker", "Weights of iteration", "In flight"], workers.map(worker))) : null,
    ),
    definitions([
      ["Ranks that train", count(live("learners"))],
      ["Started", isNumber(live("started")) ? moment(live("started")) : null],
      ["Ray", live("ray.address")],
      ["Ray job", live("ray.job")],
      ["Ray dashboard", live("ray.dashboard")],
    ]),
  );
}

const deployment = ([, reward]) => [
  reward.deployment,
  String(reward.state).toLowerCase(),
  reward.target ? `${count(reward.replicas)} of ${count(reward.target)}` : "–",
  count(reward.queue), count(reward.calls), count(reward.failures), seconds(reward.mean_latency_s),
];

function worker({ name, weights_version: version, in_flight: flying }) {
  const newest_ = largest((live("workers") ?? []).map((one) => one.weights_version));
  return [name, `${count(version)}${isNumber(version) && version < newest_ ? ", behind" : ""}`, count(flying)];
}

// ---- files -----------------------------------------------------------------------------------------

function renderSources(embedded) {
  byId("sources-lead").textContent =
    "Every number is read from these files of the run folder; nothing is smoothed." +
    (run.train.length > MOST_BARS ? ` With more than ${MOST_BARS} iterations a bar is the mean of neighbours.` : "");
  const address = (file) => `/file?${new URLSearchParams({ run: address_, name: file.name })}`;
  const name = (file) => {
    const text = el("code", {}, file.name);
    const there = !embedded && file.bytes != null && file.name.includes(".");
    return there ? el("a", { href: address(file), download: file.name }, text) : text;
  };
  const last = run.train.at(-1);
  show(
    byId("sources-files"),
    table(["File", "Size", "Holds"], run.files.map((file) => [name(file), bytes(file.bytes), el("span", { class: "says" }, file.says)])),
    at(last ?? {}, "weights.digest")
      ? el("p", { class: "lead" }, `Weights of the last iteration: version ${count(last.weights.version)}, digest `, el("code", {}, last.weights.digest), ".")
      : null,
  );
  byId("log").hidden = !run.log;
  fill("log", run.log);
  fill("spec", run.spec ?? "spec.yaml is not in the run folder.");
}

function fill(id, text) {
  const box = byId(id).querySelector("pre");
  if (box.textContent !== text) box.textContent = text;
}
