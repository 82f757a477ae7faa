"use strict";
// The page: in a report its data is inside; from the monitor it asks for what is new, again and again.

const EVERY = 2000; // milliseconds between two questions
let address_ = new URLSearchParams(location.search).get("run"); // the run's name in the monitor

function renderRun(document_, embedded) {
  const before = run;
  const changed = take(document_);
  byId("runs-view").hidden = byId("compare-view").hidden = true;
  byId("run-view").hidden = byId("nav").hidden = false;
  renderHeader(embedded);
  if (changed.rows || before?.state !== run.state) for (const part of [renderRewards, renderRatio, renderUpdate, renderTime]) part();
  if (changed.samples || before?.state !== run.state) renderSamples();
  renderCluster();
  renderSources(embedded);
  byId("nav").querySelector("[href='#cluster']").hidden = !run.live;
  if (before) speak(before);
}

// The bar at the top names the run while the header does not.
new IntersectionObserver(([seen]) => byId("top-who").classList.toggle("idle", seen.isIntersecting), { rootMargin: "-60px 0px 0px" }).observe(byId("header"));

// For those who listen: the state, and evaluations.
function speak(before) {
  const news = [];
  if (before.state !== run.state) news.push(`The run is ${run.state}.`);
  const last = run.evals.at(-1);
  if (run.evals.length > before.evals.length)
    news.push(`Evaluation after iteration ${last.iteration}: ${Object.entries(last.rewards ?? {}).map(([name, value]) => `${name} ${score(value.mean)}`).join(", ")}.`);
  if (news.length) byId("spoken").textContent = news.join(" ");
}

// ---- asking ----------------------------------------------------------------------------------------

class Trouble extends Error {}

async function ask(path, parameters) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, { signal: AbortSignal.timeout(30000) });
  if (answer.status === 401) throw new Trouble("The monitor was started anew and has another token. Open the address that it printed.");
  if (answer.status === 404) throw new Trouble("The run's folder is no longer there.");
  if (answer.status === 422) throw new Trouble(String((await answer.json()).detail));
  if (!answer.ok) throw new Trouble(`The monitor answered ${answer.status}; its terminal says why.`);
  return answer.json();
}

let failing = null; // since when, in milliseconds
function tell(error) {
  const box = byId("trouble");
  box.hidden = !error;
  document.body.classList.toggle("stale", Boolean(error));
  if (!error) return void (failing = null);
  failing ??= Date.now();
  const known_ = error instanceof Trouble;
  const says = known_ ? error.message : `The monitor does not answer, for ${duration((Date.now() - failing) / 1000)} now. What you see is from before; it goes on by itself when the monitor is back.`;
  if (box.textContent !== says) box.textContent = says;
}

async function refresh() {
  if (asked.length) {
    byId("home").hidden = false;
    const entries = [...asked.map((name) => ["run", name]), ["since", compared?.since ?? ""]];
    return renderCompare(await ask("/compare", entries), false);
  }
  if (address_ == null) {
    const list = await ask("/runs", {});
    if (!list.only) {
      byId("runs-view").hidden = false;
      return renderRuns(list);
    }
    address_ = list.runs[0].name;
  } else byId("home").hidden = false;
  renderRun(await ask("/run", { run: address_, since: run?.since ?? "" }), false);
}

let timer = null;
let asking = false;
async function poll() {
  if (asking) return;
  clearTimeout(timer);
  asking = true;
  try {
    await refresh();
    tell(null);
  } catch (error) {
    const ours = error instanceof Trouble || error instanceof TypeError || error instanceof DOMException;
    if (!ours || (error instanceof TypeError && !/fetch/i.test(error.message))) throw error; // a fault of this page
    tell(error);
  } finally {
    asking = false;
    timer = setTimeout(poll, EVERY);
  }
}

const inside = byId("run-data");
if (inside) {
  const document_ = JSON.parse(inside.textContent);
  (document_.compared ? renderCompare : renderRun)(document_, true);
} else {
  poll();
  document.addEventListener("visibilitychange", () => document.hidden || poll());
}
