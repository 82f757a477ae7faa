"use strict";
// Samples: the same prompts and the same noise at every evaluation, side by side, one over the other
// or all in a row; of a run that edits, beside the pictures that were to be changed.

const FIRST_CARDS = 20;
const decoded = new Map(); // address -> {promise, picture}

function decode(address) {
  if (!decoded.has(address)) {
    const picture = new Image();
    picture.src = address;
    const entry = { picture: null };
    entry.promise = picture.decode().then(() => (entry.picture = picture));
    decoded.set(address, entry);
  }
  return decoded.get(address);
}

// Pictures are drawn when they come near the window, or when the page is printed: then all of them,
// those too that are left out on the screen.
const nearby = new IntersectionObserver((entries) => entries.forEach((one) => one.isIntersecting && paint(one.target)), { rootMargin: "400px" });
const waiting = new Map(); // canvas -> {shot, index}
addEventListener("beforeprint", () => {
  const { all } = view;
  if (run && !all) {
    choose("all")(true);
    addEventListener("afterprint", () => choose("all")(all), { once: true });
  }
  [...waiting.keys()].forEach(paint);
});

function paint(canvas) {
  const wanted = waiting.get(canvas);
  if (!wanted) return;
  waiting.delete(canvas);
  nearby.unobserve(canvas);
  const { picture: ready, promise } = decode(wanted.shot.image);
  if (ready) return crop(canvas, ready, wanted);
  promise.then(
    (picture) => crop(canvas, picture, wanted),
    () => canvas.replaceWith(empty("picture unreadable")),
  );
}

function crop(canvas, picture, { shot, index }) {
  const [height, width] = shot.tile;
  canvas.getContext("2d").drawImage(picture, -(index % shot.columns) * width, -Math.floor(index / shot.columns) * height);
}

const points = (shot, index, name) => shot.scores[name]?.[index] ?? null;

const saysOf = (shot, index) => `iteration ${shot.iteration}, ${view.reward} ${score(points(shot, index, view.reward))}`;

function tile(shot, index, says = saysOf(shot, index)) {
  const [height, width] = shot.tile;
  const small = width < 128 ? "small" : "";
  const canvas = el("canvas", { width, height, role: "img", "aria-label": `${says}: ${(shot.prompts ?? leftOne().prompts)[index]}`, title: says, class: small });
  const ready = decoded.get(shot.image)?.picture;
  if (ready) crop(canvas, ready, { shot, index });
  else {
    waiting.set(canvas, { shot, index });
    nearby.observe(canvas);
  }
  return canvas;
}

// What the prompt was to change, of a run that edits.
const source = (index) => run.sources && tile(run.sources, index, "source");

// ---- which evaluations -----------------------------------------------------------------------------

const shots = () => run.samples;
const newest = () => shots().length - 1;
const rightOne = () => (shots().length > 1 ? shots()[Math.min(view.right ?? newest(), newest())] : null);
const leftOne = () => shots()[Math.min(view.left, newest())];

const choose = (key) => (value) => {
  view[key] = value;
  renderSamples();
};

// Made once; each render fills them.
const controls = {
  mode: new Choice("Show evaluations", choose("mode")),
  left: new Select("Left", (value) => choose("left")(Number(value))),
  reward: new Choice("Reward", choose("reward")),
  filter: new Choice("Show", choose("filter")),
  right: el("input", {
    type: "range", min: 0, step: 1, "aria-label": "Evaluation on the right",
    input: () => choose("right")(Number(controls.right.value) === newest() ? null : Number(controls.right.value)),
  }),
  says: el("output", {}),
  wipe: el("input", { type: "range", min: 0, max: 100, step: 1, "aria-label": "Divider between left and right", input: () => wipeTo(Number(controls.wipe.value)) }),
};
controls.rightLabel = el("label", {}, el("span", { class: "muted" }, "Right"), controls.right, controls.says);
controls.size = el("input", { type: "range", min: 120, max: 640, step: 8, value: 208, "aria-label": "Size of the pictures", input: () => sizeTo(Number(controls.size.value)) });
controls.sizeLabel = el("label", {}, el("span", { class: "muted" }, "Size"), controls.size);
controls.wipeLabel = el("label", {}, el("span", { class: "muted" }, "Divider"), controls.wipe);

function wipeTo(share) {
  view.wipe = Math.max(0, Math.min(100, share));
  controls.wipe.value = view.wipe;
  byId("samples-cards").style.setProperty("--wipe", `${view.wipe}%`);
}

