"""What the libraries in a run's actors warned of, told once each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayError

from flowgrpo_ray.cluster.actors import awaited
from flowgrpo_ray.cluster.crew import Crew
from flowgrpo_ray.common.heard import heard
from flowgrpo_ray.serving.types import app_name

NAMED = 3  # actors by name; of more the number


class Warned:
    """Asks actors, and tells what is new by ``tell``."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._told = tell, set[str]()

    async def ask(self, crew: Crew) -> None:
        """All of a crew at once. Each answers after what it does now; one that is lost does not."""
        actors = {worker.name: worker.actor for worker in crew.rollouts.up.values()}
        ranks = enumerate(crew.learners.ranks)
        actors |= {crew.learners.name_of(number): rank for number, rank in ranks}
        answers = await asyncio.gather(*map(_heard, actors.values()))
        found = [*zip(actors, answers, strict=True)]
        found += [(app_name(name), said) for (name, _), said in crew.rewards.heard.items()]
        for place in dict.fromkeys(place for _, said in found for place in said):
            if place not in self._told:
                self._told.add(place)
                whose = [(name, said[place]) for name, said in found if place in said]
                self._tell(f"{_who([name for name, _ in whose])}: {whose[0][1]}")


def _who(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} warns"
    known = sorted(set(names))
    more = ", …" if len(known) > NAMED else ""
    return f"{len(names)} actors ({', '.join(known[:NAMED])}{more}) warn"


async def _heard(actor: Any) -> Mapping[str, str]:
    try:
        return await awaited(actor.__ray_call__.remote(_in_actor))
    except RayError:  # its loss is told elsewhere
        return {}


def _in_actor(_: object) -> Mapping[str, str]:
    return heard()
