"""Before a run starts it tells of prompts that the model reads in part, or is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from tiny_runs import small_spec

from flowgrpo_ray.cluster.crew import REAL, Crew
from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.types import Overlong
from flowgrpo_ray.spec.prompts import Prompt

PROMPTS = {"train": [Prompt('a sign "4"'), Prompt('a sign "5"')], "eval": [Prompt('a sign "4"')]}


class Rollouts:
    def __init__(self, found: Overlong | None) -> None:
        self.found, self.asked = found, list[str]()

    async def overlong(self, prompts: Sequence[str]) -> Overlong | None:
        self.asked = list(prompts)
        return self.found


class Notes(list[str]):
    note = list[str].append


def crew_of(spec: Any, found: Overlong | None) -> tuple[Crew, Notes]:
    notes: Any = Notes()
    crew = Crew(spec, PROMPTS, {}, notes, REAL)
    rollouts: Any = Rollouts(found)
    crew.rollouts = rollouts
    return crew, notes


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Overlong(6, 512, {}), []),
        (Overlong(6, 512, {'a sign "5"': (7, 9)}), ["1 of 2 prompts are cut off after 6 tokens; "]),
        (None, ["workers were lost: "]),
    ],
)
def test_the_console_and_the_run_folder_are_told(found: Overlong | None, told: list[str]):
    crew, notes = crew_of(small_spec(), found)
    asyncio.run(crew.check_prompts())
    asked: Any = crew.rollouts
    assert asked.asked == ['a sign "4"', 'a sign "5"'], "each text once"
    assert notes == crew.warnings
    assert [text[: len(begin)] for text, begin in zip(notes, told, strict=True)] == told


def test_images_of_prompt_lines_are_told():
    crew, notes = crew_of(small_spec(), Overlong(6, 512, {}))
    crew.prompts = {"train": [Prompt("a", {"image": "a.png"}), Prompt("b", {"n": 1})], "eval": []}
    asyncio.run(crew.check_prompts())
    assert notes == crew.warnings
    (told,) = notes
    assert told.startswith(
        "1 of 2 prompt lines have a key image or images, which family 'sd3' does"
    )


@pytest.mark.parametrize("reward", ["{}", "{reward: rank, options: {reward: ocr}}"])
def test_a_run_whose_reward_cannot_be_earned_is_refused(reward: str):
    crew, notes = crew_of(
        small_spec(f"rewards={{ocr: {reward}}}"), Overlong(6, 512, {'a sign "5"': (7, 9)})
    )
    with pytest.raises(PromptError, match=r"the text '5' is cut off the prompt"):
        asyncio.run(crew.check_prompts())
    assert not notes
