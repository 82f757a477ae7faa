"""What a learner does to save memory: bit for bit the same numbers, and the memory really free.

Two ranks are in ``test_learner.py``. Here one rank, whose parameters are sharded tensors as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from tiny_runs import (
    CPU,
    LORA,
    TUNINGS,
    alone,
    conditions,
    draw_batch,
    draw_batches,
    gradients,
    largest_difference,
    one_thread,
    sampler,
    schedule,
    small_spec,
    state_of,
    unit,
    update,
)

from flowgrpo_ray.algorithm import optimizer as optimizer_module
from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.optimizer import Shelf
from flowgrpo_ray.algorithm.sampling import batch_condition
from flowgrpo_ray.algorithm.weights import load_arrays
from flowgrpo_ray.common.types import LearnerState

KL = "objective.kl={beta: 0.5, form: gaussian}"
OFFLOAD = "cluster.learner.offload_optimizer=true"
CHECKPOINTING = "cluster.learner.activation_checkpointing=true"


@pytest.fixture(scope="module", autouse=True)
def _alone_on_one_thread() -> Iterator[None]:
    with one_thread(), alone():
        yield


class Visits(Shelf):
    """Counts the numbers that are away from home, by tensors that are still alive."""

    alive: ClassVar[dict[int, int]] = {}
    most: ClassVar[int] = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        visitor = super().__getitem__(name)
        if self._home is not None:
            key = id(visitor)
            Visits.alive[key] = visitor.numel()
            Visits.most = max(Visits.most, sum(Visits.alive.values()))
            weakref.finalize(visitor, Visits.alive.pop, key)
        return visitor


@pytest.fixture
def visits(monkeypatch) -> type[Visits]:
    """Pieces of 5,000 numbers, and what is away from home."""
    monkeypatch.setattr(optimizer_module, "Shelf", Visits)
    monkeypatch.setattr(optimizer_module, "PIECE", 5_000)
    Visits.alive.clear()
    Visits.most = 0
    return Visits


def assert_equal(a: LearnerState, b: LearnerState) -> None:
    for part in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert largest_difference(getattr(a, part), getattr(b, part)) == 0.0, part
    assert a.updates == b.updates


@pytest.mark.parametrize("tuning", TUNINGS)
def test_offloaded_updates_are_those_without(tuning, visits):
    """Weights, averages and moments after three updates, the averages updated in every second."""
    spec = small_spec(TUNINGS[tuning], "ema={decay: 0.9, every: 2}")
    plain = Learner(spec, CPU)
    frugal = Learner(small_spec(TUNINGS[tuning], "ema={decay: 0.9, every: 2}", OFFLOAD), CPU)
    batches = draw_batches(spec, 2)
    assert len(plain.optimizer.pieces) == 1, "one fused call"
    assert len(frugal.optimizer.pieces) > 2
    for _ in range(3):
        assert update(frugal, batches).grad_norm == update(plain, batches).grad_norm
        assert not visits.alive, "all at home between updates"
        assert not any(adamw.state for _, adamw in frugal.optimizer.pieces)
    moved = frugal.optimizer.moments["exp_avg"]  # some parameters of the last block have no use
    largest = max(
        sum(frugal.parameters[name].numel() for name in names if name in moved)
        for names, _ in frugal.optimizer.pieces
    )
    assert visits.most == 2 * largest, "one piece's two moments at a time"
    assert_equal(state_of(frugal), state_of(plain))
    assert frugal.publish(1, averaged=True)[0] == plain.publish(1, averaged=True)[0]
    assert not visits.alive


@pytest.mark.parametrize("first", [(), (OFFLOAD,)], ids=["on", "off"])
def test_offload_may_be_switched_when_a_run_goes_on(first, visits):
    spec = small_spec(LORA)
    batches = draw_batches(spec, 2)
    whole, before = Learner(spec, CPU), Learner(small_spec(LORA, *first), CPU)
    update(before, batches)
    after = Learner(small_spec(LORA, *(() if first else (OFFLOAD,))), CPU)
    after.load_state(state_of(before))
    update(after, batches)
    for _ in range(2):
        update(whole, batches)
    assert_equal(state_of(after), state_of(whole))


def test_pieces_hold_every_parameter_once_in_order(monkeypatch):
    monkeypatch.setattr(optimizer_module, "PIECE", 6)
    shapes = {"a": 4, "b": 2, "c": 1, "d": 9, "e": 0, "f": 6, "g": 1}
    parameters = {name: torch.empty(size) for name, size in shapes.items()}
    pieces = list(optimizer_module._pieces(parameters))
    assert pieces == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]


# --- activation checkpointing


def saved_bytes(learner: Learner) -> int:
    """What the forward pass of one velocity keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    condition = batch_condition(learner.policy, conditions(), (0, 0, 1, 1))
    x = torch.randn((4, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = learner.policy.velocity(x, 0.6, condition)
    assert velocity.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_recomputed_activations_give_the_same_gradient_from_less_memory(tuning, dtype):
    overrides = (TUNINGS[tuning], KL, f"model.dtype={dtype}")
    spec = small_spec(*overrides)
    plain, frugal = Learner(spec, CPU), Learner(small_spec(*overrides, CHECKPOINTING), CPU)
    ticket, arrays = plain.publish(0)
    assert frugal.publish(0)[0] == ticket
    worker = sampler(spec)
    load_arrays(worker.trainable(), arrays)
    batch = draw_batch(worker, unit(schedule(range(1, 3))), ticket)
    found = []
    for learner in (plain, frugal):
        stats = batch.into(learner)  # past the gate
        assert stats.gate_max == 0.0
        found.append(gradients(learner))
    assert any(bool(g.any()) for g in found[0].values())
    assert largest_difference(*found) == 0.0
    assert saved_bytes(frugal) < saved_bytes(plain) / 4


def test_workers_do_not_recompute():
    network = sampler(small_spec(LORA, CHECKPOINTING)).network
    assert not any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
