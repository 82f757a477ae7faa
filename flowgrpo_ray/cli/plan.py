"""What ``flowgrpo-ray plan`` prints: counts, FLOPs, memory by part, and whether a GPU has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flowgrpo_ray.common.errors import NotFetchedError, SpecError
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.run.cost import cost_of
from flowgrpo_ray.spec.cluster import NAMES
from flowgrpo_ray.spec.training import TrainingSpec, required_resources
from flowgrpo_ray.view.console import say
from flowgrpo_ray.view.tables import print_table

if TYPE_CHECKING:
    from flowgrpo_ray.estimate.footprint import Footprint, Work
    from flowgrpo_ray.estimate.gpus import Gpu

GIB = 2**30
# GiB that torch can use, rounded down: a little less than what the name says.
GPUS = {
    **{"a10g": 22, "l4": 22, "rtx3090": 23, "rtx4090": 23, "rtx5090": 31, "a100-40": 39},
    **{"l40s": 44, "a6000": 47, "a100-80": 79, "h100": 79, "h200": 139, "b200": 178},
    "mi300x": 191,
}
ALIASES = {"a100": "a100-80", "rtxa6000": "a6000"}
MOST_GIB = 300  # of one GPU: a larger number is the name of one, as 4090
ASSUMED = GPUS["h100"]  # where ranks have GPUs and none is named or here


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
    prompts, held_out, sources, prompts_say = prompts_of(spec)
    device = None if gpu is None else (gpu, gpu_memory(gpu))
    if price is not None and measured is None:
        raise SpecError("--gpu-hour: name a run to take times from with --measured RUN")
    cost = None if measured is None else cost_of(spec, measured, price)
    from flowgrpo_ray.estimate.footprint import count_work, estimate
    from flowgrpo_ray.estimate.gpus import gpu_here

    device = device or gpu_here()
    memory = (device[1] if device else ASSUMED) * GIB if spec.ranks.gpus else None
    work = count_work(spec, held_out)
    footprint = estimate(spec, memory, prompts, sources)
    reserved, watched = required_resources(spec), price_of_watched(spec)
    if as_json:
        found: dict[str, Any] = {"name": spec.name, "spec": spec.digest(), "work": asdict(work)}
        found |= {"reserved": reserved, "watched": watched, "cost": cost}
        found |= {"footprint": None if footprint is None else asdict(footprint)}
        found |= {"needed": None if footprint is None else needed(spec, footprint)}
        print(json.dumps(found, indent=2))
        return
    print_table(console, _counts(spec, work, footprint))
    say(console, prompts_say)
    console.print("reserved in Ray: " + ", ".join(f"{n:g} {name}" for name, n in reserved.items()))
    for name, takes in watched.items():
        says = f"{name} is only watched: of these {takes['cpus']:g} CPU and {takes['gpus']:g} GPU, "
        says += f"to score {work.images:,} images an iteration, {held_out:,} an evaluation"
        say(console, says)
    if spec.checkpoint.best:
        say(console, _best(spec))
    if cost is not None:
        for line in _cost_lines(cost):
            say(console, line)
    if footprint is None:
        console.print(
            f"memory: unknown, the configs of {spec.model.path} are not on this disk; give a local "
            "folder, or fetch the model into the hub's cache"
        )
        return
    print_table(console, _memory(footprint))
    for what in not_counted(footprint):
        console.print(f"not counted: {what}", highlight=False)
    if spec.ranks.count > 1:
        console.print(shared(spec, footprint, device), highlight=False)
    for line in verdicts(spec, footprint, device):
        console.print(line, highlight=False)
    if footprint.layouts:
        print_table(console, _layouts(spec, footprint))
        console.print(advised(spec, footprint, device), highlight=False)


def _best(spec: TrainingSpec) -> str:
    every = spec.evaluation.every
    return (
        f"checkpoint.best: the best by {spec.checkpoint.best} of {-(-spec.iterations // every):,} "
        f"evaluations, one every {every} iterations and at the end; a better one is saved there"
    )


def price_of_watched(spec: TrainingSpec) -> dict[str, dict[str, float]]:
    """What the replicas of each reward of weight 0 reserve."""
    return {
        name: {"cpus": reward.replicas * reward.cpus, "gpus": reward.replicas * reward.gpus}
        for name, reward in spec.rewards.items()
        if reward.weight == 0
    }


def prompts_of(spec: TrainingSpec) -> tuple[int | None, int, int | None, str]:
    """How many to train on and held out, how many images each changes, and what is said of them; of
    public sets that are not here yet as many as the spec asks for."""
    try:
        prompts, held_out = check_run(spec)
    except NotFetchedError as error:
        assumed = spec.evaluation.prompts * len(spec.prompts.sets)
        return None, assumed, None, f"{error}. Here {assumed:,} held-out prompts are assumed"
    says = f"prompts: {len(prompts):,} to train on, {len(held_out):,} held out"
    return len(prompts), len(held_out), len(prompts[0].images), says


def gpu_memory(gpu: str) -> float:
    """GiB of a GPU by name, or the number that was given; ``SpecError`` for anything else."""
    name = gpu.lower().replace(" ", "").replace("_", "-").removeprefix("nvidia-")
    for known in (name, ALIASES.get(name), f"rtx{name}", name.replace("rtx-", "rtx")):
        if known in GPUS:
            return GPUS[known]
    try:
        memory = float(gpu)
    except ValueError:
        memory = 0.0
    if not 0 < memory <= MOST_GIB:
        raise SpecError(f"--gpu {gpu!r}: write a number of GiB, or one of {', '.join(GPUS)}")
    return memory


def not_counted(footprint: Footprint) -> Iterator[str]:
    """What takes memory of a GPU and has no known size."""
    if not footprint.encoders_known:
        yield "the text encoders, which are not on this disk"
    for name, parts in footprint.rewards.items():
        if parts is None:
            yield f"the reward {name}"


def gpus_of(spec: TrainingSpec, footprint: Footprint) -> list[Gpu]:
    from flowgrpo_ray.estimate.gpus import gpus

    return gpus(spec, footprint.actors, footprint.rewards)


def needed(spec: TrainingSpec, footprint: Footprint) -> dict[str, dict[str, float]]:
    """GiB that one GPU must have in each phase, by what runs on it; empty if nothing does."""
    return {
        gpu.name: {phase: size / GIB for phase, size in gpu.phases().items()}
        for gpu in gpus_of(spec, footprint)
    }


def verdicts(
    spec: TrainingSpec, footprint: Footprint, gpu: tuple[str, float] | None
) -> Iterator[str]:
    """For each kind of GPU by what runs on it: the phase that needs the most, and whether ``gpu``
    (name, GiB) has it; without ``gpu`` the smallest known one that has."""
    for kind in gpus_of(spec, footprint):
        phase, size = kind.largest()[0], kind.largest()[1] / GIB
        if gpu is not None:
            fits = size <= gpu[1]
            says = f"{'fits' if fits else 'DOES NOT FIT'} {gpu[0]} ({gpu[1]:g} GiB)"
        else:
            enough = [f"{known} ({has} GiB)" for known, has in GPUS.items() if has >= size]
            fits = bool(enough)
            says = f"the smallest GPU that has it: {enough[0]}" if fits else "no known GPU has it"
        yield f"{kind.name}: {size:.1f} GiB in {phase}; {says}"
        if not fits:
            sharded = footprint.parallel.sharded
            yield "  to need less: " + "; ".join(advice(spec, kind, sharded=sharded))


def shared(spec: TrainingSpec, footprint: Footprint, gpu: tuple[str, float] | None) -> str:
    """How those that train together hold the network, and what that assumes."""
    from flowgrpo_ray.estimate.parallel import PER_NODE

    found = f"{spec.ranks.count} {NAMES[spec.trains]}s: {footprint.parallel}"
    if not spec.ranks.gpus or spec.cluster.learner.parallel == "replicate":
        return found
    assumed = [] if gpu else [f"GPUs of {ASSUMED} GiB (name yours with --gpu)"]
    assumed += [f"{PER_NODE} GPUs a machine"] if spec.ranks.count > PER_NODE else []
    return f"{found}; assuming {' and '.join(assumed)}" if assumed else found


def advice(spec: TrainingSpec, gpu: Gpu, *, sharded: bool) -> Iterator[str]:
    """What to change so that what runs on ``gpu`` needs less memory."""
    learner, full = spec.cluster.learner, spec.tuning.kind == "full"
    phase, _ = gpu.largest()
    stages = set(phase.split(" and "))
    holds = {"update", "training", "publishing"} & stages
    if "training" in stages and not learner.activation_checkpointing:
        yield "cluster.learner.activation_checkpointing=true"
    if holds and not learner.offload_optimizer:
        yield "cluster.learner.offload_optimizer=true"
    if holds:
        if sharded:
            yield f"a larger cluster.{spec.trains}.count"
        elif spec.ranks.count > 1:
            yield "cluster.learner.parallel=shard"
        else:
            yield "cluster.learner.parallel=shard and more GPUs"
    if stages & {"training", "sampling"}:
        yield "a smaller sampling.micro_batch"
    if "evaluation" in stages:
        yield "a smaller evaluation.micro_batch"
    if full and spec.objective.compares_reference and gpu.actors.keys() - {"learner rank"}:
        yield spec.objective.without_tie
    if full and holds:
        yield "tuning.kind=lora"
    for name, (_, parts) in gpu.rewards.items():
        if parts and "dtype" not in spec.rewards[name].options:
            yield f"rewards.{name}.options.dtype=float16"
    yield "a GPU with more memory, or one for each actor"


def advised(spec: TrainingSpec, footprint: Footprint, gpu: tuple[str, float] | None) -> str:
    """The layout that the spec should have."""
    from flowgrpo_ray.estimate.layouts import reason, recommended

    name, has = gpu or ("any known GPU", max(GPUS.values()))
    chosen = recommended(footprint.layouts, has * GIB)
    if chosen is None:
        return f"layouts: none fits {name} ({has:g} GiB)"
    parallel = f", cluster.learner.parallel: {chosen.parallel}" if sum(chosen.counts) > 1 else ""
    why = reason(chosen, footprint.layouts, spec)
    return f"recommended: cluster.layout: {chosen.layout}{parallel}: {why}"


# --- time and price


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
    of_what = "of the KL reference" if spec.objective.stochastic else "to compare with"
    table = Table(title=f"{spec.name} (spec {spec.digest()})", title_justify="left")
    for column in ("", "per iteration", f"in {n} iterations"):
        table.add_column(column, justify="left" if not column else "right")
    for label, count in (
        ("images", work.images),
        ("micro-batches", work.micro_batches),
        ("forwards of one image, sampling", work.rollout_forwards),
        ("forwards and backwards, training", work.trained_forwards),
        (f"forwards {of_what}", work.reference_forwards),
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
    """Parts of the largest stage of each kind of process, and what the other stages need."""
    title = f"memory ({footprint.parameters / 1e6:,.2f} M parameters, "
    title += f"{footprint.trained_parameters / 1e6:,.2f} M trained)"
    from flowgrpo_ray.estimate.gpus import totals

    sizes = {section: totals(stages) for section, stages in footprint.actors.items()}
    small = max(max(of.values()) for of in sizes.values()) < GIB
    unit, size_of = ("MiB", 2**20) if small else ("GiB", GIB)
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    table.add_column(unit, justify="right")

    def add(label: str, size: int) -> None:
        table.add_row(label, f"{size / size_of:,.2f}")

    for section, stages in footprint.actors.items():
        actor, of = NAMES[section], sizes[section]
        top = max(of, key=lambda stage: of[stage])
        table.add_section()
        add(f"{actor}, {top}", of[top])
        for part, size in stages[top].items():
            if size:
                add(f"  {part}", size)
        for stage, size in of.items():
            if stage != top:
                add(f"{actor}, {stage}", size)
    for name, parts in footprint.rewards.items():
        if parts:
            add(f"reward {name}, a replica", sum(parts.values()))
    if footprint.host:
        add("in the host's memory, of each that trains", footprint.host)
    return table


def _layouts(spec: TrainingSpec, footprint: Footprint) -> Table:
    """What as many GPUs would give, and need, in either layout."""
    from flowgrpo_ray.estimate.layouts import by_counts

    shards = any(row.parallel == "shard" for row in footprint.layouts)
    title = f"layouts of {spec.gpus} GPU{'s' * (spec.gpus > 1)}, by FLOPs"
    table = Table(title=title, title_justify="left")
    columns = ["", "GPUs", "images/s", "waits", "GiB, replicated", *["GiB, sharded"][:shards]]
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    best = max(row.busy for row in footprint.layouts)
    for layout, counts, rows in by_counts(footprint.layouts):
        needs = [" + ".join(f"{size / GIB:.1f}" for size in row.needs) for row in rows]
        speed = [f"{rows[0].busy / best:.0%}", f"{1 - rows[0].busy:.0%}"]
        table.add_row(layout, " + ".join(map(str, counts)), *speed, *needs)
    return table
