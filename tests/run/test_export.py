"""From a run folder to what plain diffusers loads; sample, evaluate and export on the command line.

The run folders are made without Ray: real updates of a learner, a checkpoint, a spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import (
    CPU,
    LORA,
    PROMPTS,
    SIZE,
    TUNINGS,
    alone,
    draw_batches,
    one_thread,
    small_spec,
    state_of,
    update,
)
from typer.testing import CliRunner

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.sampling import INITIAL, draw_noise
from flowgrpo_ray.cli import app
from flowgrpo_ray.common.errors import RunFolderError, SpecError
from flowgrpo_ray.common.images import fitted
from flowgrpo_ray.common.types import Images, Schedule, WorkUnit
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.rewards.sign_colour import SignColourReward
from flowgrpo_ray.run.checkpoint import Progress, save_checkpoint
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.inference import export, generate, load_trained, open_target
from flowgrpo_ray.run.model_card import Exported, model_card
from flowgrpo_ray.spec.file import dump_spec, load_spec

STEPS = 4  # of SMALL's evaluation
SEED = 5
BASE = small_spec().model.folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Mapping[str, RunFolder]:
    """A run folder of each kind after two updates, and one that has not saved yet."""
    root: Path = tmp_path_factory.mktemp("runs")
    folders: dict[str, RunFolder] = {}
    with alone():
        for name, override in {**TUNINGS, "unsaved": LORA}.items():
            # steps of 0.01 per weight: enough to see in the images
            spec = small_spec(override, f"name={name}", "optimizer.learning_rate=1e-2")
            folders[name] = folder = RunFolder(root / name)
            folder.path.mkdir()
            folder.spec_file.write_text(dump_spec(spec))
            if name == "unsaved":
                continue
            learner, batches = Learner(spec, CPU), draw_batches(spec, 1)
            for iteration in (1, 2):
                update(learner, batches)
                progress = Progress(
                    iteration,
                    images=4 * iteration,
                    seconds=1.0,
                    failed_groups=0,
                    spec_identity=spec.identity(),
                    prompts_digest="",
                    eval_before={"sign_colour": 0.25},
                    eval_last={"sign_colour": 0.5 + iteration / 8},
                )
                save_checkpoint(folder.checkpoints, [state_of(learner)], progress, keep=2)
    return folders


def trained(folder: RunFolder | None, weights: str = "ema", iteration: int | None = None) -> Images:
    """What ``generate`` gives for a run; each prompt in a batch of its own, as the pipeline's."""
    spec = folder.read_spec() if folder else small_spec()
    policy = load_trained(spec, folder, weights, iteration)
    return generate(policy, spec, PROMPTS[:2], STEPS, SEED, batch=1)


