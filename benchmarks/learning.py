"""Learning curves of the algorithms on the embedded model, and what over-optimization does to it.

    python benchmarks/learning.py run --runs runs/learning        # 3 seeds: about eight hours
    python benchmarks/learning.py time --runs runs/learning-time  # seconds per iteration, in turns
    python benchmarks/learning.py collect --runs runs/learning    # -> benchmarks/learning.json
    python benchmarks/learning.py draw                            # -> docs/images/*.png

Every run is `flowgrpo-ray train` of a recipe with the overrides below: it can be repeated by hand.
A curve over iterations depends on the seed alone; seconds depend on the machine and on what else
it does, so they are measured apart, the algorithms taking turns, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "learning.json"
IMAGES = HERE.parent / "docs" / "images"
SEEDS = (0, 1, 2)

ALL_STEPS = "sampling.window={kind: all}"
NO_KL = "objective.kl=null"
PUBLISHED_KL = "objective.kl={beta: 0.04, form: time_weighted}"  # with 10 steps: gaussian, 0.004
GUARD = "objective={kind: grpo_guard, clip_low: 2e-4, clip_high: 2e-4}"


def _window(length: int) -> str:
    return f"sampling.window={{kind: random, length: {length}, within: [0, 4]}}"


def _adapting(beta: float) -> str:
    adapt = "{reward: sign_colour}"
    return f"objective.kl={{beta: {beta}, form: gaussian, adapt: {adapt}}}"


NFT, AWM = "tiny-ocr-nft", "tiny-ocr-awm"  # recipes; all other curves are of tiny-ocr

# name -> (iterations, overrides of the recipe; tiny-ocr's: window 2, KL, clip 1e-3)
CURVES: dict[str, tuple[int, list[str]]] = {
    "flow-grpo": (60, [ALL_STEPS, PUBLISHED_KL]),
    "fast-1": (60, [_window(1)]),
    "fast-2": (60, [_window(2)]),
    "fast-3": (60, [_window(3)]),
    "cps": (60, ["sampling.kernel=cps", "sampling.likelihood=squared_error"]),
    "guard": (60, [GUARD]),
    "nft": (40, []),
    "awm": (40, []),
}
RECIPES = {"nft": NFT, "awm": AWM, "nft-long": NFT, "awm-long": AWM}
# a KL whose weight finds itself, from ten times too little and from ten times too much
STEADY: dict[str, tuple[int, list[str]]] = {
    "steady-low": (600, [_adapting(0.01)]),
    "steady-high": (600, [_adapting(1.0)]),
}
# the same, of one seed only
ONCE: dict[str, tuple[int, list[str]]] = {
    "plain-long": (120, [ALL_STEPS, NO_KL]),
    "guard-long": (120, [ALL_STEPS, GUARD]),
    "flow-grpo-strong-kl": (60, [ALL_STEPS]),
    "fast-long": (200, []),
    "fast-guard-long": (200, [GUARD]),
    "nft-long": (200, []),
    "awm-long": (200, []),
}
LABELS = {
    "flow-grpo": "Flow-GRPO, all 9 steps, KL",
    "fast-1": "Fast, window 1, KL",
    "fast-2": "Fast, window 2, KL",
    "fast-3": "Fast, window 3, KL",
    "cps": "Fast, window 2, KL, cps",
    "guard": "Guard, window 2, no KL",
    "plain-long": "Flow-GRPO, all 9 steps, no KL",
    "guard-long": "GRPO-Guard, all 9 steps, no KL",
    "nft": "DiffusionNFT",
    "awm": "AWM",
    "fast-long": "Fast, window 2, KL",
    "fast-guard-long": "Guard, window 2, no KL",
    "nft-long": "DiffusionNFT",
    "awm-long": "AWM",
    "steady-low": "KL that adapts, from 0.01",
    "steady-high": "KL that adapts, from 1",
}


def train(name: str, seed: int, runs: Path, iterations: int, overrides: list[str]) -> Path:
    """One run, in a process of its own; one that is complete is kept, a part of one continued."""
    folder = runs / f"{name}-{seed}"
    if not (folder / "summary.json").exists():
        settings = [f"name={folder.name}", f"seed={seed}", f"iterations={iterations}", *overrides]
        recipe = RECIPES.get(name, "tiny-ocr")
        command = [sys.executable, "-m", "flowgrpo_ray", "train", recipe, "--runs", str(runs)]
        command += ["--resume"] if (folder / "checkpoints").exists() else []
        for setting in settings:
            command += ["--set", setting]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return folder


def run(runs: Path, only: list[str], seeds: list[int]) -> None:
    """All curves of one seed before those of the next."""
    for seed in seeds:
        wanted = CURVES | STEADY | (ONCE if seed == 0 else {})
        for name, (iterations, overrides) in wanted.items():
            if not only or name in only:
                every = 10 if iterations > 120 else 5
                train(name, seed, runs, iterations, [f"evaluation.every={every}", *overrides])


def rows(file: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row for row in lines if row["kind"] == kind]


def time(runs: Path, rounds: int, only: list[str]) -> None:
    """Seconds per iteration, `rounds` short runs of each algorithm taking turns."""
    names = [name for name in CURVES if not only or name in only]
    for round_ in range(rounds):
        for name in names:
            _, overrides = CURVES[name]
            short = ["evaluation.every=10", "evaluation.prompts=1", *overrides]
            train(name, round_, runs, 10, short)
    seconds = {
        name: [
            row["seconds"]
            for round_ in range(rounds)
            for row in rows(runs / f"{name}-{round_}" / "timings.jsonl", "train")[2:]
        ]
        for name in names
    }
    found = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    _update_data("seconds_together" if only else "seconds_per_iteration", found)
    print(json.dumps(found, indent=1))


def collect(runs: Path) -> None:
    """Held-out rewards, and the ratio per step, of every run that is complete."""
    found: dict[str, dict[str, Any]] = {}
    for name in CURVES | STEADY | ONCE:
        for seed in SEEDS:
            file = runs / f"{name}-{seed}" / "metrics.jsonl"
            if file.with_name("summary.json").exists():
                found.setdefault(name, {})[str(seed)] = _curve(file)
    _update_data("runs", found)


def _curve(file: Path) -> dict[str, Any]:
    evals, trained = rows(file, "eval"), rows(file, "train")
    means = [{k: v["mean"] for k, v in row["rewards"].items()} for row in evals]
    curve: dict[str, Any] = {
        "iteration": [row["iteration"] for row in evals],
        "ocr": [round(m["ocr"], 4) for m in means],
        "sign_colour": [round(m["sign_colour"], 4) for m in means],
    }
    if not trained[0]["window"]:
        return curve  # of finished images
    if "tie" in trained[0]:
        curve["beta"] = [float(f"{row['tie']['weight']:.3g}") for row in trained]
    # Over the second half, where every step has been through its window often.
    later = [row["log_ratio"]["per_step"] for row in trained[len(trained) // 2 :]]
    steps = sorted({step for row in later for step in row["step"]})
    for moment in ("mean", "std"):
        by_step = {step: [] for step in steps}
        for row in later:
            for step, value in zip(row["step"], row[moment], strict=True):
                by_step[step].append(value)
        curve[f"log_ratio_{moment}"] = [float(f"{statistics.fmean(by_step[s]):.4g}") for s in steps]
    curve["step"] = steps
    for side in ("low", "high"):
        values = [row["clip_fraction"][side] for row in trained]
        curve[f"clip_{side}"] = round(statistics.fmean(values), 4)
    return curve


def _update_data(key: str, part: dict[str, Any]) -> None:
    """What was measured anew takes the place of what was before, and all else stays."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    data[key] = data.get(key, {}) | part
    DATA.write_text(json.dumps(data, sort_keys=True) + "\n", encoding="utf-8")


