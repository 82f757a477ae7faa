"use strict";
// Charts. One is {title, unit, series, wall?, floor?, ceiling?, rule?, marks?, height?}; a series is
// {name, color, kind, points} with kind line, dots or bar and points {it, y, low?, high?, spread?};
// a mark is {kind, name, from, to, says} with kind best or diverging. The legend is the read-out, and
// all charts share one cursor. A chart lives as long as the page: new data is drawn into it.
// Of several runs (own) a chart's points are by iteration or, with `time`, by seconds, and a series
// that is `near` is read at its latest point up to the cursor.

const charts = new Map();
// Only charts near the window are drawn; of the others it is noted that they must be.
const nearing = new IntersectionObserver((entries) => entries.forEach((one) => charts.get(one.target.dataset.chart).come(one.isIntersecting)), { rootMargin: "300px" });
addEventListener("beforeprint", () => charts.forEach((one) => one.come(true)));
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => charts.get(target.dataset.chart)?.draw(false)));

function chart(spec) {
  const id = spec.id ?? spec.title;
  if (!charts.has(id)) charts.set(id, new Chart(id));
  return charts.get(id).set(spec);
}

class Chart {
  constructor(id) {
    this.at = el("span", { class: "at" });
    this.title = el("h3", {});
    this.legend = el("div", { class: "legend" });
    this.toggle = el("button", { type: "button", class: "small", "aria-pressed": "false", click: () => this.turn() }, "Table");
    this.plot = el("div", {
      class: "plot", tabindex: 0, role: "slider", "data-chart": id, "aria-orientation": "horizontal",
      pointermove: (event) => this.point(event), pointerleave: () => moveCursor(null),
      blur: () => moveCursor(null), keydown: (event) => this.step(event),
    });
    this.values = el("div", { class: "values", tabindex: 0, hidden: true });
    this.figure = el("figure", {}, el("figcaption", {}, this.title, this.at, this.toggle), this.legend, this.plot, this.values);
    this.near = this.stale = false;
    resized.observe(this.plot);
    nearing.observe(this.plot);
  }

  come(near) {
    this.near = near;
    if (near && this.stale) this.draw(true);
  }

  set(spec) {
    spec.series = spec.series.map((one) => {
      const points = one.points.filter((point) => isNumber(point.it));
      return { ...one, points, places: points.map((point) => point.it) };
    });
    spec.iterations = [...new Set(spec.series.flatMap((one) => one.places))].sort((a, b) => a - b);
    this.spec = spec;
    this.title.textContent = spec.title;
    this.known = spec.series.some((one) => one.points.some((point) => isNumber(point.y)));
    this.values.setAttribute("aria-label", `${spec.title}, all values`);
    this.legend.hidden = this.toggle.hidden = !this.known;
    this.draw(true);
    this.read();
    if (!this.values.hidden) this.list();
    return this.figure;
  }

  draw(anew) {
    const width = Math.round(this.plot.clientWidth);
    if (!anew && width === this.width) return;
    this.stale = !this.near || !width;
    if (this.stale) return;
    this.width = width;
    if (!this.known) return void this.plot.replaceChildren(empty("Not recorded."));
    const frame = (this.frame = measure(this.spec, width));
    const picture = svg("svg", { viewBox: `0 0 ${width} ${frame.height}`, "aria-hidden": "true" });
    picture.append(...axes(this.spec, frame), ...(this.spec.marks ?? []).flatMap((mark) => shade(mark, frame)));
    for (const one of this.spec.series) picture.append(...(one.kind === "bar" ? bars(one, frame) : curve(one, frame)));
    this.cursor = svg("line", { class: "cursor", y1: frame.top, y2: frame.height - frame.bottom });
    this.hits = svg("g", {});
    picture.append(this.cursor, this.hits);
    this.plot.replaceChildren(picture);
    this.mark(view.cursor);
  }

