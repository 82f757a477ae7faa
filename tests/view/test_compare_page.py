"""Many runs in a real browser: the overview, the comparison, one file of it, and paper."""

from __future__ import annotations

import base64
import itertools
import json
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from browser import Browser, needs_browser, values_of
from monitors import Served
from PIL import Image
from sample_runs import HOSTILE, make_run, write_live

from flowgrpo_ray.run.tracking import RunRecorder, read_rows
from flowgrpo_ray.run.watch import Reading
from flowgrpo_ray.spec.file import dump_spec, load_spec

pytestmark = needs_browser

RUNS = {"a0": (0, 2e-4), "a1": (1, 2e-4), "b0": (0, 5e-4), "c0": (0, 9e-4)}
PROMPTS = 24
LISTED = "!byId('runs-view').hidden && byId('runs-list').childNodes.length"
COMPARED = "!byId('compare-view').hidden && [...decoded.values()].every(one => one.picture)"


def make(folder: Path, place: int, seed: int, rate: float) -> None:
    """A run whose rewards are lower by a tenth for each that came before it."""
    make_run(folder, iterations=8 + 2 * place, every=4, prompts=PROMPTS)
    path = folder / "metrics.jsonl"
    rows = read_rows(path)
    for row in rows:
        for value in row["rewards"].values():
            value["mean"] *= 1 - place / 10
        if row["kind"] == "eval" and row["iteration"] >= 8 and place == 2:
            reading = Reading(0.8, 0.5, 0.01, 0.2, 0, 4, 0.5, 0.8, diverging=True)
            row["watch"] = {"sign_colour": reading.as_json()}
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    rates = [f"seed={seed}", f"optimizer.learning_rate={rate}", "cluster.rollout.gpus=1"]
    (folder / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr", rates)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for place, (name, (seed, rate)) in enumerate(RUNS.items()):
        make(root / name, place, seed, rate)
    return root


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Browser]:
    browser.window(1400, 900, calm=True)
    browser.open(served.entrance, ready=LISTED)
    browser.look("localStorage.clear()")
    browser.forget()
    yield browser
    assert browser.troubles == []


def held_out(root: Path, run: str, reward: str) -> dict[int, float]:
    rows = [row for row in read_rows(root / run / "metrics.jsonl") if row["kind"] == "eval"]
    return {row["iteration"]: row["rewards"][reward]["mean"] for row in rows}


def cells(browser: Browser, holder: str) -> list[list[str]]:
    rows = f"[...document.querySelectorAll('{holder} tr')]"
    return browser.look(f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))")


def tick(browser: Browser, *runs: str) -> None:
    for run in runs:
        browser.look(f"document.querySelector('[data-run=\"{run}\"]').click()")


def test_three_ticked_runs_and_their_numbers(page: Browser, root: Path):
    tick(page, "a0", "a1", "b0")
    assert page.look("tools.compare.textContent") == "Compare 3"
    page.look("tools.compare.click()")
    page.wait(COMPARED)
    chosen = page.look("compared.runs.map(one => one.name)")
    assert sorted(chosen) == ["a0", "a1", "b0"]
    results = {name: texts for name, *texts in cells(page, "#compare-results")}
    for reward in ("ocr", "sign_colour"):
        means = [held_out(root, run, reward) for run in chosen]
        shown = [f"{m[0]:.2f} → {m[max(m)]:.2f}" for m in means]
        assert results[f"{reward}, held-out"] == shown
        best = [max(m, key=lambda it, m=m: (m[it], -it)) for m in means]
        told = [f"{m[it]:.2f} at {it}" for m, it in zip(means, best, strict=True)]
        assert results[f"{reward}, best"] == told
    assert results["Over-optimization"] == [
        "sign_colour, now" if run == "b0" else "–" for run in chosen
    ]
    assert results["GPU time"] == ["4 min"] * 3  # of two GPUs in 131.2 s
    assert cells(page, "#compare-keys")[1:] == [
        ["seed", *(str(RUNS[run][0]) for run in chosen)],
        ["optimizer.learning_rate", *(str(RUNS[run][1]) for run in chosen)],
    ]
    table = values_of(page, "compare ocr, training")
    for run in chosen:
        rows = [row for row in read_rows(root / run / "metrics.jsonl") if row["kind"] == "train"]
        means = [row["rewards"]["ocr"]["mean"] for row in rows]
        assert table[run] == means + [None] * (12 - len(means))
    dots = values_of(page, "compare sign_colour, held-out")
    for run in chosen:
        means = held_out(root, run, "sign_colour")
        assert dots[run] == [means.get(int(it or 0)) for it in dots["Iteration"]]