# --- pictures

COLOURS = {
    "flow-grpo": "#444444",
    "fast-1": "#9ecae1",
    "fast-2": "#3182bd",
    "fast-3": "#08306b",
    "cps": "#e6842a",
    "guard": "#2e8b57",
    "plain-long": "#c0392b",
    "guard-long": "#2e8b57",
    "nft": "#8e44ad",
    "awm": "#d81b60",
    "fast-long": "#3182bd",
    "fast-guard-long": "#2e8b57",
    "nft-long": "#8e44ad",
    "awm-long": "#d81b60",
    "steady-low": "#e6842a",
    "steady-high": "#8e44ad",
}
SIX = ("flow-grpo", "fast-1", "fast-2", "fast-3", "cps", "guard")
FOUR = ("fast-2", "guard", "nft", "awm")
LONG = ("fast-long", "fast-guard-long", "nft-long", "awm-long")
FOUND = ("fast-long", "fast-guard-long", "steady-low", "steady-high")
STOPPED = {"fast-guard-long": 100}  # where the watch would have ended it


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    )
    data = json.loads(DATA.read_text(encoding="utf-8"))
    _draw_curves(data, SIX, data["seconds_per_iteration"], "learning.png")
    _draw_curves(data, FOUR, data["seconds_together"], "objectives.png")
    _draw_long(data)
    if STEADY.keys() <= data["runs"].keys():
        _draw_steady(data)
    _draw_over_optimization(data)


