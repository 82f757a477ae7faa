"""The commands as typed: help, counts, lists, and mistakes that end in one message and status 2."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flowgrpo_ray
from flowgrpo_ray import cli
from flowgrpo_ray.cli.plan import gpu_memory, prompts_of
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.types import Parallel
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.spec.file import RECIPES, load_spec, recipe_names

COMMANDS = {
    "train": "Train a model",
    "plan": "Check a spec",
    "sample": "one image per prompt",
    "evaluate": "held-out prompts",
    "export": "for diffusers",
    "report": "report.html",
    "monitor": "as a live page",
    "recipes": "the training specs of this package",
    "configs": "Serve configs of rewards",
    "schema": "JSON schema",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Any, tmp_path: Path):
    """``run("plan", "tiny-ocr") -> (status, stdout, stderr)`` through the program's entry point."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "COLUMNS": "250", "NO_COLOR": "1"})
    level = logging.getLogger("diffusers").level

    def call(*arguments: str) -> tuple[int, str, str]:
        answer = command_line(*arguments)
        logging.getLogger("diffusers").setLevel(level)
        return answer

    return call


def squeezed(text: str) -> str:
    """Without the line breaks and boxes of the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─┃━┏┓┡┩└┘]", " ", text).split())


def test_every_command_is_listed_and_known_here(run):
    status, out, _ = run("--help")
    assert status == 0
    registered = {c.name or c.callback.__name__ for c in cli.app.registered_commands}  # type: ignore[union-attr]
    registered |= {group.name for group in cli.app.registered_groups}
    assert registered >= COMMANDS.keys()
    assert all(re.search(rf"\b{name}\b", out) for name in registered)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_is_for(run, command: str):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert COMMANDS[command] in squeezed(out)


def table(out: str) -> dict[str, list[int]]:
    """``{label: [per iteration, in all]}`` of the plan's table."""
    rows = re.findall(r"^\W*(\w[\w ,-]*?)\s*[│|]\s*([\d,]+)\s*[│|]\s*([\d,]+)\W*$", out, re.M)
    return {label: [int(n.replace(",", "")) for n in numbers] for label, *numbers in rows}


def test_plan_counts_the_work(run):
    """8 groups of 12 images, 10 steps of which 2 are trained, no guidance, KL, 2 updates."""
    status, out, _ = run("plan", "tiny-ocr", "--set", "iterations=10")
    assert status == 0
    assert table(out) == {
        "images": [96, 960],
        "micro-batches": [4, 40],
        "forwards of one image, sampling": [960, 9600],
        "forwards and backwards, training": [192, 1920],
        "forwards of the KL reference": [192, 1920],
        "optimizer updates": [2, 20],
    }
    assert "256 to train on, 64 held out" in out
    assert "0 GPU" in out
    assert (
        "sign_colour is only watched: of these 0.25 CPU and 0 GPU, to score 96 images an "
        "iteration, 64 an evaluation\n"
    ) in out
    assert "ocr is only watched" not in out
    assert "memory (1.70 M parameters, 1.70 M trained)" in out
    assert re.search(r"learner rank, training\W+\d+\.\d\d", out)
    assert "GiB in " not in out, "no verdict on a spec without GPUs"
    assert "layouts" not in out


def test_plan_counts_guidance_and_all_steps(run):
    status, out, _ = run(
        *("plan", "tiny-ocr", "--set", "sampling.guidance=4.5", "--set", "objective.kl=null"),
        *("--set", "sampling.window={kind: all}", "--set", "iterations=1"),
    )
    assert status == 0
    counts = {label: each for label, (each, _) in table(out).items()}
    assert counts["forwards of one image, sampling"] == 2 * 960
    assert counts["forwards and backwards, training"] == 2 * 96 * 9
    assert counts["forwards of the KL reference"] == 0


GPU_ACTORS = ("--set", "cluster={rollout: {gpus: 1}, learner: {gpus: 1}}")


