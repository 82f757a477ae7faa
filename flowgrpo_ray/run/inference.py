"""Trained and untrained models outside a run, in this process: sample, evaluate, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from flowgrpo_ray import __version__
from flowgrpo_ray.algorithm.sampling import rollout
from flowgrpo_ray.algorithm.weights import load_arrays
from flowgrpo_ray.common.errors import RunFolderError, SpecError
from flowgrpo_ray.common.files import check_place
from flowgrpo_ray.common.paths import share_mode
from flowgrpo_ray.common.types import Images, LearnerState, Request, WeightsTicket, WorkUnit
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.encodings import EncodingCache
from flowgrpo_ray.rewards import ask, build
from flowgrpo_ray.run.checkpoint import (
    BEST,
    Progress,
    best_checkpoint,
    checkpoint_iteration,
    list_checkpoints,
    load_checkpoint,
)
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.model_card import Exported, model_card
from flowgrpo_ray.run.scoring import sources_of
from flowgrpo_ray.run.tracking import sources_per_prompt
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.plan import still_schedule
from flowgrpo_ray.spec.prompts import Prompt, check_lengths
from flowgrpo_ray.spec.sections import over_groups
from flowgrpo_ray.spec.training import TrainingSpec

WEIGHTS = ("ema", "last")
EXPORTS = ("lora", "pipeline")
Iteration = int | Literal["best"] | None  # of a checkpoint; None for the newest


def open_target(target: str) -> tuple[TrainingSpec, RunFolder | None]:
    """A run folder, or a spec or recipe, which stands for its untrained base model."""
    if Path(target).is_dir():
        folder = RunFolder.existing(Path(target))
        return folder.read_spec(), folder
    return load_spec(target), None


def load_trained(
    spec: TrainingSpec, folder: RunFolder | None, weights: str, iteration: Iteration = None
) -> Policy:
    """The policy with a checkpoint's weights (the newest, or ``iteration``), or untrained (with
    ``model.lora``, if the spec names one).

    ``weights`` is ``ema`` (the same as ``last`` in a run without averaging) or ``last``.
    """
    if folder is not None:
        return _trained(spec, _checkpoint(folder, iteration)[0], weights)
    policy = _load(spec)
    if spec.model.lora is not None:
        policy.tune(spec.seed, with_reference=False)
    return policy


def _load(spec: TrainingSpec) -> Policy:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = spec.with_linear("torch")  # whatever the run took: as plain diffusers draws
    return load_policy(spec, device, frozenset({"network", "decoder"}))


def _checkpoint(folder: RunFolder, iteration: Iteration) -> tuple[LearnerState, Progress]:
    found = list_checkpoints(folder.checkpoints)
    if iteration == BEST and found:
        best = best_checkpoint(folder.checkpoints)
        if best is None:
            raise RunFolderError(
                f"{folder.path} keeps no best checkpoint: its spec names no reward in "
                "checkpoint.best, or no evaluation was saved since. Name an iteration"
            )
        iteration = best["iteration"]
    if iteration is not None:
        there = [checkpoint_iteration(path) for path in found]
        found = [path for path, of in zip(found, there, strict=True) if of == iteration]
        if there and not found:
            raise RunFolderError(
                f"{folder.path} holds no checkpoint of iteration {iteration}; there are: "
                f"{', '.join(map(str, there))}"
            )
    if not found:
        raise RunFolderError(f"{folder.path} holds no checkpoint yet; train it first")
    return load_checkpoint(found[-1])


def _trained(spec: TrainingSpec, state: LearnerState, weights: str) -> Policy:
    policy = _load(spec)
    policy.tune(spec.seed, with_reference=False)
    chosen = state.ema if weights == "ema" and state.ema else state.weights
    load_arrays(policy.trainable(), chosen)
    return policy


def cut_off(policy: Policy, spec: TrainingSpec, prompts: Sequence[Prompt]) -> str | None:
    """What to tell of prompts that the model reads in part; ``PromptError`` where a reward of the
    spec asks for what is not read."""
    found = EncodingCache(policy).overlong([prompt.text for prompt in prompts])
    return check_lengths(spec, prompts, found)


def generate(
    policy: Policy,
    spec: TrainingSpec,
    prompts: Sequence[Request],
    steps: int,
    seed: int,
    batch: int,
) -> Images:
    """One image per prompt, by the evaluations' solver from noise drawn by ``seed`` and place."""
    encodings = EncodingCache(policy)
    encodings.add(prompts)
    conditions = [encodings.get(prompt) for prompt in prompts]
    size = spec.sampling.size
    schedule = still_schedule(spec, policy.sigmas(steps, size))
    images: list[Images] = []
    for index, start in enumerate(range(0, len(prompts), batch)):
        places = tuple(range(start, min(start + batch, len(prompts))))
        unit = WorkUnit(seed, "eval", 0, index, places, (0,) * len(places), schedule)
        chosen = {place: conditions[place] for place in places}
        _, x = rollout(policy, unit, chosen, size, WeightsTicket(0, ""))
        images.append(policy.images(x, size))
    return np.concatenate(images)


def score(
    spec: TrainingSpec, images: Images, prompts: Sequence[Prompt]
) -> Mapping[str, np.ndarray]:
    """Every reward of the spec on images, ``[n]``, without Serve; NaN where it does not score them.

    Left out are those that compare the images of a group: here each prompt has one.
    """
    found: dict[str, np.ndarray] = {}
    comparing = over_groups(spec.rewards)
    for name, reward in spec.rewards.items():
        if name in comparing:
            continue
        found[name] = np.full(len(images), np.nan, np.float32)
        if places := [i for i, prompt in enumerate(prompts) if reward.scores(prompt.set)]:
            texts = [prompts[i].text for i in places]
            metadata = [prompts[i].metadata for i in places]
            sources = sources_of([prompts[i] for i in places], spec.sampling.size)
            scorer = build(reward.reward or name, reward.options)
            found[name][places] = ask(scorer, images[places], texts, metadata, sources)
    return found


def export(
    spec: TrainingSpec,
    folder: RunFolder,
    out: Path,
    what: str,
    weights: str,
    iteration: Iteration = None,
) -> None:
    """Write a trained model into the new folder ``out``: LoRA weights or all, and a model card."""
    if what == "lora" and spec.tuning.kind != "lora":
        raise SpecError(f"{folder.path} trained the full network; export it with --format pipeline")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is a file or not empty; export into a new folder")
    check_place(out, f"--out {out}")
    state, progress = _checkpoint(folder, iteration)
    policy = _trained(spec, state, weights)
    if what == "lora":
        policy.save_lora(out)
    else:
        policy.save_pipeline(out)
    versions = {name: version(name) for name in ("torch", "diffusers", "peft")}
    versions = {"flowgrpo_ray": __version__, **versions}
    call = (policy.call_takes_length, policy.call_scheduler)
    sources = sources_per_prompt(folder.path) or policy.sources.start
    given = (policy.call_arguments, progress, versions, *call, sources, policy.read_by)
    exported = Exported(what, weights, *given)
    card = model_card(spec, exported)
    readme = out / "README.md"
    readme.write_text(card, encoding="utf-8")
    share_mode((path for path in out.rglob("*") if path.is_file()), like=readme)
