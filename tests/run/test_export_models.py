"""Export and back, for every family: what plain diffusers draws, and what a new run starts from.

Each family's real classes, tiny and with random weights, after one real update.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import comfy_rules
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    EDITING,
    MODELS,
    PIPELINES,
    PROMPTS,
    conditions_of,
    draw_batch_of,
    load_pipe,
    model_folder,
    schedule_of,
    spec_of,
)
from tiny_runs import (
    CPU,
    TUNINGS,
    UNTRAINED,
    alone,
    one_thread,
    sampler,
    schedule,
    state_of,
    unit,
    update,
)

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, rollout
from flowgrpo_ray.common.types import Images, WorkUnit
from flowgrpo_ray.policies import load_policy, policy_class
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.run.checkpoint import Progress, save_checkpoint
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.inference import export, generate, load_trained
from flowgrpo_ray.spec.file import dump_spec
from flowgrpo_ray.spec.training import TrainingSpec

STEPS, SEED = 3, 5
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _alone_on_one_thread() -> Iterator[None]:
    with one_thread(), alone():
        yield


@dataclass(frozen=True)
class Trained:
    """A run folder of one family."""

    family: str
    spec: TrainingSpec
    folder: RunFolder

    def images(self, weights: str) -> Images:
        """What ``generate`` draws, each prompt in a batch of its own."""
        policy = load_trained(self.spec, self.folder, weights)
        if self.family in EDITING:
            return self._edited(policy)
        return generate(policy, self.spec, PROMPTS[:2], STEPS, SEED, batch=1)

    def _edited(self, policy: Policy) -> Images:
        """The same of prompts that name images."""
        conditions = conditions_of(self.family, f"sampling.guidance={policy.guidance}")
        levels = schedule_of(policy, range(0), STEPS)
        images: list[Images] = []
        for place in range(2):
            of = WorkUnit(SEED, "eval", 0, 0, (place,), (0,), levels)
            _, x = rollout(policy, of, conditions, self.spec.sampling.size, UNTRAINED)
            images.append(policy.decode(x))
        return np.concatenate(images)

    def drawn_by(self, pipe: Any) -> Images:
        """What plain diffusers draws from the same noise."""
        model = MODELS[self.family]
        assert model.pipeline_images is not None
        shape = load_policy(self.spec, CPU, frozenset({"network", "decoder"})).latent_shape(
            model.size
        )
        images: list[Images] = []
        for place, prompt in enumerate(PROMPTS[:2]):
            of = WorkUnit(SEED, "eval", 0, 0, (place,), (0,), schedule(range(0), steps=STEPS))
            noise, guidance = draw_noise(of, INITIAL, shape), self.spec.sampling.guidance
            images.append(model.pipeline_images(pipe, [prompt], noise, STEPS, guidance, model.size))
        return np.concatenate(images)

    def exported(self, out: Path, what: str, weights: str = "ema") -> Path:
        export(self.spec, self.folder, out, what, weights)
        return out


def train(family: str, tuning: str, folder: Path) -> Trained:
    """One large update from one micro-batch: enough to see in the images."""
    guided = f"sampling.guidance={MODELS[family].guidances[-1]}"
    settings = ("optimizer={learning_rate: 2e-2}", "ema={decay: 0.5, every: 1}")
    spec = spec_of(family, TUNINGS[tuning], guided, *settings)
    learner = Learner(spec, CPU)
    ticket, _ = learner.publish(0)
    batch = draw_batch_of(sampler(spec), conditions_of(family, guided), ticket=ticket)
    update(learner, [batch])
    run = RunFolder(folder)
    folder.mkdir()
    run.spec_file.write_text(dump_spec(spec))
    progress = Progress(1, 4, 1.0, 0, spec.identity(), "")
    save_checkpoint(run.checkpoints, [state_of(learner)], progress, keep=1)
    return Trained(family, spec, run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Mapping[tuple[str, str], Trained]:
    """By family and tuning, each trained when it is first asked for."""
    root: Path = tmp_path_factory.mktemp("models")

    class Runs(dict[tuple[str, str], Trained]):
        def __missing__(self, key: tuple[str, str]) -> Trained:
            self[key] = train(*key, root / "-".join(key))
            return self[key]

    return Runs()


@pytest.fixture(scope="module", autouse=True)
def _each_prompt_alone() -> Iterator[None]:
    """As the pipelines encode one: in a larger batch encodings have other last bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "encoded_at_once", 1)
        yield


@torch.no_grad()
def velocity(spec: TrainingSpec, run: RunFolder | None) -> torch.Tensor:
    """Of a run, or of what a spec starts from, under the run's conditions."""
    policy = load_trained(spec, run, "ema")
    conditions = conditions_of(spec.model.family, f"sampling.guidance={spec.sampling.guidance}")
    x = draw_noise(unit(schedule(range(0))), INITIAL, policy.latent_shape(spec.sampling.size))
    return policy.velocity(x, 0.6, batch_condition(policy, conditions, (0, 0, 1, 1)))


def changed(spec: TrainingSpec, **model: str) -> TrainingSpec:
    """``spec`` with other keys of its model."""
    return spec.model_copy(update={"model": spec.model.model_copy(update=model)})


