"""Who scores which images of the units that are scored together, and what each unit was worth.

Most rewards look at each image alone, and are asked unit by unit. A reward that compares the images
of a group is asked group by group, whatever units these images came in. None is asked about images
of prompt sets that it does not score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ray import ObjectRef

from flowgrpo_ray.cluster.actors import all_or_none
from flowgrpo_ray.cluster.pictures import Pictures
from flowgrpo_ray.common.types import Edit, WorkUnit
from flowgrpo_ray.rewards import takes_sources, weighted_total
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.run.metrics import Scores
from flowgrpo_ray.serving.client import RewardClient
from flowgrpo_ray.spec.plan import Block
from flowgrpo_ray.spec.prompts import Prompt
from flowgrpo_ray.spec.sections import over_groups
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Question:
    """One call of a reward: the images at ``places`` of all, which are those that are ``shown`` of
    the images of some units, these by their numbers. ``None``: all are."""

    reward: str
    units: Sequence[int]
    places: np.ndarray
    shown: Sequence[int] | None


class Scorer:
    """Scores units with the rewards of a spec, through their deployments."""

    def __init__(
        self,
        spec: TrainingSpec,
        prompts: Mapping[str, Sequence[Prompt]],
        rewards: RewardClient,
        ledger: Ledger,
    ) -> None:
        self._spec, self._prompts = spec, prompts
        self.rewards, self._ledger = rewards, ledger
        self._over_groups = over_groups(spec.rewards)
        rewards_of = {name: reward.reward or name for name, reward in spec.rewards.items()}
        self._taking_sources = {name for name, of in rewards_of.items() if takes_sources(of)}
        self._pictures = Pictures()

    async def score(self, units: Sequence[WorkUnit], images: Sequence[ObjectRef]) -> list[Scores]:
        """Every reward's scores of the units' images; NaN, and why, where one gave up.

        The units hold whole groups, if a reward compares the images of a group.
        """
        prompts = [self._prompts[unit.stream][prompt] for unit in units for prompt in unit.prompts]
        ends = np.cumsum([unit.batch for unit in units])
        asked = {name: self._asks(name, units, prompts) for name in self._spec.rewards}
        for name, of_reward in asked.items():
            for unit, some in zip(units, np.split(of_reward, ends[:-1]), strict=True):
                if not some.any():
                    self._ledger.scored(unit.key, name)
        questions = [q for name in asked for q in self._questions(name, units, asked[name])]
        answers = await all_or_none(*(self._ask(q, units, images, prompts) for q in questions))

        rewards = {name: np.full(len(prompts), np.nan, np.float32) for name in asked}
        lost = np.zeros(len(prompts), bool)
        failures: list[dict[str, str]] = [{} for _ in units]
        weights = self._spec.weights
        for question, answer in zip(questions, answers, strict=True):
            if not isinstance(answer, str):
                rewards[question.reward][question.places] = answer
                continue
            lost[question.places] |= bool(weights[question.reward])
            for place in question.units:
                failures[place][question.reward] = answer
        total = weighted_total(rewards, weights, asked)
        parts = [slice(end - unit.batch, end) for unit, end in zip(units, ends, strict=True)]
        return [
            Scores(
                {name: values[part] for name, values in rewards.items()},
                total[part],
                lost[part],
                why,
                {name: of_reward[part] for name, of_reward in asked.items()},
            )
            for part, why in zip(parts, failures, strict=True)
        ]

    def _asks(
        self, reward: str, units: Sequence[WorkUnit], prompts: Sequence[Prompt]
    ) -> np.ndarray:
        """Which of the images a reward scores, bool [b]."""
        if reward in self._over_groups and units[0].stream == "eval":
            return np.zeros(len(prompts), bool)
        of_reward = self._spec.rewards[reward]
        return np.array([of_reward.scores(prompt.set) for prompt in prompts])

    def _questions(
        self, reward: str, units: Sequence[WorkUnit], asked: np.ndarray
    ) -> Iterator[Question]:
        """The calls of a reward for the images that it is ``asked`` about, bool [b]."""
        numbers = np.repeat(np.arange(len(units)), [unit.batch for unit in units])
        of_image = numbers
        if reward in self._over_groups:
            of_image = np.concatenate([unit.prompts for unit in units])
        for together in dict.fromkeys(of_image[asked].tolist()):
            places = np.flatnonzero(asked & (of_image == together))
            sent = np.isin(numbers, numbers[places])
            shown = (np.cumsum(sent) - 1)[places].tolist()
            every = len(shown) == sent.sum()
            of_units = np.unique(numbers[places]).tolist()
            yield Question(reward, of_units, places, None if every else shown)

    async def _ask(
        self,
        question: Question,
        units: Sequence[WorkUnit],
        images: Sequence[ObjectRef],
        prompts: Sequence[Prompt],
    ) -> np.ndarray | str:
        """A reward's scores, or why there are none."""
        of = [prompts[place] for place in question.places]
        size = self._spec.sampling.size
        edits = [edit for p in of if isinstance(edit := p.request(size), Edit)]
        more = {}
        if edits and question.reward in self._taking_sources:
            more["sources"] = await self._pictures.of(edits)
        try:
            return await self.rewards.ask(
                question.reward,
                [images[i] for i in question.units],
                [prompt.text for prompt in of],
                [prompt.metadata for prompt in of],
                question.shown,
                **more,
            )
        finally:
            for i in question.units:
                self._ledger.scored(units[i].key, question.reward)


def scored_together(spec: TrainingSpec, blocks: Sequence[Block]) -> list[Block]:
    """The units of ``blocks`` that are scored together: whole groups if a reward compares their
    images, else each alone."""
    if over_groups(spec.rewards):
        return list(blocks)
    return [(unit,) for block in blocks for unit in block]