def test_curves_by_time_smoothed_and_seeds_together(page: Browser, served: Served, root: Path):
    page.open(served.address + "?compare=a0&compare=a1&compare=b0", ready=COMPARED)
    train = {
        run: [row for row in read_rows(root / run / "metrics.jsonl") if row["kind"] == "train"]
        for run in RUNS
    }
    means = {run: [row["rewards"]["ocr"]["mean"] for row in rows] for run, rows in train.items()}
    page.look("repick({smooth: 5})")
    found = values_of(page, "compare ocr, training")["a0"][:8]
    assert found == pytest.approx([fmean(means["a0"][max(0, i - 4) : i + 1]) for i in range(8)])
    page.look("repick({smooth: 1, mean: true})")
    table = values_of(page, "compare ocr, training")
    pairs = list(zip(means["a0"], means["a1"], strict=False))
    together = table["a0 and other seeds"]
    assert together[:8] == pytest.approx([fmean(pair) for pair in pairs])
    assert together[8:10] == means["a1"][8:10], "only one seed went on"
    assert table["± spread"][:8] == pytest.approx([stdev(pair) for pair in pairs])
    page.look("repick({mean: false, wall: true})")
    table = values_of(page, "compare ocr, training")
    times = [row for row in read_rows(root / "b0" / "timings.jsonl") if row["kind"] != "start"]
    ends = {
        row["iteration"]: sum(one["seconds"] for one in times[: i + 1])
        for i, row in enumerate(times)
        if row["kind"] == "train"
    }
    expected = dict(zip(ends.values(), means["b0"], strict=True))
    known = {
        at: value
        for at, value in zip(table["Seconds"], table["b0"], strict=True)
        if value is not None
    }
    assert list(known.values()) == list(expected.values())
    assert list(known) == pytest.approx(list(expected), rel=0.01)  # as it is written


def test_the_same_prompts_in_columns(page: Browser, served: Served, root: Path):
    page.open(served.address + "?compare=b0&compare=a0", ready=COMPARED)
    heads = cells(page, ".columns thead")
    assert heads == [
        ["", "b0", "a0"],
        ["", *("iteration 0", "iteration 12"), *("iteration 0", "iteration 8")],
    ]
    page.look("[...waiting.keys()].forEach(paint)")
    row = "document.querySelectorAll('.columns tbody tr')[9].querySelectorAll('canvas')"
    script = f"""[...{row}].map(
        canvas => [...canvas.getContext('2d').getImageData(0, 0, 40, 40).data])"""
    shots = [("b0", 0), ("b0", 12), ("a0", 0), ("a0", 8)]
    for pixels, (run, iteration) in zip(page.look(script), shots, strict=True):
        with Image.open(root / run / "samples" / f"iteration-{iteration:06d}.png") as grid:
            expected = np.asarray(grid)[40:80, 40:80]
        assert np.array_equal(np.reshape(pixels, (40, 40, 4))[..., :3], expected)
    width = "Math.round(document.querySelector('.columns canvas').getBoundingClientRect().width)"
    assert page.look(width) == 128
    page.look("dials.size.value = 64; dials.size.dispatchEvent(new Event('input'))")
    assert page.look(width) == 64
    page.look("dials.shots.buttons.get('all').click(); dials.wall.buttons.get(true).click()")
    page.wait("document.querySelectorAll('.columns tbody tr')[0].cells.length === 1 + 4 + 3")
    address = page.look("location.href")
    page.open("about:blank", ready="true")
    page.open(address, ready=COMPARED)  # as somebody else who was given the link
    assert page.look("[picks.size, picks.shots, picks.wall]") == [64, "all", True]
    assert page.look("compared.runs.map(one => one.name)") == ["b0", "a0"]
    assert page.look(width) == 64


def test_the_comparison_follows_its_runs(page: Browser, served: Served, root: Path):
    make(root / "d0", 0, 0, 1e-3)
    write_live(root / "d0", "running", iteration=8)
    (root / "d0" / "summary.json").unlink()
    page.open(served.address + "?compare=a0&compare=d0&compare=gone", ready=COMPARED)
    assert "gone is no longer there" in page.look("byId('compare-who').textContent")
    row = next(r for r in read_rows(root / "a0" / "metrics.jsonl") if r["kind"] == "train")
    page.look("window.kept = charts.get('compare ocr, training').plot; scrollTo(0, 500)")
    RunRecorder(root / "d0").log({**row, "iteration": 9})
    page.wait("compared.runs[1].curves.iterations.length === 9")
    last = values_of(page, "compare ocr, training")["d0"][-1]
    assert last == row["rewards"]["ocr"]["mean"]
    assert page.look("kept.isConnected && scrollY") == 500


def listed(browser: Browser) -> list[str]:
    return browser.look(
        "[...document.querySelectorAll('.who')].map(td => td.firstChild.textContent)"
    )


