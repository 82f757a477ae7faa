"use strict";
// Where the time goes, what runs where, and the files behind it all.

const LEDGER = 10; // iterations

function renderTime() {
  const rows = run.timed;
  const starts = run.timings.filter((row) => row.kind === "start");
  if (!rows.length) place(byId("time-charts"), [empty(starts.length ? "No iteration timed yet." : "No times recorded yet.")]);
  const stages = [...new Set(rows.flatMap((row) => Object.keys(row.stages ?? {})))];
  if (rows.length) place(byId("time-charts"), timeCharts(rows, stages));
  show(byId("time-tables"), rows.length ? [stageTable(rows, stages), slowestTable(rows)] : null, starts.map(startTable));
  show(byId("time-ledger"), rows.length ? ledger(rows.slice(-LEDGER), stages) : null);
}

function timeCharts(rows, stages) {
  const stack = binned(rows.map((row) => ({ it: row.iteration, parts: stages.map((stage) => row.stages?.[stage] ?? null) })), stages);
  stack.series.push(line("iteration", "var(--ink)", rows, "seconds"));
  const kinds = [...new Set(rows.flatMap((row) => Object.keys(row.busy ?? {})))];
  const rewards = [...new Set(rows.flatMap((row) => Object.keys(row.rewards ?? {})))];
  const each = (names, get) => names.map((name, i) => line(name, COLORS[i % COLORS.length], rows, (row) => get(row, name)));
  const answer = ({ rewards: all }, name) => (all?.[name]?.calls ? all[name].seconds / all[name].calls : null);
  return [
    chart({ title: "Seconds per iteration", unit: "seconds", floor: 0, ...stack }),
    ...(kinds.length ? [chart({ title: "Busy", unit: "share of the iteration", floor: 0, series: each(kinds, (row, kind) => row.busy?.[kind]) })] : []),
    chart({ title: "Images per second", unit: "images per second", floor: 0, series: [line("images per second", COLORS[0], rows, "images_per_second")] }),
    ...(rewards.length ? [chart({ title: "Answer time of rewards", unit: "seconds per call", floor: 0, series: each(rewards, answer) })] : []),
  ];
}

function stageTable(rows, stages) {
  const whole = mean(rows.map((row) => row.seconds));
  const entry = (name, values, color) => ({
    cells: [name, seconds(values.at(-1)), seconds(mean(values)), seconds(largest(values))],
    share: whole ? mean(values) / whole : 0,
    color,
  });
  const entries = stages.map((stage, i) => entry(stage, rows.map((row) => row.stages?.[stage]), COLORS[i % COLORS.length]));
  entries.push(entry("whole iteration", rows.map((row) => row.seconds), "var(--ink)"));
  return titled("Stages", gauges(["Stage", "Last", "Mean busy", "Largest", "Mean"], entries));
}

// How often each stage was the slowest, and what the last such iteration says of replicas.
function slowestTable(rows) {
  const seen = rows.filter((row) => row.bottleneck);
  if (!seen.length) return null;
  const names = [...new Set(seen.map((row) => row.bottleneck.stage))];
  const entries = names.map((name) => {
    const mine = seen.filter((row) => row.bottleneck.stage === name);
    const replicas = mine.at(-1).bottleneck.replicas;
    return {
      cells: [name, count(mine.length), seconds(mean(mine.map((row) => row.bottleneck.seconds))), replicas == null ? "–" : count(replicas)],
      share: mine.length / seen.length,
      times: mine.length,
    };
  });
  entries.sort((a, b) => b.times - a.times);
  return titled("Slowest stage", gauges(["Stage", "Iterations", "Work of each actor", "Replicas that help", "Of all"], entries));
}

function startTable(row, i) {
  const entries = Object.entries(row.phases ?? {}).map(([phase, value]) => ({ cells: [phase, seconds(value)], share: row.seconds ? value / row.seconds : 0 }));
  return titled(`${i ? `Resume ${i}` : "Start-up"}, ${seconds(row.seconds)}`, gauges(["Phase", "Seconds", "Of the start"], entries));
}

function ledger(rows, stages) {
  const kinds = [...new Set(rows.flatMap((row) => Object.keys(row.busy ?? {})))];
  const names = ["Iteration", "Whole", ...stages, ...kinds.map((kind) => `${kind} busy`), "Slowest"];
  const cells = rows.toReversed().map((row) => [
    count(row.iteration), seconds(row.seconds),
    ...stages.map((stage) => seconds(row.stages?.[stage])), ...kinds.map((kind) => percent(row.busy?.[kind])),
    row.bottleneck?.stage ?? "–",
  ]);
  return titled(`Ledger of the last ${plural(rows.length, "iteration")}`, table(names, cells));
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
      workers.length ? titled("Rollout workers", table(["Worker", "Weights of iteration", "In flight"], workers.map(worker))) : null,
    ),
    definitions([
      ["Learner ranks", count(live("learners"))],
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
  const text = run.spec ?? "spec.yaml is not in the run folder.";
  const box = byId("spec").querySelector("pre");
  if (box.textContent !== text) box.textContent = text;
}
