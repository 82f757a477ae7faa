"""How long a folder of runs takes to be listed: by the overview, and by reading every row.

Makes run folders with rows as ``tiny-ocr`` writes them, an evaluation of 64 prompts after every 25
iterations, on which a reward is watched. Each turn is a process of its own, so that nothing is kept
from the one before; the files are in the page cache, and counted are seconds of a core. Both ways
take turns on a tenth of the runs, then the overview reads them all.

    .venv/bin/python benchmarks/runs.py [--runs 200] [--iterations 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from flowgrpo_ray.run.overview import overview
from flowgrpo_ray.run.tracking import METRICS, SUMMARY, TIMINGS, read_rows
from flowgrpo_ray.spec.file import dump_spec, load_spec

EVERY, PROMPTS = 25, 64


def spread(rng: random.Random) -> dict[str, float]:
    return {"mean": rng.random(), "std": rng.random()}


def train_row(iteration: int, rng: random.Random) -> dict[str, Any]:
    steps = [rng.random() for _ in range(2)]
    return {
        "kind": "train",
        "iteration": iteration,
        "images": 96,
        "reward": spread(rng),
        "rewards": {"ocr": spread(rng), "sign_colour": spread(rng)},
        "groups": {"total": 8, "no_spread": 0, "dropped": 0, "refilled": 0},
        "clip_fraction": {"low": rng.random(), "high": rng.random()},
        "log_ratio": {"gate": 0.0, "max_abs": rng.random(), **spread(rng)}
        | {"per_step": {"step": [0, 1], "mean": steps, "std": steps}},
        "loss": rng.random(),
        "policy_loss": rng.random(),
        "kl": rng.random(),
        "grad_norm": steps,
        "learning_rate": 2e-4,
        "weights": {"version": iteration, "digest": "86eabdc781f439a1ee803f16bf0b6dab"},
    }


def eval_row(iteration: int, rng: random.Random) -> dict[str, Any]:
    scores = {name: [rng.random() for _ in range(PROMPTS)] for name in ("total", "sign_colour")}
    per_prompt = {"total": scores.pop("total"), "rewards": scores}
    rewards = {"ocr": spread(rng), "sign_colour": spread(rng)}
    row = {"kind": "eval", "iteration": iteration, "prompts": PROMPTS, "weights": "ema"}
    return {**row, "rewards": rewards, "per_prompt": per_prompt, "unscored": {"ocr": 0}}


def timing_row(iteration: int, rng: random.Random) -> dict[str, Any]:
    ledger = {
        kind: {
            state: {what: rng.random() for what in ("first", "second")}
            for state in ("busy", "loading", "waiting", "overhead")
        }
        for kind in ("rollout", "learner", "reward-ocr", "reward-sign_colour")
    }
    row = {"kind": "train", "iteration": iteration, "seconds": rng.random()}
    return {**row, "images_per_second": 30 * rng.random(), "ledger": ledger}


def make_run(folder: Path, seed: int, iterations: int) -> None:
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    rows = [eval_row(0, rng)]
    for iteration in range(1, iterations + 1):
        rows.append(train_row(iteration, rng))
        if iteration % EVERY == 0:
            rows.append(eval_row(iteration, rng))
    times = [timing_row(iteration, rng) for iteration in range(1, iterations + 1)]
    settings = [f"seed={seed % 5}", f"optimizer.learning_rate={1e-4 * (1 + seed // 5 % 10)}"]
    (folder / "spec.yaml").write_text(dump_spec(load_spec("tiny-ocr", settings)))
    (folder / METRICS).write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    (folder / TIMINGS).write_text("".join(json.dumps(row) + "\n" for row in times))
    if seed % 10:  # one of ten is still going on, and its times have to be added up
        (folder / SUMMARY).write_text(json.dumps({"iterations": iterations, "seconds": 4321.0}))


def listed(root: Path) -> float:
    """Seconds of a core for the overview."""
    began = time.process_time()
    overview(root)
    return time.process_time() - began


def read(root: Path) -> float:
    """The same, to read every row."""
    began = time.process_time()
    for name in (METRICS, TIMINGS):
        for path in root.glob(f"*/{name}"):
            read_rows(path)
    return time.process_time() - began


def turn(what: Callable[[Path], float], root: Path) -> float:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(what, root).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        few = Path(root, "few")
        for i in range(options.runs):
            folder = few if i < options.runs // 10 else Path(root, "more")
            make_run(folder / f"run-{i:03d}", i, options.iterations)
        pairs = [(turn(listed, few), turn(read, few)) for _ in range(options.rounds)]
        ratio = median(whole / quick for quick, whole in pairs)
        whole = median(turn(listed, Path(root)) for _ in range(options.rounds))
        size = sum(path.stat().st_size for path in Path(root).rglob("*.jsonl")) / 2**20
    print(f"{options.runs} runs of {options.iterations} iterations, {size:.0f} MiB of rows")
    print(f"  overview: {whole:.2f} s of a core")
    print(f"  of a tenth, every row takes {ratio:.0f} times as long as the overview")


if __name__ == "__main__":
    main()
