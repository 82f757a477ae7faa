"""The run report: exact data, inert text, and a page for runs that are short or unfinished."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from flowgrpo_ray.errors import RunFolderError
from flowgrpo_ray.report import LARGEST_TILE, render_page, report_data, spread, write_report
from flowgrpo_ray.tracking import RunRecorder, read_rows, save_samples
from flowgrpo_ray.watch import Reading

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>"
COLOURS = {"red": (196, 52, 44), "green": (46, 140, 84), "blue": (44, 92, 180), "black": (40,) * 3}
STAGES = {"publish": 0.05, "sample": 1.2, "score": 0.5, "train": 0.9, "step": 0.02}


def sign(text: str, colour: tuple[int, int, int], quality: float, seed: int, size: int = 40):
    """A shop sign with digits; the lower the quality, the more of it is noise."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), (226, 224, 216))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((2, size // 5, size - 3, size - size // 5), 4, fill=colour)
    font = ImageFont.load_default(size * 0.52)
    draw.text((size / 2, size / 2), text, "white", font, anchor="mm")
    noise = rng.normal(128, 60, (size, size, 3))
    mixed = np.asarray(image) * quality + noise * (1 - quality)
    return mixed.clip(0, 255).astype(np.uint8)


def evaluate(folder: Path, iteration: int, skill: float, count: int, size: int = 40) -> dict:
    """Samples of one evaluation; the same seed per prompt at every iteration."""
    prompts, images, ocr, colour = [], [], [], []
    for index in range(count):
        rng = np.random.default_rng([7, index])
        name = list(COLOURS)[index % len(COLOURS)]
        text = str(rng.integers(10, 100))
        quality = float(np.clip(skill + rng.normal(0, 0.16), 0.05, 0.97))
        prompts.append(f'a {name} shop sign that reads "{text}"')
        images.append(sign(text, COLOURS[name], quality, index, size))
        ocr.append(round(min(1.0, quality * 1.1) * 2) / 2)
        colour.append(quality)
    scores = {"ocr": ocr, "sign_colour": [None, *colour[1:]]}
    save_samples(folder, iteration, np.stack(images), prompts, scores)
    known = {"ocr": ocr, "sign_colour": colour[1:]}
    return {k: {"mean": float(np.mean(v)), "std": float(np.std(v))} for k, v in known.items()}


def train_row(iteration: int, skill: float, rng: np.random.Generator) -> dict:
    ocr, colour = (float(np.clip(skill + rng.normal(0, 0.03), 0, 1)) for _ in range(2))
    return {
        "kind": "train",
        "iteration": iteration,
        "images": 96,
        "reward": {"mean": 0.8 * ocr + 0.2 * colour, "std": 0.3 - 0.2 * skill},
        "rewards": {
            "ocr": {"mean": ocr, "std": 0.34 - 0.2 * skill},
            "sign_colour": {"mean": colour, "std": 0.2 - 0.1 * skill},
        },
        "groups": {"total": 8, "no_spread": int(rng.binomial(8, skill / 4)), "dropped": 0},
        "log_ratio": {
            "gate": 0.0,
            "max_abs": float(rng.gamma(6, 0.006)),
            "mean": float(rng.normal(0, 1e-4)),
            "std": float(rng.gamma(8, 6e-4)),
        },
        "clip_fraction": {"low": float(rng.beta(2, 30)), "high": float(rng.beta(2, 34))},
        "loss": float(rng.normal(-0.002, 0.004)),
        "policy_loss": float(rng.normal(-0.003, 0.004)),
        "kl": 0.0004 * iteration * float(rng.gamma(20, 0.05)),
        "grad_norm": [float(rng.gamma(9, 0.05)), float(rng.gamma(8, 0.05))],
        "updates": 2,
        "learning_rate": 3e-4 * min(1, iteration / 5),
        "window": [1, 3],
        "weights": {"version": iteration, "digest": f"9f{iteration:06x}"},
    }