def load_pipeline(path: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(place: int) -> torch.Tensor:
    """What ``generate`` starts from for the prompt at ``place``."""
    of = Schedule("flow_sde", (0.0,) * (STEPS + 1), (0.0,) * STEPS)
    return draw_noise(WorkUnit(SEED, "eval", 0, 0, (place,), (0,), of), INITIAL, (4, 8, 12))


def pipeline_images(pipe: Any) -> Images:
    """Plain diffusers from the same noise, prompt by prompt."""
    images: list[np.ndarray] = []
    for place, prompt in enumerate(PROMPTS[:2]):
        made = pipe(
            prompt,
            latents=noise(place),
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            max_sequence_length=10,
        )
        images.append(np.asarray(made.images[0]))
    return np.stack(images)


def difference(a: Images, b: Images) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def assert_equal_but_for_rounding(a: Images, b: Images) -> None:
    """A few values at most, each off by one: equal weights that were loaded to other places in
    memory can give other last bits, and a value in the middle of two integers goes either way."""
    off = np.abs(a.astype(int) - b.astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3


# --- export


def test_training_shows_in_the_images(runs):
    """So the comparisons below can fail: untrained, averaged and last weights draw apart."""
    for folder in (runs["full"], runs["lora"]):
        untrained, ema, last = trained(None), trained(folder), trained(folder, "last")
        assert difference(untrained, ema) > 0.5
        assert difference(ema, last) > 0.1
        assert difference(last, trained(folder, "last", iteration=1)) > 0.1


@pytest.mark.parametrize("weights", ["ema", "last"])
def test_plain_diffusers_draws_an_exported_lora_exactly(runs, weights, tmp_path):
    out = tmp_path / "out"
    export(runs["lora"].read_spec(), runs["lora"], out, "lora", weights)
    pipe = load_pipeline(BASE)
    pipe.load_lora_weights(out)
    assert np.array_equal(pipeline_images(pipe), trained(runs["lora"], weights))


@pytest.mark.parametrize("weights", ["ema", "last"])
def test_plain_diffusers_draws_an_exported_pipeline(runs, weights, tmp_path):
    out = tmp_path / "out"
    export(runs["full"].read_spec(), runs["full"], out, "pipeline", weights)
    assert_equal_but_for_rounding(
        pipeline_images(load_pipeline(out)), trained(runs["full"], weights)
    )


def test_an_exported_pipeline_changes_the_network_alone(runs, tmp_path):
    out = tmp_path / "out"
    export(runs["full"].read_spec(), runs["full"], out, "pipeline", "ema")
    base, written = load_pipeline(BASE), load_pipeline(out)
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer"):
        before, after = (getattr(p, part).state_dict() for p in (base, written))
        assert before.keys() == after.keys()
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (part != "transformer")


def test_adapters_are_merged_into_an_exported_pipeline(runs, tmp_path):
    """``(W + B A) x`` instead of ``W x + B (A x)``: float32 rounding, so at most that a pixel's
    value crosses the middle of two integers."""
    out = tmp_path / "out"
    export(runs["lora"].read_spec(), runs["lora"], out, "pipeline", "ema")
    pipe = load_pipeline(out)
    assert not any("lora" in name for name in pipe.transformer.state_dict())
    assert_equal_but_for_rounding(pipeline_images(pipe), trained(runs["lora"]))


def test_a_full_run_has_no_lora_to_export(runs, tmp_path):
    with pytest.raises(SpecError, match="full network; export it with --format pipeline"):
        export(runs["full"].read_spec(), runs["full"], tmp_path / "out", "lora", "ema")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["lora", "pipeline"])
def test_a_run_without_checkpoint_has_nothing_to_export(runs, what, tmp_path):
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        export(runs["unsaved"].read_spec(), runs["unsaved"], tmp_path / "out", what, "ema")
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_over_other_files(runs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        export(runs["lora"].read_spec(), runs["lora"], tmp_path, "lora", "ema")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_folder_is_an_error(runs, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(RunFolderError, match=r"out\.safetensors"):
        export(runs["lora"].read_spec(), runs["lora"], out, "lora", "ema")
    assert out.read_text() == "mine"


# --- the model card


def parts_of(card: str) -> tuple[dict[str, Any], str, str, str]:
    """Front matter, prose, the code that loads the model if there is any, the spec."""
    empty, matter, body = card.split("---\n", 2)
    assert not empty
    found = re.findall(r"^```(\w+)\n(.*?)^```$", body, re.M | re.S)
    blocks = dict(reversed(found))  # the first of each language
    prose = body.partition("```")[0]
    return yaml.safe_load(matter), prose, blocks.get("python", ""), blocks["yaml"]


@pytest.mark.parametrize(
    ("run", "what", "weights", "iteration"),
    [("lora", "lora", "ema", 2), ("lora", "pipeline", "last", 1), ("full", "pipeline", "ema", 2)],
)
def test_the_model_card_tells_what_was_exported(runs, run, what, weights, iteration, tmp_path):
    spec, out = runs[run].read_spec(), tmp_path / "out"
    export(spec, runs[run], out, what, weights, iteration)
    card = (out / "README.md").read_text()
    matter, prose, _, yaml_spec = parts_of(card)
    assert matter["library_name"] == "diffusers"
    assert matter["pipeline_tag"] == "text-to-image"
    assert ("lora" in matter["tags"]) == (what == "lora")
    assert "license" not in matter
    assert "license of the base model applies" in prose.replace("\n", " ")
    kind = {"ema": "averaged (EMA) weights", "last": "weights of the last update"}[weights]
    assert f"{kind} after iteration {iteration} ({4 * iteration} images)" in prose
    assert f"torch {version('torch')}, diffusers {version('diffusers')}" in prose
    assert f"| sign_colour | 1 | 0.2500 | {0.5 + iteration / 8:.4f} |" in card
    (tmp_path / "spec.yaml").write_text(yaml_spec)
    assert load_spec(str(tmp_path / "spec.yaml")) == spec


def test_the_card_of_a_lora_tells_its_strength_and_a_way_for_each_program(runs, tmp_path):
    out = tmp_path / "out"
    export(runs["lora"].read_spec(), runs["lora"], out, "lora", "ema")
    card = (out / "README.md").read_text()
    assert "adapters of rank 4 whose strength in training, alpha / rank = 8 / 4, is part" in card
    assert re.findall(r"^### (.*)$", card, re.M) == ["diffusers", "peft", "ComfyUI", "flowgrpo_ray"]
    (node,) = re.findall(r"```json\n(.*?)```", card, re.S)
    assert json.loads(node)["inputs"]["strength_model"] == 1


@pytest.mark.parametrize(("run", "what"), [("lora", "lora"), ("full", "pipeline")])
def test_the_code_of_the_model_card_draws_the_same_image(runs, run, what, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(runs[run].read_spec(), runs[run], out, what, "ema")
    code = parts_of((out / "README.md").read_text())[2]
    assert code.count('"your prompt",') == 1
    assert f"height={SIZE[0]},\n    width={SIZE[1]}," in code
    monkeypatch.chdir(out)
    exec(
        code.replace('"your prompt"', "prompt, latents=noise"),
        {
            "prompt": PROMPTS[0],
            "noise": noise(0),
        },
    )
    drawn = np.asarray(Image.open("image.png"))
    assert_equal_but_for_rounding(drawn, trained(runs[run])[0])


CARD = Exported(
    "lora", "last", ("guidance_scale={guidance}",), Progress(3, 9, 1.0, 0, "", ""), {"torch": "1"}
)


def test_the_card_of_a_hub_model_names_base_revision_and_start():
    spec = small_spec(
        LORA, "model.path=owner/base", "model.revision=abc", "model.lora=owner/start", "ema=null"
    )
    matter, prose, code, _ = parts_of(model_card(spec, CARD))
    assert matter["base_model"] == "owner/base"
    assert "`owner/base` and the LoRA `owner/start`" in prose
    assert "from_pretrained('owner/base', revision='abc', dtype=torch.float32)" in code
    assert "| sign_colour | 1 | not measured | not measured |" in model_card(spec, CARD)
    averaged = replace(CARD, weights="ema")
    assert "weights of the last update" in model_card(spec, averaged), "a run without averages"


def test_the_code_of_the_card_has_the_specs_negative_prompt():
    """In place of the family's own, whatever signs are in it."""
    spec = small_spec(LORA, "sampling.guidance=4")
    card = replace(CARD, arguments=("true_cfg_scale={guidance}", 'negative_prompt=" "'))
    code = parts_of(model_card(spec, card))[2]
    assert "true_cfg_scale=4.0" in code
    assert 'negative_prompt=" "' in code
    model = spec.model.model_copy(update={"negative_prompt": "a {blurred} 'sign'"})
    code = parts_of(model_card(spec.model_copy(update={"model": model}), card))[2]
    assert code.count("negative_prompt=") == 1
    assert """negative_prompt="a {blurred} 'sign'\"""" in code


def test_the_code_of_the_card_sets_the_shift_of_the_spec(runs, tmp_path, monkeypatch):
    spec = small_spec("model.shift=3")
    export(runs["full"].read_spec(), runs["full"], tmp_path / "out", "pipeline", "ema")
    code = parts_of(model_card(spec, replace(CARD, what="pipeline")))[2]
    monkeypatch.chdir(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(code.partition("image =")[0], found)
    found["pipe"].scheduler.set_timesteps(STEPS)
    sigmas = load_policy(spec, CPU, frozenset()).sigmas(STEPS, SIZE)
    assert tuple(found["pipe"].scheduler.sigmas.tolist()) == sigmas


@pytest.mark.parametrize(("what", "says"), [("lora", "`model.lora`"), ("pipeline", "`model.path`")])
def test_the_card_of_a_model_without_pipeline_says_how_to_go_on_with_it(what, says):
    spec = small_spec(LORA, "model.family=bagel", "model.path=owner/base")
    card = model_card(spec, replace(CARD, what=what, arguments=()))
    matter, _, code, _ = parts_of(card)
    assert says in card
    assert code.startswith("from peft import PeftModel") == (what == "lora")
    assert matter.get("library_name") == ("peft" if what == "lora" else None)


@pytest.mark.parametrize(
    ("sources", "files"), [(1, ["source.png"]), (2, ["source-1.png", "source-2.png"])]
)
def test_the_code_of_the_card_gives_the_pipeline_its_sources(sources, files, tmp_path, monkeypatch):
    arguments = ("max_area={height} * {width}",)
    spec = small_spec("sampling.size=[32, 48]")
    card = model_card(spec, replace(CARD, arguments=arguments, what="pipeline", sources=sources))
    matter, _, code, _ = parts_of(card)
    assert matter["pipeline_tag"] == "image-to-image"
    assert matter["tags"] == ["image-to-image", "flow-grpo"]
    pictures = np.random.default_rng(0).integers(0, 256, (sources, 64, 64, 3), np.uint8)
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"pipe": dict}
    (imported,) = re.findall("^from PIL .*$", code, re.M)
    exec(f"{imported}\ndef fitted" + code.partition("def fitted")[2].partition(".images")[0], found)
    assert found["image"]["max_area"] == 32 * 48
    given = found["image"]["image"]
    images = given if sources > 1 else [given]
    for image, picture in zip(images, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(image), fitted(picture, (32, 48)))


# --- opening a run


def test_a_target_is_a_run_folder_or_a_spec(runs, tmp_path):
    spec, folder = open_target(str(runs["lora"].path))
    assert spec == runs["lora"].read_spec()
    assert folder is not None
    assert folder.path == runs["lora"].path
    assert open_target("tiny-ocr")[1] is None
    with pytest.raises(RunFolderError, match=r"not a run folder: it has no spec\.yaml"):
        open_target(str(tmp_path))


def test_an_iteration_without_checkpoint_is_an_error(runs):
    with pytest.raises(RunFolderError, match="no checkpoint of iteration 7"):
        trained(runs["lora"], iteration=7)


# --- command line


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_sample_writes_the_grid_that_it_says(runs, tmp_path):
    out = tmp_path / "grid.png"
    result = invoke(
        "sample", runs["lora"].path, *PROMPTS[:2], "--out", out, "--seed", SEED, "--columns", 1
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"2 images in {out}"
    spec = runs["lora"].read_spec()
    images = generate(load_trained(spec, runs["lora"], "ema"), spec, PROMPTS[:2], STEPS, SEED, 4)
    assert np.array_equal(np.asarray(Image.open(out)), np.concatenate(images))


def test_images_are_drawn_by_the_solver_of_the_evaluations(runs):
    spec = runs["lora"].read_spec()
    policy = load_trained(spec, runs["lora"], "ema")
    by_other = spec.model_copy(
        update={"evaluation": spec.evaluation.model_copy(update={"solver": "dpm2"})}
    )
    euler, dpm2 = (generate(policy, s, PROMPTS[:1], 4, SEED, 1) for s in (spec, by_other))
    assert not np.array_equal(euler, dpm2)


def test_sample_makes_the_folder_that_it_writes_into(runs, tmp_path):
    out = tmp_path / "new" / "grid.png"
    result = invoke("sample", runs["lora"].path, PROMPTS[0], "--steps", 1, "--out", out)
    assert result.exit_code == 0, repr(result.exception)
    assert out.is_file()


def test_evaluate_prints_what_the_rewards_give(runs, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    options = ("--prompts", prompts, "--limit", 2, "--seed", SEED, "--steps", 3)
    result = invoke("evaluate", runs["full"].path, *options, "--weights", "last")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    spec = runs["full"].read_spec()
    images = generate(load_trained(spec, runs["full"], "last"), spec, PROMPTS[:2], 3, SEED, 4)
    scores = SignColourReward()(images, PROMPTS[:2], [{}, {}]).astype(np.float64)
    assert row == {
        "prompts": 2,
        "steps": 3,
        "seed": SEED,
        "rewards": {"sign_colour": {"mean": scores.mean(), "std": scores.std()}},
    }
    averaged = json.loads(invoke("evaluate", runs["full"].path, *options).stdout)
    assert averaged["rewards"] != row["rewards"]


@pytest.mark.parametrize(("run", "what"), [("lora", "lora"), ("full", "pipeline")])
def test_export_writes_what_fits_the_run_and_says_how_to_load_it(runs, run, what, tmp_path):
    out = tmp_path / "out"
    result = invoke("export", runs[run].path, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{what} written")
    assert str(out) in result.stdout
    names = {path.name for path in out.iterdir()}
    if what == "lora":
        assert names == {"pytorch_lora_weights.safetensors", "README.md"}
    else:
        assert {"README.md", "model_index.json", "transformer", "vae", "scheduler"} <= names


def test_an_unknown_format_is_refused_with_the_known_ones(runs, tmp_path):
    result = invoke("export", runs["lora"].path, "--out", tmp_path / "out", "--format", "onnx")
    assert result.exit_code == 2
    assert "lora" in result.output
    assert "pipeline" in result.output
