"""What nobody could try without a GPU: Stable Diffusion 3.5 Medium at its true size, on one.

Weights are random, of the published configs, and so are the prompts' encodings: no download is
needed, and time and memory do not depend on values. One process samples a group and trains on it,
as a colocated worker does, with the LoRA and objective of ``sd35-ocr``: by dtype, attention kernel,
micro-batch, eager and compiled. Before that the tiny model is trained by the command. A verdict for
each claim of the documentation ends it.

    .venv/bin/python benchmarks/gpu.py --out gpu.json

It takes up to ``--minutes``; what comes too late for that is named. ``--scale tiny`` runs the same
code over the embedded model's configs, on a CPU too. docs/gpu.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from flowgrpo_ray.algorithm.gate import MOST_IN_NOISE, Floor
from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.parallel import join_group
from flowgrpo_ray.algorithm.sampling import rollout
from flowgrpo_ray.common.errors import ContractError, ModelError
from flowgrpo_ray.common.types import Condition, Trajectory, WorkUnit
from flowgrpo_ray.estimate.footprint import estimate, find_configs
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs, Policy
from flowgrpo_ray.run.tracking import read_rows
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.plan import plan_iteration
from flowgrpo_ray.spec.training import TrainingSpec

# Dense bfloat16 and float16 FLOP/s of the vendor's data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
SHIFT = 3.0  # of the published scheduler
PROMPT = 0  # the one prompt of the group
SCALES: dict[str, tuple[str, ...]] = {
    "full": ("model.path=stabilityai/stable-diffusion-3.5-medium",),
    "tiny": (
        "model.path=builtin:tiny-sd3",
        "model.max_sequence_length=10",
        "sampling.size=[32, 48]",
        "sampling.steps=3",
    ),
}
IMAGES = {"full": 24, "tiny": 4}  # of the group
PARTS = ("rollout", "update")
UPDATES = 3  # of each case: the first is timed, all are asked for overflows
TRAINED = 0.9  # held-out OCR of the tiny model, from 0.34


class Case(NamedTuple):
    name: str
    overrides: tuple[str, ...] = ()
    parts: int = 3  # micro-batches of the group


BF16 = "model.dtype=bfloat16"
CASES = (
    Case("bfloat16", (BF16,)),
    Case("bfloat16, compiled", (BF16, "model.compile=true")),
    Case("float16", ("model.dtype=float16",)),
    Case("bfloat16, cudnn", (BF16, "model.attention=cudnn")),
    Case("bfloat16, 2 micro-batches", (BF16,), parts=2),
    Case("bfloat16, 6 micro-batches", (BF16,), parts=6),
    Case("bfloat16, flash", (BF16, "model.attention=flash")),
    Case("bfloat16, efficient", (BF16, "model.attention=efficient")),
    Case("bfloat16, deterministic", (BF16, "model.deterministic=true")),
    Case("float32", ("model.dtype=float32",)),
)


def benchmark_spec(scale: str, case: Case, device: torch.device, folder: Path) -> TrainingSpec:
    """``sd35-ocr`` as one group on one GPU (or, on the CPU, none)."""
    gpus = 1 if device.type == "cuda" else 0
    batch = max(1, IMAGES[scale] // case.parts)
    workers = f"{{count: 1, gpus: {gpus}}}"
    return load_spec(
        "sd35-ocr",
        [
            *SCALES[scale],
            *(f"model.path={folder}", f"sampling.micro_batch={batch}"),
            *(f"sampling.group_size={IMAGES[scale]}", "sampling.groups=1", "objective.updates=1"),
            f"evaluation.micro_batch={batch}",
            f"cluster={{layout: colocated, workers: {workers}}}",
            *case.overrides,
        ],
    )


def write_random_model(configs: Configs, folder: Path, device: torch.device, seed: int) -> None:
    """Transformer, autoencoder and scheduler as the pipeline's ``save_pretrained`` writes them."""
    import diffusers

    torch.manual_seed(seed)
    for name, content in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    with torch.device(device):
        for part in ("transformer", "vae"):
            config = configs[f"{part}/config.json"]
            made = getattr(diffusers, config["_class_name"]).from_config(config)
            made.save_pretrained(folder / part)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")


def random_condition(policy: Policy, configs: Configs) -> Condition:
    """A prompt's encoding of the true shapes, standard normal."""
    example = policy.example_condition(1, configs)
    return {name: as_array(torch.randn_like(tensor[0])) for name, tensor in example.items()}


# --- measuring