def make_run(
    folder: Path, iterations: int = 12, every: int = 4, prompts: int = 12, finished: bool = True
) -> Path:
    """A run folder as the driver leaves it, of a run that learns to write digits."""
    rng = np.random.default_rng(3)
    recorder = RunRecorder(folder, tensorboard=False)
    phases = {"import": 2.1, "ray": 8.0, "actors": 12.0, "models": 5.4, "rewards": 3.5}
    recorder.log_timing({"kind": "start", "seconds": 31.0, "phases": phases})

    def evaluation(iteration: int, skill: float) -> dict:
        rewards = evaluate(folder, iteration, skill, prompts)
        row = {"kind": "eval", "iteration": iteration, "prompts": prompts, "weights": "ema"}
        recorder.log({**row, "rewards": rewards})
        recorder.log_timing({"kind": "eval", "iteration": iteration, "seconds": 1.1})
        return {name: value["mean"] for name, value in rewards.items()}

    before = after = evaluation(0, 0.3)
    for iteration in range(1, iterations + 1):
        skill = 0.95 - 0.65 * float(np.exp(-3 * iteration / iterations))
        recorder.log(train_row(iteration, skill, rng))
        stages = {name: value * float(rng.gamma(60, 1 / 60)) for name, value in STAGES.items()}
        seconds = 0.72 * sum(stages.values())
        row = {"kind": "train", "iteration": iteration, "seconds": seconds, "stages": stages}
        recorder.log_timing({**row, "images_per_second": 96 / seconds})
        if iteration % every == 0 or iteration == iterations:
            after = evaluation(iteration, skill)
    (folder / "spec.yaml").write_text("name: tiny-ocr\nmodel:\n  base: tiny-sd3  # embedded\n")
    if finished:
        summary = {"name": "tiny-ocr", "eval_before": before, "eval_after": after}
        counts = {"seconds": 131.2, "iterations": iterations, "images": 96 * iterations}
        recorder.write_summary({**summary, **counts})
    return folder


