"""Stable Diffusion 3.5 Medium at its true size on one GPU: one group sampled, one update.

Weights are random, of the published configs, and so are the prompts' encodings: no download is
needed, and time and memory do not depend on values. Rollout and update run through the code of a
training run, one after the other in one process, with the LoRA and objective of ``sd35-ocr``.

    .venv/bin/python benchmarks/gpu_sd35.py --out gpu.json

``--scale tiny`` runs the same code over the embedded model's configs, on a CPU too.
docs/gpu.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flowgrpo_ray.algorithm.gate import Floor
from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.parallel import join_group
from flowgrpo_ray.algorithm.sampling import rollout
from flowgrpo_ray.algorithm.weights import digest
from flowgrpo_ray.common.types import Condition, Trajectory, WeightsTicket, WorkUnit
from flowgrpo_ray.estimate.footprint import Footprint, estimate, find_configs
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Configs, Policy, as_array
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.prompts import plan_iteration
from flowgrpo_ray.spec.training import TrainingSpec

# Dense bfloat16 and float16 FLOP/s of the vendor's data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
SHIFT = 3.0  # of the published scheduler
PROMPT = 0  # the one prompt of the group
SCALES: dict[str, tuple[str, ...]] = {
    "full": (
        "model.path=stabilityai/stable-diffusion-3.5-medium",
        "sampling.group_size=24",
        "sampling.micro_batch=8",
        "evaluation.micro_batch=8",
    ),
    "tiny": (
        "model.path=builtin:tiny-sd3",
        "model.max_sequence_length=10",
        "sampling.size=[32, 48]",
        "sampling.steps=3",
        "sampling.group_size=4",
        "sampling.micro_batch=2",
        "evaluation.micro_batch=2",
    ),
}


def benchmark_spec(scale: str, dtype: str, device: torch.device) -> TrainingSpec:
    """``sd35-ocr`` as one group and one update on one GPU (or, on the CPU, none)."""
    gpus = 1 if device.type == "cuda" else 0
    return load_spec(
        "sd35-ocr",
        [
            *SCALES[scale],
            f"model.dtype={dtype}",
            "sampling.groups=1",
            "objective.updates=1",
            f"cluster={{rollout: {{gpus: {gpus}}}, learner: {{gpus: {gpus}}}}}",
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


def sample(
    spec: TrainingSpec, configs: Configs, device: torch.device, estimated: Footprint
) -> tuple[list[tuple[WorkUnit, Trajectory]], Condition, WeightsTicket, dict[str, Any]]:
    """The group's trajectories, after one micro-batch that is not timed."""
    policy = load_policy(spec, device, frozenset({"network", "decoder"}))
    policy.tune(spec.seed, with_reference=spec.objective.compares_reference)
    condition = random_condition(policy, configs)
    size = spec.sampling.size
    sigmas = policy.sigmas(spec.sampling.steps, size)
    units = plan_iteration(spec, 1, 1, sigmas).units
    ticket = WeightsTicket(0, digest(policy.trainable()))

    def draw(unit: WorkUnit) -> tuple[WorkUnit, Trajectory]:
        trajectory, x = rollout(policy, unit, {PROMPT: condition}, size, ticket)
        policy.images(x, size)
        return unit, trajectory

    draw(units[0])
    with Watch(device) as watch:
        sampled = [draw(unit) for unit in units]
    stages = [estimated.actors["rollout"][stage] for stage in ("sampling", "decoding")]
    return (
        sampled,
        condition,
        ticket,
        watch.row(spec.sampling.images, estimated.rollout_flops, stages),
    )


def update(
    spec: TrainingSpec,
    sampled: Sequence[tuple[WorkUnit, Trajectory]],
    condition: Condition,
    ticket: WeightsTicket,
    device: torch.device,
    estimated: Footprint,
) -> tuple[float, dict[str, Any]]:
    """``max |log rho|`` before the first update, which is also the warm-up; then one update."""
    learner = Learner(spec, device)
    published, _ = learner.publish(0)
    assert published == ticket, "the learner draws the same adapters from the seed"
    conditions = {PROMPT: condition}
    learner.gate.floor = Floor.of([learner.measure_floor(*of, conditions) for of in sampled])
    advantages = np.random.default_rng(0).normal(size=spec.sampling.images).astype(np.float32)
    batch = spec.sampling.micro_batch
    with Watch(device) as watch:
        for index, (unit, trajectory) in enumerate(sampled):
            mine = advantages[index * batch : (index + 1) * batch]
            learner.accumulate(unit, trajectory, conditions, mine, np.ones(batch, bool))
        learner.step(spec.sampling.images, spec.points)
    stages = [estimated.actors["learner"][stage] for stage in ("training", "update")]
    row = watch.row(spec.sampling.images, estimated.training_flops, stages)
    return learner.gate.floor.largest, row


def run(scale: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """All numbers of one dtype."""
    spec = benchmark_spec(scale, dtype, device)
    configs = find_configs(spec.model)
    assert configs is not None, "both scales come with this package"
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(configs, Path(folder), device, spec.seed)
        model = spec.model.model_copy(update={"path": folder})
        spec = spec.model_copy(update={"model": model})
        estimated = estimate(spec)
        assert estimated is not None
        sampled, condition, ticket, rollout_row = sample(spec, configs, device, estimated)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log_rho, update_row = update(spec, sampled, condition, ticket, device, estimated)
    return {
        "dtype": dtype,
        "size": list(spec.sampling.size),
        "steps": spec.sampling.steps,
        "images": spec.sampling.images,
        "micro_batch": spec.sampling.micro_batch,
        "parameters": estimated.parameters,
        "log_rho_max": log_rho,
        "rollout": rollout_row,
        "update": update_row,
    }


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
    """Parse the options, measure each dtype, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    if options.scale == "full" and not torch.cuda.is_available():
        parser.error("--scale full needs a GPU; --scale tiny runs on the CPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    join_group(0, 1, socket.create_server(("127.0.0.1", 0)), device)
    try:
        results = [run(options.scale, dtype, device) for dtype in options.dtypes]
    finally:
        dist.destroy_process_group()
    packages = ("torch", "diffusers", "transformers", "peft", "numpy")
    found = {
        "scale": options.scale,
        "machine": machine(device),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "results": results,
    }
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