def test_plan_as_json_has_the_numbers(run):
    status, out, _ = run("plan", "tiny-ocr", "--json", *GPU_ACTORS)
    assert status == 0
    found = json.loads(out)
    assert found["work"]["rollout_forwards"] == 960
    assert found["reserved"]["GPU"] == 2
    assert found["watched"] == {"sign_colour": {"cpus": 0.25, "gpus": 0}}
    stages = found["footprint"]["actors"]["learner"]
    assert stages.keys() == {"loading", "training", "update", "publishing"}
    phases = found["needed"]["learner rank"]
    assert phases["update"] == sum(stages["update"].values()) / 2**30
    assert found["needed"]["rollout worker"].keys() >= {"start", "sampling", "evaluation"}
    layouts = {row["layout"]: row for row in found["footprint"]["layouts"]}
    assert layouts["separate"]["counts"] == [1, 1]
    assert layouts["colocated"]["busy"] == 1.0 > layouts["separate"]["busy"]


def test_plan_recommends_a_layout(run):
    status, out, _ = run("plan", "tiny-ocr", *GPU_ACTORS, "--set", "advantages.std=global")
    assert status == 0
    out = squeezed(out)
    assert "layouts of 2 GPUs, by FLOPs" in out
    assert re.search(r"separate 1 \+ 1 50% 50% ", out)
    assert re.search(r"colocated 2 100% 0% ", out)
    chosen = "recommended: cluster.layout: colocated, cluster.learner.parallel: replicate"
    assert f"{chosen}: with advantages.std: global separate sides take turns" in out


def test_plan_without_the_models_configs_says_so(run):
    status, out, _ = run("plan", "tiny-ocr", "--set", "model.path=owner/name")
    assert status == 0
    assert table(out)["images"] == [96, 5760]
    assert "memory: unknown, the configs of owner/name are not on this disk" in squeezed(out)


@pytest.mark.parametrize("gpu", ["h1000", "-1", "nan", "inf"])
def test_plan_for_a_gpu_that_is_none(run, gpu: str):
    status, _, err = run("plan", "tiny-ocr", "--gpu", gpu)
    assert status == 2
    assert f"--gpu '{gpu}': write a number of GiB, or one of a10g" in squeezed(err)


def footprint_of(worker: int, rank: int, stage: str = "training", reward: int = 0) -> Any:
    """A model that needs so many GiB, in a stage of either; of one worker that is both the sum."""
    from flowgrpo_ray.estimate.footprint import Footprint

    gib = 2**30
    rollout = {"sampling": {"weights": worker * gib}, "start": {"weights": gib}}
    learner = {"loading": {"weights": 1}, stage: {"weights": rank * gib - 1, "more": 1}}
    workers = {"start": {"weights": 12 * gib}, stage: {"weights": (worker + rank) * gib}}
    actors = {"rollout": rollout, "learner": learner, "workers": workers}
    rewards = {"ocr": {"weights": reward * gib}, "sign_colour": {}}
    whole = Parallel()
    return Footprint(1, 1, 1, 1, actors, rewards, 0, whole, encoders_known=True, layouts=[])


def verdicts(gpu: tuple[str, float] | None, footprint: Any, *overrides: str) -> list[str]:
    from flowgrpo_ray.cli import plan

    spec = load_spec("tiny-ocr", [GPU_ACTORS[1], *overrides])
    return list(plan.verdicts(spec, footprint, gpu))


def test_verdicts_compare_with_a_gpu_or_name_one():
    worker, rank, advice = verdicts(("h100", 79), footprint_of(79, 80))
    assert worker == "rollout worker: 79.0 GiB in sampling; fits h100 (79 GiB)"
    assert rank == "learner rank: 80.0 GiB in training; DOES NOT FIT h100 (79 GiB)"
    for key in ("activation_checkpointing=true", "offload_optimizer=true", "more GPUs", "lora"):
        assert key in advice
    worker, rank = verdicts(None, footprint_of(22, 40))
    assert worker.endswith("the smallest GPU that has it: a10g (22 GiB)")
    assert rank.endswith("the smallest GPU that has it: l40s (44 GiB)")
    assert "no known GPU has it" in verdicts(None, footprint_of(1, 192))[1]


