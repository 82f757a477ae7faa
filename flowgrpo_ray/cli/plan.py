"""What ``flowgrpo-ray plan`` prints: counts, FLOPs, memory by part, and whether a GPU has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flowgrpo_ray.errors import SpecError
from flowgrpo_ray.preflight import check_run
from flowgrpo_ray.spec import TrainingSpec, required_resources

if TYPE_CHECKING:
    from flowgrpo_ray.footprint import Footprint, Work

GIB = 2**30
# GiB that torch can use, rounded down: a little less than what the name says.
GPUS = {
    "a10g": 22,
    "rtx4090": 23,
    "a100-40": 39,
    "l40s": 44,
    "a100-80": 79,
    "h100": 79,
    "h200": 139,
}


def show_plan(spec: TrainingSpec, gpu: str | None, as_json: bool, console: Console) -> None:
    """Check ``spec`` and print what it will do; ``gpu`` is a name of ``GPUS`` or GiB."""
    prompts, held_out = check_run(spec)
    device = None if gpu is None else (gpu, gpu_memory(gpu))
    from flowgrpo_ray.footprint import count_work, estimate, gpu_here

    work, footprint = count_work(spec, len(held_out)), estimate(spec)
    cpus, gpus = required_resources(spec)
    if as_json:
        found: dict[str, Any] = {"name": spec.name, "spec": spec.digest(), "work": asdict(work)}
        found |= {"reserved": {"cpus": cpus, "gpus": gpus}}
        found |= {"footprint": None if footprint is None else asdict(footprint)}
        found |= {"needed": None if footprint is None else needed(spec, footprint)}
        print(json.dumps(found, indent=2))
        return
    console.print(_counts(spec, work, footprint))
    console.print(f"prompts: {len(prompts):,} to train on, {len(held_out):,} held out")
    console.print(f"reserved in Ray: {cpus:g} CPUs, {gpus:g} GPUs")
    if footprint is None:
        console.print(
            f"memory: unknown, the configs of {spec.model.path} are not on this disk; give a local "
            "folder, or fetch the model into the hub's cache"
        )
        return
    console.print(_memory(footprint))
    if not footprint.encoders_known:
        console.print("encoding: the text encoders are not on this disk and not counted")
    for line in verdicts(spec, footprint, device or gpu_here()):
        console.print(line, highlight=False)


def gpu_memory(gpu: str) -> float:
    """GiB of a GPU by name, or the number that was given; ``SpecError`` for anything else."""
    if gpu.lower() in GPUS:
        return GPUS[gpu.lower()]
    try:
        memory = float(gpu)
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise SpecError(f"--gpu {gpu!r}: write a number of GiB, or one of {', '.join(GPUS)}")
    return memory


def largest(stages: Mapping[str, Mapping[str, int]]) -> tuple[str, int]:
    """The stage that needs the most, and its bytes."""
    totals = {stage: sum(parts.values()) for stage, parts in stages.items()}
    stage = max(totals, key=lambda name: totals[name])
    return stage, totals[stage]


def needed(spec: TrainingSpec, footprint: Footprint) -> dict[str, float]:
    """GiB that one GPU must have, by what runs on it; empty if nothing does.

    Actors that reserve a part of a GPU share it, and each needs all of its memory.
    """
    kinds = {
        "rollout worker": (spec.cluster.rollout.gpus, largest(footprint.rollout)[1] / GIB),
        "learner rank": (spec.cluster.learner.gpus, largest(footprint.learner)[1] / GIB),
    }
    on_gpu = {name: kind for name, kind in kinds.items() if kind[0] > 0}
    if len(on_gpu) == 2 and sum(part for part, _ in on_gpu.values()) <= 1:
        return {" + ".join(on_gpu): sum(size for _, size in on_gpu.values())}
    return {name: int(1 / part) * size for name, (part, size) in on_gpu.items()}


def verdicts(
    spec: TrainingSpec, footprint: Footprint, gpu: tuple[str, float] | None
) -> Iterator[str]:
    """For each kind of actor that takes a GPU: what it needs, and whether ``gpu`` (name, GiB) has
    it; without ``gpu`` the smallest known one that has."""
    for name, size in needed(spec, footprint).items():
        if gpu is not None:
            fits = size <= gpu[1]
            says = f"{'fits' if fits else 'DOES NOT FIT'} {gpu[0]} ({gpu[1]:g} GiB)"
        else:
            enough = [f"{known} ({has} GiB)" for known, has in GPUS.items() if has >= size]
            fits = bool(enough)
            says = f"the smallest GPU that has it: {enough[0]}" if fits else "no known GPU has it"
        yield f"{name}: {size:.1f} GiB; {says}"
        if not fits:
            yield "  to need less: " + "; ".join(advice(spec, footprint, name))


def advice(spec: TrainingSpec, footprint: Footprint, name: str) -> Iterator[str]:
    """What to change so that the actors of ``name`` need less memory."""
    learner = spec.cluster.learner
    full = spec.tuning.kind == "full"
    if "learner" in name:
        stage, _ = largest(footprint.learner)
        if stage == "update" and not learner.activation_checkpointing:
            yield "cluster.learner.activation_checkpointing=true"
        if stage != "loading" and not learner.offload_optimizer:
            yield "cluster.learner.offload_optimizer=true"
        if stage == "update":
            yield "a larger cluster.learner.count"
            yield "a smaller sampling.micro_batch"
        if full:
            yield "tuning.kind=lora"
    if "rollout" in name:
        stage, _ = largest(footprint.rollout)
        if full and spec.objective.kl:
            yield "objective.kl=null"
        if stage != "encoding":
            most = max(("sampling", "evaluation"), key=lambda part: getattr(spec, part).micro_batch)
            yield f"a smaller {most}.micro_batch"
    yield "a GPU with more memory, or one for each actor"


# --- tables


def _counts(spec: TrainingSpec, work: Work, footprint: Footprint | None) -> Table:
    n = spec.iterations
    table = Table(title=f"{spec.name} (spec {spec.digest()})", title_justify="left")
    for column in ("", "per iteration", f"in {n} iterations"):
        table.add_column(column, justify="left" if not column else "right")
    for label, count in (
        ("images", work.images),
        ("micro-batches", work.micro_batches),
        ("forwards of one image, sampling", work.rollout_forwards),
        ("forwards and backwards, training", work.trained_forwards),
        ("forwards of the KL reference", work.reference_forwards),
        ("optimizer updates", work.updates),
    ):
        table.add_row(label, f"{count:,}", f"{count * n:,}")
    if footprint is not None:
        for label, flops in (
            ("TFLOPs, sampling", footprint.rollout_flops),
            ("TFLOPs, training", footprint.training_flops),
        ):
            table.add_row(label, f"{flops / 1e12:,.3f}", f"{flops * n / 1e12:,.0f}")
    return table


def _memory(footprint: Footprint) -> Table:
    """Parts of the largest stage of each kind of actor, and what the other stages need."""
    title = f"memory ({footprint.parameters / 1e6:,.2f} M parameters, "
    title += f"{footprint.trained_parameters / 1e6:,.2f} M trained)"
    small = largest(footprint.learner)[1] < GIB
    unit, size_of = ("MiB", 2**20) if small else ("GiB", GIB)
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    table.add_column(unit, justify="right")

    def add(label: str, size: int) -> None:
        table.add_row(label, f"{size / size_of:,.2f}")

    for actor, stages in (
        ("rollout worker", footprint.rollout),
        ("learner rank", footprint.learner),
    ):
        top, total = largest(stages)
        table.add_section()
        add(f"{actor}, {top}", total)
        for part, size in stages[top].items():
            if size:
                add(f"  {part}", size)
        for stage, parts in stages.items():
            if stage != top:
                add(f"{actor}, {stage}", sum(parts.values()))
    if footprint.learner_host:
        add("learner rank, in the host's memory", footprint.learner_host)
    return table
