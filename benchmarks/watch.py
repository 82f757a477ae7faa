"""How often the over-optimization watch is wrong, and how soon it is right, on drawn scores.

Each prompt has a level of its own and new noise in every evaluation; together they have the
reward's spread over images, and ``--own`` is the level's part of the variance: the correlation
between two evaluations. A healthy run stays at its level for 100 evaluations while the trained
total rises. A falling one loses what is published, linearly over ten evaluations, after five
without a fall. No model is run.

    .venv/bin/python benchmarks/watch.py [--runs 400] [--own 0.7] [--set watch.significance=4]
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from flowgrpo_ray.run.watch import Watch
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec

QUIET, FALLING = 5, 10  # evaluations
FALLS = {  # before, after, spread over images
    "PickScore": (22.34, 21.16, 1.3),
    "ImageReward": (0.87, 0.44, 1.0),
    "aesthetic": (5.39, 4.93, 0.55),
}


def first_alarm(
    spec: TrainingSpec, rng: np.random.Generator, means: np.ndarray, prompts: int, own: float
) -> float:
    """The evaluation at which a run alarms, infinity if never. ``means`` of each evaluation are in
    standard deviations over images."""
    watch = Watch(spec)
    level = math.sqrt(own) * rng.standard_normal(prompts)
    for i, mean in enumerate(means):
        scores = mean + level + math.sqrt(1 - own) * rng.standard_normal(prompts)
        per_prompt = {"rewards": {"sign_colour": scores}, "total": np.full(prompts, i / 100)}
        readings = watch.see({"kind": "eval", "iteration": i, "per_prompt": per_prompt})
        if any(reading.diverging for reading in readings.values()):
            return i
    return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--own", type=float, default=0.7)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    spec = load_spec("tiny-ocr", options.set)
    print(f"{options.runs} runs each, correlation {options.own:g}, {spec.watch!r}")
    for prompts in (64, 512, 2048):
        rng = np.random.default_rng(0)
        runs = options.runs if prompts < 2048 else -(-options.runs // 4)

        def alarms(means: np.ndarray, prompts: int = prompts, rng=rng, runs: int = runs):
            return np.array(
                [first_alarm(spec, rng, means, prompts, options.own) for _ in range(runs)]
            )

        wrong = np.isfinite(alarms(np.zeros(100))).mean()
        print(f"{prompts} prompts: {wrong:.1%} of the healthy runs alarm")
        for name, (before, after, spread) in FALLS.items():
            passed = np.clip((np.arange(QUIET + 3 * FALLING) - QUIET) / FALLING, 0, 1)
            after_start = alarms(-passed * (before - after) / spread) - QUIET
            middle, late = np.quantile(after_start, [0.5, 0.95], method="higher")
            print(f"  {name}: {middle:g} evaluations after the fall began; in 95% of runs {late:g}")


if __name__ == "__main__":
    main()