def test_advice_leaves_out_what_is_done_or_would_not_help():
    done = "cluster.learner={gpus: 1, activation_checkpointing: true, offload_optimizer: true}"
    lora = "tuning={kind: lora, rank: 4, alpha: 8}"
    _, _, advice = verdicts(("a10g", 22), footprint_of(1, 30), done, lora)
    for key in ("activation_checkpointing", "offload_optimizer", "tuning"):
        assert key not in advice
    assert "micro_batch" in advice
    _, _, advice = verdicts(("a10g", 22), footprint_of(1, 30, "publishing"))
    assert "activation_checkpointing" not in advice
    _, advice, _ = verdicts(("a10g", 22), footprint_of(30, 1))
    assert "objective.kl=null" in advice
    assert "learner" not in advice


def test_what_shares_a_gpu_needs_it_together():
    from flowgrpo_ray.cli.plan import gpus_of

    def of(rollout: float, learner: float, count: int = 1, more: str = "") -> dict[str, float]:
        workers = f"{{count: {count}, gpus: {rollout}}}"
        keys = f"cluster={{rollout: {workers}, learner: {{gpus: {learner}}}{more}}}"
        spec = load_spec("tiny-ocr", [keys, "rewards.ocr.gpus=0.2"])
        kinds = gpus_of(spec, footprint_of(10, 30, reward=3))
        return {gpu.name: gpu.largest()[1] / 2**30 for gpu in kinds}

    assert of(0.4, 0.4) == {"rollout worker + learner rank + ocr": 43}
    assert of(0.2, 0.6, 2) == {"2 rollout workers + learner rank": 50, "ocr": 3}
    assert of(0.5, 1) == {"rollout worker + ocr": 13, "learner rank": 30}
    assert of(0.5, 1, 3) == {"2 rollout workers": 20, "learner rank": 30, "ocr": 3}
    assert of(0.5, 0.6, 2) == {"2 rollout workers": 20, "learner rank + ocr": 33}
    assert of(0, 1) == {"learner rank": 30, "ocr": 3}
    assert of(0, 0) == {"ocr": 3}
    assert of(0.4, 0.4, more=", layout: colocated") == {"worker + ocr": 43}


def test_the_phase_that_needs_the_most_is_named():
    """Text encoders are there alone; rewards from then on; sharing processes at the same time."""
    keys = "cluster={rollout: {gpus: 0.4}, learner: {gpus: 0.4}}"
    both, _ = verdicts(("a10g", 22), footprint_of(10, 30), keys)
    name = "rollout worker + learner rank: 40.0 GiB in sampling and training"
    assert both == f"{name}; DOES NOT FIT a10g (22 GiB)"
    keys = "cluster={layout: colocated, workers: {count: 1, gpus: 0.9}}"
    assert verdicts(None, footprint_of(1, 1), keys)[0].startswith("worker: 12.0 GiB in start; ")
    more = verdicts(None, footprint_of(5, 6, reward=3), keys, "rewards.ocr.gpus=0.1")
    assert more[0].startswith("worker + ocr: 14.0 GiB in training; ")


def test_a_reward_of_unknown_size_is_told():
    from flowgrpo_ray.cli.plan import not_counted

    found = replace(footprint_of(1, 1), rewards={"mine": None, "ocr": {}}, encoders_known=False)
    told = ["the text encoders, which are not on this disk", "the reward mine"]
    assert list(not_counted(found)) == told


