"""Run folders as the driver leaves them, made in a moment."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowgrpo_ray.run.tracking import RunRecorder, save_samples

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>"
COLOURS = {"red": (196, 52, 44), "green": (46, 140, 84), "blue": (44, 92, 180), "black": (40,) * 3}
# Seconds of a process in an iteration.
WORK = {"publish": 0.05, "load": 0.02, "sample": 0.9, "score": 0.5, "accumulate": 0.7, "step": 0.02}


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


def ledger_rows(seconds: float, work: dict[str, float]) -> dict:
    """Each adds up to `seconds`."""
    publish, load = work["publish"], work["load"]
    rollout: dict = {
        "busy": {"sample": work["sample"]},
        "loading": {"load": load},
        "overhead": {"transport": 0.01, "lost": 0.0},
        "waiting": {"weights": publish},
    }
    rollout["waiting"]["learner and rewards"] = seconds - work["sample"] - load - 0.01 - publish
    idle = seconds - publish - work["accumulate"] - work["step"]
    learner = {
        "busy": {"accumulate": work["accumulate"], "step": work["step"]},
        "loading": {"publish": publish},
        "waiting": {"samples": 0.6 * idle, "scores of ocr": 0.4 * idle},
    }
    reward = {"busy": {"score": work["score"]}, "waiting": {"images": seconds - work["score"]}}
    return {"rollout": rollout, "learner": learner, "reward-ocr": reward}


def timing_row(iteration: int, seconds: float, work: dict[str, float]) -> dict:
    rows = ledger_rows(seconds, work)
    score = work["score"]
    reward = {"calls": 4, "images": 96, "seconds": 4 * score, "busy_s": score}
    pace, then = work["sample"] + work["load"], seconds - 0.15
    advice = (
        f"cluster.rollout.count 2 -> 3 would remove it: about {then:.1f} s an iteration instead "
    )
    return {
        "kind": "train",
        "iteration": iteration,
        "seconds": seconds,
        "images_per_second": 96 / seconds,
        "ledger": rows,
        "processes": {"rollout": 2.0, "learner": 1.0, "reward-ocr": 1.0},
        "busy": {kind: sum(row["busy"].values()) / seconds for kind, row in rows.items()},
        "rewards": {"ocr": {**reward, "failures": 0, "replicas": 1}},
        "bottleneck": {
            "stage": "sampling",
            "seconds": pace,
            "advice": advice + f"of {seconds:.1f}, by estimate.",
            "change": {"cluster.rollout.count": 3},
            "then": then,
        },
    }


def write_live(folder: Path, state: str, **more: Any) -> None:
    """live.json as a driver on this machine keeps it."""
    now = time.time()
    rewards = {"deployment": "reward-ocr", "state": "RUNNING", "replicas": 1, "target": 2}
    traffic = {"queue": 3, "calls": 144, "failures": 0, "mean_latency_s": 0.21}
    content = {
        "state": state,
        "stage": "sampling, scoring, training",
        "message": None,
        "iteration": 12,
        "iterations": 60,
        "started": now - 300,
        "updated": now,
        "pid": 4711,
        "host": "node-7",
        "ray": {"address": "10.0.0.5:6379", "dashboard": "http://10.0.0.5:8265", "job": "ray-1"},
        "checkpoint": {"iteration": 10, "at": now - 40},
        "workers": [
            {"name": "rollout-0", "weights_version": 12, "in_flight": 2},
            {"name": "rollout-1", "weights_version": 11, "in_flight": 0},
        ],
        "learners": 1,
        "rewards": {"ocr": {**rewards, **traffic}},
        **more,
    }
    beside = folder / "live.json.part"
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(folder / "live.json")


def make_run(
    folder: Path, iterations: int = 12, every: int = 4, prompts: int = 12, finished: bool = True
) -> Path:
    """A run folder as the driver leaves it, of a run that learns to write digits."""
    rng = np.random.default_rng(3)
    recorder = RunRecorder(folder)
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
        work = {name: value * float(rng.gamma(60, 1 / 60)) for name, value in WORK.items()}
        recorder.log_timing(timing_row(iteration, 0.8 * sum(work.values()), work))
        if iteration % every == 0 or iteration == iterations:
            after = evaluation(iteration, skill)
    (folder / "spec.yaml").write_text("name: tiny-ocr\nmodel:\n  base: tiny-sd3  # embedded\n")
    if finished:
        summary = {"name": "tiny-ocr", "eval_before": before, "eval_after": after}
        counts = {"seconds": 131.2, "iterations": iterations, "images": 96 * iterations}
        recorder.write_summary({**summary, **counts})
    return folder
