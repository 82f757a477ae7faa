"""`flowgrpo-ray train`: a run, and the verdict on a validation run."""

from __future__ import annotations

import itertools
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flowgrpo_ray.cli.options import RunsOption, SetOption, SpecArgument
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.paths import in_job, runs_root
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    from flowgrpo_ray.cluster.run import Outcome

STARTED = time.perf_counter()

console = Console()


def train(
    spec: SpecArgument,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run of this name from its checkpoint")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="delete the run of this name, and begin it anew")
    ] = False,
    runs: RunsOption = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="print errors alone; driver.log has the notes")
    ] = False,
    validate: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="run N iterations without KL in a folder of their own, judge"
        ),
    ] = None,
) -> None:
    """Train a model: joins the Ray cluster of RAY_ADDRESS, or starts one on this machine.

    Ctrl-C finishes the iteration and saves; Ctrl-C again stops at once. Continue with --resume.
    """
    runs, resolved = runs_root(runs), None
    console.quiet = quiet
    try:
        from flowgrpo_ray.cluster.run import train as run_training
        from flowgrpo_ray.view.console import RunDisplay

        resolved = load_spec(spec, overrides or [])
        if resume and overwrite:
            raise SpecError("--resume goes on with a run and --overwrite deletes it: give one")
        if in_job():
            console.print(
                f"run folder: {runs / resolved.name}", soft_wrap=True, markup=False, highlight=False
            )
        if validate is not None:
            resolved = _validation_run(resolved, validate, runs, resume)
        with RunDisplay(resolved, console) as display:
            outcome = run_training(
                resolved,
                runs,
                resume=resume,
                overwrite=overwrite,
                display=display,
                started=STARTED,
            )
        if outcome.stopped:
            _say_how_to_continue(_again(spec, overrides, runs), outcome)
        elif validate is not None:
            raise typer.Exit(_judge(resolved, outcome))
        else:
            _say_what_came_of_it(resolved, outcome)
    except KeyboardInterrupt:
        _say_what_is_left(_again(spec, overrides, runs), resolved and runs / resolved.name)
        raise typer.Exit(130) from None


def _say_what_came_of_it(spec: TrainingSpec, outcome: Outcome) -> None:
    """Of a finished run: rewards before and after, where its time went, and what to do next."""
    from flowgrpo_ray.run.tracking import TIMINGS, read_rows
    from flowgrpo_ray.view.console import ledger_table, summary_table
    from flowgrpo_ray.view.tables import print_table

    console.print()
    print_table(console, summary_table(outcome.summary))
    if (ledger := ledger_table(read_rows(outcome.folder / TIMINGS))) is not None:
        print_table(console, ledger)
    done, images = outcome.summary["iterations"], outcome.summary["images"]
    seconds = outcome.summary["seconds"]
    console.print(f"{done} iterations, {images:,} images, {seconds:.0f} s from the command to here")
    best = outcome.summary.get("best")  # not in those of earlier versions
    if best:
        says = f"best:   iteration {best['iteration']}, {best['reward']} {best['value']:.3f}; "
        says += "sample, evaluate and export take it with --iteration best"
        console.print(says, soft_wrap=True, markup=False, highlight=False)
    console.print(f"report: {outcome.folder / 'report.html'}", soft_wrap=True, markup=False)
    console.print(
        f"next:   flowgrpo-ray sample {outcome.folder} 'blue sign \"246\"' 'pink sign \"582\"'"
        if spec.model.path == "builtin:tiny-sd3"
        else f"next:   flowgrpo-ray export {outcome.folder} --out {spec.name}-export",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _again(spec: str, overrides: list[str] | None, runs: Path) -> str:
    """The command that goes on with a run, or begins it again."""
    if in_job():
        return "the same submission (a plain ray job submit wants --resume with train)"
    return f"flowgrpo-ray train {spec}{_as_options(overrides)} --runs {runs} --resume"


def _say_what_is_left(again: str, folder: Path | None) -> None:
    """Of a run that was interrupted: its newest checkpoint, or that there is none."""
    from flowgrpo_ray.run.checkpoint import checkpoint_iteration, list_checkpoints

    kept = list_checkpoints(folder / "checkpoints") if folder else []
    says = "interrupted; nothing is saved yet, begin again"
    if kept:
        says = f"interrupted; saved is iteration {checkpoint_iteration(kept[-1])}, continue"
    console.print(f"{says} with\n  {again}", soft_wrap=True, markup=False, highlight=False)


def _say_how_to_continue(again: str, outcome: Outcome) -> None:
    """What is kept of a run that was stopped, and the command that goes on with it."""
    from flowgrpo_ray.view.console import say

    if outcome.diverged:
        again += " --set watch.action=report"
        says = f"stopped by the watch: {outcome.diverged}"
        say(console, says)
    done = outcome.summary["iterations"]
    saved = f"stopped after iteration {done}, saved" if done else "stopped before iteration 1"
    console.print(
        f"{saved}; continue with\n  {again}", soft_wrap=True, markup=False, highlight=False
    )


def _validation_run(spec: TrainingSpec, iterations: int, runs: Path, resume: bool) -> TrainingSpec:
    """The spec of a validation run, under a name that is free."""
    from flowgrpo_ray.run.validation import validation_spec

    if resume:
        raise SpecError("--validate begins anew; leave out --resume")
    wanted = validation_spec(spec, iterations)
    names = (wanted.name if n == 1 else f"{wanted.name}-{n}" for n in itertools.count(1))
    free = next(name for name in names if not (runs / name).exists())
    return wanted.model_copy(update={"name": free})


def _judge(spec: TrainingSpec, outcome: Outcome) -> int:
    """Print and keep the verdict of a validation run; the exit status."""
    from flowgrpo_ray.run.tracking import METRICS, read_rows
    from flowgrpo_ray.run.validation import verdict
    from flowgrpo_ray.view.console import verdict_table
    from flowgrpo_ray.view.tables import print_table

    rows = read_rows(outcome.folder / METRICS)
    found = verdict(spec, rows, outcome.summary["ratio_floor"])
    file = outcome.folder / "validation.json"
    file.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    print_table(console, verdict_table(found))
    console.print(
        f"kept in {file}; curves: {outcome.folder / 'report.html'}", soft_wrap=True, markup=False
    )
    return 0 if found.ok else 1


def _as_options(overrides: list[str] | None) -> str:
    return "".join(f" --set {shlex.quote(override)}" for override in overrides or [])
