"""The command line. Each command checks its input first and ends user mistakes in one message."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

import flowgrpo_ray
from flowgrpo_ray.cli import completion
from flowgrpo_ray.cli.configs import configs
from flowgrpo_ray.cli.monitor import monitor
from flowgrpo_ray.cli.options import (
    IterationOption,
    RunArgument,
    SetOption,
    SpecArgument,
    StepsOption,
    TargetArgument,
    WeightsOption,
)
from flowgrpo_ray.cli.prompts import prompts_app
from flowgrpo_ray.cli.recipes import recipes_app
from flowgrpo_ray.cli.rewards import rewards_app
from flowgrpo_ray.cli.runs import compare, runs_app
from flowgrpo_ray.cli.train import train
from flowgrpo_ray.common.errors import FlowGrpoError, SpecError
from flowgrpo_ray.common.files import check_free
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec

app = typer.Typer(
    help="Online reinforcement learning for flow-matching text-to-image models, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(rewards_app, name="rewards")
app.add_typer(prompts_app, name="prompts")
app.add_typer(recipes_app, name="recipes")
app.add_typer(runs_app, name="runs")
app.command()(compare)
app.command()(configs)
app.command()(monitor)
app.command()(train)
console = Console(markup=False)  # what is printed may name a file of any name


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"flowgrpo-ray {flowgrpo_ray.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_tell_version, is_eager=True, help="print the version and end"
        ),
    ] = False,
) -> None:
    """Online reinforcement learning for flow-matching text-to-image models, on Ray."""


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
        typer.Option(
            metavar="RUN",
            help="a short run of this spec: say how long all of it takes",
            autocompletion=completion.runs,
        ),
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
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="an image that each prompt changes, for a model that does; may be repeated",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace --out")] = False,
) -> None:
    """Draw one image per prompt into a grid PNG."""
    from flowgrpo_ray.run.inference import cut_off, generate, load_trained, open_target
    from flowgrpo_ray.run.tracking import save_grid
    from flowgrpo_ray.spec.prompts import Prompt
    from flowgrpo_ray.spec.sources import requests_for
    from flowgrpo_ray.view.console import say

    spec, folder = open_target(target)
    requests = requests_for(spec, prompts, images or [])
    _check_picture(out, overwrite)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        say(console, f"{len(prompts)} prompts of one word each; one of several words wants quotes")
    out.parent.mkdir(parents=True, exist_ok=True)
    policy = load_trained(spec, folder, weights, iteration)
    unscored = spec.model_copy(update={"rewards": {}})
    if told := cut_off(policy, unscored, [Prompt(text) for text in prompts]):
        say(console, told)
    steps = steps or spec.evaluation.steps
    drawn = generate(policy, spec, requests, steps, seed, spec.evaluation.micro_batch)
    save_grid(out, drawn, min(columns, len(drawn)))
    count = f"{len(drawn)} image{'s' if len(drawn) > 1 else ''}"
    console.print(f"{count} in {out}", soft_wrap=True)


def _check_picture(out: Path, overwrite: bool) -> None:
    """``SpecError`` for a file that `sample` cannot, or must not, write."""
    if out.suffix.lower() != ".png":
        raise SpecError(f"--out {out}: the name must end in .png")
    check_free(out, overwrite, f"--out {out}")


@app.command()
def evaluate(
    target: TargetArgument,
    prompts: Annotated[
        str | None, typer.Option(help="a prompt file; default: the held-out ones of the spec")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first N prompts only")] = None,
    steps: StepsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    weights: WeightsOption = "ema",
    iteration: IterationOption = None,
) -> None:
    """Score images of held-out prompts with every reward of the spec; prints JSON."""
    from flowgrpo_ray.run.inference import cut_off, generate, load_trained, open_target, score
    from flowgrpo_ray.run.metrics import mean_and_std
    from flowgrpo_ray.spec.prompts import load_held_out, prompts_for

    spec, folder = open_target(target)
    chosen = prompts_for(spec, prompts, "--prompts") if prompts else load_held_out(spec, limit)
    chosen = chosen[:limit]
    policy = load_trained(spec, folder, weights, iteration)
    if told := cut_off(policy, spec, chosen):
        print(told, file=sys.stderr)
    steps = steps or spec.evaluation.steps
    requests = [prompt.request(spec.sampling.size) for prompt in chosen]
    images = generate(policy, spec, requests, steps, seed, spec.evaluation.micro_batch)
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
    from flowgrpo_ray.run.folder import RunFolder
    from flowgrpo_ray.run.inference import export as write

    folder = RunFolder.existing(run)
    spec = folder.read_spec()
    what = what or ("lora" if spec.tuning.kind == "lora" else "pipeline")
    write(spec, folder, out, what, weights, iteration)
    console.print(f"{what} written; how to load it: {out / 'README.md'}", soft_wrap=True)


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html of a run, finished or still going."""
    from flowgrpo_ray.view.report import write_report

    console.print(str(write_report(run)), soft_wrap=True)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters of a prompt
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FlowGrpoError as error:
        _end(str(getattr(error, "cause", None) or error))  # Ray wraps what an actor raised
    except OSError as error:
        if error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}")
    except SystemExit as end:
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            print("interrupted", file=sys.stderr)  # of which typer makes status 130
        raise


def _end(message: str) -> NoReturn:
    from rich.markup import escape

    from flowgrpo_ray.view.console import printable

    text = escape(printable(message))
    Console(stderr=True).print(f"[bold red]error:[/] {text}", highlight=False)
    sys.exit(2)
