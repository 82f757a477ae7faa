"""The run report: exact data, inert text, and a page for runs that are short or unfinished."""

import io
import json
import re
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_browser
from PIL import Image
from sample_runs import HOSTILE, make_run, train_row, write_live

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.run.brief import brief, spread
from flowgrpo_ray.run.state import state_of
from flowgrpo_ray.run.tracking import RunRecorder, read_rows, save_samples, save_sources
from flowgrpo_ray.run.watch import Reading
from flowgrpo_ray.view.compared import curves
from flowgrpo_ray.view.page import SCRIPTS, STYLE, asset
from flowgrpo_ray.view.report import LONGEST_LOG, report_data, write_report
from flowgrpo_ray.view.shots import LARGEST_TILE


def embedded(page: str) -> dict:
    """The JSON document of a page, found as a browser finds it: up to the first `</script`."""
    start = page.index('id="run-data">') + len('id="run-data">')
    return json.loads(page[start : page.index("</script", start)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny-ocr")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def test_report_holds_the_exact_data(run: Path):
    path = write_report(run)
    assert path == run / "report.html"
    data = embedded(path.read_text())
    assert data["metrics"] == read_rows(run / "metrics.jsonl")
    assert data["timings"] == read_rows(run / "timings.jsonl")
    assert data["summary"] == json.loads((run / "summary.json").read_text())
    assert data["spec"] == (run / "spec.yaml").read_text()
    assert data["state"] == "finished"
    assert data["notes"] == []
    again = report_data(run) | {"now": data["now"], "files": data["files"]}
    assert data == json.loads(json.dumps(again))


def test_headline_is_the_summary(run: Path):
    data = report_data(run)
    summary = json.loads((run / "summary.json").read_text())
    assert data["headline"] == {
        "rewards": [
            {
                "name": name,
                "before": summary["eval_before"][name],
                "after": summary["eval_after"][name],
            }
            for name in ("ocr", "sign_colour")
        ],
        "prompts": 12,
        "weights": "ema",
        "iterations": 12,
        "images": 1152,
        "seconds": 131.2,
        "updates": 24,
        "gate": 0.0,
        "gates": 12,
    }


@needs_browser
def test_what_the_run_told_is_in_its_report(tmp_path: Path, browser: Browser):
    """Long prompts and the like at the top, whatever alarm stands above; every note in the log."""
    folder = make_run(tmp_path / "run", iterations=2, prompts=2)
    row = {
        "kind": "start",
        "seconds": 1.0,
        "phases": {},
        "warnings": ["3 prompts are cut off", "b"],
    }
    RunRecorder(folder).log_timing(row)
    notes = [f"2026-01-01 00:00:00 note {i}\n" for i in range(4000)]
    (folder / "driver.log").write_text("".join(notes))
    log = report_data(folder)["log"]
    assert "".join(notes).endswith(log)
    assert log.startswith("2026-")
    assert LONGEST_LOG - 40 < len(log) <= LONGEST_LOG
    browser.open(write_report(folder).as_uri())
    told = "document.querySelector('#header .alert.past')"
    lines = browser.look(f"[...{told}.querySelectorAll('p')].map(p => p.textContent)")
    assert lines == ["Told at the start", "3 prompts are cut off", "b"]
    assert browser.look("document.querySelector('#log pre').textContent") == log
    assert browser.look("document.querySelector('#log').hidden") is False


def test_samples_keep_their_pixels(run: Path):
    samples = report_data(run)["samples"]
    assert [sample["iteration"] for sample in samples] == [0, 4, 8, 12]
    assert samples[0]["scores"]["sign_colour"][0] is None
    content = b64decode(samples[0]["image"].removeprefix("data:image/png;base64,"))
    assert content == (run / "samples/iteration-000000.png").read_bytes()


@needs_browser
def test_wall_time_adds_iterations_and_evaluations(tmp_path: Path, browser: Browser):
    recorder = RunRecorder(tmp_path)
    recorder.log({"kind": "train", "iteration": 1})
    recorder.log_timing({"kind": "start", "seconds": 31.0, "phases": {}})
    recorder.log_timing({"kind": "eval", "iteration": 0, "seconds": 1.5})
    recorder.log_timing({"kind": "train", "iteration": 1, "seconds": 2.0})
    recorder.log_timing({"kind": "eval", "iteration": 1, "seconds": 1.0})
    recorder.log_timing({"kind": "train", "iteration": 2, "seconds": 2.0})
    browser.open(write_report(tmp_path).as_uri())
    assert browser.look("[0, 1, 2].map(clock)") == [0, 3.5, 6.5]
    assert report_data(tmp_path)["headline"]["seconds"] == 6.5


def test_text_of_the_run_is_inert(tmp_path: Path):
    recorder = RunRecorder(tmp_path)
    recorder.log({"kind": "eval", "iteration": 0, "rewards": {"ocr": {"mean": 0.5, "std": 0.1}}})
    images = np.zeros((1, 8, 8, 3), np.uint8)
    save_samples(tmp_path, 0, images, [HOSTILE], {"ocr": [0.5]})
    (tmp_path / "spec.yaml").write_text(f"name: {HOSTILE}\n")
    recorder.write_summary({"name": HOSTILE})
    page = write_report(tmp_path).read_text()
    assert "<img" not in page
    assert page.count("</script>") == 2  # the document's and the code's own
    data = embedded(page)
    assert data["samples"][0]["prompts"] == [HOSTILE]
    assert data["name"] == HOSTILE


def test_the_page_never_parses_data_as_html_and_names_no_other_place():
    for name in ("page.html", STYLE, *SCRIPTS):
        text = asset(name)
        assert not re.search(
            r"https?://\w|//[a-z]+\.[a-z]|@import|<link[^>]+href=\"(?!data:)", text
        ), name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, name
        assert "</script" not in text or name == "page.html"


def test_no_part_of_the_page_is_long():
    for name in ("page.html", STYLE, *SCRIPTS):
        assert len(asset(name).splitlines()) < 400, name


@needs_browser
def test_a_report_asks_the_network_for_nothing_and_has_no_fault(run: Path, browser: Browser):
    browser.forget()
    page = write_report(run)
    browser.open(page.as_uri())
    browser.look("[...waiting.keys()].forEach(paint)")
    browser.wait("[...decoded.values()].length && [...decoded.values()].every(one => one.picture)")
    asked = {address for address in browser.requests if not address.startswith("data:")}
    assert asked == {page.as_uri()}
    assert browser.troubles == []


@needs_browser
def test_hostile_text_is_shown_as_text(tmp_path: Path, browser: Browser):
    """In every place that shows a text of the run."""
    folder = make_run(tmp_path / "run", iterations=2, prompts=2)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    save_samples(folder, 2, images, [HOSTILE, "x"], {HOSTILE: [0.5, 1.0]})
    save_samples(folder, 0, images, [HOSTILE, "x"], {HOSTILE: [0.5, 1.0]})
    (folder / "spec.yaml").write_text(f"name: {HOSTILE}\n")
    (folder / "driver.log").write_text(HOSTILE)
    RunRecorder(folder).write_summary({"name": HOSTILE, "eval_before": {HOSTILE: 1}})
    write_live(
        folder, "failed", message=HOSTILE, host=HOSTILE, ray={"dashboard": "javascript:alert(1)"}
    )
    browser.forget()
    browser.open(write_report(folder).as_uri())
    browser.look("enlarge(0)")
    assert browser.look("document.querySelectorAll('img, script[src], iframe').length") == 0
    assert (
        browser.look(
            "[...document.querySelectorAll('a')].filter(a => /script/.test(a.href)).length"
        )
        == 0
    )
    for place in (
        "#header h1",
        "#zoom-title",
        "#spec pre",
        "#log pre",
        ".alert",
        ".prompt",
        "#cluster-lead",
        ".headline .name",
    ):
        assert HOSTILE in browser.look(f"document.querySelector({place!r}).textContent"), place
    assert browser.troubles == []


def test_no_such_folder_says_so(tmp_path: Path):
    with pytest.raises(RunFolderError, match=r"no run folder at .*absent"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize("metrics", [None, "", '{"kind": "trai'])
def test_folder_without_metrics_says_what_to_do(tmp_path: Path, metrics: str | None):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(RunFolderError, match="wait for the run's first iteration"):
        write_report(tmp_path)


def test_first_iteration_of_a_running_run(tmp_path: Path):
    """One row and a torn one, and nothing else in the folder."""
    row = train_row(1, 0.3, np.random.default_rng(0))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"kind": "tr')
    data = embedded(write_report(tmp_path).read_text())
    assert data["state"] == "unknown"
    assert data["headline"]["rewards"] == []
    assert data["headline"]["images"] == 96
    notes = " ".join(data["notes"])
    for said in ("timings.jsonl is missing", "summary.json is not", "spec"):
        assert said in notes


def test_evaluation_before_any_training(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=0, prompts=4, finished=False)
    data = report_data(folder)
    (ocr, _) = data["headline"]["rewards"]
    assert ocr["before"] is not None
    assert ocr["after"] is None
    assert data["headline"]["gate"] is None
    assert data["headline"]["seconds"] == 1.1


def test_unfinished_run_counts_what_is_there(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=5, every=2, prompts=4, finished=False)
    head = report_data(folder)["headline"]
    assert head["iterations"] == 5
    assert head["images"] == 480
    assert head["rewards"][0]["after"] > head["rewards"][0]["before"]


def test_damaged_side_files_are_left_out_and_named(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=4, every=1, prompts=4)
    (folder / "summary.json").write_text('{"name": "ti')
    (folder / "samples/iteration-000001.json").write_text("[]")
    (folder / "samples/iteration-000002.json").write_text('{"iteration": 2, "prompts": []}')
    (folder / "samples/iteration-000003.png").unlink()
    data = report_data(folder)
    assert [sample["iteration"] for sample in data["samples"]] == [0, 4]
    notes = "\n".join(data["notes"])
    assert "summary.json is not readable" in notes
    assert "iteration-000001.json is not readable (does not hold a JSON object)" in notes
    assert "iteration-000002.json was left out: scores, tile, columns is missing" in notes
    assert "iteration-000003.json was left out: iteration-000003.png is missing" in notes


# --- the over-optimization watch


def watched_run(folder: Path, diverging: str, checkpoints: tuple[int, ...] = ()) -> Path:
    """A character per iteration, each evaluated: "." for no reading yet, "-" for a plain one, "d"
    diverging."""
    recorder = RunRecorder(folder)
    rng = np.random.default_rng(0)
    for iteration, mark in enumerate(diverging, start=1):
        recorder.log(train_row(iteration, 0.5, rng))
        scores = {"sign_colour": {"mean": 0.9, "std": 0.1}}
        row = {"kind": "eval", "iteration": iteration, "rewards": scores, "prompts": 4}
        row["per_prompt"] = {"total": [0.5] * 4, "rewards": {"sign_colour": [0.123456] * 4}}
        if mark != ".":
            reading = Reading(
                best=0.969,
                now=0.95 - iteration / 100,
                error=0.01,
                std=0.02,
                best_from=2,
                best_iteration=3,
                trained_best=0.71,
                trained_now=0.95,
                diverging=mark == "d",
            )
            row["watch"] = {"sign_colour": reading.as_json()}
        recorder.log(row)
    for iteration in checkpoints:
        (folder / "checkpoints" / f"iteration-{iteration:06d}").mkdir(parents=True)
    return folder


def test_divergence_at_the_end_is_told_with_the_checkpoint_that_is_kept(tmp_path: Path):
    folder = watched_run(tmp_path, "..-ddd", checkpoints=(1, 2, 5))
    (watched,) = report_data(folder)["watch"]
    assert watched["name"] == "sign_colour"
    assert watched["diverging"]
    assert (watched["best_from"], watched["best_iteration"]) == (2, 3)
    (span,) = watched["spans"]
    assert (span["from"], span["to"], span["best"]) == (4, 6, [2, 3])
    assert span["says"] == (
        "sign_colour fell from 0.969 (iterations 2-3) to 0.89 on held-out prompts while the "
        "trained reward went from 0.71 to 0.95: over-optimization"
    )
    out = f"{tmp_path.name}-before"
    assert watched["export"] == f"flowgrpo-ray export {tmp_path} --iteration 2 --out {out}"
    assert "0.123456" not in write_report(folder).read_text(), "scores by prompt are the watch's"


def test_divergence_that_passed_is_told_with_its_lowest_point(tmp_path: Path):
    (watched,) = report_data(watched_run(tmp_path, "--d--dd-", checkpoints=(1,)))["watch"]
    assert not watched["diverging"]
    assert [(span["from"], span["to"]) for span in watched["spans"]] == [(3, 3), (6, 7)]
    assert "to 0.88 on" in watched["spans"][1]["says"]
    assert watched["export"] is None


def test_without_a_watched_reward_or_divergence_there_is_nothing_to_tell(tmp_path: Path, run: Path):
    assert report_data(run)["watch"] == []
    (watched,) = report_data(watched_run(tmp_path, "..----"))["watch"]
    assert watched["spans"] == []


@needs_browser
@pytest.mark.parametrize(
    ("marks", "seen", "unseen"),
    [
        ("..-ddd", ["Over-optimization since iteration 4", 'class="diverging-from"'], []),
        ("..-dd-", ["Over-optimization in iterations 4–5, no longer at the end"], []),
        ("..----", ['class="best-bar"'], ["Over-optimization", 'class="diverging"']),
        ("......", ["sign_colour"], ["best window", "best-bar", 'class="alert']),
    ],
)
def test_the_page_draws_the_watch(
    tmp_path: Path, browser: Browser, marks: str, seen: list[str], unseen: list[str]
):
    """The notice, and the marks on the curve."""
    page = drawn(browser, write_report(watched_run(tmp_path, marks)))
    for text in seen:
        assert text in page, text
    for text in unseen:
        assert text not in page, text


@needs_browser
def test_the_page_draws_steps_and_refills_where_rows_have_them(tmp_path: Path, browser: Browser):
    recorder = RunRecorder(tmp_path)
    rng = np.random.default_rng(0)
    for iteration in (1, 2, 3):
        row = train_row(iteration, 0.5, rng)
        steps = [0, 1] if iteration < 3 else [1, 2]
        row["log_ratio"]["per_step"] = {"step": steps, "mean": [1e-4, 0.0], "std": [3e-3, 4e-3]}
        row["groups"]["refilled"] = iteration - 1
        recorder.log(row)
    page = drawn(browser, write_report(tmp_path))
    assert "Spread of log ρ by step" in page
    table = page[page.index("log ρ by stochastic step") :]
    cells = [cell for cell in re.findall(r"<td[^>]*>([^<]*)</td>", table) if cell][:8]
    # step 1: spreads 4, 4 and 3 in thousandths around means of 0, 0 and 0.1: 3.7 in all
    assert cells == ["0", "2", "1.0e−4", "0.0030", "1", "3", "3.3e−5", "0.0037"]
    assert "refilled<b>2</b>" in page
    older = drawn(browser, write_report(make_run(tmp_path / "older", iterations=2, prompts=4)))
    assert "by stochastic step" not in older
    assert "refilled<b>" not in older


@needs_browser
def test_every_prompt_set_has_a_line_of_its_own(tmp_path: Path, browser: Browser):
    """On the page, in lists of runs and in comparisons; of rewards that score several."""
    recorder, summary = RunRecorder(tmp_path), {}
    for iteration, signs, scenes in ((0, 0.25, 0.5), (4, 0.75, 0.125)):
        of = {"signs": {"ocr": spread_of(signs)}, "scenes": {"ocr": spread_of(scenes)}}
        of["scenes"]["geneval"] = spread_of(0.375)
        whole = {"ocr": spread_of((signs + scenes) / 2), "geneval": spread_of(0.375)}
        row = {"kind": "eval", "iteration": iteration, "prompts": 4, "rewards": whole, "sets": of}
        recorder.log(row)
        key = "eval_after" if iteration else "eval_before"
        summary[key] = {name: round(value["mean"], 6) for name, value in whole.items()}
        if not iteration:
            recorder.log(train_row(1, 0.5, np.random.default_rng(0)))
    recorder.write_summary({"name": "a", **summary})
    moved = {
        "ocr": (0.375, 0.4375),
        "geneval": (0.375, 0.375),
        "ocr of signs": (0.25, 0.75),
        "ocr of scenes": (0.5, 0.125),
    }
    headline = report_data(tmp_path)["headline"]["rewards"]
    assert {one["name"]: (one["before"], one["after"]) for one in headline} == moved
    listed = brief(tmp_path, "a")["rewards"]
    assert {name: (one["before"], one["after"]) for name, one in listed.items()} == moved
    compared = curves(tmp_path, (1,))
    assert [row["rewards"]["ocr of signs"]["mean"] for row in compared["evals"]] == [0.25, 0.75]
    assert compared["rewards"].keys() >= moved.keys()
    page = drawn(browser, write_report(tmp_path))
    for name in moved:
        assert re.search(rf">{name}<", page), name


def spread_of(mean: float) -> dict[str, float]:
    return {"mean": mean, "std": 0.1}


@needs_browser
def test_the_page_is_that_of_whatever_objective_the_run_has(tmp_path: Path, browser: Browser):
    """By its card alone: the class of this one is nowhere."""
    folder = make_run(tmp_path / "own")
    card = {
        "kind": "nowhere:Mine",
        "called": "Mine",
        "gate": {"name": "gap", "symbol": "gap", "title": "The gap", "meaning": "It must be 0."}
        | {"signed": False},
        "gated": "first",
        "steps": False,
        "charts": [
            {
                "title": "Two parts",
                "unit": "u",
                "penalty": False,
                "lines": [{"label": "one", "path": "own.a"}, {"label": "other", "path": "own.b"}],
            },
            {
                "title": "A penalty",
                "unit": "p",
                "penalty": True,
                "lines": [{"label": "p", "path": "tie"}],
            },
        ],
    }
    (folder / "objective.json").write_text(json.dumps(card))
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        if row["kind"] == "train":
            first = row["iteration"] == 1
            for key in ("log_ratio", "clip_fraction", "kl"):
                row.pop(key, None)
            row["gap"] = {"gate": 0.0 if first else None, "max_abs": 0.25, "mean": 0.1, "std": 0.01}
            row |= {"own": {"a": 1.5, "b": 2.5}, "tie": 0.75}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = drawn(browser, write_report(folder))
    for told in ("Mine run report", "The gap", "It must be 0.", "Largest |gap|", "Mean |gap|"):
        assert told in text
    assert "gate is exactly 0 in the one iteration whose samples are of the weights" in text
    for told in ("Two parts", "one 1.5", "other 2.5", "A penalty", "p 0.75"):
        assert told in text
    for absent in ("log ρ", "Clipped", "KL to the base model"):
        assert absent not in text


def drawn(browser: Browser, page: Path) -> str:
    """The body as the page's code has made it."""
    browser.open(page.as_uri())
    browser.look("charts.forEach(one => one.come(true))")  # those out of sight too
    html: str = browser.look("document.querySelector('main').outerHTML")
    return html


# --- the state of a run


@pytest.mark.parametrize(
    ("told", "age", "summary", "state"),
    [
        ("running", 3, None, "running"),
        ("running", 14.9, None, "running"),
        ("starting", 15.1, None, "lost"),
        ("stopping", 15.1, None, "lost"),
        ("failed", 1e6, None, "failed"),
        ("running", 1, {"iterations": 8}, "finished"),  # written by the run itself, at its end
        ("stopping", 1, {"iterations": 5}, "stopped"),
        ("starting", 1, {"iterations": 5}, "starting"),  # goes on; the summary is of before
        ("dancing", 1, None, "unknown"),
    ],
)
def test_state_of_a_run(told: str, age: float, summary: dict | None, state: str):
    live = {"state": told, "updated": 1000.0, "iterations": 8}
    assert state_of(live, summary, 1000.0 + age) == state


def test_state_without_a_live_file():
    assert state_of(None, None, 0) == "unknown"
    assert state_of(None, {"iterations": 3}, 0) == "finished"
    assert state_of({"state": "running", "updated": None}, None, 0) == "unknown"


def test_a_report_says_how_a_run_ended(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=2, prompts=2, finished=False)
    write_live(folder, "running", updated=time.time() - 60)
    assert report_data(folder)["state"] == "lost"
    write_live(folder, "failed", message="no GPU")
    data = report_data(folder)
    assert (data["state"], data["live"]["message"]) == ("failed", "no GPU")


def test_large_samples_are_scaled_down_and_said_so(tmp_path: Path):
    RunRecorder(tmp_path).log({"kind": "train", "iteration": 1})
    images = np.zeros((3, 512, 384, 3), np.uint8)
    save_samples(tmp_path, 0, images, ["a", "b", "c"], {"ocr": [0, 1, 0]})
    data = report_data(tmp_path)
    assert data["samples"][0]["tile"] == [LARGEST_TILE, 192]
    assert data["samples"][0]["original_tile"] == [512, 384]
    assert data["samples"][0]["image"].startswith("data:image/jpeg;base64,")
    assert any("scaled down" in note for note in data["notes"])


def test_the_sources_of_edits_are_embedded_and_what_is_none_is_said(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=1, prompts=3)
    assert report_data(folder)["sources"] is None
    drawn = np.random.default_rng(0).integers(0, 256, (3, 2, 40, 40, 3), np.uint8)
    save_sources(folder, drawn)
    data = report_data(folder)
    assert data["notes"] == []
    kept = {key: data["sources"][key] for key in ("tile", "columns", "per_image")}
    assert kept == {"tile": [40, 80], "columns": 3, "per_image": 2}
    content = b64decode(data["sources"]["image"].removeprefix("data:image/png;base64,"))
    assert content == (folder / "samples/sources.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels[:, 80:120], drawn[1, 0])
    for damage in ({"columns": 0}, {"tile": [40]}, {"per_image": "2"}):
        (folder / "samples/sources.json").write_text(json.dumps({**kept, **damage}))
        data = report_data(folder)
        assert data["sources"] is None
        assert ["sources.json was left out" in note for note in data["notes"]] == [True]


def test_spread_keeps_first_and_last():
    assert spread([1, 2, 3], 16) == [1, 2, 3]
    chosen = spread(list(range(100)), 16)
    assert len(set(chosen)) == 16
    assert (chosen[0], chosen[-1]) == (0, 99)
