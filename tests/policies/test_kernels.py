"""Which kernels a process takes: the same ones wherever the network runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_runs import (
    CPU,
    LORA,
    alone,
    conditions,
    draw_batch,
    largest_of,
    one_thread,
    sampler,
    schedule,
    small_spec,
    unit,
)

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.weights import load_arrays
from flowgrpo_ray.policies.kernels import use_kernels

ENABLED = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}


@pytest.fixture(scope="module", autouse=True)
def _as_before() -> Iterator[None]:
    with one_thread(), alone():
        yield
    use_kernels(small_spec().model)


@pytest.mark.parametrize(
    ("attention", "enabled"),
    [
        ("native", {"flash", "efficient", "math"}),
        ("flash", {"flash", "math"}),
        ("efficient", {"efficient", "math"}),
        ("cudnn", {"cudnn", "math"}),
        ("math", {"math"}),
    ],
)
def test_a_policy_sets_the_kernels_of_its_process(attention: str, enabled: set[str]):
    sampler(small_spec(f"model.attention={attention}"))
    assert {name for name, ask in ENABLED.items() if ask()} == enabled
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_kernels_give_other_bits_and_the_same_on_both_sides():
    """On a CPU flash attention is another kernel than math: 2e-7 of the velocity apart."""
    drawn = {}
    for attention in ("native", "math"):
        overrides = (LORA, f"model.attention={attention}", "model.deterministic=true")
        learner, worker = Learner(small_spec(*overrides), CPU), sampler(small_spec(*overrides))
        assert torch.are_deterministic_algorithms_enabled()
        ticket, arrays = learner.publish(0)
        load_arrays(worker.trainable(), arrays)
        batch = drawn[attention] = draw_batch(worker, unit(schedule(range(1, 3))), ticket)
        floor = learner.measure_floor(batch.unit, batch.trajectory, conditions())
        assert largest_of(floor) == 0
        batch.into(learner)
        learner.step(4, 2)
    native, math = (drawn[name].trajectory.latents for name in ("native", "math"))
    assert 0 < abs(native - math).max() < 1e-4
