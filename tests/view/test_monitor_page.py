"""The live page in a real browser: numbers, pictures, updates, windows, keyboard, colours."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from browser import Browser, needs_browser, values_of
from monitors import RUN, Served, make_runs
from PIL import Image
from ports import own_port
from sample_runs import HOSTILE, WORK, evaluate, make_run, timing_row, train_row, write_live
from whole_runs import alone

from flowgrpo_ray.run.tracking import RunRecorder, read_rows, save_samples, save_sources

pytestmark = needs_browser


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("outside"))


@pytest.fixture
def page(browser: Browser, served: Served) -> Browser:
    """A browser that has been let in, with a window of 1400 by 900."""
    browser.window(1400, 900, calm=True)
    browser.open(served.entrance, ready="!byId('runs-view').hidden")
    browser.forget()
    return browser


def drawn(browser: Browser, chart: str, series: str) -> list[tuple[float, float]]:
    """The points of a drawn line in the units of the axes, read back with the axes' labels."""
    script = """((id, name) => { const one = charts.get(id); one.come(true);
        const read = (query, key) => [...one.plot.querySelectorAll(query)].map(
            text => [text.textContent, Number(text.getAttribute(key))]);
        const line = [...one.plot.querySelectorAll("path")].find(p => p.dataset.series === name);
        return [read("text:not([class])", "x"), read(".level", "y"), line.getAttribute("d")] })"""
    across, up, path = browser.look(f"{script}({chart!r}, {series!r})")

    def axis(labels: list, shift: float) -> Any:
        (a, at_a), (b, at_b) = [
            (float(text.replace("−", "-").replace(",", "")), at - shift) for text, at in labels[:2]
        ]
        return lambda at: a + (at - at_a) * (b - a) / (at_b - at_a)

    x, y = axis([label for label in across if label[1] > 0], 0), axis(up, 4)
    pairs = re.findall(r"[ML]([\d.]+) ([\d.]+)", path)
    return [(x(float(a)), y(float(b))) for a, b in pairs]


def test_from_the_list_to_a_run_without_a_fault(page: Browser):
    names = page.look("[...document.querySelectorAll('.who a')].map(a => a.textContent)")
    assert sorted(names) == ["lost", "more/failed", "starting", RUN]
    assert names[0] == "lost", "what needs a person comes first"
    page.look(
        f"[...document.querySelectorAll('.who a')].find(a => a.href.includes('{RUN}')).click()"
    )
    page.wait("run")
    assert page.look("byId('header').querySelector('h1').textContent") == RUN
    page.look("[...waiting.keys()].forEach(paint)")
    page.wait("[...decoded.values()].every(one => one.picture)")
    assert page.troubles == []
    token = [address for address in page.requests if "token" in address]
    assert token == []
    for name in ("lost", "starting"):
        page.open(page.look("location.origin") + f"/?run={name}")
    assert page.troubles == []


