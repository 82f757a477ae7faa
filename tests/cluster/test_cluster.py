"""Contracts between driver, rollout workers, learner and rewards, on a real Ray cluster."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import socket
import time
import weakref
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import ANY, patch

import numpy as np
import pytest
import torch
from tiny_runs import merged
from waiting import PATIENCE_S

from flowgrpo_ray.common.errors import ClusterError, ContractError, RewardError
from flowgrpo_ray.common.types import MicrobatchStats, Parallel, WeightsTicket, WorkUnit
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.run.metrics import Scores, Signal, count_groups, signals
from flowgrpo_ray.run.tracking import RunRecorder, StartClock, read_rows
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.plan import plan_iteration, plan_refill
from flowgrpo_ray.spec.prompts import load_prompt_sets
from flowgrpo_ray.spec.training import TrainingSpec

T = TypeVar("T")
COLOCATED = "cluster.layout=colocated"
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
    """Keeps the stages and the notes."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, stage: str) -> None:
        self.stages.append(stage)

    def iteration(self, row: dict[str, Any], seconds: float) -> None: ...
    def evaluation(self, iteration: int, rewards: dict[str, float | None]) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)


def make_trainer(spec: TrainingSpec, root: Path) -> Any:
    from flowgrpo_ray.cluster.driver import Trainer

    prompts, held_out = load_prompt_sets(spec)
    folder = RunFolder.claim(root, spec, resume=False)
    recorder = RunRecorder(folder.path)
    clock = StartClock(time.perf_counter())
    return Trainer(spec, prompts, held_out, folder, recorder, SilentDisplay(), clock)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def cluster(ray_cluster: None) -> Iterator[None]:
    """Ray, with the reward deployments of whoever started them first."""
    yield
    from ray import serve

    serve.shutdown()  # other tests share this cluster, and start Serve with HTTP


@contextmanager
def started(loop: asyncio.AbstractEventLoop, spec: TrainingSpec, root: Path) -> Iterator[Any]:
    """A trainer whose actors are up. One at a time: their names are those of the run."""
    import ray
    from ray.util.placement_group import remove_placement_group

    trainer = make_trainer(spec, root)
    run(loop, trainer.start())
    trainer.started_with = list(trainer.display.notes)
    crew = trainer.crew
    actors = {worker.actor for worker in crew.rollouts.up.values()} | {*crew.learners.ranks}
    yield trainer
    for actor in actors:
        ray.kill(actor)
    remove_placement_group(crew.placement.group)
    while ray.util.list_named_actors():
        time.sleep(0.02)


