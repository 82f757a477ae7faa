"""The command line. Each command checks its input first and ends user mistakes in one message."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from flowgrpo_ray.cli.monitor import monitor
from flowgrpo_ray.cli.rewards import rewards_app
from flowgrpo_ray.errors import FlowGrpoError, SpecError
from flowgrpo_ray.paths import in_job, runs_root
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.spec_file import RECIPES, load_spec, recipe_names

if TYPE_CHECKING:
    from flowgrpo_ray.cluster.run import Outcome

STARTED = time.perf_counter()

app = typer.Typer(
    help="Online reinforcement learning for flow-matching text-to-image models, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(rewards_app, name="rewards")
app.command()(monitor)
console = Console()

SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC|RECIPE", help="a YAML training spec, or a recipe by name")
]
TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|SPEC",
        help="a run folder, or a spec or recipe, which stands for its untrained base model",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, as runs/tiny-ocr")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key of the spec, as seed=1"),
]
WeightsOption = Annotated[
    Literal["ema", "last"], typer.Option(help="averaged weights, or those of the last update")
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="denoising steps; default: evaluation.steps of the spec")
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        help="folder that holds the run folders; default: FLOWGRPO_RUNS, else runs, and in a Ray "
        "job ~/flowgrpo-runs"
    ),
]
IterationOption = Annotated[
    int | None, typer.Option(min=0, help="of the checkpoint; default: newest")
]


@app.command()
def train(
    spec: SpecArgument,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run of this name from its checkpoint")
    ] = False,
    runs: RunsOption = None,
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
    from flowgrpo_ray.cluster.run import train as run_training
    from flowgrpo_ray.console import RunDisplay, ledger_table, summary_table
    from flowgrpo_ray.tracking import TIMINGS, read_rows

    resolved = load_spec(spec, overrides or [])
    runs = runs_root(runs)
    if in_job():
        console.print(f"run folder: {runs / resolved.name}", soft_wrap=True, highlight=False)
    if validate is not None:
        resolved = _validation_run(resolved, validate, runs, resume)
    try:
        with RunDisplay(resolved, console) as display:
            outcome = run_training(resolved, runs, resume=resume, display=display, started=STARTED)
    except KeyboardInterrupt:
        console.print("interrupted; continue from the last checkpoint with --resume")
        raise typer.Exit(130) from None
    done = outcome.summary["iterations"]
    again = f"flowgrpo-ray train {spec}{_as_options(overrides)} --runs {runs} --resume"
    if in_job():
        again = "the same submission (a plain ray job submit wants --resume with train)"
    if outcome.stopped:
        saved = f"stopped after iteration {done}, saved" if done else "stopped before iteration 1"
        if outcome.diverged:
            again += " --set watch.action=report"
            console.print(f"stopped by the watch: {outcome.diverged.says}", highlight=False)
            if outcome.diverged.before is not None:
                export = f"flowgrpo-ray export {outcome.folder} --out {resolved.name}-export"
                console.print("the model from before is written with", highlight=False)
                console.print(
                    f"  {export} --iteration {outcome.diverged.before}",
                    soft_wrap=True,
                    highlight=False,
                )
        console.print(f"{saved}; continue with\n  {again}", soft_wrap=True, highlight=False)
        return
    if validate is not None:
        raise typer.Exit(_judge(resolved, outcome))
    console.print()
    console.print(summary_table(outcome.summary))
    if (ledger := ledger_table(read_rows(outcome.folder / TIMINGS))) is not None:
        console.print(ledger)
    images, seconds = outcome.summary["images"], outcome.summary["seconds"]
    console.print(f"{done} iterations, {images:,} images, {seconds:.0f} s from the command to here")
    console.print(f"report: {outcome.folder / 'report.html'}", soft_wrap=True)
    console.print(
        f"next:   flowgrpo-ray sample {outcome.folder} 'blue sign \"246\"' 'pink sign \"582\"'"
        if resolved.model.path == "builtin:tiny-sd3"
        else f"next:   flowgrpo-ray export {outcome.folder} --out {resolved.name}-export",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def submit(
    spec: SpecArgument,
    overrides: SetOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="of the cluster's dashboard, as http://head:8265; default: RAY_API_SERVER_ADDRESS "
            "or RAY_ADDRESS, else the cluster that runs here"
        ),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="folder on the cluster that holds the run folders, an absolute path; default: "
            "FLOWGRPO_RUNS there, else ~/flowgrpo-runs"
        ),
    ] = None,
    stop_wait: Annotated[
        int,
        typer.Option(min=1, help="seconds a stopped job has to finish its iteration and save"),
    ] = 600,
    wait: Annotated[bool, typer.Option("--wait", help="follow the job until it ends")] = False,
) -> None:
    """Train as a job of a Ray cluster; submitting the same run again continues it.

    The spec is checked here first. Uploaded are the spec, its prompt files and the modules of your
    reward classes, nothing else.
    """
    from flowgrpo_ray.cli.submit import submit_run

    raise typer.Exit(
        submit_run(load_spec(spec, overrides or []), address, runs, stop_wait, wait, console)
    )


def _validation_run(spec: TrainingSpec, iterations: int, runs: Path, resume: bool) -> TrainingSpec:
    """The spec of a validation run, under a name that is free."""
    from flowgrpo_ray.validation import validation_spec

    if resume:
        raise SpecError("--validate begins anew; leave out --resume")
    wanted = validation_spec(spec, iterations)
    names = (wanted.name if n == 1 else f"{wanted.name}-{n}" for n in itertools.count(1))
    free = next(name for name in names if not (runs / name).exists())
    return wanted.model_copy(update={"name": free})


def _judge(spec: TrainingSpec, outcome: Outcome) -> int:
    """Print and keep the verdict of a validation run; the exit status."""
    from flowgrpo_ray.console import verdict_table
    from flowgrpo_ray.tracking import METRICS, read_rows
    from flowgrpo_ray.validation import verdict

    rows = read_rows(outcome.folder / METRICS)
    found = verdict(spec, rows, outcome.summary["ratio_floor"])
    file = outcome.folder / "validation.json"
    file.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    console.print(verdict_table(found))
    console.print(f"kept in {file}; curves: {outcome.folder / 'report.html'}", soft_wrap=True)
    return 0 if found.ok else 1


def _as_options(overrides: list[str] | None) -> str:
    return "".join(f" --set {shlex.quote(override)}" for override in overrides or [])


@app.command()
def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME|GIB", help="say whether this GPU is enough, as h100 or 80"),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="a short run of this spec: say how long all of it takes"),
    ] = None,
    gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="price of an hour of one GPU, with --measured")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers as JSON")] = False,
) -> None:
    """Check a spec and print what it will do: images, forwards, FLOPs, GPUs, memory, hours."""
    from flowgrpo_ray.cli.plan import show_plan

    show_plan(load_spec(spec, overrides or []), gpu, as_json, console, measured, gpu_hour)


@app.command()
def sample(
    target: TargetArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="one image for each")],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("samples.png"),
    steps: StepsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    weights: WeightsOption = "ema",
    iteration: IterationOption = None,
    columns: Annotated[int, typer.Option(min=1, help="images in a row")] = 8,
) -> None:
    """Draw one image per prompt into a grid PNG."""
    from flowgrpo_ray.inference import generate, load_trained, open_target
    from flowgrpo_ray.tracking import save_grid

    spec, folder = open_target(target)
    out.parent.mkdir(parents=True, exist_ok=True)
    policy = load_trained(spec, folder, weights, iteration)
    steps = steps or spec.evaluation.steps
    images = generate(policy, spec, prompts, steps, seed, spec.evaluation.micro_batch)
    save_grid(out, images, min(columns, len(images)))
    count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    console.print(f"{count} in {out}", soft_wrap=True)


@app.command()
def evaluate(
    target: TargetArgument,
    prompts: Annotated[
        str | None, typer.Option(help="a prompt file; default: prompts.evaluate of the spec")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first N prompts only")] = None,
    steps: StepsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    weights: WeightsOption = "ema",
    iteration: IterationOption = None,
) -> None:
    """Score images of held-out prompts with every reward of the spec; prints JSON."""
    from flowgrpo_ray.inference import generate, load_trained, open_target, score
    from flowgrpo_ray.metrics import mean_and_std
    from flowgrpo_ray.prompts import load_prompts

    spec, folder = open_target(target)
    chosen = load_prompts(
        prompts or spec.prompts.evaluate, "--prompts" if prompts else "prompts.evaluate"
    )
    chosen = chosen[: limit or (None if prompts else spec.evaluation.prompts)]
    policy = load_trained(spec, folder, weights, iteration)
    steps = steps or spec.evaluation.steps
    texts = [prompt.text for prompt in chosen]
    images = generate(policy, spec, texts, steps, seed, spec.evaluation.micro_batch)
    rewards = {name: mean_and_std(v) for name, v in score(spec, images, chosen).items()}
    print(json.dumps({"prompts": len(chosen), "steps": steps, "seed": seed, "rewards": rewards}))


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="the new folder to write")],
    what: Annotated[
        Literal["lora", "pipeline"] | None,
        typer.Option("--format", help="default: lora for LoRA runs, else the whole pipeline"),
    ] = None,
    weights: WeightsOption = "ema",
    iteration: IterationOption = None,
) -> None:
    """Write a trained model for diffusers: LoRA safetensors, or a full pipeline folder.

    Its README.md is a model card, with the code that loads it.
    """
    from flowgrpo_ray.inference import export as write
    from flowgrpo_ray.run_folder import RunFolder

    folder = RunFolder.existing(run)
    spec = folder.read_spec()
    what = what or ("lora" if spec.tuning.kind == "lora" else "pipeline")
    write(spec, folder, out, what, weights, iteration)
    console.print(f"{what} written; how to load it: {out / 'README.md'}", soft_wrap=True)


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html of a run, finished or still going."""
    from flowgrpo_ray.report import write_report

    console.print(str(write_report(run)), soft_wrap=True)


@app.command()
def recipes() -> None:
    """List the training specs of this package."""
    table = Table(box=None, show_header=False)
    for name in recipe_names():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        table.add_row(f"[bold]{name}[/]", text.splitlines()[0].lstrip("# "))
    console.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of a training spec, for editors."""
    print(json.dumps(TrainingSpec.model_json_schema(), indent=2))


def main() -> None:
    """Entry point: a mistake of the user is one message and exit status 2, not a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        app()
    except FlowGrpoError as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what an actor raised
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(cause))}", highlight=False)
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    from flowgrpo_ray.console import printable

    return escape(printable(text))
