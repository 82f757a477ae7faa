"use strict";
// Axes: round ticks, their labels, and where values go in a picture.

function ticks(low, high, most, whole) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// Labels of one axis, all with as many digits as its step needs.
function tickLabels(values) {
  const step = values.length > 1 ? values[1] - values[0] : Math.abs(values[0] ?? 1) || 1;
  const size = Math.max(...values.map(Math.abs));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((value) => {
    if (value === 0) return "0";
    const small = size < 1e-3 || size >= 1e6;
    if (small) return minus(Number(value.toPrecision(3)).toExponential().replace("e+", "e"));
    return minus(value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  });
}

// The lowest and highest value to show, with a little room.
function range(spec) {
  const values = known(spec.series.flatMap((one) => one.points.flatMap((point) => [point.y, point.low, point.high])));
  if (isNumber(spec.floor)) values.push(spec.floor);
  if (isNumber(spec.ceiling)) values.push(spec.ceiling);
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  if (low === high) {
    const room = Math.abs(low) || 1;
    return low === spec.floor ? [low, low + room] : [low - room / 2, high + room / 2];
  }
  const room = (high - low) * 0.05;
  return [low === spec.floor ? low : low - room, high === spec.ceiling ? high : high + room];
}

// Where things go: the size of the picture, its margins, the domains, and x and y in pixels.
function measure(spec, width) {
  const height = spec.height || 200;
  const [right, top, bottom] = [12, 20, 36];
  const wall = spec.own ? spec.time : Boolean(spec.wall && view.wall && run.clock.values.length);
  const where = (it) => (wall && !spec.own ? clock(it) : it);
  const bar = spec.binned || 1;
  const half = spec.series.some((one) => one.kind === "bar") ? bar / 2 : 0;
  const last = Math.max(spec.iterations.at(-1), spec.own ? 0 : run.last);
  let [start, end] = [where(Math.min(spec.iterations[0], half ? 1 : 0)) - half, where(last) + half];
  if (start === end) [start, end] = [start - 0.5, end + 0.5];
  const [low, high] = range(spec);
  const levels = ticks(low, high, 5, spec.whole);
  const labels = tickLabels(levels);
  const left = 12 + 6.8 * Math.max(...labels.map((text) => text.length), 2);
  const across = (value) => left + ((value - start) / (end - start)) * (width - left - right);
  const x = (it) => across(where(it));
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const barWidth = across(start + bar) - left;
  return { width, height, left, right, top, bottom, wall, start, end, levels, labels, across, x, y, barWidth };
}

// Seconds since the first iteration began, at the end of an iteration.
function clock(iteration) {
  const { iterations, values } = run.clock;
  return values[Math.max(0, lastUpTo(iterations, iteration))] ?? 0;
}

// At most a few points for each pixel column: its first, lowest, highest and last, in their order.
// What is drawn looks the same; what is read comes from all points.
function thinned(points, x, columns) {
  if (points.length <= 4 * columns) return points;
  const kept = [];
  let bin = [];
  const close = () => {
    if (!bin.length) return;
    const low = bin.reduce((a, b) => (b.y < a.y ? b : a));
    const high = bin.reduce((a, b) => (b.y > a.y ? b : a));
    const wide = { low: Math.min(...known(bin.map((p) => p.low))), high: Math.max(...known(bin.map((p) => p.high))) };
    const band = Number.isFinite(wide.low) ? wide : {};
    for (const point of new Set([bin[0], ...[low, high].sort((a, b) => a.it - b.it), bin.at(-1)])) kept.push({ ...point, ...band });
    bin = [];
  };
  for (const point of points) {
    if (bin.length && Math.floor(x(point.it)) !== Math.floor(x(bin[0].it))) close();
    if (isNumber(point.y)) bin.push(point);
    else {
      close();
      kept.push(point);
    }
  }
  close();
  return kept;
}