@pytest.fixture(scope="module")
def trainer(
    cluster: None, loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Two rollout workers, one learner rank; of linear layers they take oneDNN's."""
    from flowgrpo_ray.cluster import linear

    spec = load_spec("tiny-ocr", SMALL)
    timed = patch.object(linear, "measure", lambda: {"torch": 1.0, "onednn": 0.5})
    with ExitStack() as ending:
        with timed:
            trainer = ending.enter_context(started(loop, spec, tmp_path_factory.mktemp("runs")))
        yield trainer


def run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return loop.run_until_complete(asyncio.wait_for(work, 240))


# --- small runs; before the tests that share a trainer, whose actors have the same names


class Brightness:
    """In place of the rewards' client. The first group of every iteration is flat."""

    def __init__(self, trainer: Any) -> None:
        plans = [plan_iteration(trainer.spec, i, 256, trainer.crew.sigmas) for i in range(1, 9)]
        firsts = [plan.units[0].prompts[0] for plan in plans]
        self.flat = {trainer.prompts["train"][prompt].text for prompt in firsts}

    async def ask(self, _: str, parts: list[Any], prompts: list[str], *more: Any) -> np.ndarray:
        images = np.concatenate([await part for part in parts])
        bright = images.mean(axis=(1, 2, 3)) / 255
        scores = np.where([prompt in self.flat for prompt in prompts], 0, bright)
        return scores.astype(np.float32)


def train_small(
    loop: asyncio.AbstractEventLoop, root: Path, iterations: int, *overrides: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The metrics rows of a run over two rollout workers; then those of its iterations from the
    second on, done again over one of them."""
    root.mkdir()
    with started(loop, load_spec("tiny-ocr", [*SMALL, *overrides]), root) as trainer:

        async def train() -> None:
            trainer.crew.scorer.rewards = Brightness(trainer)
            await trainer.crew.measure_floor()
            await trainer.iterate(1)
            after_first = merged(await trainer.crew.learners.shares())
            for iteration in range(2, iterations + 1):
                await trainer.iterate(iteration)
            await trainer.crew.learners.load_state(after_first)
            del trainer.crew.rollouts.up[1]
            for iteration in range(2, iterations + 1):
                await trainer.iterate(iteration)

        run(loop, train())
        rows = read_rows(trainer.folder.path / "metrics.jsonl")
    return rows[:iterations], rows[iterations:]


def layout_of(
    loop: asyncio.AbstractEventLoop, root: Path, *overrides: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The metrics rows of two iterations between evaluations, and digests of all that a checkpoint
    then holds."""
    from flowgrpo_ray.algorithm.weights import digest

    root.mkdir()
    with started(loop, load_spec("tiny-ocr", [*SMALL, *TWO_RANKS, *overrides]), root) as trainer:

        async def train() -> Any:
            crew = trainer.crew
            crew.scorer.rewards = Brightness(trainer)
            assert (await crew.measure_floor()).exact
            for iteration in (1, 2):
                await trainer.evaluate()
                await trainer.iterate(iteration)
            await trainer.evaluate()
            state = merged(await crew.learners.shares())
            if trainer.spec.cluster.layout == "colocated":
                await refuses_what_was_not_announced(trainer)
            return state

        state = run(loop, train())
        rows = read_rows(trainer.folder.path / "metrics.jsonl")
    kept = ("weights", "ema", "exp_avg_sq", "follower")
    arrays = {name: getattr(state, name) for name in kept}
    tensors = {
        name: {key: torch.tensor(array) for key, array in held.items()}
        for name, held in arrays.items()
    }
    return rows, {name: digest(held) for name, held in tensors.items()}


async def refuses_what_was_not_announced(trainer: Any) -> None:
    """After an update a worker samples nothing before the next weights are announced."""
    crew = trainer.crew
    unit = plan_iteration(trainer.spec, 3, 256, crew.sigmas).units[0]
    ticket = await crew.publish(3)
    assert (await crew.sample(unit, ticket)).worker == 0
    with pytest.raises(ContractError, match="was to be sampled with weights"):
        await crew.sample(unit, WeightsTicket(3, "0" * 32))
    await crew.learners.step(0, 2, last=True)
    with pytest.raises(ContractError, match="this worker holds None"):
        await crew.sample(unit, ticket)


TWO_RANKS = (
    "cluster.learner={count: 2, cpus: 0.5}",
    "advantages={refill: 1}",
    "ema={decay: 0.5, every: 1}",
)
OBJECTIVES = {
    "grpo": ("objective={kind: flow_grpo, updates: 2, kl: {beta: 0.1}}",),
    "nft": (
        "objective={kind: diffusion_nft, updates: 2, decay: {rate: 0.2}, "
        "times: {count: 2, within: [0.3, 1]}}",
        *("sampling.eta=null", "sampling.window=null", "sampling.solver=dpm2"),
    ),
    "awm": (
        "objective={kind: awm, updates: 2, anchor_decay: {rate: 0.2}, "
        "times: {count: 2, within: [0.3, 1]}}",
        *("sampling.eta=null", "sampling.window=null"),
    ),
}


def test_prompts_are_encoded_as_they_come_to_be_needed() -> None:
    """Those of the next iterations when the last are used up, whichever iteration is next."""
    from flowgrpo_ray.cluster.crew import REAL, Crew

    changes = ["prompts.encode_ahead=20", "iterations=50"]
    spec = load_spec("tiny-ocr", [*SMALL, *changes])
    train, held_out = load_prompt_sets(spec)
    display = SilentDisplay()
    crew = Crew(spec, {"train": train, "eval": held_out}, {}, display, REAL)
    encoded: list[list[str]] = []

    async def encode(texts: list[str], tell: Callable[[int, int], None]) -> int:
        tell(len(encoded), 7)
        encoded.append(texts)
        return 0 if len(encoded) > 1 else 7

    crew.rollouts = SimpleNamespace(encode=encode)  # type: ignore[assignment]
    for iteration in (1, *range(1, 8), 3, 4):  # a learner was lost after the seventh
        asyncio.run(crew.encode(iteration))
        plan = plan_iteration(spec, iteration, len(train), (1.0, 0.9, 0.5, 0.2, 0.0))
        needed = {train[p].text for unit in plan.units for p in unit.prompts}
        assert needed | {p.text for p in held_out} <= set(encoded[-1])
    assert 2 < len(encoded) < 8
    assert all(len(texts) <= 20 + len(held_out) for texts in encoded)
    assert display.stages == [f"encoding prompts: {n} of 7" for n in range(len(encoded))]
    (note,) = display.notes
    assert re.fullmatch(r"encoded 7 prompts in \d+\.\d s", note), "not where all are there"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "parallel"), [("grpo", "shard"), ("nft", "shard"), ("awm", "replicate")]
)
def test_both_layouts_are_the_same_run(
    objective: str,
    parallel: str,
    cluster: None,
    loop: asyncio.AbstractEventLoop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where units are trained by another worker than the one that sampled them."""
    from flowgrpo_ray.cluster.colocated import IN_FLIGHT, WorkerPool

    held = (*OBJECTIVES[objective], f"cluster.learner.parallel={parallel}")
    separate, state = layout_of(loop, tmp_path / "separate", *held)
    assert [row["kind"] for row in separate] == ["eval", "train", "eval", "train", "eval"]
    assert len({row["rewards"]["ocr"]["mean"] for row in separate}) == 5, "weights move"
    assert [r["groups"]["refilled"] for r in separate if r["kind"] == "train"] == [1, 1]
    home, taken = WorkerPool._match, []

    def takes_over(pool: Any) -> Any:
        found = home(pool)
        if found and found[1].index == 1 and pool.up[0].in_flight < IN_FLIGHT:
            taken.append(found[1].iteration)
            return pool.up[0], found[1]
        return found

    monkeypatch.setattr(WorkerPool, "_match", takes_over)
    assert layout_of(loop, tmp_path / "colocated", *held, COLOCATED) == (separate, state)
    assert {1, 2} <= set(taken), "worker 0 has sampled a unit of worker 1 in every iteration"


@pytest.mark.slow
def test_guard_with_refills_over_learner_ranks_whose_rows_are_not_full(
    cluster: None, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    """Two micro-batches in an update and one that replaces a flat group, over two ranks."""
    guard = (
        "objective={kind: grpo_guard, updates: 2}",
        "advantages={refill: 1}",
        "sampling.steps=6",
        "sampling.window={kind: progressive, length: 2, stride: 2, iterations: 1}",
    )
    two_ranks = "cluster.learner={count: 2, cpus: 0.5}"
    rows, again = train_small(loop, tmp_path / "two", 3, *guard, two_ranks)
    assert [row["groups"]["refilled"] for row in rows] == [1, 1, 1]
    assert [row["groups"]["no_spread"] for row in rows] == [1, 1, 1]
    assert [row["images"] for row in rows] == [20, 20, 20]
    assert [row["log_ratio"]["gate"] for row in rows] == [0.0] * 3
    assert [row["window"] for row in rows] == [[0, 2], [2, 4], [3, 5]]
    assert len({row["weights"]["digest"] for row in rows}) == 3, "weights move"
    assert rows[1:] == again
    ((alone,), _) = train_small(loop, tmp_path / "one", 1, *guard)
    for sums in ("grad_norm", "policy_loss"):
        assert alone[sums] == pytest.approx(rows[0][sums], rel=1e-4)


@pytest.mark.slow
def test_flow_dppo_in_epochs_over_micro_batches_that_straddle_groups(
    cluster: None, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    """Two blocks of 3 groups in 2 micro-batches, trained on twice."""
    dppo = (
        "objective={kind: flow_dppo, updates: 2, epochs: 2, kl: {beta: 0.1}}",
        "sampling.micro_batch=6",
        "sampling.groups=6",
    )
    rows, again = train_small(loop, tmp_path / "two", 3, *dppo)
    assert [row["images"] for row in rows] == [24] * 3
    assert [row["groups"]["no_spread"] for row in rows] == [1] * 3
    assert [row["log_ratio"]["gate"] for row in rows] == [0.0] * 3
    assert [row["updates"] for row in rows] == [4] * 3
    assert min(row["log_ratio"]["max_abs"] for row in rows) > 0, "the later updates are off-policy"
    assert len({row["weights"]["digest"] for row in rows}) == 3, "weights move"
    assert rows[1:] == again


# --- contracts


def test_the_driver_loads_no_diffusers() -> None:
    """In a process of its own: this one may have loaded it for another test."""
    import subprocess
    import sys

    code = "import sys, flowgrpo_ray.cluster.driver, flowgrpo_ray.cluster.run\n"
    code += "print([m for m in ('diffusers', 'transformers', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_actor_computes_on_as_many_threads_as_the_spec_says() -> None:
    """Else each takes all cores, and they fight for them."""
    import subprocess
    import sys

    code = "from flowgrpo_ray.cluster.actors import set_up_process\n"
    code += "from flowgrpo_ray.spec.cluster import ActorsSpec\n"
    code += "set_up_process(ActorsSpec(threads=3), 'rollout-0', 'run')\n"
    code += "import os, torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "3 3"


@pytest.mark.slow
def test_learner_ranks_meet_where_the_first_listens_already(ray_cluster: None) -> None:
    """From the moment that its address is told: nobody else can take the port before they join."""
    import ray

    from flowgrpo_ray.cluster.learner_group import LearnerRank

    spec = load_spec("tiny-ocr", ["cluster.learner={count: 2, cpus: 0.5}"])
    actor: Any = ray.remote(LearnerRank).options(num_cpus=0.5)
    ranks = [actor.remote(spec, rank) for rank in range(2)]
    address = ray.get(ranks[0].address.remote())
    with pytest.raises(OSError, match="in use"):
        socket.create_server(address)
    early = ranks[1].join.remote(address)
    socket.create_connection(address).close()
    agreed = ray.get([early, ranks[0].join.remote(address)], timeout=PATIENCE_S)
    assert agreed == 2 * [Parallel(groups=((0,), (1,)))], "each has the whole network, on a CPU"
    for rank in ranks:
        ray.kill(rank)


@pytest.mark.parametrize("lag", [0, 1])
def test_no_more_weights_are_kept_than_may_be_asked_for(lag: int) -> None:
    """With full tuning each version is as large as the network."""
    from flowgrpo_ray.cluster.rollout_pool import RolloutPool

    pool = RolloutPool.__new__(RolloutPool)
    pool.spec, pool._weights = load_spec("tiny-ocr", [f"sampling.max_lag={lag}"]), {}
    for version in range(5):
        pool.publish(WeightsTicket(version, ""), object())  # type: ignore[arg-type]
    assert [ticket.version for ticket in pool._weights] == ([2, 3, 4] if lag else [4])


def test_a_lost_actor_is_told_in_a_line(ray_cluster: None) -> None:
    import os

    import ray
    from ray.exceptions import ActorDiedError

    from flowgrpo_ray.cluster.actors import first_line

    class Broken:
        def __init__(self, how: str) -> None:
            if how == "at start":
                raise ValueError("no such device")

        def work(self) -> None:
            os.kill(os.getpid(), 9)

    def told(how: str) -> str:
        actor = ray.remote(Broken).options(num_cpus=0).remote(how)
        with pytest.raises(ActorDiedError) as lost:
            ray.get(actor.work.remote())
        return first_line(lost.value)

    assert told("at start") == "it cannot start: ValueError: no such device"
    assert "died unexpectedly" in told("later")


def test_warnings_of_actors_are_told_once(trainer: Any, loop: asyncio.AbstractEventLoop) -> None:
    """By the place that warns and the actors that do; no deprecation, nothing of Ray's own."""
    import ray

    def warn(_: object, number: int) -> None:
        import logging
        import warnings

        warnings.warn(f"no kernel for layer {number}", stacklevel=1)
        warnings.warn("old name", FutureWarning, stacklevel=1)
        logging.getLogger("diffusers.models").warning("'torch_dtype' is deprecated")
        logging.getLogger("ray.serve").warning("Ray's")
        if number == 2:
            logging.getLogger("transformers.models").warning("%d weights\n were not used", 3)

    crew, notes = trainer.crew, trainer.display.notes
    samplers = [worker.actor for worker in crew.rollouts.up.values()]
    actors, before = [*samplers, *crew.learners.ranks], len(notes)
    for number, actor in enumerate(actors):
        ray.get([actor.__ray_call__.remote(warn, number) for _ in range(2)])
    crew.rewards.heard = {("ocr", "a"): {"x:1": "blind"}, ("ocr", "b"): {"x:1": "blind"}}
    trainer.telemetry.follow(crew)
    for _ in range(2):
        run(loop, trainer.telemetry.listen())
    mine = [note for note in notes[before:] if "warn" in note]
    assert mine == [
        "3 actors (learner-0, rollout-0, rollout-1) warn: no kernel for layer 0",
        "learner-0 warns: 3 weights were not used",
        "2 actors (reward-ocr) warn: blind",
    ]


@pytest.mark.parametrize(("ranks", "called"), [(1, [[0, 3]]), (2, [[0, 2], [1, 3]])])
def test_the_learner_never_fetches_a_row_without_gradient(
    ranks: int, called: list[list[int]]
) -> None:
    """Rows of one unit for each rank; of units 0 to 5, only 0 and 3 have a gradient."""
    from flowgrpo_ray.cluster.actors import Calls, RunOnRay
    from flowgrpo_ray.cluster.learner_group import Contribution, LearnerGroup

    class Rank:
        def __init__(self) -> None:
            self.units: list[int] = []
            self.accumulate = self

        async def remote(self, unit: WorkUnit, *others: object) -> MicrobatchStats:
            self.units.append(unit.index)
            zero = np.zeros(1)
            return MicrobatchStats(1, zero, zero, 0, True, 0, {}, 0)

    async def accumulate() -> list[Rank]:
        spec = stream_spec(groups=6)
        group = LearnerGroup(RunOnRay(spec, ANY, Ledger({"learner": ranks}), ANY), ANY)
        group.ranks = [Rank() for _ in range(ranks)]
        group.calls = [Calls("learner", f"learner-{n}", 9, group._ledger) for n in range(ranks)]
        for unit in plan_iteration(spec, 1, 256, (1.0, 0.8, 0.6, 0.3, 0.0)).units:
            keep = np.full(unit.batch, unit.index in (0, 3))
            signal = np.zeros(unit.batch, np.float32)
            group.accumulate(Contribution(unit, ANY, [], signal, keep, 0))
        await asyncio.gather(*group._running)
        return group.ranks

    assert [rank.units for rank in asyncio.run(accumulate())] == called


def test_a_checkpoint_is_freed_as_soon_as_it_is_taken_up(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    """The driver would hold a whole learner in memory until the end of a resumed run."""
    state = merged(run(loop, trainer.crew.learners.shares()))
    held = weakref.ref(state)
    trainer._saved = state, trainer.journal.progress
    del state
    run(loop, trainer._take_up())
    gc.collect()
    assert held() is None


def test_a_unit_gives_the_same_bits_on_every_worker_in_any_order(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    async def both_orders() -> list[list[Any]]:
        crew = trainer.crew
        ticket, arrays = await crew.learners.publish(1)
        units = plan_iteration(trainer.spec, 1, 256, crew.sigmas).units
        conditions = [crew.rollouts.conditions(crew.prompts_of(unit)) for unit in units]
        first, second = (worker.actor for worker in crew.rollouts.up.values())
        await asyncio.gather(*(worker.load.remote(ticket, arrays) for worker in (first, second)))
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
        other = WeightsTicket(2, "0" * 32)
        _, arrays = await trainer.crew.learners.publish(2)
        trainer.crew.rollouts.publish(other, arrays)
        unit = plan_iteration(trainer.spec, 2, 256, trainer.crew.sigmas).units[0]
        await trainer.crew.sample(unit, other)

    with pytest.raises(ContractError, match=r"rollout-0 loaded weights with digest .*published"):
        run(loop, load_something_else())


def test_a_worker_with_old_weights_refuses_to_sample(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    async def sample_with_old() -> None:
        crew = trainer.crew
        newer, _ = await crew.learners.publish(4)
        unit = plan_iteration(trainer.spec, 4, 256, crew.sigmas).units[0]
        given = crew.rollouts.conditions(crew.prompts_of(unit))
        actor = crew.rollouts.up[0].actor
        await actor.sample.options(num_returns=3).remote(unit, newer, *given)[2]

    with pytest.raises(ContractError, match="was to be sampled with weights"):
        run(loop, sample_with_old())


class FailsOnce:
    """A client of which one reward fails for the first micro-batch, as a dead deployment would."""

    def __init__(self, real: Any, reward: str) -> None:
        self.real, self.reward, self.left = real, reward, 1

    async def ask(self, reward: str, *call: Any) -> Any:
        if not self.left or reward != self.reward:
            return await self.real.ask(reward, *call)
        self.left -= 1
        return f"reward-{reward} failed 3 times, last with a broken pipe"

    def take_stats(self) -> Any:
        return self.real.take_stats()


@contextmanager
def failing(trainer: Any, reward: str) -> Iterator[Path]:
    """Within it a reward of ``trainer`` fails once; where its metrics go."""
    crew = trainer.crew
    real = crew.rewards
    crew.rewards = crew.scorer.rewards = FailsOnce(real, reward)
    yield trainer.folder.path / "metrics.jsonl"
    crew.rewards = crew.scorer.rewards = real


def test_groups_that_cannot_be_scored_are_dropped_counted_and_stop_the_run(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    with (
        failing(trainer, "ocr") as metrics,
        pytest.raises(RewardError, match=r"(?s)1 groups.*max_failed_groups = 0.*broken pipe"),
    ):
        run(loop, trainer.iterate(1))
    row = read_rows(metrics)[-1]
    assert (row["groups"]["total"], row["groups"]["dropped"]) == (4, 1)
    assert row["unscored"] == {"ocr": row["images"] // 4, "sign_colour": 0}


def test_a_watched_reward_that_fails_drops_no_group_and_is_told(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    trainer.display.notes.clear()
    with failing(trainer, "sign_colour") as metrics:
        trainer.journal.progress = replace(trainer.journal.progress, failed_groups=0)
        run(loop, trainer.iterate(2))
    row = read_rows(metrics)[-1]
    lost = row["images"] // 4
    assert row["groups"]["dropped"] == 0
    assert row["unscored"] == {"ocr": 0, "sign_colour": lost}
    (note,) = trainer.display.notes
    assert note.startswith(f"sign_colour: {lost} images without a score: reward-sign_colour failed")


def test_a_reward_that_fails_in_an_evaluation_is_told_and_stops_nothing(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    trainer.display.notes.clear()
    with failing(trainer, "ocr") as metrics:
        run(loop, trainer.evaluate())
    row = read_rows(metrics)[-1]
    assert row["kind"] == "eval"
    assert row["unscored"] == {"ocr": row["prompts"], "sign_colour": 0}
    assert row["rewards"]["ocr"]["mean"] is None
    assert row["rewards"]["sign_colour"]["mean"] > 0
    assert "broken pipe" in trainer.display.notes[0]
    assert trainer.journal.progress.eval_last["ocr"] is None


def test_the_linear_layers_that_were_faster_are_everybodys(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    """Their bits differ: as much as one actor with others, and the ratio is not 1."""
    assert "oneDNN, which takes 0.50 of" in trainer.started_with[0]
    assert trainer.folder.read_spec().cluster.cpu_linear == "onednn"
    floor = run(loop, trainer.crew.measure_floor())
    assert floor.exact
    assert floor.as_json()["values"]


@pytest.mark.parametrize(
    ("measured", "overrides", "taken"),
    [
        ({"torch": 1.0, "onednn": 0.79}, [], "onednn"),
        ({"torch": 1.0, "onednn": 0.81}, [], "torch"),
        (None, [], "torch"),
        ({"torch": 1.0, "onednn": 0.5}, ["model.dtype=bfloat16"], "torch"),
        ({"torch": 1.0, "onednn": 0.5}, ["cluster.cpu_linear=torch"], "torch"),
        (None, ["cluster.cpu_linear=onednn"], "onednn"),
    ],
)
def test_linear_layers_are_chosen_by_a_clear_difference(
    ray_cluster: None,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
    measured: dict[str, float] | None,
    overrides: list[str],
    taken: str,
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    from flowgrpo_ray.cluster import linear

    monkeypatch.setattr(linear, "measure", lambda: measured)
    spec, group = load_spec("tiny-ocr", overrides), placement_group([{"CPU": 0.001}])
    settled = run(loop, linear.settled(spec, group, lambda _: None))
    remove_placement_group(group)
    assert settled == spec.with_linear(taken)
    assert settled.identity() == spec.identity()


def test_linear_layers_are_timed_only_where_mkl_lacks_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowgrpo_ray.cluster import linear

    monkeypatch.setattr(linear, "PROCESSOR", tmp_path / "cpuinfo")
    assert linear.measure() is None, "not Linux"
    for vendor, flag, timed in (
        ("AuthenticAMD", "avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx512f", False),
    ):
        linear.PROCESSOR.write_text(f"vendor_id : {vendor}\nflags : fpu {flag}\n")
        assert (linear.measure() is not None) == timed


def test_more_gpus_than_the_cluster_has(ray_cluster: None) -> None:
    from flowgrpo_ray.cluster.session import check_resources

    spec = load_spec("tiny-ocr", ["cluster.rollout.gpus=1"])
    with pytest.raises(ClusterError, match=r"asks for 2 GPUs and the cluster has 0.*rollout\.gpus"):
        check_resources(spec)


def test_a_deployed_reward_is_used_only_if_it_is_the_one_the_spec_means(
    trainer: Any, loop: asyncio.AbstractEventLoop
) -> None:
    from flowgrpo_ray.serving.args import RewardServiceArgs
    from flowgrpo_ray.serving.deploy import check_same

    run(loop, check_same(RewardServiceArgs(name="ocr", options={"detect": False})))
    with pytest.raises(
        RewardError, match=r"(?s)reward-ocr is deployed.*'detect': False.*spec asks"
    ):
        run(loop, check_same(RewardServiceArgs(name="ocr", options={"detect": True})))


# --- the stream of one iteration, without Ray: sampling and scoring are stand-ins

STREAM = "sampling={size: [32, 48], steps: 4, eta: 0.8, window: {kind: all}, group_size: 2, "


def stream_spec(
    *overrides: str, groups: int = 4, micro_batch: int = 2, **advantages: int | str
) -> TrainingSpec:
    """Groups of 2, two updates; a micro-batch of 2 is a block."""
    return load_spec(
        "tiny-ocr",
        [
            *overrides,
            STREAM + f"groups: {groups}, micro_batch: {micro_batch}}}",
            f"advantages={json.dumps(advantages)}",
            "rewards={sign_colour: {}}",
            "objective={kind: flow_grpo, updates: 2}",
        ],
    )


class StandIn:
    """A trainer whose units take as long as ``delay`` says.

    A sample is worth its place in its group, times its prompt; of a prompt in ``flat`` nothing.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        *,
        flat: Callable[[int], bool] = lambda prompt: False,
        delay: Callable[[int], Awaitable[object]] = lambda index: asyncio.sleep(0),
        unscored: Container[int] = (),
        prompts: int = 40,
    ) -> None:
        self.spec, self.flat, self.delay, self.unscored = spec, flat, delay, unscored
        self.ledger = Ledger({"learner": 1})
        self.set_sizes = [prompts]
        self.plan = plan_iteration(spec, 1, prompts, (1.0, 0.75, 0.5, 0.25, 0.0))
        self.sampled: list[int] = []  # indices of units, in order of their end
        self.scored: list[int] = []

    async def sample(self, unit: WorkUnit, ticket: WeightsTicket) -> Any:
        from flowgrpo_ray.cluster.samplers import Sampled

        await self.delay(unit.index)
        self.sampled.append(unit.index)
        return Sampled(unit, unit.index, conditions=[], seconds=1.0, worker=0)  # type: ignore[arg-type]

    async def score(self, units: Sequence[WorkUnit], images: Any) -> list[Scores]:
        assert images == [unit.index for unit in units]
        return [await self._score(unit) for unit in units]

    async def _score(self, unit: WorkUnit) -> Scores:
        await self.delay(unit.index)
        if unit.index in self.unscored:
            none, lost = np.full(unit.batch, np.nan, np.float32), np.ones(unit.batch, bool)
            return Scores({"sign_colour": none}, none, lost, {"sign_colour": "it is gone"})
        self.scored.append(unit.index)
        pairs = zip(unit.prompts, unit.samples, strict=True)
        values = [0 if self.flat(p) else (p + 1) * sample for p, sample in pairs]
        total = np.array(values, np.float32)
        return Scores({"sign_colour": total}, total)

    def stream(self) -> Any:
        from flowgrpo_ray.cluster.stream import Stream

        return Stream(self, self.plan, WeightsTicket(1, "00"))  # type: ignore[arg-type]

    def run(self, epochs: int = 1) -> tuple[Any, list[list[tuple[WorkUnit, Any, Signal]]]]:
        """The finished stream, and what each update of each epoch was given."""

        async def consume() -> Any:
            stream = self.stream()
            numbers = [*range(len(self.plan.updates))] * epochs
            given = [[part async for part in stream.update(number)] for number in numbers]
            return stream, given

        return asyncio.run(asyncio.wait_for(consume(), 20))


def order(given: list[list[tuple[WorkUnit, Any, Signal]]]) -> list[list[int]]:
    """The indices of the units of each update."""
    return [[unit.index for unit, _, _ in update] for update in given]


def prompts_of(stream: Any) -> list[int]:
    return [prompt for result in stream.results for prompt in result.unit.distinct_prompts]


def random_delays(seed: int) -> Callable[[int], Awaitable[object]]:
    draw = random.Random(seed)
    return lambda index: asyncio.sleep(draw.random() / 100)


STDS = pytest.mark.parametrize("std", ["group", "global"])


@STDS
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_accumulation_is_in_plan_order_whatever_the_order_of_arrival(
    std: str, micro_batch: int
) -> None:
    """Each unit comes with its own sample and with the advantages of its own scope."""
    spec = stream_spec(groups=12, micro_batch=micro_batch, std=std)
    arrivals = set()
    for seed in range(4):
        trainer = StandIn(spec, delay=random_delays(seed))
        plan = trainer.plan
        stream, given = trainer.run()
        arrivals.add(tuple(trainer.scored))
        assert order(given) == [[unit.index for unit in update.units] for update in plan.updates]
        assert [r.unit for r in stream.results] == plan.units
        assert sorted(trainer.sampled) == list(range(len(plan.units)))
        scopes = [plan.units] if std == "global" else plan.blocks
        expected: dict[int, Signal] = {}
        for scope in scopes:
            scores = [asyncio.run(trainer._score(unit)) for unit in scope]
            expected |= signals(scope, scores, spec.advantages, spec.weights)
        for unit, sampled, signal in (part for update in given for part in update):
            assert sampled.trajectory is unit
            assert signal.advantages.tolist() == expected[unit.index].advantages.tolist()
            assert np.abs(signal.advantages).min() > 0
    assert len(arrivals) > 1, "they arrived in other orders than planned"


def test_an_update_does_not_wait_for_the_next_ones_units() -> None:
    """With ``std: group``: the second update's units never end here."""

    async def first_update() -> list[int]:
        gate = asyncio.Event()
        trainer = StandIn(stream_spec(), delay=lambda i: gate.wait() if i > 1 else asyncio.sleep(0))
        stream = trainer.stream()
        indices = [unit.index async for unit, _, _ in stream.update(0)]
        stream.cancel()
        left = await asyncio.gather(*stream._units.values(), return_exceptions=True)
        assert [type(end) for end in left[2:]] == [asyncio.CancelledError] * 2
        return indices

    assert asyncio.run(asyncio.wait_for(first_update(), 20)) == [0, 1]


def test_workers_that_train_sample_everything_before_an_update() -> None:
    """The last unit of the second update takes longest; nothing waits for its score."""
    gate = asyncio.Event()

    async def one_waits(index: int) -> None:
        if index == 3:
            await gate.wait()

    async def consume() -> list[int]:
        source: Any = StandIn(stream_spec(COLOCATED), delay=one_waits)
        with source.stream() as stream:
            update = stream.update(0)
            given = [(await anext(update))[0].index for _ in range(2)]
            end = asyncio.ensure_future(anext(update, None))
            await asyncio.wait({end}, timeout=0.2)
            assert not end.done(), "the weights would change under a unit that is being sampled"
            source.score = lambda *_: asyncio.sleep(60)
            gate.set()
            await asyncio.wait_for(end, 20)
            assert sorted(source.sampled) == [0, 1, 2, 3]
            assert sorted(source.scored) == [0, 1, 2]
            return given

    assert asyncio.run(consume()) == [0, 1]


def test_workers_that_train_draw_all_refills_before_an_update() -> None:
    """The same ones as workers of the separate layout do, one after the other."""

    def stand_in(*overrides: str) -> StandIn:
        spec = stream_spec(*overrides, std="group", refill=1)
        return StandIn(spec, flat=lambda prompt: prompt % 2 == 0)

    async def consume(source: StandIn) -> None:
        with source.stream() as stream:
            async for _ in stream.update(0):
                pass
            sampled = list(source.sampled)
            assert [u.index async for u, _, _ in stream.update(1)]
            assert source.sampled == sampled
            assert len(sampled) > 4, "none was refilled"

    asyncio.run(asyncio.wait_for(consume(stand_in(COLOCATED)), 20))
    (_, here), (_, there) = stand_in(COLOCATED).run(), stand_in().run()
    assert [[u for u, _, _ in update] for update in here] == [[u for u, _, _ in up] for up in there]


def test_no_training_begins_before_the_last_refill_is_sampled() -> None:
    """Of the last update, after which no scores are waited for."""
    spec = stream_spec(COLOCATED, std="group", refill=1)
    last = plan_iteration(spec, 1, 40, (1.0, 0.75, 0.5, 0.25, 0.0)).updates[-1]
    flat = {prompt for unit in last.units for prompt in unit.prompts}
    slow_refills = lambda index: asyncio.sleep(0.1 * (index >= 4))  # noqa: E731
    source = StandIn(spec, flat=lambda prompt: prompt in flat, delay=slow_refills)

    async def consume() -> None:
        with source.stream() as stream:
            async for _ in stream.update(0):
                assert sorted(source.sampled) == [0, 1, 2, 3, 4, 5]

    asyncio.run(asyncio.wait_for(consume(), 20))


def test_a_unit_that_fails_ends_the_update_of_workers_that_train() -> None:
    async def one_fails(index: int) -> None:
        if index == 3:
            raise RuntimeError("no such luck")

    async def first_update() -> None:
        with StandIn(stream_spec(COLOCATED), delay=one_fails).stream() as stream:
            async for _ in stream.update(0):
                pass

    with pytest.raises(RuntimeError, match="no such luck"):
        asyncio.run(asyncio.wait_for(first_update(), 20))


@STDS
def test_flat_groups_are_replaced_at_the_end_of_their_update(std: str) -> None:
    """One group of the second update and its first replacement have no spread."""
    spec = stream_spec(std=std, refill=5)
    plain = StandIn(spec)
    third = plain.plan.units[2].prompts[0]
    used = {prompt for unit in plain.plan.units for prompt in unit.prompts}
    ((replacement,),) = plan_refill(spec, plain.plan, 40, used, [third])
    flat = {third, replacement.prompts[0]}
    trainer = StandIn(spec, flat=flat.__contains__, delay=random_delays(1))
    stream, given = trainer.run()
    assert order(given) == [[0, 1], [2, 3, 4, 5]]
    assert [r.unit.index for r in stream.results] == [0, 1, 2, 3, 4, 5]
    assert sorted(trainer.sampled) == [0, 1, 2, 3, 4, 5]
    assert len(set(prompts_of(stream))) == 6
    kept = [bool(result.signal.keep.any()) for result in stream.results]
    assert kept == [True, True, False, True, False, True]
    assert count_groups(stream.results) == {"total": 6, "no_spread": 2, "dropped": 0}


@STDS
def test_tries_are_bounded_and_prompts_never_come_twice(std: str) -> None:
    """Every group is flat: two are replaced twice, in either update."""
    trainer = StandIn(stream_spec(std=std, refill=2), flat=lambda p: True, delay=random_delays(2))
    stream, given = trainer.run()
    assert order(given) == [[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]]
    assert [result.unit.index for result in stream.results] == list(range(12))
    assert len(set(prompts_of(stream))) == 12
    assert not any(signal.keep.any() for update in given for _, _, signal in update)


@STDS
def test_no_prompts_left_to_refill_with(std: str) -> None:
    """Two are left of six: the first update takes both, the second goes without."""
    trainer = StandIn(stream_spec(std=std, refill=3), flat=lambda p: True, prompts=6)
    stream, given = trainer.run()
    assert order(given) == [[0, 1, 4, 5], [2, 3]]
    assert sorted(prompts_of(stream)) == list(range(6))


@STDS
def test_nothing_is_refilled_where_nothing_is_flat(std: str) -> None:
    """Nor where refill is off."""
    for spec, flat in ((stream_spec(std=std, refill=9), 0), (stream_spec(std=std), 1)):
        trainer = StandIn(spec, flat=lambda p, flat=flat: bool(flat))
        assert order(trainer.run()[1]) == [[0, 1], [2, 3]]
        assert sorted(trainer.sampled) == [0, 1, 2, 3]


def test_a_refill_is_of_whole_blocks() -> None:
    """Micro-batches of 3 straddle groups of 2: one flat group brings 3 new ones, in 2 units."""
    spec = stream_spec(groups=6, micro_batch=3, refill=1)
    flat = StandIn(spec).plan.units[0].prompts[0]
    stream, given = StandIn(spec, flat=lambda p: p == flat).run()
    assert order(given) == [[0, 1, 4, 5], [2, 3]]
    assert count_groups(stream.results) == {"total": 9, "no_spread": 1, "dropped": 0}
    pairs = [p for r in stream.results for p in zip(r.unit.prompts, r.unit.samples, strict=True)]
    assert sorted(pairs) == [(p, s) for p in sorted(set(prompts_of(stream))) for s in (0, 1)]


def test_with_std_global_advantages_are_over_all_and_the_refills() -> None:
    """No unit is given before the last refill is scored."""
    spec = stream_spec(std="global", refill=1)
    flat = {StandIn(spec).plan.units[i].prompts[0] for i in (0, 3)}
    trainer = StandIn(spec, flat=flat.__contains__)

    async def scored_at_the_first() -> int:
        stream = trainer.stream()
        async for _ in stream.update(0):
            break
        return len(trainer.scored)

    assert asyncio.run(scored_at_the_first()) == 6
    stream, given = trainer.run()
    assert order(given) == [[0, 1, 4], [2, 3, 5]]
    totals = np.concatenate([result.scores.total for result in stream.results])
    spread = totals.astype(float).std() + 1e-4
    for result in stream.results:
        centred = result.scores.total - result.scores.total.mean()
        assert result.signal.advantages.tolist() == pytest.approx((centred / spread).tolist())


@STDS
def test_a_second_epoch_gives_the_same_units_and_samples_nothing(std: str) -> None:
    """Refills included."""
    spec = stream_spec(std=std, refill=1)
    flat = StandIn(spec).plan.units[0].prompts[0]
    trainer = StandIn(spec, flat=lambda p: p == flat, delay=random_delays(3))
    _, given = trainer.run(epochs=3)
    assert order(given) == [[0, 1, 4], [2, 3]] * 3
    assert sorted(trainer.sampled) == sorted(trainer.scored) == [0, 1, 2, 3, 4]
    first, *others = [given[i : i + 2] for i in (0, 2, 4)]
    for other in others:
        for update, again in zip(first, other, strict=True):
            for part, same in zip(update, again, strict=True):
                assert all(a is b for a, b in zip(part, same, strict=True))


@STDS
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_unit_that_cannot_be_scored_takes_its_group_out(std: str, micro_batch: int) -> None:
    """It is a failure and not a group without spread: it is told, and not refilled."""
    spec = stream_spec(micro_batch=micro_batch, std=std, refill=2)
    stream, given = StandIn(spec, unscored={1}).run()
    failed = stream.results[1].unit.prompts[0]
    assert [i for update in order(given) for i in update] == list(range(8 // micro_batch))
    for result in stream.results:
        assert result.signal.keep.tolist() == [p != failed for p in result.unit.prompts]
        assert bool(result.scores.failures) == (result.unit.index == 1)
    assert np.isnan(stream.results[1].scores.rewards["sign_colour"]).all()
    assert count_groups(stream.results) == {"total": 4, "no_spread": 0, "dropped": 1}


def test_an_error_of_a_worker_ends_the_stream() -> None:
    async def breaks(index: int) -> None:
        if index == 2:
            raise ContractError("not these weights")

    trainer = StandIn(stream_spec(), delay=breaks)
    with pytest.raises(ContractError, match="not these weights"):
        trainer.run()
