"""Prompt sets: what the files that a spec names hold, each prompt fit for its rewards."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.types import Overlong
from flowgrpo_ray.rewards import keys_read, needs_sources, prompt_check, read_check
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.plan import most_groups
from flowgrpo_ray.spec.prompt_files import IMAGES, Prompt, check_alike, load_prompts
from flowgrpo_ray.spec.prompt_keys import check_keys
from flowgrpo_ray.spec.training import TrainingSpec

SHOWN = 60  # characters of a long prompt


def load_prompt_sets(spec: TrainingSpec) -> tuple[list[Prompt], list[Prompt]]:
    """The spec's training and evaluation prompts, each fit for every reward that scores it.

    Those to train on are in the order of their sets, the held-out ones of the sets in turn.
    """
    train: list[Prompt] = []
    most = most_groups(spec)
    for key, one in spec.prompts.sets.items():
        found = _of_set(spec, one.file, f"{key}.file" if one.name else key, one.name)
        if len(found) < most[one.name]:
            raise PromptError(
                f"{key} = {one.file!r} holds {len(found)} prompts; an iteration needs "
                f"{most[one.name]} different ones (sampling.groups = {spec.sampling.groups})"
            )
        train += found
    held_out = load_held_out(spec)
    check_alike((len(prompt.images) for prompt in [*train, *held_out]), "prompts")
    return train, held_out


def load_held_out(spec: TrainingSpec, most: int | None = None) -> list[Prompt]:
    """The spec's evaluation prompts, each fit for every reward that scores it: the first
    ``evaluation.prompts`` of each set, or the first ``most``."""
    found = [
        _of_set(spec, one.evaluate, f"{key}.evaluate" if one.name else "prompts.evaluate", one.name)
        for key, one in spec.prompts.sets.items()
    ]
    in_turn = itertools.zip_longest(
        *(prompts[: most or spec.evaluation.prompts] for prompts in found)
    )
    return [prompt for row in in_turn for prompt in row if prompt is not None]


def _of_set(spec: TrainingSpec, file: str, key: str, name: str) -> list[Prompt]:
    """The prompts of a file of the set ``name``."""
    prompts = [replace(prompt, set=name) for prompt in prompts_for(spec, file, key, name)]
    for reward_name, reward in spec.rewards.items():
        if reward.scores(name):
            check = prompt_check(reward.reward or reward_name, reward.options)
            check_prompts(prompts, key, check, f"rewards.{reward_name}")
            needs = needs_sources(reward.reward or reward_name, reward.options)
            check_needed(prompts, key, needs, f"rewards.{reward_name}")
    return prompts


def prompts_for(spec: TrainingSpec, file: str, key: str, name: str = "") -> list[Prompt]:
    """The prompts of a file of the set ``name``, with the source images that the family draws
    from."""
    prompts, family = load_prompts(file, key), spec.model.family
    edits = (allowed := FAMILIES[family].sources) != range(1)
    readers = {
        f"rewards.{called}": keys_read(reward.reward or called, reward.options)
        for called, reward in spec.rewards.items()
        if reward.scores(name)
    }
    check_keys(prompts, f"{key} = {file!r}", family if edits else None, readers)
    if not edits:
        return prompts
    from flowgrpo_ray.spec.sources import with_sources  # which needs Pillow

    return with_sources(prompts, file, key, allowed, f"family {family!r}")


def set_sizes(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """How many there are of each set, for prompts in the order of their sets."""
    return tuple(len(list(of)) for _, of in itertools.groupby(prompts, lambda p: p.set))


def check_prompts(
    prompts: Sequence[Prompt],
    key: str,
    check: Callable[[str, Mapping[str, Any]], None],
    called: str,
) -> None:
    """``PromptError`` for a prompt that a reward could never score, as its ``check`` says; it names
    the prompts ``key`` and the reward as it is ``called``."""
    for number, prompt in enumerate(prompts, 1):
        try:
            check(prompt.text, prompt.metadata)
        except ValueError as error:
            raise PromptError(f"{key}: prompt {number}, for {called}: {error}") from error


def check_needed(prompts: Sequence[Prompt], key: str, needs: bool, called: str) -> None:
    """``PromptError`` where a reward ``needs`` source images, and the prompts have none."""
    if needs and not all(prompt.images for prompt in prompts):
        raise PromptError(
            f"{key}: {called} compares with the source image of each prompt, and these have none: "
            'name them under "image", with a family that changes images'
        )


def check_lengths(spec: TrainingSpec, prompts: Sequence[Prompt], found: Overlong) -> str | None:
    """What to tell of prompts that the model reads in part; ``PromptError`` where a reward could
    not be earned, as it is about the rest."""
    if not found.cut:
        return None
    limit = found.limit
    longest = max(found.cut, key=lambda text: found.cut[text][0])
    if found.most == limit:
        advice = "The model takes no more: shorten them"
    else:
        advice = f"Raise model.max_sequence_length = {limit}"
        if found.most < found.cut[longest][0]:
            advice += f" (at most {found.most})"
    for prompt in prompts:
        tokens, read = found.cut.get(prompt.text, (0, 0))
        for name, reward in spec.rewards.items():
            if tokens and reward.scores(prompt.set):
                check = read_check(reward.reward or name, reward.options)
                try:
                    check(prompt.text, prompt.metadata, prompt.text[:read])
                except ValueError as error:
                    raise PromptError(
                        f"rewards.{name}: {error}. The model reads {limit} of the prompt's "
                        f"{tokens} tokens. {advice}"
                    ) from error
    return (
        f"{len(found.cut)} of {len({p.text for p in prompts})} prompts are cut off after {limit} "
        f"tokens; the longest has {found.cut[longest][0]}: {longest[:SHOWN]!r}. {advice}"
    )


def unused_images(spec: TrainingSpec, prompts: Sequence[Prompt]) -> str | None:
    """What to tell of prompt lines that name source images, as the family draws from text alone."""
    naming = sum(prompt.names_images for prompt in prompts)
    if not naming or FAMILIES[spec.model.family].sources != range(1):
        return None
    return (
        f"{naming} of {len(prompts)} prompt lines have a key {' or '.join(IMAGES)}, which family "
        f"{spec.model.family!r} does not draw from: only rewards are given it"
    )


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Identifies the set and its order: a resumed run must train on the same one."""
    rows = [
        [
            *(p.text, dict(p.metadata)),
            *([p.set] if p.set else []),
            *([[image.digest for image in p.images]] if p.images else []),
        ]
        for p in prompts
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