def _draw_curves(
    data: dict[str, Any], names: Sequence[str], each: dict[str, float], file: str
) -> None:
    from matplotlib import pyplot

    figure, (by_iteration, by_time, colour) = pyplot.subplots(1, 3, figsize=(14, 4.4))
    for name in names:
        _band(by_iteration, data, name, "ocr")
        _band(by_time, data, name, "ocr", each[name])
        _band(colour, data, name, "sign_colour")
    by_iteration.set(xlabel="iteration", title="OCR of held-out prompts", ylim=(0.25, 1.02))
    by_time.set(xlabel="seconds of training", title="the same against time", ylim=(0.25, 1.02))
    colour.set(xlabel="iteration", title="colour of held-out prompts (watched)")
    by_iteration.legend(fontsize=8, loc="lower right")
    _save(figure, file)


def _draw_long(data: dict[str, Any]) -> None:
    """Does it over-optimize: 200 iterations, one seed."""
    from matplotlib import pyplot

    figure, (trained, watched) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in LONG:
        _band(trained, data, name, "ocr")
        _band(watched, data, name, "sign_colour")
    trained.set(xlabel="iteration", title="trained: OCR, held out")
    watched.set(xlabel="iteration", title="watched: colour, held out")
    trained.legend(fontsize=8, loc="lower right")
    _save(figure, "objectives-long.png")


def _draw_steady(data: dict[str, Any]) -> None:
    """Does a weight that adapts come to the same from both sides, and does it hold the colours."""
    from matplotlib import pyplot

    figure, (trained, watched, weight) = pyplot.subplots(1, 3, figsize=(14, 4.2))
    for name in FOUND:
        _band(trained, data, name, "ocr")
        _band(watched, data, name, "sign_colour")
        if name in STOPPED:
            watched.axvline(STOPPED[name], color=COLOURS[name], linestyle=":", label="stopped")
        for run in data["runs"][name].values():
            betas = run.get("beta", [0.1] * 200 if name == "fast-long" else [])
            weight.plot(range(1, len(betas) + 1), betas, color=COLOURS[name], linewidth=0.7)
    start = data["runs"]["fast-long"]["0"]["sign_colour"][0]
    watched.axhline(start - 0.02, color="#888888", linestyle="--", label="0.02 below the start")
    trained.set(xlabel="iteration", title="trained: OCR, held out", ylim=(0.25, 1.02))
    watched.set(xlabel="iteration", title="watched: colour, held out")
    weight.set(xlabel="iteration", title="weight of the KL", yscale="log")
    trained.legend(fontsize=8, loc="lower right")
    watched.legend(fontsize=8, loc="lower right")
    _save(figure, "steady.png")


def _draw_over_optimization(data: dict[str, Any]) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(16, 4))
    for name in ("plain-long", "guard-long"):
        _band(panels[0], data, name, "ocr")
        _band(panels[1], data, name, "sign_colour")
        for panel, moment in zip(panels[2:], ("mean", "std"), strict=True):
            for run in data["runs"][name].values():
                panel.plot(run["step"], run[f"log_ratio_{moment}"], ".-", color=COLOURS[name])
    panels[0].set(xlabel="iteration", title="trained: OCR, held out")
    panels[1].set(xlabel="iteration", title="watched: colour, held out")
    panels[2].set(xlabel="step", title="log ratio: mean per step")
    panels[3].set(xlabel="step", title="log ratio: spread per step", yscale="log")
    panels[0].legend(fontsize=8, loc="lower right")
    _save(figure, "over-optimization.png")


def _band(
    panel: Any, data: dict[str, Any], name: str, reward: str, seconds: float | None = None
) -> None:
    """Mean over seeds as a line, their range as a band."""
    runs = list(data["runs"][name].values())
    x = [iteration * (seconds or 1) for iteration in runs[0]["iteration"]]
    values = list(zip(*(run[reward] for run in runs), strict=True))
    low, high = [min(v) for v in values], [max(v) for v in values]
    panel.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    panel.plot(x, [statistics.fmean(v) for v in values], color=COLOURS[name], label=LABELS[name])


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110)
    print(IMAGES / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learning curves on the embedded model.")
    parser.add_argument("what", choices=("run", "time", "collect", "draw"))
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--only", nargs="*", default=[], help="names of curves")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "run":
        run(options.runs, options.only, options.seeds)
    elif options.what == "time":
        time(options.runs, options.rounds, options.only)
    elif options.what == "collect":
        collect(options.runs)
    else:
        draw()