  // Show the values at the cursor, or the latest.
  read() {
    if (!this.known) return;
    const { spec } = this;
    const shown = view.cursor;
    const brief = (one) => el("b", { class: spreads(one) && one.kind === "line" ? "wide" : null }, reading(one, shown, spec, true));
    show(
      this.legend,
      ...spec.series.map((one) => el("span", {}, el("span", { class: `swatch ${one.kind}`, css: { background: one.color } }), one.name, brief(one))),
      ...named(spec.marks).map((mark) => el("span", {}, el("span", { class: `swatch ${mark.kind}` }), mark.name, el("b", {}, mark.says))),
    );
    const time = shown != null && spec.wall && view.wall ? `${seconds(clock(shown))}, ` : "";
    this.at.textContent = shown == null ? "" : `${time}${moment_(shown, spec)}`;
    const [first, last] = [spec.iterations[0], spec.iterations.at(-1)];
    const told = { label: spec.title, valuemin: first, valuemax: last, valuenow: shown ?? last, valuetext: describe(spec, shown) };
    for (const [name, value] of Object.entries(told)) this.plot.setAttribute(`aria-${name}`, value);
    if (this.frame && !this.stale) this.mark(shown);
  }

  // Draw the cursor at an iteration, or take it away.
  mark(iteration) {
    const { iterations } = this.spec;
    const inside = iteration != null && iteration >= iterations[0] && iteration <= iterations.at(-1);
    this.cursor.style.visibility = inside ? "visible" : "hidden";
    this.hits.replaceChildren();
    if (!inside) return;
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.frame.x(iteration));
    this.hits.append(...this.spec.series.flatMap((one) => hit(one, iteration, this.frame)));
  }

  point(event) {
    if (!this.frame || !this.known) return;
    const box = this.plot.getBoundingClientRect();
    const { iterations } = this.spec;
    const x = event.clientX - box.left;
    const left = lastUpTo(iterations.map(this.frame.x), x);
    const near = [iterations[left], iterations[left + 1]].filter((it) => it != null);
    moveCursor(near.reduce((a, b) => (Math.abs(this.frame.x(b) - x) < Math.abs(this.frame.x(a) - x) ? b : a)));
  }

  step(event) {
    if (event.key === "Escape") moveCursor(null);
    if (!this.known || event.altKey || event.ctrlKey || event.metaKey) return;
    const { iterations } = this.spec;
    const last = iterations.length - 1;
    const here = view.cursor == null ? last : Math.max(0, lastUpTo(iterations, view.cursor));
    const leap = Math.max(1, Math.round(last / 10));
    const next = {
      ArrowLeft: here - 1, ArrowRight: here + 1, PageDown: here - leap, PageUp: here + leap, Home: 0, End: last,
    }[event.key];
    if (next == null) return;
    event.preventDefault();
    moveCursor(iterations[Math.max(0, Math.min(last, next))]);
  }

  turn() {
    this.values.hidden = !this.values.hidden;
    this.toggle.setAttribute("aria-pressed", String(!this.values.hidden));
    if (!this.values.hidden) this.list();
  }

  // Every number of the chart as a table, none of them binned.
  list() {
    const spec_ = this.spec;
    const columns = spec_.series.flatMap((one) => {
      const rows = new Map((one.exact ?? one.points).map((point) => [point.it, point]));
      const column = (name, key) => ({ name, rows, key });
      const spread = spreads(one) ? [column("± spread", "spread")] : [];
      const ends = !spread.length && one.kind !== "bar" && one.points.some((point) => isNumber(point.high));
      return [column(one.name, "y"), ...spread, ...(ends ? [column("lowest", "low"), column("highest", "high")] : [])];
    });
    const its = [...new Set(columns.flatMap(({ rows }) => [...rows.keys()]))].sort((a, b) => a - b);
    const cell = ({ rows, key }, it) => {
      const value = rows.get(it)?.[key];
      return isNumber(value) ? el("data", { value }, number(value)) : "–";
    };
    show(this.values, table([spec_.time ? "Seconds" : "Iteration", ...columns.map(({ name }) => name)], its.map((it) => [spec_.time ? number(it) : count(it), ...columns.map((one) => cell(one, it))])));
  }
}