def embedded(page: str) -> dict:
    """The JSON document of a page, found as a browser finds it: up to the first `</script`."""
    start = page.index('id="run-data">') + len('id="run-data">')
    return json.loads(page[start : page.index("</script", start)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny-ocr")


def test_report_holds_the_exact_data(run: Path):
    path = write_report(run)
    assert path == run / "report.html"
    data = embedded(path.read_text())
    rows = read_rows(run / "metrics.jsonl")
    assert data["train"] + data["evals"] == sorted(rows, key=lambda row: row["kind"] == "eval")
    assert data["timings"] == read_rows(run / "timings.jsonl")
    assert data["summary"] == json.loads((run / "summary.json").read_text())
    assert data["spec"] == (run / "spec.yaml").read_text()
    assert data["finished"]
    assert data["notes"] == []
    assert data == json.loads(json.dumps(report_data(run)))


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


def test_samples_keep_their_pixels(run: Path):
    samples = report_data(run)["samples"]
    assert [sample["iteration"] for sample in samples] == [0, 4, 8, 12]
    assert samples[0]["scores"]["sign_colour"][0] is None
    from base64 import b64decode

    content = b64decode(samples[0]["image"].removeprefix("data:image/png;base64,"))
    assert content == (run / "samples/iteration-000000.png").read_bytes()


def test_wall_time_adds_iterations_and_evaluations(tmp_path: Path):
    recorder = RunRecorder(tmp_path, tensorboard=False)
    recorder.log({"kind": "train", "iteration": 1})
    recorder.log_timing({"kind": "start", "seconds": 31.0, "phases": {}})
    recorder.log_timing({"kind": "eval", "iteration": 0, "seconds": 1.5})
    recorder.log_timing({"kind": "train", "iteration": 1, "seconds": 2.0})
    recorder.log_timing({"kind": "eval", "iteration": 1, "seconds": 1.0})
    recorder.log_timing({"kind": "train", "iteration": 2, "seconds": 2.0})
    assert report_data(tmp_path)["wall"] == [(0, 0.0), (1, 3.5), (2, 6.5)]


def test_text_of_the_run_is_inert(tmp_path: Path):
    recorder = RunRecorder(tmp_path, tensorboard=False)
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


def test_page_asks_for_nothing_and_never_parses_data_as_html(run: Path):
    page = render_page(report_data(run))
    assert not re.search(r"https?:|//[a-z]+\.|@import|<link[^>]+href=\"(?!data:)", page)
    assert not re.search(r"\b(src|url)\s*[=(]\s*['\"]?(?!data:)\w", page.replace("src = shot", ""))
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in page


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
    assert not data["finished"]
    assert data["headline"]["rewards"] == []
    assert data["headline"]["images"] == 96
    notes = " ".join(data["notes"])
    for said in ("no evaluation yet", "timings.jsonl is missing", "summary.json is not", "spec"):
        assert said in notes


def test_evaluation_before_any_training(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=0, prompts=4, finished=False)
    data = report_data(folder)
    (ocr, _) = data["headline"]["rewards"]
    assert ocr["before"] is not None
    assert ocr["after"] is None
    assert data["headline"]["gate"] is None
    assert data["wall"] == []


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
    assert "iteration-000001.json does not hold a JSON object" in notes
    assert "iteration-000002.json was left out: scores, tile, columns is missing" in notes
    assert "iteration-000003.json was left out: iteration-000003.png is missing" in notes


# --- the over-optimization watch


def watched_run(folder: Path, diverging: str, checkpoints: tuple[int, ...] = ()) -> Path:
    """A character per iteration: "." for no reading yet, "-" for a plain one, "d" diverging."""
    recorder = RunRecorder(folder, tensorboard=False)
    rng = np.random.default_rng(0)
    for iteration, mark in enumerate(diverging, start=1):
        row = train_row(iteration, 0.5, rng)
        if mark != ".":
            reading = Reading(
                best=0.969,
                now=0.95 - iteration / 100,
                best_from=2,
                best_iteration=3,
                best_std=0.02,
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
        "sign_colour fell from 0.969 (iterations 2-3) to 0.89 while the trained reward rose from "
        "0.71 to 0.95: over-optimization; the checkpoint of iteration 2 is kept"
    )


def test_divergence_that_passed_is_told_with_its_lowest_point(tmp_path: Path):
    (watched,) = report_data(watched_run(tmp_path, "--d--dd-", checkpoints=(1,)))["watch"]
    assert not watched["diverging"]
    assert [(span["from"], span["to"]) for span in watched["spans"]] == [(3, 3), (6, 7)]
    assert "to 0.88 while" in watched["spans"][1]["says"]
    assert "checkpoint" not in watched["spans"][1]["says"]


def test_without_a_watched_reward_or_divergence_there_is_nothing_to_tell(tmp_path: Path, run: Path):
    assert report_data(run)["watch"] == []
    (watched,) = report_data(watched_run(tmp_path, "..----"))["watch"]
    assert watched["spans"] == []


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize(
    ("marks", "seen", "unseen"),
    [
        ("..-ddd", ["Over-optimization since iteration 4", 'class="diverging-from"'], []),
        ("..-dd-", ["Over-optimization in iterations 4–5, no longer at the end"], []),
        ("..----", ['class="best-bar"'], ["Over-optimization", 'class="diverging"']),
        ("......", ["sign_colour"], ["best window", "best-bar", 'class="alert']),
    ],
)
def test_the_page_draws_the_watch(tmp_path: Path, marks: str, seen: list[str], unseen: list[str]):
    """In a browser: the notice, and the marks on the curve."""
    page = drawn(write_report(watched_run(tmp_path, marks)))
    for text in seen:
        assert text in page, text
    for text in unseen:
        assert text not in page, text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_page_draws_steps_and_refills_where_rows_have_them(tmp_path: Path):
    recorder = RunRecorder(tmp_path, tensorboard=False)
    rng = np.random.default_rng(0)
    for iteration in (1, 2, 3):
        row = train_row(iteration, 0.5, rng)
        steps = [0, 1] if iteration < 3 else [1, 2]
        row["log_ratio"]["per_step"] = {"step": steps, "mean": [1e-4, 0.0], "std": [3e-3, 4e-3]}
        row["groups"]["refilled"] = iteration - 1
        recorder.log(row)
    page = drawn(write_report(tmp_path))
    assert "Spread of log ρ by step" in page
    table = page[page.index("log ρ by stochastic step") :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)[:8]
    # step 1: spreads 4, 4 and 3 in thousandths around means of 0, 0 and 0.1: 3.7 in all
    assert cells == ["0", "2", "1.0e−4", "0.0030", "1", "3", "3.3e−5", "0.0037"]
    assert "refilled<b>2</b>" in page
    older = drawn(write_report(make_run(tmp_path / "older", iterations=2, prompts=4)))
    assert "by stochastic step" not in older
    assert "refilled<b>" not in older


def drawn(page: Path) -> str:
    """The document as a browser has it after the page's code ran, without that code and data."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    run = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return re.sub(r"<(script|style)\b.*?</\1>", "", run.stdout, flags=re.S)


def test_large_samples_are_scaled_down_and_said_so(tmp_path: Path):
    RunRecorder(tmp_path, tensorboard=False).log({"kind": "train", "iteration": 1})
    images = np.zeros((3, 512, 384, 3), np.uint8)
    save_samples(tmp_path, 0, images, ["a", "b", "c"], {"ocr": [0, 1, 0]})
    data = report_data(tmp_path)
    assert data["samples"][0]["tile"] == [LARGEST_TILE, 192]
    assert data["samples"][0]["original_tile"] == [512, 384]
    assert data["samples"][0]["image"].startswith("data:image/jpeg;base64,")
    assert any("scaled down" in note for note in data["notes"])


def test_spread_keeps_first_and_last():
    assert spread([1, 2, 3], 16) == [1, 2, 3]
    chosen = spread(list(range(100)), 16)
    assert len(set(chosen)) == 16
    assert (chosen[0], chosen[-1]) == (0, 99)