function sizeTo(pixels) {
  view.size = pixels;
  byId("samples-cards").style.setProperty("--size", `${pixels}px`);
}

let drawnCards = "";
function renderSamples() {
  const lead = byId("samples-lead");
  if (!shots().length) {
    lead.textContent = waits("the first evaluation: it draws held-out prompts before any training", "There are no evaluation images.");
    for (const id of ["samples-controls", "samples-cards"]) byId(id).replaceChildren();
    byId("samples-all").hidden = true;
    drawnCards = "";
    return;
  }
  lead.textContent =
    (shots().length > 1
      ? `The same prompts and the same noise at every evaluation.${view.mode === "row" ? "" : " Press a picture to enlarge it."}`
      : "The evaluation images so far; a second evaluation will stand beside them.") + (run.sources ? " The source of each stands before it." : "");
  const rewards = Object.keys(shots()[0].scores);
  if (!rewards.includes(view.reward)) view.reward = run.rewards.find((name) => rewards.includes(name)) ?? rewards[0] ?? null;
  const [left, right] = [leftOne(), rightOne()];
  const pairs = compare(left, right);
  const kept = pairs.filter((pair) => view.filter === "all" || pair.change === view.filter);
  fillControls(rewards, pairs, right);
  const row = view.mode === "row" ? shots().map((shot) => shot.image) : [];
  const wanted = JSON.stringify([left.image, right?.image, run.sources?.image, row, view.mode, view.reward, view.all, kept.map((pair) => pair.i)]);
  if (wanted !== drawnCards) {
    drawCards(kept, left, right);
    // Ready before they come near, so that printing finds them.
    const needed = view.mode === "row" ? shots() : [left, right].filter(Boolean);
    for (const shot of run.sources ? [run.sources, ...needed] : needed) decode(shot.image);
  }
  drawnCards = wanted;
  const more = byId("samples-all");
  more.hidden = kept.length <= FIRST_CARDS;
  more.textContent = view.all ? `Show the first ${FIRST_CARDS}` : `Show all ${kept.length}`;
  more.onclick = () => choose("all")(!view.all);
}

function fillControls(rewards, pairs, right) {
  const several = Boolean(right);
  const modes = [
    { value: "pairs", label: "Side by side" },
    { value: "wipe", label: "Slider" },
    { value: "row", label: "All in a row" },
  ];
  const places = shots().map((shot, i) => ({ value: i, label: `iteration ${count(shot.iteration)}` }));
  controls.right.max = newest();
  controls.right.value = Math.min(view.right ?? newest(), newest());
  const newestShown = view.right == null ? ", the newest" : "";
  controls.says.textContent = several ? `iteration ${count(right.iteration)}${newestShown}` : "";
  controls.right.setAttribute("aria-valuetext", controls.says.textContent);
  const compared = several && view.mode !== "row";
  place(
    byId("samples-controls"),
    [
      several && controls.mode.set(modes, view.mode),
      compared && controls.left.set(places, Math.min(view.left, newest())),
      compared && controls.rightLabel,
      compared && view.mode === "wipe" && controls.wipeLabel,
      rewards.length > 1 && controls.reward.set(rewards.map((name) => ({ value: name, label: name })), view.reward),
      several && controls.filter.set(changes(pairs), view.filter),
      controls.sizeLabel,
    ].filter(Boolean),
  );
  wipeTo(view.wipe);
}

// The filters, each with how many pairs it keeps.
function changes(pairs) {
  const size = (name) => (name === "all" ? pairs.length : pairs.filter((pair) => pair.change === name).length);
  const names = ["all", "better", "worse", "same", "unscored"].filter((name) => name !== "unscored" || size(name) || view.filter === name);
  return names.map((name) => ({ value: name, label: `${name[0].toUpperCase()}${name.slice(1)} ${size(name)}` }));
}

function compare(left, right) {
  return left.prompts.map((prompt, i) => {
    const same = right && right.prompts[i] === prompt;
    const before = points(left, i, view.reward);
    const after = same ? points(right, i, view.reward) : null;
    const gain = isNumber(before) && isNumber(after) ? after - before : null;
    const change = gain == null ? "unscored" : gain > 1e-6 ? "better" : gain < -1e-6 ? "worse" : "same";
    return { i, prompt, before, after, gain, change, same };
  });
}

// ---- cards -----------------------------------------------------------------------------------------

