"use strict";
// Numbers: how they are written, and small sums over rows.

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const at = (row, path) => path.split(".").reduce((value, key) => (value == null ? null : value[key]), row) ?? null;
const known = (values) => values.filter(isNumber);
const sum = (values) => known(values).reduce((a, b) => a + b, 0);
const mean = (values) => (known(values).length ? sum(values) / known(values).length : null);
const largest = (values) => known(values).reduce((a, b) => (a == null ? b : Math.max(a, b)), null);
const minus = (text) => text.replaceAll("-", "−");
const count = (value) => (isNumber(value) ? minus(value.toLocaleString("en-US")) : "–");
const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

function number(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value)) return count(value);
  if (size < 1e-3) return minus(value.toExponential(1));
  if (size >= 1000) return count(Math.round(value));
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : 2;
  return minus(size >= 0.1 ? value.toFixed(digits) : value.toPrecision(2));
}
const score = (value) => (isNumber(value) && Math.abs(value) < 1000 ? minus(value.toFixed(2)) : number(value));
const percent = (value) => (isNumber(value) ? `${Math.round(value * 100)} %` : "–");

function seconds(value) {
  if (!isNumber(value)) return "–";
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return duration(value);
}

// Of what is not measured but told: 40 s, 12 min, 3 h 05 min, 2 days.
function duration(value) {
  if (!isNumber(value)) return "–";
  if (value < 120) return `${Math.max(0, Math.round(value))} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes >= 2880) return `${Math.round(minutes / 1440)} days`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}
const ago = (value) => (value < 2 ? "now" : `${duration(value)} ago`);
const moment = (unix) => new Date(unix * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

function bytes(size) {
  if (size == null) return "missing";
  if (size < 10240) return `${count(size)} B`;
  return size < 1e7 ? `${count(Math.round(size / 1024))} KiB` : `${count(Math.round(size / 1048576))} MiB`;
}

// The place of the last of sorted values that is at most `value`, by halving; -1 if none is.
function lastUpTo(values, value) {
  let [low, high] = [-1, values.length - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (values[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}