def test_a_note_is_printed_as_it_is():
    """A failed reward's note quotes a prompt, which may look like rich's markup."""
    from rich.console import Console

    from flowgrpo_ray.view.console import RunDisplay

    out = io.StringIO()
    display = RunDisplay(load_spec("tiny-ocr"), Console(file=out, width=200))
    display.note("first prompt: 'a sign [/] [red] [/b]'")
    assert out.getvalue() == "first prompt: 'a sign [/] [red] [/b]'\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("train tiny-ocr-n", ["tiny-ocr-nft"]),
        ("plan my", ["my-folder/", "my.yaml"]),
        ("recipes copy tiny-ed", ["tiny-edit"]),
        ("export ru", ["runs/mine"]),
        ("sample my", ["my-folder/", "my.yaml"]),
        ("compare runs/mine r", ["runs/mine"]),
        ("rewards check picks", ["pickscore"]),
        ("rewards score --reward cl", ["clip_iqa", "clipscore"]),
        ("report not", []),  # the shell's own file names, then
    ],
)
def test_a_shell_completes_names(
    words: str,
    offered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/.lock").touch()
    Path("my-folder").mkdir()
    for name in ("my.yaml", "my.txt"):
        Path(name).touch()
    monkeypatch.setenv("_FLOWGRPO_RAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"flowgrpo-ray {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit):
        cli.app(prog_name="flowgrpo-ray")
    assert capsys.readouterr().out.split() == offered


def test_recipes_lists_each_with_its_line_by_the_gpus_that_it_needs(run):
    status, out, _ = run("recipes")
    assert status == 0
    places = []
    for name in recipe_names():
        line = re.search(rf"^\W*{name}\s+\w+", out, re.M)
        places.append((load_spec(name).gpus, line.start()))
    assert sorted(places) == sorted(places, key=lambda place: place[1])
    rows = json.loads(run("recipes", "--json")[1])
    assert {row["name"]: row["gpus"] for row in rows} == {
        name: load_spec(name).gpus for name in recipe_names()
    }


def test_a_recipe_is_shown_and_copied_with_its_comments(run, tmp_path):
    text = (RECIPES / "tiny-ocr.yaml").read_text()
    assert run("recipes", "show", "tiny-ocr")[:2] == (0, text)
    file = tmp_path / "mine.yaml"
    status, out, _ = run("recipes", "copy", "tiny-ocr", file)
    assert (status, file.read_text()) == (0, text)
    assert f"flowgrpo-ray plan {file}" in out
    file.write_text("mine")
    for arguments in (("copy", "tiny-ocr", file), ("copy", "tiny-orc", tmp_path / "new.yaml")):
        assert run("recipes", *arguments)[0] == 2
    assert file.read_text() == "mine"
    assert run("recipes", "copy", "tiny-ocr", file, "--overwrite")[0] == 0
    assert run("recipes", "copy", "tiny-ocr", tmp_path / "no" / "a.yaml")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


def test_plan_needs_no_public_prompts(run):
    """A recipe as it ships; a file of one's own must be there."""
    spec = load_spec("sd35-ocr-1gpu-24gb")
    prompts, held_out, sources, says = prompts_of(spec)
    assert (prompts, held_out, sources) == (None, 1018, None)
    assert "`flowgrpo-ray prompts fetch ocr` puts below prompts/. Here 1,018 held-out" in says
    assert run("plan", "sd35-ocr-1gpu-24gb", "--set", "prompts.train=prompts/mine.txt")[0] == 2


def test_version(run):
    assert run("--version")[:2] == (0, f"flowgrpo-ray {flowgrpo_ray.__version__}\n")


@pytest.mark.parametrize("name", ["4090", "RTX 4090", "rtx4090", "nvidia_rtx_4090"])
def test_a_gpu_has_many_spellings(name):
    assert gpu_memory(name) == 23


def test_a_number_that_no_gpu_has_is_no_number_of_gib():
    assert gpu_memory("80") == 80
    assert gpu_memory("A100") == gpu_memory("a100-80") == 79
    for name in ("301", "4091", "0", "-1", "nan", "h1000"):
        with pytest.raises(SpecError, match="write a number of GiB, or one of"):
            gpu_memory(name)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optimizer.lr=1e-4", "did you mean 'learning_rate'"),
        ("sampling.guidance_scale=4", "did you mean 'guidance'"),
        ("sampling.num_image_per_prompt=8", "did you mean 'group_size'"),
        ("model.dtype=fp16", "did you mean 'float16'"),
    ],
)
def test_words_of_other_trainers_are_understood(override, meant):
    with pytest.raises(SpecError, match=meant):
        load_spec("tiny-ocr", [override])