def test_the_curves_are_the_numbers_of_the_rows(page: Browser, served: Served, root: Path):
    """The table has them exactly; the line, read back from its pixels, as exactly as pixels can."""
    rows = read_rows(root / RUN / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    held_out = {row["iteration"]: row["rewards"] for row in rows if row["kind"] == "eval"}
    page.open(served.address + f"?run={RUN}")
    for name in ("ocr", "sign_colour"):
        table = values_of(page, f"reward {name}")
        assert table["Iteration"] == list(range(13))
        assert table["training"] == [None, *(row["rewards"][name]["mean"] for row in train)]
        measured = [held_out.get(i, {}).get(name, {}).get("mean") for i in range(13)]
        assert table["held-out"] == measured
        found = drawn(page, f"reward {name}", "training")
        expected = [(row["iteration"], row["rewards"][name]["mean"]) for row in train]
        np.testing.assert_allclose(found, expected, atol=1e-3)
    kl = [row["kl"] for row in train]
    assert values_of(page, "KL to the base model")["KL"] == kl
    np.testing.assert_allclose(
        [y for _, y in drawn(page, "KL to the base model", "KL")], kl, atol=1e-5
    )
    ratio = values_of(page, "Largest |log ρ|")
    assert ratio["after updates"] == [row["log_ratio"]["max_abs"] for row in train]
    assert ratio["gate"] == [0.0] * 12
    norms = values_of(page, "Gradient norm")
    assert norms["highest"] == [max(row["grad_norm"]) for row in train]
    times = [r for r in read_rows(root / RUN / "timings.jsonl") if r["kind"] == "train"]
    whole = values_of(page, "Seconds per iteration")["iteration"]
    assert whole == [row["seconds"] for row in times]
    for kind in ("rollout", "learner", "reward-ocr"):
        states = values_of(page, f"ledger {kind}")
        for state in ("busy", "loading", "waiting", "overhead"):
            entries = [row["ledger"][kind].get(state, {}) for row in times]
            assert states[state] == pytest.approx([sum(one.values()) for one in entries])
    assert values_of(page, "Images per second")["images per second"] == [
        row["images_per_second"] for row in times
    ]


def test_the_ledger_of_the_last_ten_iterations(page: Browser, served: Served, root: Path):
    """Bars whose parts are the mean shares, a table with the seconds, and what would help."""
    rows = [r for r in read_rows(root / RUN / "timings.jsonl") if r["kind"] == "train"][-10:]
    page.open(served.address + f"?run={RUN}")
    whole = fmean(row["seconds"] for row in rows)
    parts = """[...document.querySelectorAll(".ledger .line")].map(line => [
        line.firstChild.textContent, line.lastChild.getAttribute("aria-label"),
        [...line.querySelectorAll("i")].map(i => [i.className.trim(), i.style.width, i.title])])"""
    lines = page.look(parts)
    assert [name for name, *_ in lines] == ["rollout × 2", "learner × 1", "reward-ocr × 1"]
    table = page.look(
        "[...byId('time-tables').querySelector('tbody').rows].map(row => "
        "[...row.cells].map(cell => cell.textContent))"
    )
    told = {"loading": "{} weights", "waiting": "waiting for {}"}
    for name, label, segments in lines:
        kind = name.partition(" ")[0]
        assert sum(float(width.removesuffix("%")) for _, width, _ in segments) == pytest.approx(100)
        means = {
            (state, told.get(state, "{}").format(what)): fmean(
                row["ledger"][kind][state][what] for row in rows
            )
            for state, entries in rows[-1]["ledger"][kind].items()
            for what in entries
            if what != "lost"  # nothing was: not shown
        }
        shown = {
            (css.partition(" ")[0], title.partition(":")[0]): (width, title.partition(": ")[2])
            for css, width, title in segments
        }
        assert shown.keys() == means.keys()
        for key, (width, seconds) in shown.items():
            assert float(width.removesuffix("%")) == pytest.approx(
                100 * means[key] / whole, abs=0.01
            )
            assert seconds == f"{means[key]:.2f} s"
            share = f"{means[key] / whole:.0%}".replace("%", " %")
            assert f"{key[1]} {share}" in label
            assert [kind, key[1], seconds, share, ""] in table
    last = rows[-1]["bottleneck"]
    assert page.look("byId('time-verdict').textContent") == (
        f"Slowest in 10 of the last 10 iterations: sampling, {last['seconds']:.2f} s of work for "
        f"each of its actors. {last['advice']}"
    )


def test_rows_of_older_runs_are_shown_without_a_ledger(page: Browser, served: Served, root: Path):
    folder = make_run(root / "older", iterations=2, prompts=2)
    try:
        timings = folder / "timings.jsonl"
        rows = read_rows(timings)
        for row in rows:
            for key in ("ledger", "processes", "bottleneck"):
                row.pop(key, None)
        timings.write_text("".join(json.dumps(row) + "\n" for row in rows))
        page.open(served.address + "?run=older")
        assert values_of(page, "Seconds per iteration")["Iteration"] == [1, 2]
        assert page.look("byId('time-verdict').hidden && !byId('time-ledger').childNodes.length")
        assert page.troubles == []
    finally:
        shutil.rmtree(folder)


def test_the_grids_are_the_pixels_of_the_samples(page: Browser, served: Served, root: Path):
    page.open(served.address + f"?run={RUN}")
    page.look("[...waiting.keys()].forEach(paint)")
    page.wait("[...decoded.values()].length === 2 && [...decoded.values()].every(p => p.picture)")
    assert page.look("[...decoded.values()].map(one => one.picture.naturalWidth)") == [320, 320]
    script = """[...document.querySelectorAll('.card')[9].querySelectorAll('canvas')].map(canvas =>
        [...canvas.getContext('2d').getImageData(0, 0, 40, 40).data])"""
    for pixels, iteration in zip(page.look(script), (0, 12), strict=True):
        with Image.open(root / RUN / "samples" / f"iteration-{iteration:06d}.png") as grid:
            expected = np.asarray(grid)[40:80, 40:80]
        assert np.array_equal(np.reshape(pixels, (40, 40, 4))[..., :3], expected)
    page.look("choose('left')(1)")
    page.look("choose('mode')('row')")
    page.look("[...waiting.keys()].forEach(paint)")
    page.wait("decoded.size === 4")
    assert page.look("document.querySelectorAll('.card .step').length") == 12 * 4
    page.look("choose('mode')('wipe'); wipeTo(30)")
    assert page.look(
        "getComputedStyle(document.querySelectorAll('.stacked canvas')[1]).clipPath"
    ) == ("inset(0px 0px 0px 30%)")


def test_edits_stand_beside_their_sources(page: Browser, served: Served, root: Path):
    folder = make_run(root / "edits", iterations=2, every=2, prompts=3)
    drawn = np.random.default_rng(0).integers(0, 256, (3, 1, 40, 40, 3), np.uint8)
    save_sources(folder, drawn)
    first = """[...document.querySelectorAll('.card')[1].querySelectorAll('canvas')[0]
        .getContext('2d').getImageData(0, 0, 40, 40).data]"""
    count = "[...document.querySelectorAll('.card')].map(c => c.querySelectorAll('canvas').length)"
    try:
        page.open(served.address + "?run=edits")
        for mode in ("pairs", "wipe", "row"):
            page.look(f"choose('mode')('{mode}')")
            page.look("[...waiting.keys()].forEach(paint)")
            page.wait("[...decoded.values()].every(one => one.picture)")
            assert page.look(count) == [3, 3, 3]
            assert np.array_equal(np.reshape(page.look(first), (40, 40, 4))[..., :3], drawn[1, 0])
        page.look("enlarge(1)")
        figures = "[...document.querySelectorAll('#zoom figcaption')].map(one => one.textContent)"
        assert page.look(figures) == ["source", "iteration 0", "iteration 2"]
        assert page.troubles == []
    finally:
        shutil.rmtree(folder)


def test_the_page_follows_a_run_and_keeps_the_readers_place(
    page: Browser, served: Served, root: Path
):
    folder = make_run(root / "going", iterations=6, every=3, prompts=12, finished=False)
    recorder = RunRecorder(folder)
    try:
        write_live(folder, "running", iteration=6)
        page.open(served.address + "?run=going")
        page.look("charts.get('reward ocr').turn(); choose('mode')('wipe'); wipeTo(20)")
        page.look("choose('left')(1); controls.filter.buttons.get('better').click()")
        page.look("scrollTo({top: 900, behavior: 'instant'}); byId('spec').open = true")
        page.look(
            "controls.wipe.focus({preventScroll: true}); window.kept = charts.get('Loss').plot"
        )
        page.forget()
        row = train_row(7, 0.6, np.random.default_rng(0))
        recorder.log(row)
        recorder.log_timing(timing_row(7, 2.0, WORK))
        rewards = evaluate(folder, 7, 0.9, 12)
        recorder.log(
            {"kind": "eval", "iteration": 7, "prompts": 12, "weights": "ema", "rewards": rewards}
        )
        write_live(folder, "stopping", iteration=7)
        page.wait("run.last === 7 && run.samples.length === 4 && run.state === 'stopping'")
        assert values_of(page, "reward ocr")["training"][-1] == row["rewards"]["ocr"]["mean"]
        assert page.look("controls.says.textContent") == "iteration 7, the newest"
        assert page.look("byId('top-progress').textContent") == "7 / 60"
        assert page.look("byId('top-state').textContent") == "stopping"
        assert "Evaluation after iteration 7: ocr" in page.look("byId('spoken').textContent")
        kept = "[scrollY, view.wipe, view.mode, view.left, view.filter, byId('spec').open]"
        assert page.look(kept) == [900, 20, "wipe", 1, "better", True]
        assert page.look("document.activeElement === controls.wipe")
        assert page.look("kept === charts.get('Loss').plot && kept.isConnected")
        asked = [address for address in page.requests if "/run?" in address]
        assert all("since=" in address and not address.endswith("since=") for address in asked)
        assert page.troubles == []
        recorder.truncate(5)  # killed, and resumed from the checkpoint of iteration 5
        write_live(folder, "starting", iteration=5)
        page.wait("run.last === 5 && run.state === 'starting'")
        assert values_of(page, "reward ocr")["Iteration"] == [0, 1, 2, 3, 4, 5]
        write_live(folder, "running", updated=time.time() - 13)
        page.wait("run.state === 'lost'")
        said = page.look("document.querySelector('.alert').textContent")
        assert "Not heard of for" in said
        assert "process 4711 on node-7" in said
    finally:
        shutil.rmtree(folder)


def test_the_cluster_as_the_driver_tells_it(page: Browser, served: Served, root: Path):
    folder = make_run(root / "going", iterations=2, prompts=2, finished=False)
    try:
        write_live(folder, "running")
        page.open(served.address + "?run=going")
        cells = page.look(
            "[...document.querySelectorAll('#cluster td')].map(cell => cell.textContent)"
        )
        assert cells[:7] == ["reward-ocr", "running", "1 of 2", "3", "144", "0", "0.21 s"]
        assert cells[7:] == ["rollout-0", "12", "2", "rollout-1", "11, behind", "0"]
        link = page.look("[...document.querySelectorAll('.facts a')].map(a => [a.href, a.rel])")
        assert link == [["http://10.0.0.5:8265/", "noreferrer"]]
        assert "iteration 10, 4" in page.look("byId('header').textContent")
        newest = page.look("byId('time-recent').querySelector('tbody tr').textContent")
        assert newest.startswith("2")
        assert newest.endswith("sampling")
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_monitor_that_is_gone_and_comes_back(root: Path, browser: Browser):
    secret = {"FLOWGRPO_MONITOR_TOKEN": "0123456789abcdef"}
    port = str(own_port())
    with Served(root / RUN, "--port", port, **secret) as first:
        browser.open(first.address + "?token=0123456789abcdef", ready="run")
        assert browser.look("byId('header').querySelector('h1').textContent") == RUN
        assert browser.look("byId('home').hidden"), "there is no list of one run"
    browser.wait("!byId('trouble').hidden")
    assert "does not answer" in browser.look("byId('trouble').textContent")
    with Served(root / RUN, "--port", port, **secret):
        browser.wait("byId('trouble').hidden && !document.body.classList.contains('stale')")
    with Served(root / RUN, "--port", port):
        browser.wait("byId('trouble').textContent.includes('another token')")


@pytest.mark.parametrize(("width", "dark"), [(360, True), (390, False), (900, True), (1400, False)])
def test_it_fits_the_window(page: Browser, served: Served, width: int, dark: bool):
    page.window(width, 800, dark=dark)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    page.open(served.address, ready="!byId('runs-view').hidden")
    assert page.look("innerWidth") == width
    assert page.look(fits)
    page.open(served.address + f"?run={RUN}")
    page.look("charts.forEach(one => { one.come(true); one.turn() }); byId('spec').open = true")
    for mode in ("pairs", "wipe", "row"):
        page.look(f"choose('mode')('{mode}')")
        assert page.look(fits), mode
    page.look("enlarge(0)")
    assert page.look("byId('zoom').getBoundingClientRect().width <= innerWidth")


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(page: Browser, served: Served, dark: bool):
    """Contrast of 4.5 or more (WCAG AA) for all text, 3 for the colours of lines."""
    page.window(1400, 900, dark=dark)
    page.open(served.address + f"?run={RUN}")

    def colour(variable: str) -> np.ndarray:
        text = f"getComputedStyle(document.documentElement).getPropertyValue('{variable}')"
        found = page.look(text).strip().removeprefix("#")
        return np.array([int(found[i : i + 2], 16) for i in (0, 2, 4)]) / 255

    def luminance(variable: str) -> float:
        c = colour(variable)
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert (luminance("--paper") < 0.1) == dark
    for text in ("--ink", "--muted", "--bad", "--better"):
        assert contrast(text, "--paper") >= 4.5, text
    assert contrast("--muted", "--panel") >= 4.5
    for line in ("--c0", "--c1", "--c2", "--c3", "--c4", "--good", "--warn", "--done", "--wait"):
        assert contrast(line, "--paper") >= 3, line
    for text, bar in (
        ("--paper", "--c0"),
        ("--paper", "--c1"),
        ("--paper", "--c3"),
        ("--ink", "--wait"),
    ):
        assert contrast(text, bar) >= 4.5, bar


def test_everything_can_be_done_with_the_keyboard(page: Browser, served: Served, root: Path):
    train = [row for row in read_rows(root / RUN / "metrics.jsonl") if row["kind"] == "train"]
    page.open(served.address + f"?run={RUN}")
    reached, hidden = set(), set()
    for _ in range(90):
        page.press("Tab", windowsVirtualKeyCode=9)
        at = "document.activeElement"
        name = page.look(f"(at => at.className || at.textContent || at.nodeName)({at})")
        reached.add(name)
        if page.look(f"{at} !== document.body && getComputedStyle({at}).outlineStyle === 'none'"):
            hidden.add(name)
    assert {"skip", "home", "plot", "small", "Wall time", "Slider", "pair "} <= reached
    assert not hidden, "focus is always visible"
    page.look("charts.get('reward ocr').plot.focus()")
    says = "document.activeElement.getAttribute('aria-valuetext')"
    page.press("Home")
    page.press("ArrowRight")
    page.press("ArrowRight")
    page.wait(f"{says}.startsWith('iteration 2:')")
    mean, std = (train[1]["rewards"]["ocr"][key] for key in ("mean", "std"))
    assert f"training {mean:.2f} ± {std:.2f}" in page.look(says)
    assert page.look("document.activeElement.getAttribute('aria-valuenow')") == "2"
    shown = "charts.get('Loss').legend.textContent"
    page.look("charts.get('Loss').come(true)")
    assert page.look("charts.get('Loss').at.textContent") == "iteration 2", "all charts follow"
    assert page.look(shown).startswith("total")
    page.press("Escape")
    page.wait("view.cursor === null")
    page.look("document.querySelector('.pair').focus()")
    page.press("Enter", windowsVirtualKeyCode=13, text="\r")
    page.wait("byId('zoom').open")
    page.press("Escape", windowsVirtualKeyCode=27)
    page.wait("!byId('zoom').open")
    assert page.look("document.activeElement.className").startswith("pair")


def test_motion_only_for_those_who_want_it(page: Browser, served: Served):
    page.look("document.body.append(chip('running'))")
    motion = "getComputedStyle(document.body.lastChild, '::before').animationName"
    for calm, name in ((False, "breathe"), (True, "none")):
        page.window(1400, 900, calm=calm)
        assert page.look(motion) == name


def test_hostile_text_stays_text(page: Browser, served: Served, root: Path):
    name = "<img src=x onerror=alert(1)>"
    folder = make_run(root / name, iterations=2, prompts=2, finished=False)
    try:
        images = np.zeros((2, 8, 8, 3), np.uint8)
        for iteration in (0, 2):
            save_samples(folder, iteration, images, [HOSTILE, "x"], {HOSTILE: [0.5, 1.0]})
        (folder / "spec.yaml").write_text(f"name: {HOSTILE}\n")
        write_live(folder, "failed", message=HOSTILE, ray={"dashboard": "javascript:alert(1)"})
        page.open(served.address, ready="!byId('runs-view').hidden")
        page.look("[...document.links].find(a => a.textContent.includes('onerror')).click()")
        page.wait("run && run.samples.length")
        page.look("enlarge(0)")
        assert page.look("document.querySelectorAll('main img, dialog img').length") == 0
        assert page.look("byId('header').querySelector('h1').textContent") == name
        assert page.look("byId('zoom-title').textContent") == HOSTILE
        assert HOSTILE in page.look("document.querySelector('.alert').textContent")
        assert page.look("[...document.links].every(a => /^http:/.test(a.href))")
        assert page.troubles == []
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_long_run_is_drawn_with_few_points_and_read_with_all(
    page: Browser, served: Served, root: Path
):
    folder = root / "long"
    recorder = RunRecorder(folder)
    rng = np.random.default_rng(0)
    rows = [train_row(i, i / 2000, rng) for i in range(1, 2001)]
    times = [timing_row(i, 2.0, WORK) for i in range(1, 2001)]
    try:
        for name, many in (("metrics.jsonl", rows), ("timings.jsonl", times)):
            (recorder.folder / name).write_text("".join(json.dumps(row) + "\n" for row in many))
        page.open(served.address + "?run=long")
        line = drawn(page, "Loss", "total")
        width = page.look("charts.get('Loss').width")
        assert len(line) <= 4 * width
        losses = [row["loss"] for row in rows]
        ends = [min(y for _, y in line), max(y for _, y in line)]
        np.testing.assert_allclose(ends, [min(losses), max(losses)], atol=1e-4)
        assert values_of(page, "Loss")["total"] == losses
        assert values_of(page, "ledger rollout")["busy"] == [0.9] * 2000
        page.look("charts.get('Loss').plot.focus()")
        page.press("PageDown")
        says = "charts.get('Loss').plot.getAttribute('aria-valuetext')"
        page.wait(f"{says}.startsWith('iteration 1,800: total ')")
    finally:
        shutil.rmtree(folder)


# --- a real run


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_real_run_from_its_start_to_its_end(tmp_path: Path, browser: Browser):
    """The driver itself writes; the monitor was there before it."""
    small = {
        "name": "small",
        "iterations": "3",
        "sampling.steps": "6",
        "sampling.group_size": "4",
        "sampling.groups": "4",
        "sampling.micro_batch": "8",
        "sampling.window": "{kind: random, length: 2, within: [0, 4]}",
        "evaluation": "{every: 2, steps: 4, prompts: 8, micro_batch: 4, grid: 8}",
        "cluster.rollout": "{count: 1, cpus: 0.5}",
    }
    command = [sys.executable, "-m", "flowgrpo_ray", "train", "tiny-ocr", "--runs", str(tmp_path)]
    for key, value in small.items():
        command += ["--set", f"{key}={value}"]
    (tmp_path / "home").mkdir()
    with Served(tmp_path) as served:
        browser.window(1400, 900, calm=True)
        browser.open(served.entrance, ready="!byId('runs-view').hidden")
        assert "No run below" in browser.look("byId('runs-lead').textContent")
        browser.forget()
        process = subprocess.Popen(
            command,
            env=alone() | {"HOME": str(tmp_path / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            browser.wait("document.querySelector('.who a')")
            assert "starting" in browser.look("byId('runs-list').textContent")
            browser.open(served.address + "?run=small")
            browser.wait("run.state === 'running' && run.live.workers.length === 1")
            browser.wait("run.train.length > 0 && run.live.rewards.ocr.calls > 0")
            browser.wait("run.state === 'finished' && run.live.state === 'finished'")
            output = process.communicate(timeout=60)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert process.returncode == 0, output
        rows = read_rows(tmp_path / "small" / "metrics.jsonl")
        train = [row["rewards"]["ocr"]["mean"] for row in rows if row["kind"] == "train"]
        assert values_of(browser, "reward ocr")["training"] == [None, *train]
        assert browser.look("run.samples.map(shot => shot.iteration)") == [0, 2, 3]
        assert browser.look("byId('top-progress').textContent") == "3 / 3"
        assert browser.look("run.notes") == []
        assert browser.troubles == []
