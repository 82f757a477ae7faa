"""Prompt sets: the files that a spec names, and what they hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.paths import builtin_path, expand
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.rewards import prompt_check
from flowgrpo_ray.spec.plan import most_groups
from flowgrpo_ray.spec.training import TrainingSpec

MOST_BYTES = 2**30  # of a prompt file, which is held in memory
LONGEST = 2**16  # characters of a prompt and its metadata


@dataclass(frozen=True)
class Prompt:
    """One prompt and what a reward may need beside it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    set: str = ""  # the name of the one that it belongs to, where there are several


def load_prompts(path: str, key: str) -> list[Prompt]:
    """The prompts of a file: a line each (.txt), or a JSON object with "prompt" a line (.jsonl).

    Empty lines are skipped. ``key`` is the spec key that named the file, for the errors.
    """
    file = builtin_path(path) or expand(path)
    if not os.path.isfile(file):  # a name that no file can have is no error to it
        raise PromptError(f"{key} = {path!r}: there is no such file")
    try:
        # Not splitlines: JSON text may hold U+2028 and its like. A byte order mark is dropped.
        lines = _read(file, f"{key} = {path!r}").decode("utf-8").removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptError(f"{key} = {path!r}: line {line} is not UTF-8 text") from error
    parse_line = _parse_json if file.suffix == ".jsonl" else Prompt
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                if len(line) > LONGEST:
                    raise ValueError(f"{len(line):,} characters; at most {LONGEST:,}")
                prompts.append(parse_line(line.strip()))
            except ValueError as error:
                raise PromptError(
                    f"{key} = {path!r}: line {number} holds no prompt: {error}"
                ) from error
    if not prompts:
        raise PromptError(f"{key} = {path!r}: the file holds no prompts")
    return prompts


def _read(file: Path, named: str) -> bytes:
    """The content of a prompt file."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise PromptError(f"{named}: larger than {MOST_BYTES >> 20} MiB; split the file")
        return file.read_bytes()
    except OSError as error:
        raise PromptError(f"{named}: cannot be read: {error.strerror}") from error


def _parse_json(line: str) -> Prompt:
    try:
        row: Any = parse(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):  # pyright: ignore[reportUnknownMemberType]
        raise ValueError('expected a JSON object with a string under "prompt"')
    metadata = cast(dict[str, Any], row)
    return Prompt(metadata.pop("prompt"), metadata)


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
    return train, load_held_out(spec)


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
    prompts = [replace(prompt, set=name) for prompt in load_prompts(file, key)]
    for reward_name, reward in spec.rewards.items():
        if reward.scores(name):
            check = prompt_check(reward.reward or reward_name, reward.options)
            check_prompts(prompts, key, check, f"rewards.{reward_name}")
    return prompts


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


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Identifies the set and its order: a resumed run must train on the same one."""
    rows = [[p.text, dict(p.metadata), *([p.set] if p.set else [])] for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
