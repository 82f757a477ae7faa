"""``checkpoint``: when a run is saved, and by which reward the best of its models is kept."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from flowgrpo_ray.common.strict import Strict
from flowgrpo_ray.spec.sections import PromptsSpec, RewardSpec, over_groups

OF_SET = "@"  # between a reward and a prompt set


class CheckpointSpec(Strict):
    """When the run is saved."""

    every: int = Field(default=10, ge=1, description="iterations between checkpoints")
    keep: int = Field(default=2, ge=1, description="older ones are deleted")
    best: str | None = Field(
        default=None,
        min_length=1,
        description="a reward, as ocr, or ocr@signs for one prompt set: the evaluation with its "
        "highest held-out mean is saved, wherever every falls, and that checkpoint kept",
    )

    @property
    def best_of(self) -> tuple[str, str]:
        """Reward and prompt set of ``best``, either empty where there is none."""
        reward, _, of_set = (self.best or "").partition(OF_SET)
        return reward, of_set

    def check_best(self, rewards: Mapping[str, RewardSpec], prompts: PromptsSpec) -> None:
        """``ValueError`` if evaluations do not say what ``best`` asks for."""
        if self.best is None:
            return
        name, of_set = self.best_of
        if name not in rewards:
            raise ValueError(
                f"checkpoint.best = {self.best!r}: there is no reward {name!r} "
                f"(rewards: {', '.join(rewards)})"
            )
        if name in over_groups(rewards):
            raise ValueError(
                f"checkpoint.best = {self.best!r}: {name} compares the images of a group, and "
                "evaluations draw one for each prompt. Name another reward"
            )
        sets = [one.name for one in prompts.sets.values() if rewards[name].scores(one.name)]
        if OF_SET in self.best and (not of_set or of_set not in sets):
            known = ", ".join(sets) if any(sets) else "none; prompts.train is one file"
            raise ValueError(
                f"checkpoint.best = {self.best!r}: {name} scores no set {of_set!r} of "
                f"prompts.train (sets: {known})"
            )