function axes(spec, { width, height, left, right, bottom, wall, start, end, levels, labels, across, y }) {
  const level = (name, value) => svg("line", { class: name, x1: left, x2: width - right, y1: y(value), y2: y(value) });
  const parts = levels.flatMap((value, i) => [
    level("grid", value),
    svg("text", { class: "level", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, labels[i]),
  ]);
  const time = (value) => (value ? seconds(value).replace(/\.0+ /, " ") : "0");
  for (const value of ticks(start, end, Math.max(2, Math.min(8, width / 90)), !wall)) {
    const text = wall ? time(value) : count(value);
    const inside = Math.min(across(value), width - 3.5 * text.length); // the last label stays in the picture
    parts.push(svg("text", { x: inside, y: height - bottom + 16, "text-anchor": "middle" }, text));
  }
  parts.push(svg("text", { class: "unit", x: 0, y: 9 }, spec.unit ?? ""));
  parts.push(svg("text", { class: "unit", x: width - right, y: height - 4, "text-anchor": "end" }, wall ? "time in iterations and evaluations" : "iteration"));
  if (spec.rule) {
    parts.push(level("rule", spec.rule.y));
    parts.push(svg("text", { x: width - right, y: y(spec.rule.y) - 6, "text-anchor": "end" }, spec.rule.label));
  }
  return parts;
}

// A mark behind the curves: the best window over a bar, or a stretch of divergence after a dashed line.
function shade({ kind, from, to }, { x, top, bottom, height }) {
  const [start, foot] = [x(from), height - bottom];
  const box = { x: start, width: Math.max(2, x(to) - start) };
  const area = svg("rect", { class: kind, y: top, height: foot - top, ...box });
  if (kind === "best") return [area, svg("rect", { class: "best-bar", y: foot - 3, height: 3, ...box })];
  return [area, svg("line", { class: "diverging-from", x1: start, x2: start, y1: top, y2: foot })];
}

function bars(one, { x, y, barWidth }) {
  const width = Math.min(28, Math.max(1, barWidth - (barWidth > 5 ? 1.5 : 0)));
  const seen = one.points.filter((point) => isNumber(point.y) && point.high > point.low);
  return seen.map((point) => {
    const box = { x: x(point.it) - width / 2, y: y(point.high), width, height: y(point.low) - y(point.high) };
    return svg("rect", { ...box, fill: one.color, opacity: 0.85, "data-series": one.name });
  });
}

// A line that breaks where a value is missing, its band, and circles for dots or a lone point.
function curve(one, { x, y, width }) {
  const pair = (it, value) => `${x(it).toFixed(2)} ${y(value).toFixed(2)}`;
  const points = thinned(one.points, x, width);
  const seen = points.filter((point) => isNumber(point.y));
  const banded = seen.filter((point) => isNumber(point.low) && isNumber(point.high));
  const dotted = one.kind === "dots";
  const pieces = [];
  if (banded.length > 1) {
    const edge = [...banded.map((p) => pair(p.it, p.high)), ...banded.toReversed().map((p) => pair(p.it, p.low))];
    pieces.push(svg("polygon", { points: edge.join(" "), fill: one.color, opacity: 0.13 }));
  }
  const path = points.map((point, i) => (isNumber(point.y) ? (isNumber(points[i - 1]?.y) ? "L" : "M") + pair(point.it, point.y) : ""));
  const dense = seen.length > width;
  const stroke = { stroke: one.color, "stroke-width": dotted ? 1.2 : dense ? 1 : 1.8, "stroke-dasharray": dotted ? "2 4" : one.dash };
  pieces.push(svg("path", { d: path.join(""), fill: "none", "stroke-linejoin": "round", "data-series": one.name, ...stroke }));
  if (dotted || seen.length === 1)
    pieces.push(...seen.map((p) => svg("circle", { class: "dot", r: seen.length > 30 ? 2.6 : 3.6, cx: x(p.it), cy: y(p.y), fill: one.color, "data-series": one.name })));
  return pieces;
}

// The point that is read at an iteration: of dots the latest up to it, of bars the one that holds it.
function pointAt(one, iteration, spec) {
  if (iteration == null) return one.points.findLast((point) => isNumber(point.y));
  if (one.kind === "bar") return one.points.find((point) => Math.abs(point.it - iteration) <= (spec.binned ?? 1) / 2);
  const place = lastUpTo(one.places, iteration);
  if (one.near && one.kind === "line") return one.points[place];
  if (one.kind === "dots") return one.points.slice(0, place + 1).findLast((point) => isNumber(point.y));
  return one.places[place] === iteration ? one.points[place] : undefined;
}

const spreads = (one) => one.points.some((point) => isNumber(point.spread));

// In brief, so that the legend keeps its lines: dots at a cursor without their spread.
function reading(one, iteration, spec, brief) {
  const point = pointAt(one, iteration, spec);
  if (!point || !isNumber(point.shown ?? point.y)) return "–";
  const apart = iteration != null && one.kind === "dots";
  const spread = isNumber(point.spread) && !(brief && apart) ? ` ± ${number(point.spread)}` : "";
  return `${number(point.shown ?? point.y)}${spread}${apart ? ` at ${spec.time ? seconds(point.it) : count(point.it)}` : ""}`;
}

function hit(one, iteration, { x, y }) {
  const point = one.kind === "bar" ? null : pointAt(one, iteration);
  if (!point || !isNumber(point.y)) return [];
  return [svg("circle", { class: "dot", r: 4, cx: x(point.it), cy: y(point.y), fill: one.color })];
}

// Where a chart is read: at an iteration or, where its own points are by time, at a second.
const moment_ = (at_, spec) => (spec.time ? seconds(at_) : `iteration ${count(at_)}`);

const describe = (spec, iteration) =>
  `${iteration == null ? "latest" : moment_(iteration, spec)}: ${spec.series.map((one) => `${one.name} ${reading(one, iteration, spec)}`).join(", ")}` +
  named(spec.marks).map((mark) => `; ${mark.name} ${mark.says}`).join("");

// Marks of one kind together, for the legend.
const named = (marks) =>
  ["best", "diverging"].flatMap((kind) => {
    const alike = (marks ?? []).filter((mark) => mark.kind === kind);
    return alike.length ? { ...alike[0], says: alike.map((mark) => mark.says).join(", ") } : [];
  });

let reads = 0;
function moveCursor(iteration) {
  if (view.cursor === iteration) return;
  view.cursor = iteration;
  reads ||= requestAnimationFrame(() => {
    reads = 0;
    charts.forEach((one) => one.read());
  });
}

const line = (name, color, rows, y, more) => ({
  name,
  color,
  kind: "line",
  points: rows.map((row) => ({ it: row.iteration, y: typeof y === "string" ? at(row, y) : y(row), ...(more ? more(row) : {}) })),
});
const around = (middle, spread) => (isNumber(middle) && isNumber(spread) ? { low: middle - spread, high: middle + spread, spread } : {});

// Rows {it, parts} as stacked bar series; many iterations are averaged into at most MOST_BARS bars.
const MOST_BARS = 150;
function binned(rows, names) {
  const size = Math.max(1, Math.ceil(rows.length / MOST_BARS));
  const bins = [];
  for (let i = 0; i < rows.length; i += size) bins.push(rows.slice(i, i + size));
  const stacks = bins.map((bin) => {
    let top = 0;
    const parts = names.map((_, k) => {
      const value = mean(bin.map((row) => row.parts[k]));
      const low = top;
      top += value ?? 0;
      return { shown: value, y: top, low, high: top };
    });
    return { it: bin[Math.floor(bin.length / 2)].it, parts };
  });
  const series = names.map((name, k) => ({
    name,
    color: COLORS[k % COLORS.length],
    kind: "bar",
    points: stacks.map((stack) => ({ it: stack.it, ...stack.parts[k] })),
    exact: rows.map((row) => ({ it: row.it, y: row.parts[k] })),
  }));
  return { binned: size, series };
}