def test_sort_filter_group_and_hide(page: Browser, served: Served, root: Path):
    page.look("hide(['d0'], true)")
    page.look("document.querySelector('[data-sort=\"reward ocr\"]').click()")
    assert listed(page) == ["c0", "b0", "a1", "a0"]
    page.look("document.querySelector('[data-sort=\"reward ocr\"]').click()")
    assert listed(page) == ["a0", "a1", "b0", "c0"]
    assert (
        page.look("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "descending"
    )
    script = "(tools.filter.value = '{}', tools.filter.dispatchEvent(new Event('input')))"
    page.look(script.format("learning_rate=0.0002 finished"))
    assert listed(page) == ["a0", "a1"]
    page.look(script.format("seed=0"))
    assert listed(page) == ["a0", "b0", "c0"]
    page.look(script.format(""))
    page.look("tools.grouped.buttons.get(true).click()")
    assert listed(page) == ["a0", "b0", "c0"]
    ends = [held_out(root, run, "ocr") for run in ("a0", "a1")]
    after = [means[max(means)] for means in ends]
    group = page.look("document.querySelector('.group').textContent")
    assert f"→ {fmean(after):.2f} ± {stdev(after):.2f}" in group
    page.look("hide(['a1'], true)")
    assert listed(page) == ["a0", "b0", "c0"]
    assert not page.look("document.querySelectorAll('.group').length"), "one seed is no group"
    page.look("tools.gone.click()")
    group = page.look("document.querySelector('.group').textContent")
    assert f"→ {after[0]:.2f}best" in group, "hidden runs are not counted"
    assert "spread of 1 seed2 finished" in group
    page.look("tools.gone.click(); hide(['a1'], false)")
    page.look("document.querySelector('.opener').click()")
    assert listed(page) == ["a0", "a0", "a1", "b0", "c0"]
    page.look("document.querySelector('[data-group=a0]').click()")
    assert page.look("[...list.ticked].sort()") == ["a0", "a1"]
    page.look("tools.hide.click()")
    assert listed(page) == ["b0", "c0"]
    page.open(page.look("location.href"), ready=LISTED)
    assert listed(page) == ["b0", "c0"], "the address and the browser remember"
    page.look("tools.gone.click(); tools.back.click()")
    assert len(listed(page)) >= 3


def test_sparklines_have_one_scale(page: Browser, root: Path):
    """The height of each last point, read back, is linear in its value over all runs."""
    script = """[...document.querySelectorAll('.overview tbody tr')].map(row => [
        row.querySelector('[data-run]').dataset.run, [...row.querySelectorAll('.spark')].map(
        one => one.lastChild.getAttribute('points').trim().split(' ').slice(-2).map(Number))])"""
    found = dict(page.look(script))
    ends = {run: held_out(root, run, "ocr") for run in RUNS}
    values = [ends[run][max(ends[run])] for run in RUNS]
    xs, ys = np.transpose([found[run][0] for run in RUNS])
    slope, offset = np.polyfit(values, ys, 1)
    assert slope < 0
    assert slope * np.array(values) + offset == pytest.approx(ys, abs=0.1)
    assert (xs - 1) / (xs.max() - 1) == pytest.approx([8 / 14, 10 / 14, 12 / 14, 1], abs=0.01)
    badge = (
        "[...document.querySelectorAll('.overview tr')].find(r => r.querySelector('[data-run=b0]'))"
    )
    assert "over-optimized" in page.look(f"{badge}.textContent")


def test_one_file_holds_the_comparison(
    browser: Browser, root: Path, tmp_path: Path, command_line: Any
):
    file = tmp_path / "c.html"
    status, output, _ = command_line("compare", root / "a0", root / "b0", "--html", file)
    assert status == 0
    assert f"{file} written" in output
    browser.window(1400, 900, calm=True)
    browser.forget()
    browser.open(file.as_uri(), ready=COMPARED)
    for run in ("a0", "b0"):
        means = held_out(root, run, "ocr")
        dots = values_of(browser, "compare ocr, held-out")
        assert dots[run] == [means.get(int(it or 0)) for it in dots["Iteration"]]
    browser.look("dials.shots.buttons.get('all').click()")
    browser.wait("document.querySelectorAll('.columns tbody tr')[0].cells.length === 1 + 3 + 4")
    assert [a for a in browser.requests if not a.startswith("data:")] == [file.as_uri()]
    assert browser.troubles == []
    status, _, error = command_line("compare", root / "a0", root / "b0", "--html", file)
    assert status == 2
    assert "--overwrite" in error


# --- paper, and the page of one run


def printed(browser: Browser) -> list[bytes]:
    """The pixels of every picture of the pages."""
    pages = base64.b64decode(browser.call("Page.printToPDF")["data"])
    found = re.finditer(rb"/Subtype /Image\n.*?/Length (\d+)>> stream\n", pages, re.S)
    return [zlib.decompress(pages[one.end() : one.end() + int(one.group(1))]) for one in found]


def tiles(path: Path) -> list[bytes]:
    with Image.open(path) as grid:
        pixels = np.asarray(grid)
    places = [(40 * (i // 8), 40 * (i % 8)) for i in range(PROMPTS)]
    return [pixels[y : y + 40, x : x + 40].tobytes() for y, x in places]


def test_printing_keeps_every_picture(page: Browser, served: Served, root: Path):
    """Those too that are below the window, or left out on the screen."""
    page.open(served.address + "?run=a0")
    page.wait("decoded.size === 2 && [...decoded.values()].every(one => one.picture)")
    expected = [tiles(root / "a0" / "samples" / f"iteration-{it:06d}.png") for it in (0, 8)]
    assert page.look("document.querySelectorAll('.card').length") == 20
    assert sorted(printed(page)) == sorted(itertools.chain(*expected))
    assert page.look("[view.all, document.querySelectorAll('.card').length]") == [False, 20]
    page.open(served.address + "?compare=a0&compare=b0", ready=COMPARED)
    expected += [tiles(root / "b0" / "samples" / f"iteration-{it:06d}.png") for it in (0, 12)]
    assert sorted(printed(page)) == sorted(itertools.chain(*expected))


def test_the_trained_reward_stands_above_the_fold(page: Browser, served: Served, root: Path):
    page.open(served.address + "?run=b0")
    assert page.look("byId('header-chart').querySelector('h3').textContent").startswith("ocr")
    box = page.look("byId('header-chart').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] < box["bottom"] <= 900
    assert box["left"] > page.look("byId('header').getBoundingClientRect().right")
    rows = [row for row in read_rows(root / "b0" / "metrics.jsonl") if row["kind"] == "train"]
    shown = values_of(page, "trained")["training"]
    assert shown == [None, *(row["rewards"]["ocr"]["mean"] for row in rows)]
    alarm = page.look("document.querySelector('.alert').textContent")
    assert "--set watch.action=stop" in alarm


def test_pictures_of_a_pair_stand_apart_and_have_a_size(page: Browser, served: Served):
    page.open(served.address + "?run=a0")
    pair = "[...document.querySelector('.pair').children].map(one => one.getBoundingClientRect())"
    script = f"(([a, b]) => [b.left - a.right, a.width])({pair})"
    gap, width = page.look(script)
    assert gap >= 8
    page.look("controls.size.value = 400; controls.size.dispatchEvent(new Event('input'))")
    assert page.look(script)[1] > 1.5 * width


def test_a_starting_run_says_what_it_waits_for(page: Browser, served: Served, root: Path):
    folder = root / "starting"
    folder.mkdir()
    (folder / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr")))
    write_live(folder, "starting", iteration=0, stage="loading models", checkpoint=None)
    page.open(served.address + "?run=starting")
    for part in ("header", "rewards", "samples", "ratio", "update", "time"):
        assert "Waits for the " in page.look(f"byId('{part}').textContent"), part
    write_live(folder, "starting", updated=time.time() - 60)
    page.wait("run.state === 'lost'")
    told = page.look("[...document.querySelectorAll('.alert code')].map(code => code.textContent)")
    spec = folder / "spec.yaml"
    assert told == [f"flowgrpo-ray train {spec} --runs {root.resolve()} --resume"]
    assert "Waits" not in page.look("byId('run-view').textContent")


@pytest.mark.parametrize(("width", "dark"), [(360, True), (900, False)])
def test_it_fits_the_window(page: Browser, served: Served, width: int, dark: bool):
    page.window(width, 800, dark=dark)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    page.open(served.address, ready=LISTED)
    page.look("relist({keys: true, grouped: true}); document.querySelector('.opener').click()")
    assert page.look(fits)
    page.open(served.address + "?compare=a0&compare=a1&compare=b0&compare=c0", ready=COMPARED)
    page.look(
        "charts.forEach(one => { one.come(true); one.turn() }); repick({shots: 'all', size: 384})"
    )
    assert page.look(fits)


def test_hostile_text_stays_text(page: Browser, served: Served, root: Path):
    name = "<img src=x onerror=alert(1)>"
    make(root / name, 1, 3, 1e-4)
    spec = root / name / "spec.yaml"
    spec.write_text(spec.read_text().replace("kind: full", f"kind: '{HOSTILE}'"))
    page.open(served.address, ready=f"{LISTED} && list.data.keys.includes('tuning.kind')")
    assert HOSTILE in page.look("byId('runs-list').textContent")
    query = page.look(f"String(new URLSearchParams([['compare', '{name}'], ['compare', 'a0']]))")
    page.open(f"{served.address}?{query}", ready=COMPARED)
    assert HOSTILE in page.look("byId('compare-keys').textContent")
    assert page.look("document.querySelectorAll('img').length") == 0