class Watch:
    """Seconds and peak memory of a block of work; a context manager."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.seconds = 0.0
        self.peak: int | None = None  # bytes of tensors; unknown on the CPU
        self.reserved: int | None = None  # bytes that torch took from the device

    def __enter__(self) -> Watch:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        self.seconds = time.perf_counter() - self.started

    def row(self, images: int, flops: int, parts: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """What is reported; ``parts`` are the estimate's of each stage that ran."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else ""
        peak = next((flops for part, flops in PEAKS.items() if part in name), None)
        rate = flops / self.seconds
        tensors = [sum(p.values()) - p["reserved"] for p in parts]
        return {
            "seconds": self.seconds,
            "images_per_second": images / self.seconds,
            "flops": flops,
            "flops_per_second": rate,
            "utilisation": None if peak is None else rate / peak,
            "peak_bytes": self.peak,
            "reserved_bytes": self.reserved,
            "estimated_bytes": max(tensors),
        }


def measure(spec: TrainingSpec, configs: Configs, device: torch.device) -> dict[str, Any]:
    """A group sampled and trained on by one process, after a micro-batch that is not timed."""
    estimated = estimate(spec)
    assert estimated is not None
    policy = load_policy(spec, device, frozenset({"network", "decoder"}))
    policy.tune(spec.seed, with_reference=spec.objective.compares_reference)
    learner = Learner(spec, device, policy)
    ticket = learner.announce(0, averaged=False)
    conditions, size = {PROMPT: random_condition(policy, configs)}, spec.sampling.size
    units = plan_iteration(spec, 1, 1, policy.sigmas(spec.sampling.steps, size)).units

    def draw(unit: WorkUnit) -> tuple[WorkUnit, Trajectory]:
        trajectory, x = rollout(policy, unit, conditions, size, ticket)
        policy.images(x, size)
        return unit, trajectory

    advantages = np.random.default_rng(0).normal(size=spec.sampling.images).astype(np.float32)

    def train(index: int, unit: WorkUnit, trajectory: Trajectory) -> None:
        mine = advantages[index * unit.batch : (index + 1) * unit.batch]
        learner.accumulate(unit, trajectory, conditions, mine, np.ones(unit.batch, bool))

    with Watch(device) as first:
        draw(units[0])
    with Watch(device) as sampling:
        sampled = [draw(unit) for unit in units]
    floor = Floor.of([learner.measure_floor(*of, conditions) for of in sampled])
    learner.gate.floor = floor
    with Watch(device) as first_update:
        train(0, *sampled[0])
    learner.optimizer.zero_grad()
    learner.announce(0, averaged=False)
    with Watch(device) as training:
        for index, of in enumerate(sampled):
            train(index, *of)
        steps = [learner.step(spec.sampling.images, spec.points)]
    for _ in range(UPDATES - 1):
        for index, of in enumerate(sampled):
            train(index, *of)
        steps.append(learner.step(spec.sampling.images, spec.points))
    stages = estimated.actors["workers"]
    images = spec.sampling.images
    return {
        "dtype": spec.model.dtype,
        "size": list(size),
        "steps": spec.sampling.steps,
        "images": images,
        "micro_batch": spec.sampling.micro_batch,
        "parameters": estimated.parameters,
        "floor": floor.as_json(),
        "beyond_clip": floor.beyond(min(spec.objective.bounds.values)),
        "overflows": sum(step.overflow for step in steps),
        "first_seconds": first.seconds + first_update.seconds,
        "rollout": sampling.row(
            images, estimated.rollout_flops, [stages[name] for name in ("sampling", "decoding")]
        ),
        "update": training.row(
            images, estimated.training_flops, [stages[name] for name in ("training", "update")]
        ),
    }


def train_tiny(device: torch.device, iterations: int) -> dict[str, Any]:
    """The tiny model, by the command: held-out OCR before and after, and seconds."""
    gpus = 0.9 if device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as runs:
        settings = [
            "cluster.layout=colocated",
            f"cluster.workers={{count: 1, gpus: {gpus}, cpus: 1}}",
            f"iterations={iterations}",
        ]
        command = [sys.executable, "-m", "flowgrpo_ray", "train", "tiny-ocr", "--runs", runs]
        for setting in settings:
            command += ["--set", setting]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            return {"error": done.stdout[-2000:] + done.stderr[-2000:]}
        folder = Path(runs) / "tiny-ocr"
        summary = json.loads((folder / "summary.json").read_text())
        rows = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "train"]
    return {
        "iterations": iterations,
        "seconds": seconds,
        "before": summary["eval_before"]["ocr"],
        "after": summary["eval_after"]["ocr"],
        "ratio_floor": summary["ratio_floor"],
        "excess": sum(row["log_ratio"]["excess"] for row in rows),
    }