function drawCards(pairs, left, right) {
  const holder = byId("samples-cards");
  const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.prompt : null;
  waiting.clear();
  holder.className = `cards ${view.mode} ${run.sources ? "edits" : ""}`;
  const shown = pairs.slice(0, view.all ? undefined : FIRST_CARDS);
  holder.replaceChildren(...shown.map((pair) => (view.mode === "row" ? strip(pair) : card(pair, left, right))));
  if (!shown.length) holder.append(empty("None."));
  if (focused != null) holder.querySelector(`[data-prompt="${focused}"]`)?.focus({ preventScroll: true });
}

function cue(pair, right) {
  if (pair.change === "better") return `▲ ${score(pair.gain)}`;
  if (pair.change === "worse") return `▼ ${score(Math.abs(pair.gain))}`;
  return pair.change === "same" ? "=" : right ? "not scored" : "";
}

function frame(pair, className, ...content) {
  const attributes = { type: "button", class: className, "data-prompt": pair.i, "aria-label": `Enlarge: ${pair.prompt}`, click: () => enlarge(pair.i) };
  return el("button", attributes, ...content);
}

function card(pair, left, right) {
  const both = right && pair.same;
  const wipe = both && view.mode === "wipe";
  const pictures = frame(pair, `pair ${both ? (wipe ? "stacked" : "") : "single"}`, tile(left, pair.i), both && tile(right, pair.i), wipe && el("i", { class: "divider" }));
  if (wipe)
    pictures.addEventListener("pointermove", (event) => {
      const box = pictures.getBoundingClientRect();
      wipeTo(Math.round((100 * (event.clientX - box.left)) / box.width));
    });
  const from = source(pair.i);
  const widths = from && `${run.sources.per_image}fr ${both && !wipe ? 2 : 1}fr`;
  const scores = both ? `${score(pair.before)} → ${score(pair.after)}` : score(pair.before);
  return el(
    "div",
    { class: `card ${pair.change}` },
    from ? el("div", { class: "edit", css: { "grid-template-columns": widths } }, from, pictures) : pictures,
    el("div", { class: "score" }, el("span", {}, scores), el("span", { class: "cue" }, cue(pair, right))),
    el("p", { class: "prompt", title: pair.prompt }, pair.prompt),
  );
}

// One prompt at every evaluation.
function strip(pair) {
  const step = (picture, ...says) => el("span", { class: "step" }, picture, el("small", {}, ...says));
  const from = source(pair.i);
  const each = shots().map((shot) => {
    if (shot.prompts[pair.i] !== pair.prompt) return null;
    return step(tile(shot, pair.i), `${count(shot.iteration)}`, el("b", {}, score(points(shot, pair.i, view.reward))));
  });
  return el("div", { class: `card ${pair.change}` }, el("p", { class: "prompt" }, pair.prompt), el("div", { class: "strip", tabindex: 0, role: "group", "aria-label": `All evaluations of: ${pair.prompt}`, "data-prompt": pair.i }, from && step(from, "source"), each));
}

// One prompt, large, with every reward's score.
function enlarge(index) {
  const dialog = byId("zoom");
  const [left, right] = [leftOne(), rightOne()];
  const pair = compare(left, right)[index];
  const both = [left, pair.same ? right : null].filter(Boolean);
  byId("zoom-title").textContent = pair.prompt;
  const large = (shot, alt = `iteration ${shot.iteration}`) => {
    const original = shot.original_tile[0] !== shot.tile[0] && !shot.image.startsWith("data:");
    return el("figure", {}, original ? el("img", { src: `${shot.image}&tile=${index}`, alt }) : tile(shot, index, alt), el("figcaption", {}, alt));
  };
  const rows = Object.keys(left.scores).map((name) => [name, ...both.map((shot) => score(points(shot, index, name)))]);
  const step = (by, label) => {
    const next = index + by;
    return el("button", { type: "button", class: "plain", disabled: !left.prompts[next], click: () => enlarge(next) }, label);
  };
  byId("zoom-body").replaceChildren(
    el("div", { class: "large" }, run.sources && large(run.sources, "source"), both.map((shot) => large(shot))),
    table(["Reward", ...both.map((shot) => `iteration ${count(shot.iteration)}`)], rows),
    el("div", { class: "controls" }, step(-1, "Previous prompt"), step(1, "Next prompt")),
  );
  if (!dialog.open) dialog.showModal();
}