def test_a_picture_is_written_over_only_if_asked(run, tmp_path):
    out = tmp_path / "a.png"
    out.write_text("mine")
    assert run("sample", "tiny-ocr", "a sign", "--out", out)[0] == 2
    assert run("sample", "tiny-ocr", "a sign", "--out", tmp_path / "a.jpg")[0] == 2
    assert run("sample", "tiny-ocr", "a sign", "--out", tmp_path, "--overwrite")[0] == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_schema_is_json_with_descriptions(run):
    """What an editor needs to complete keys and to show what they mean."""
    status, out, _ = run("schema")
    assert status == 0
    schema = json.loads(out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert {"model", "sampling", "rewards", "objective"} <= schema["properties"].keys()
    sampling = schema["$defs"]["SamplingSpec"]["properties"]
    for key in ("steps", "guidance", "eta", "group_size", "groups", "micro_batch"):
        assert sampling[key]["description"], key


MISTAKES = {
    "no such recipe": (["plan", "tiny-orc"], "did you mean the recipe 'tiny-ocr'?"),
    "no such spec to train": (["train", "x.yaml"], "'x.yaml' is neither a file nor a recipe"),
    "unknown key": (
        ["plan", "tiny-ocr", "--set", "sed=1"],
        "sed: unknown key; did you mean 'seed'",
    ),
    "unknown key, before training": (["train", "tiny-ocr", "--set", "sed=1"], "'seed'"),
    "bad --set": (["plan", "tiny-ocr", "--set", "seed"], "write it as key=value"),
    "brackets in a message": (["plan", "tiny-ocr", "--set", "seed=[b]x"], "[b]x"),
    "no such prompts": (
        ["plan", "tiny-ocr", "--set", "prompts.train=no.txt"],
        "prompts.train = 'no.txt': there is no such file",
    ),
    "no such model": (["plan", "tiny-ocr", "--set", "model.path=./no"], "model.path = './no'"),
    "not a run": (["export", "nowhere", "--out", "new"], "nowhere is not a run folder"),
    "no run to report on": (["report", "nowhere"], "nowhere"),
    "neither run nor spec": (["sample", "nowhere", "a sign"], "'nowhere' is neither"),
    "no prompts to evaluate on": (
        ["evaluate", "tiny-ocr", "--prompts", "no.txt"],
        "--prompts = 'no.txt': there is no such file",
    ),
    "an image for a model that takes none": (
        ["sample", "tiny-ocr", "a sign", "--image", "no.png"],
        "--image: 1 source images; family 'sd3' takes 0 with each",
    ),
    "unknown option": (["plan", "tiny-ocr", "--sett", "a=1"], "--sett"),
    "unknown command": (["trian", "tiny-ocr"], "trian"),
    "missing argument": (["train"], "SPEC|RECIPE"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(run, tmp_path: Path, case: str):
    arguments, message = MISTAKES[case]
    status, out, err = run(*arguments)
    assert status == 2
    assert message in squeezed(err)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == [], "nothing was started or written"


def test_more_gpus_than_there_are_ends_before_ray_starts(run, tmp_path: Path):
    greedy = ["cluster.learner.gpus=1", "cluster.rollout={count: 99, gpus: 1}"]
    status, _, err = run("train", "tiny-ocr", *(a for key in greedy for a in ("--set", key)))
    assert status == 2
    assert "100 GPUs" in squeezed(err)
    assert "RAY_ADDRESS" in squeezed(err)
    # Who corrects the spec can train: a run that never began needs no --resume.
    RunFolder.claim(tmp_path / "runs", load_spec("tiny-ocr"), resume=False).release()


def test_an_interrupt_while_a_run_is_summed_up_says_what_is_saved(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from flowgrpo_ray.cli import train
    from flowgrpo_ray.cluster import run as running

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    ended = running.Outcome(tmp_path / "tiny-ocr", {}, stopped=False)
    (ended.folder / "checkpoints" / "iteration-000060").mkdir(parents=True)
    monkeypatch.setattr(running, "train", lambda *_, **__: ended)
    monkeypatch.setattr(train, "_say_what_came_of_it", interrupted)
    status, out, _ = run("train", "tiny-ocr", "--runs", str(tmp_path))
    assert status == 130
    assert out.startswith("interrupted; saved is iteration 60, continue with\n")


def test_training_over_a_run_asks_for_resume(run, tmp_path: Path):
    folder = RunFolder.claim(tmp_path / "runs", load_spec("tiny-ocr"), resume=False)
    folder.release()
    (folder.path / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1}\n')
    status, _, err = run("train", "tiny-ocr")
    assert status == 2
    assert "--resume" in err
