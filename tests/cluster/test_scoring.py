"""Which reward is asked about which images, and what is made of the answers; without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from editing import write_image

from flowgrpo_ray.cluster.scoring import Scorer, scored_together
from flowgrpo_ray.common.sources import find_source, read_sources
from flowgrpo_ray.common.types import Schedule, WorkUnit
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.run.metrics import Scores, count_groups, signals, unscored
from flowgrpo_ray.run.metrics import UnitResult as Result
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.plan import plan_iteration
from flowgrpo_ray.spec.prompts import Prompt
from flowgrpo_ray.spec.training import TrainingSpec

SETS = (
    "prompts={train: [{name: words, file: a.txt, evaluate: b.txt}, "
    "{name: colours, file: c.txt, evaluate: d.txt}]}"
)
REWARDS = (
    "rewards={ocr: {weight: 2, sets: [words], options: {detect: false}}, "
    "sign_colour: {sets: [colours]}, jpeg_compressibility: {weight: 0.5}, "
    "ranked: {weight: 0, reward: rank, options: {reward: jpeg_compressibility}}}"
)
PROMPTS = [Prompt(f"p{i}", {}, "words" if i < 4 else "colours") for i in range(8)]
SCHEDULE = Schedule("flow_sde", (1.0, 0.5, 0.0), (0.8, 0.0))
COMPRESSIBILITY = np.float32(100)


def tiny(*overrides: str) -> TrainingSpec:
    return load_spec("tiny-ocr", [SETS, REWARDS, *overrides])


def unit(index: int, prompts: Sequence[int], stream: str = "train") -> WorkUnit:
    return WorkUnit(0, stream, 1, index, tuple(prompts), tuple(range(len(prompts))), SCHEDULE)


class Client:
    """Answers each image with its number in what was sent and, of rewards that ``fail``, nothing.

    ``images`` are ranges of numbers instead of references.
    """

    def __init__(self, fail: Sequence[str] = ()) -> None:
        self.calls: list[tuple[str, list[int], list[str]]] = []
        self.fail = fail

    async def ask(
        self,
        reward: str,
        images: Sequence[range],
        prompts: Sequence[str],
        metadata: object,
        shown: Sequence[int] | None,
    ) -> np.ndarray | str:
        every = [number for part in images for number in part]
        numbers = every if shown is None else [every[place] for place in shown]
        self.calls.append((reward, numbers, list(prompts)))
        if reward in self.fail:
            return f"{reward} is gone"
        return np.float32(numbers)


def scored(units: Sequence[WorkUnit], client: Client, spec: TrainingSpec) -> list[Scores]:
    """Images are numbered through."""
    ends = np.cumsum([of.batch for of in units]).tolist()
    images: Any = [range(end - of.batch, end) for of, end in zip(units, ends, strict=True)]
    prompts = {"train": PROMPTS, "eval": PROMPTS}
    scorer = Scorer(spec, prompts, client, Ledger({}))  # type: ignore[arg-type]
    return asyncio.run(scorer.score(units, images))


# Groups of three in micro-batches of two: of p1 (words), p5 (colours).
BLOCK = [unit(0, [1, 1]), unit(1, [1, 5]), unit(2, [5, 5])]


def test_each_reward_is_asked_about_the_images_of_its_sets_and_groups() -> None:
    client = Client()
    found = scored(BLOCK, client, tiny())
    calls = {reward: [c[1:] for c in client.calls if c[0] == reward] for reward, *_ in client.calls}
    assert calls["ocr"] == [([0, 1], ["p1"] * 2), ([2], ["p1"])]
    assert calls["sign_colour"] == [([3], ["p5"]), ([4, 5], ["p5"] * 2)]
    assert [numbers for numbers, _ in calls["jpeg_compressibility"]] == [[0, 1], [2, 3], [4, 5]]
    assert calls["ranked"] == [([0, 1, 2], ["p1"] * 3), ([3, 4, 5], ["p5"] * 3)]
    assert [score.total.tolist() for score in found] == [[0, 2.5], [5, 4.5], [6, 7.5]]
    assert np.isnan(found[1].rewards["ocr"]).tolist() == [False, True]
    assert unscored(found) == dict.fromkeys(tiny().rewards, 0), "NaN where it was not asked"


def test_what_fails_drops_the_groups_that_it_scores_and_no_others() -> None:
    spec = tiny()
    found = scored(BLOCK, Client(fail=["ocr", "ranked"]), spec)
    assert [f.lost.tolist() for f in found if f.lost is not None] == [
        [True, True],
        [True, False],
        [False, False],
    ], "a watched one drops none"
    assert found[0].failures == {"ocr": "ocr is gone", "ranked": "ranked is gone"}
    assert found[2].failures == {"ranked": "ranked is gone"}
    assert unscored(found) == {"ocr": 3, "sign_colour": 0, "jpeg_compressibility": 0, "ranked": 6}
    of = signals(BLOCK, found, spec.advantages, spec.weights)
    results = [Result(u, s, of[u.index]) for u, s in zip(BLOCK, found, strict=True)]
    assert count_groups(results) == {"total": 2, "no_spread": 0, "dropped": 1}
    assert [of[i].keep.tolist() for i in range(3)] == [[False] * 2, [False, True], [True] * 2]


def test_the_spread_of_an_iteration_is_that_of_images_with_the_same_rewards() -> None:
    """Totals of a set are ten times those of the other; each is divided by its own spread."""
    units = [unit(0, [1, 1, 5, 5]), unit(1, [2, 2, 6, 6])]
    values = np.float32([[1, 3, 10, 30], [2, 4, 20, 40]])
    first = np.array([True, True, False, False])
    asked = {"ocr": first, "sign_colour": ~first}
    parts = [Scores({"ocr": total, "sign_colour": total}, total, asked=asked) for total in values]
    weights = {"ocr": 1.0, "sign_colour": 1.0}
    for per_reward in (False, True):
        spec = tiny("advantages.std=global", f"advantages.per_reward={str(per_reward).lower()}")
        found = signals(units, parts, spec.advantages, weights)
        for number in range(2):
            low, high = -1 / (np.sqrt(1.25) + 1e-4), 10 / (np.sqrt(125) + 1e-4)
            expected = [low, -low, -high, high]
            np.testing.assert_allclose(found[number].advantages, expected, rtol=1e-6)


def test_evaluations_ask_no_reward_that_compares_a_group() -> None:
    client = Client()
    (found,) = scored([unit(0, [0, 5, 6], "eval")], client, tiny())
    assert {reward for reward, *_ in client.calls} == {"ocr", "sign_colour", "jpeg_compressibility"}
    assert not found.was_asked("ranked").any()
    assert found.was_asked("ocr").tolist() == [True, False, False]


def test_units_wait_for_their_group_only_where_a_reward_compares_it() -> None:
    plain = load_spec("tiny-ocr", ["sampling.micro_batch=6"])
    plan = plan_iteration(plain, 1, 256, tuple(np.linspace(1, 0, 11).tolist()))
    alone = scored_together(plain, plan.blocks)
    assert [list(units) for units in alone] == [[of] for of in plan.units]
    assert scored_together(tiny("sampling.micro_batch=6"), plan.blocks) == plan.blocks


def test_source_images_go_to_the_rewards_that_take_them_once_for_each_prompt(monkeypatch, tmp_path):
    """Of units that hold several prompts, and of places that are shown. Files are read one after
    the other here: whichever is read first is asked about first."""

    async def at_once(call: Any, *given: Any) -> Any:
        return call(*given)

    monkeypatch.setattr("flowgrpo_ray.cluster.pictures.asyncio.to_thread", at_once)
    reads: list[str] = []
    real = read_sources
    monkeypatch.setattr(
        "flowgrpo_ray.common.sources.read_sources",
        lambda requests: (reads.extend(of.text for of in requests), real(requests))[1],
    )
    monkeypatch.setattr("flowgrpo_ray.cluster.pictures.ray.put", lambda array: array)
    edits = [
        replace(prompt, images=(find_source(write_image(tmp_path / f"{i}.png", (i, 0, 0)))[0],))
        for i, prompt in enumerate(PROMPTS)
    ]
    rewards = (
        "rewards={sign_colour: {sets: [colours]}, preservation: {sets: [words]}, "
        "ranked: {reward: rank, options: {reward: preservation}}}"
    )
    spec = load_spec("tiny-ocr", [SETS, rewards])
    seen: dict[str, list[Any]] = {}

    class Sees(Client):
        async def ask(self, reward: str, *call: Any, sources: Any = None) -> Any:
            of = sources and [int(sources.arrays[place][0, 0, 0, 0]) for place in sources.of]
            seen.setdefault(reward, []).append((of, sources and len(sources.arrays)))
            return await super().ask(reward, *call)

    client: Any = Sees()
    scorer = Scorer(spec, {"train": edits, "eval": edits}, client, Ledger({}))
    images: Any = [range(2), range(2, 4), range(4, 6)]
    asyncio.run(scorer.score(BLOCK, images))
    assert seen == {
        "sign_colour": [(None, None)] * 2,
        "preservation": [([1, 1], 1), ([1], 1)],
        "ranked": [([1, 1, 1], 1), ([5, 5, 5], 1)],
    }
    assert sorted(reads) == ["p1", "p5"]