def off(a: Images, b: Images) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize(("weights", "header"), [("ema", True), ("last", False)])
@pytest.mark.parametrize("family", PIPELINES)
def test_plain_diffusers_draws_an_exported_lora(runs, family, weights, header, tmp_path):
    """The same arithmetic, as alpha / rank is 2: bit for bit. No adapter is lost on the way, and
    the scale is kept whether the file's header is read or not."""
    run = runs[family, "lora"]
    pipe = load_pipe(model_folder(family))
    base = run.drawn_by(pipe)
    out = run.exported(tmp_path / "out", "lora", weights)
    if not header:
        save_file(load_file(out / WEIGHTS), out / WEIGHTS)
    pipe.load_lora_weights(out)
    policy = load_trained(run.spec, run.folder, weights)
    theirs = {n: p for n, p in pipe.transformer.named_parameters() if ".lora_" in n}
    ours = {n.replace(".default.", ".default_0."): p for n, p in policy.trainable().items()}
    assert ours.keys() == theirs.keys()
    for name, ours_ in ours.items():
        assert torch.equal(theirs[name], 2 * ours_ if ".lora_B." in name else ours_)
    drawn = run.drawn_by(pipe)
    assert np.array_equal(drawn, run.images(weights))
    assert off(drawn, base).mean() > 0.5


@pytest.mark.parametrize("family", PIPELINES)
def test_the_card_says_how_peft_draws_an_exported_lora(runs, family, tmp_path, monkeypatch):
    run = runs[family, "lora"]
    out = run.exported(tmp_path / "out", "lora")
    (code,) = re.findall(r"### peft.*?```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    pipe = load_pipe(model_folder(family))
    monkeypatch.chdir(out)
    exec(code, {"pipe": pipe})
    assert np.array_equal(run.drawn_by(pipe), run.images("ema"))


@pytest.mark.parametrize("family", comfy_rules.BLOCKS)
def test_comfyui_and_forge_merge_an_exported_lora_at_its_strength(runs, family, tmp_path):
    """Their rules, and the trained weights, ``W + alpha / rank * B A`` with the run's alpha."""
    run = runs[family, "lora"]
    base = load_policy(run.spec, CPU, frozenset({"network"})).network.state_dict()
    adapters = load_trained(run.spec, run.folder, "ema").trainable()
    trained = dict(base)
    for name in [n for n in adapters if ".lora_B." in n]:
        layer = name.partition(".lora_")[0]
        a, b = (adapters[f"{layer}.lora_{side}.default.weight"].detach().clone() for side in "AB")
        trained[f"{layer}.weight"] = base[f"{layer}.weight"] + 8 / 4 * (b @ a)
    file = load_file(run.exported(tmp_path / "out", "lora") / WEIGHTS)
    merged = comfy_rules.Published(family, base).with_lora(file)
    expected = comfy_rules.Published(family, trained).weights
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("weights", ["ema", "last"])
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", PIPELINES)
def test_plain_diffusers_draws_an_exported_pipeline(runs, family, tuning, weights, tmp_path):
    """Rounding alone differs: where weights lie in memory; with adapters, that they are merged."""
    run = runs[family, tuning]
    drawn = run.drawn_by(load_pipe(run.exported(tmp_path / "out", "pipeline", weights)))
    difference = off(drawn, run.images(weights))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_a_new_run_goes_on_from_an_exported_lora(runs, family, tmp_path):
    run = runs[family, "lora"]
    lora = str(run.exported(tmp_path / "out", "lora"))
    start = velocity(changed(run.spec, lora=lora), None)
    assert torch.equal(start, velocity(run.spec, run.folder))
    assert not torch.equal(start, velocity(run.spec, None))
    merged = velocity(changed(runs[family, "full"].spec, lora=lora), None)
    assert (merged - start).abs().max() < 1e-5 * start.abs().max()


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", MODELS)
def test_a_new_run_goes_on_from_an_exported_model(runs, family, tuning, tmp_path):
    run = runs[family, tuning]
    out = run.exported(tmp_path / "out", "pipeline")
    start, trained = (
        velocity(changed(run.spec, path=str(out)), None),
        velocity(run.spec, run.folder),
    )
    assert (start - trained).abs().max() <= 1e-5 * trained.abs().max()
    assert not torch.equal(start, velocity(run.spec, None))


@pytest.mark.parametrize("family", MODELS)
def test_every_export_has_a_model_card(runs, family, tmp_path):
    card = runs[family, "lora"].exported(tmp_path / "out", "lora") / "README.md"
    text = card.read_text()
    assert f"family: {family}" in text
    assert ("### ComfyUI" in text) == (family in comfy_rules.BLOCKS)
    assert ("### Forge" in text) == (family == "flux")
    if family in PIPELINES:  # the call that it shows is one of the family's pipeline
        import diffusers

        def pipe(*given: Any, **named: Any) -> Any:
            call = signature(getattr(diffusers, policy_class(family).pipeline).__call__)
            assert call.bind(None, *given, **named).arguments["prompt"] == "your prompt"
            return MagicMock()

        call = text[text.index("image = pipe(") : text.index("image.save")]
        assert ("image=source" in call) == (family in EDITING)
        exec(call, {"pipe": pipe, "source": None})


@pytest.mark.parametrize("what", ["lora", "pipeline"])
@pytest.mark.parametrize("family", ["sd3", "bagel"])
def test_exported_files_follow_the_umask(runs, family, what, tmp_path):
    before = os.umask(0o027)
    try:
        out = runs[family, "lora"].exported(tmp_path / "out", what)
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
