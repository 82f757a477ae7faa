"""What ``flowgrpo-ray plan`` prints: counts, FLOPs, memory by part, and whether a GPU has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.run.folder import RunFolder, difference
from flowgrpo_ray.run.tracking import TIMINGS, read_rows
from flowgrpo_ray.spec.cluster import ActorsSpec
from flowgrpo_ray.spec.training import TrainingSpec, required_resources

if TYPE_CHECKING:
    from flowgrpo_ray.estimate.footprint import Footprint, Work

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


def show_plan(
    spec: TrainingSpec,
    gpu: str | None,
    as_json: bool,
    console: Console,
    measured: Path | None = None,
    price: float | None = None,
) -> None:
    """Check ``spec`` and print what it will do; ``gpu`` is a name of ``GPUS`` or GiB, ``measured``
    a run to take times from, ``price`` that of an hour of a GPU."""
    prompts, held_out = check_run(spec)
    device = None if gpu is None else (gpu, gpu_memory(gpu))
    if price is not None and measured is None:
        raise SpecError("--gpu-hour: name a run to take times from with --measured RUN")
    cost = None if measured is None else cost_of(spec, measured, price)
    from flowgrpo_ray.estimate.footprint import count_work, estimate, gpu_here

    work, footprint = count_work(spec, len(held_out)), estimate(spec)
    reserved = required_resources(spec)
    if as_json:
        found: dict[str, Any] = {"name": spec.name, "spec": spec.digest(), "work": asdict(work)}
        found |= {"reserved": reserved}
        found |= {"footprint": None if footprint is None else asdict(footprint)}
        found |= {"needed": None if footprint is None else needed(spec, footprint)}
        found |= {"cost": cost}
        print(json.dumps(found, indent=2))
        return
    console.print(_counts(spec, work, footprint))
    console.print(f"prompts: {len(prompts):,} to train on, {len(held_out):,} held out")
    console.print("reserved in Ray: " + ", ".join(f"{n:g} {name}" for name, n in reserved.items()))
    if cost is not None:
        for line in _cost_lines(cost):
            console.print(line, highlight=False, soft_wrap=True)
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
    rollout, learner = spec.cluster.rollout, spec.cluster.learner
    worker, rank = (largest(s)[1] / GIB for s in (footprint.rollout, footprint.learner))
    beside = _sharing(rollout, 1 - learner.gpus)
    if rollout.gpus and learner.gpus and beside:
        workers = "rollout worker" if beside == 1 else f"{beside} rollout workers"
        return {f"{workers} + learner rank": beside * worker + rank}
    kinds = {"rollout worker": (rollout, worker), "learner rank": (learner, rank)}
    return {n: _sharing(kind, 1) * size for n, (kind, size) in kinds.items() if kind.gpus}


def _sharing(kind: ActorsSpec, part: float) -> int:
    """How many actors of a kind may come to lie in this part of one GPU."""
    return min(kind.count, int(part / kind.gpus + 1e-9)) if kind.gpus else 0


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
    from flowgrpo_ray.estimate.footprint import shards

    learner = spec.cluster.learner
    full = spec.tuning.kind == "full"
    if "learner" in name:
        stage, _ = largest(footprint.learner)
        if stage == "update" and not learner.activation_checkpointing:
            yield "cluster.learner.activation_checkpointing=true"
        if stage != "loading" and not learner.offload_optimizer:
            yield "cluster.learner.offload_optimizer=true"
        if stage == "update":
            if shards(spec) > 1:
                yield "a larger cluster.learner.count"
            else:
                alone = " and a larger cluster.learner.count" if learner.count == 1 else ""
                yield f"cluster.learner.parallel=shard{alone}"
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


# --- time and price

COMPARED = {
    *("model", "tuning", "sampling", "rewards", "advantages", "objective", "evaluation", "cluster")
}


def cost_of(spec: TrainingSpec, run: Path, price: float | None) -> dict[str, Any]:
    """Hours of ``spec`` at the speed of ``run``, which must have done the same work on the same
    division of machines; ``SpecError`` if it has not."""
    held = RunFolder.existing(run).read_spec()
    if odd := difference(_timed(held), _timed(spec)):
        raise SpecError(
            f"measured in {run}: {odd}. Measure this spec: train it under another name for a few "
            "iterations"
        )
    timings = run / TIMINGS
    rows = read_rows(timings) if timings.exists() else []
    starts, trains, evals = (
        [row["seconds"] for row in rows if row["kind"] == kind]
        for kind in ("start", "train", "eval")
    )
    if not starts or len(trains) < 2 or not evals:
        raise SpecError(f"measured in {run}: it needs 2 iterations and an evaluation at least")
    start, each, evaluation = starts[-1], median(trains[1:]), evals[-1]  # the first warms up
    evaluations = 1 + -(-spec.iterations // spec.evaluation.every)
    after_start = (evaluations - 1) * evaluation  # the first one is a phase of the start
    hours = (start + spec.iterations * each + after_start) / 3600
    reserved = required_resources(spec)
    found = {"run": str(run), "start_s": start, "iteration_s": each, "evaluation_s": evaluation}
    found |= {"iterations": spec.iterations, "evaluations": evaluations, "hours": hours}
    found |= {"gpu_hours": hours * reserved["GPU"], "cpu_hours": hours * reserved["CPU"]}
    return found | {"price": None if price is None else hours * reserved["GPU"] * price}


def _timed(spec: TrainingSpec) -> dict[str, Any]:
    """The part of a spec that the time of an iteration or an evaluation depends on."""
    values = spec.model_dump(mode="json", include=COMPARED)
    del values["evaluation"]["every"]
    values["cluster"] = {kind: values["cluster"][kind] for kind in ("rollout", "learner")}
    return values


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"measured in {cost['run']}: {cost['iteration_s']:.3g} s an iteration, "
        f"{cost['evaluation_s']:.3g} s an evaluation, {cost['start_s']:.3g} s to start"
    )
    total = f"{cost['iterations']:,} iterations and {cost['evaluations']:,} evaluations: "
    total += f"{cost['hours']:.3g} hours, {cost['gpu_hours']:.3g} GPU-hours, "
    total += f"{cost['cpu_hours']:.3g} CPU-hours"
    yield total if cost["price"] is None else f"{total}, GPUs for {cost['price']:,.2f}"


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
