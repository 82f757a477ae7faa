"""Contracts between driver, rollout workers, learner and rewards, on a real Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from flowgrpo_ray.errors import ClusterError, ContractError, RewardError
from flowgrpo_ray.prompts import load_prompt_sets, plan_iteration
from flowgrpo_ray.run_folder import RunFolder
from flowgrpo_ray.spec import TrainingSpec
from flowgrpo_ray.spec_file import load_spec
from flowgrpo_ray.tracking import RunRecorder, StartClock, read_rows
from flowgrpo_ray.types import WeightsTicket

T = TypeVar("T")
SMALL = (
    "iterations=2",
    "sampling.steps=4",
    "sampling.window={kind: random, length: 2, within: [0, 3]}",
    "sampling.group_size=4",
    "sampling.groups=4",
    "sampling.micro_batch=4",
    "evaluation={every: 10, steps: 2, prompts: 4, micro_batch: 4, grid: 4}",
)


class SilentDisplay:
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, stage: str) -> None: ...
    def iteration(self, row: dict[str, Any], seconds: float) -> None: ...
    def evaluation(self, iteration: int, rewards: dict[str, float]) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)


def make_trainer(spec: TrainingSpec, root: Path) -> Any:
    from flowgrpo_ray.cluster.driver import Trainer

    prompts, held_out = load_prompt_sets(spec)
    folder = RunFolder.claim(root, spec, resume=False)
    recorder = RunRecorder(folder.path, tensorboard=False)
    clock = StartClock(time.perf_counter())
    return Trainer(spec, prompts, held_out, folder, recorder, SilentDisplay(), clock)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def trainer(
    ray_cluster: None, loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A trainer whose actors are up: two rollout workers, one learner rank."""
    spec = load_spec("tiny-ocr", SMALL)
    trainer = make_trainer(spec, tmp_path_factory.mktemp("runs"))
    loop.run_until_complete(trainer.start())
    yield trainer
    import ray
    from ray import serve
    from ray.util.placement_group import remove_placement_group

    serve.shutdown()  # other tests share this cluster, and start Serve with HTTP
    for actor in [*trainer.rollouts.workers, *trainer.learners.ranks]:
        ray.kill(actor)
    remove_placement_group(trainer.group)


def run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return loop.run_until_complete(asyncio.wait_for(work, 120))


def test_the_driver_loads_no_diffusers() -> None:
    """In a process of its own: this one may have loaded it for another test."""
    import subprocess
    import sys

    code = "import sys, flowgrpo_ray.cluster.driver, flowgrpo_ray.cluster.run\n"
    code += "print([m for m in ('diffusers', 'transformers', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_unit_gives_the_same_bits_on_every_worker_in_any_order(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    async def both_orders() -> list[list[Any]]:
        ticket = await trainer.publish(1)
        units = plan_iteration(trainer.spec, 1, 256, trainer.sigmas).units
        conditions = [trainer._conditions(unit) for unit in units]
        first, second = trainer.rollouts.workers
        given = list(zip(units, conditions, strict=True))
        runs = []
        for worker, order in ((first, given), (second, given[::-1])):
            calls = {
                unit.index: worker.sample.options(num_returns=3).remote(unit, ticket, *given_for)
                for unit, given_for in order
            }
            runs.append([await asyncio.gather(*calls[i][:2]) for i in range(len(units))])
        return runs

    forwards, backwards = run(loop, both_orders())
    assert len(forwards) == 4
    for (trajectory, images), (other, other_images) in zip(forwards, backwards, strict=True):
        assert trajectory.latents.tobytes() == other.latents.tobytes()
        assert trajectory.log_probs.tobytes() == other.log_probs.tobytes()
        assert trajectory.provenance == other.provenance
        assert images.tobytes() == other_images.tobytes()
    assert not np.array_equal(forwards[0][0].latents, forwards[1][0].latents)


def test_weights_other_than_the_published_stop_the_run(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    async def load_something_else() -> None:
        _, arrays = await trainer.learners.publish(2)
        await trainer.rollouts.load(WeightsTicket(2, "0" * 32), arrays)

    with pytest.raises(ContractError, match=r"rollout-0 loaded weights with digest .*published"):
        run(loop, load_something_else())


def test_a_worker_with_old_weights_refuses_to_sample(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    async def sample_with_old() -> None:
        await trainer.publish(3)
        newer, _ = await trainer.learners.publish(4)
        unit = plan_iteration(trainer.spec, 4, 256, trainer.sigmas).units[0]
        await trainer._sample(unit, newer)

    with pytest.raises(ContractError, match="was to be sampled with weights"):
        run(loop, sample_with_old())


def test_groups_that_cannot_be_scored_are_dropped_counted_and_stop_the_run(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    """The reward fails for the first micro-batch of each iteration, as a dead deployment would."""
    real = trainer.rewards

    class FailsOnce:
        def __init__(self) -> None:
            self.left = 1

        async def score(self, *call: Any) -> Any:
            if self.left:
                self.left -= 1
                raise RewardError("reward-ocr failed 3 times, last with a broken pipe")
            return await real.score(*call)

    try:
        trainer.rewards = FailsOnce()
        with pytest.raises(RewardError, match=r"(?s)1 groups.*max_failed_groups = 0.*broken pipe"):
            run(loop, trainer.iterate(1))
    finally:
        trainer.rewards = real
    row = read_rows(trainer.folder.path / "metrics.jsonl")[-1]
    assert row["groups"]["dropped"] == 1
    assert row["groups"]["total"] == 4


def test_more_gpus_than_the_cluster_has(ray_cluster: None) -> None:
    from flowgrpo_ray.cluster.session import check_resources

    spec = load_spec("tiny-ocr", ["cluster.rollout.gpus=1"])
    with pytest.raises(ClusterError, match=r"asks for 2 GPUs and the cluster has 0.*rollout\.gpus"):
        check_resources(spec)


def test_a_deployed_reward_is_used_only_if_it_is_the_one_the_spec_means(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    from flowgrpo_ray.cluster.reward_service import RewardServiceArgs, check_same

    run(loop, check_same(RewardServiceArgs(name="ocr", options={"detect": False})))
    with pytest.raises(
        RewardError, match=r"(?s)reward-ocr is deployed.*'detect': False.*spec asks"
    ):
        run(loop, check_same(RewardServiceArgs(name="ocr", options={"detect": True})))