# --- what it comes to


Finding = tuple[str, bool | None, str]  # a claim, whether it holds, and what was found


def verdicts(
    results: Mapping[str, dict[str, Any]], tiny: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The claims of the documentation, and what was found."""
    measured = {name: row for name, row in results.items() if "error" not in row}
    failed = [(f"{n} runs", False, row["error"]) for n, row in results.items() if "error" in row]
    found = [*failed, *(of for named in measured.items() for of in _of_case(*named))]
    eager, compiled = measured.get("bfloat16"), measured.get("bfloat16, compiled")
    if eager and compiled:
        times = [eager[part]["seconds"] / compiled[part]["seconds"] for part in PARTS]
        says = f"{times[0]:.2f} times as fast in sampling, {times[1]:.2f} in the update"
        found.append(("compiling pays", min(times) > 1, says))
    if tiny is not None:
        found.append(_of_tiny(tiny))
    return [dict(zip(("claim", "ok", "says"), of, strict=True)) for of in found]


def _of_case(name: str, row: Mapping[str, Any]) -> Iterator[Finding]:
    largest, lost = max(row["floor"]["largest"]), row["beyond_clip"]
    says = f"max |log rho| {largest:.2g}, {lost:.1%} beyond the clip range"
    yield f"{name}: noise is not clipped", lost < MOST_IN_NOISE, says
    for part in PARTS:
        peak, expected = row[part]["peak_bytes"], row[part]["estimated_bytes"]
        if peak is not None:
            says = f"{peak / 2**30:.2f} GiB, estimated {expected / 2**30:.2f}"
            yield f"{name}, {part}: no more memory than plan says", peak <= expected, says
    if row["dtype"] == "float16":
        says = f"{row['overflows']} of the first {UPDATES}"
        yield f"{name} wastes no update at the start", row["overflows"] == 0, says


def _of_tiny(tiny: Mapping[str, Any]) -> Finding:
    if "error" in tiny:
        return "the tiny model trains", False, tiny["error"]
    says = f"held-out OCR {tiny['before']:.3f} to {tiny['after']:.3f} in {tiny['seconds']:.0f} s"
    return f"the tiny model reaches {TRAINED}", tiny["after"] >= TRAINED, says


def attempt(
    scale: str, case: Case, configs: Configs, device: torch.device, folder: Path
) -> dict[str, Any]:
    """A case's numbers, or why there are none: the others go on."""
    try:
        row = measure(benchmark_spec(scale, case, device, folder), configs, device)
    except (RuntimeError, ContractError, ModelError) as error:  # out of memory is a RuntimeError
        row = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "device": properties.name if properties else platform.processor() or platform.machine(),
        "memory_bytes": properties.total_memory if properties else None,
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure each case, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], metavar="CASE")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins after so many")
    parser.add_argument("--train", type=int, default=60, help="iterations of the tiny model")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    if options.scale == "full" and not torch.cuda.is_available():
        parser.error("--scale full needs a GPU; --scale tiny runs on the CPU")
    began = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    wanted = [case for case in CASES if case.name in (options.cases or [case.name])]
    results: dict[str, dict[str, Any]] = {}
    tiny = train_tiny(device, options.train) if options.train else None  # the GPU is its own
    join_group(0, 1, socket.create_server(("127.0.0.1", 0)), device)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            configs = find_configs(load_spec("sd35-ocr", SCALES[options.scale]).model)
            assert configs is not None, "both scales come with this package"
            write_random_model(configs, folder, device, seed=0)
            for case in wanted:
                if time.perf_counter() - began < 60 * options.minutes:
                    results[case.name] = attempt(options.scale, case, configs, device, folder)
    finally:
        dist.destroy_process_group()
    packages = ("torch", "diffusers", "transformers", "peft", "numpy")
    found = {
        "scale": options.scale,
        "machine": machine(device),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "minutes": (time.perf_counter() - began) / 60,
        "results": results,
        "tiny": tiny,
        "not_run": [case.name for case in wanted if case.name not in results],
        "verdicts": verdicts(results, tiny),
    }
    print(json.dumps(found, indent=2))
    marks = {True: "ok", False: "NO", None: "--"}
    for one in found["verdicts"]:
        print(f"{marks[one['ok']]}  {one['claim']}: {one['says']}", file=sys.stderr)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
