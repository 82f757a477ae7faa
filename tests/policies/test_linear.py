"""Linear layers by oneDNN: the same layer, and the same bits for whoever samples and trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_runs import (
    CPU,
    SIZE,
    TUNINGS,
    alone,
    conditions,
    draw_batch,
    gradients,
    one_thread,
    perturb,
    sampler,
    schedule,
    small_spec,
    unit,
)
from torch import nn

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.sampling import batch_condition
from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.policies.linear import OneDnnLinear, time_linear, use_onednn

ONEDNN = "cluster.cpu_linear=onednn"
KL = "objective.kl={beta: 0.1}"


@pytest.fixture(scope="module", autouse=True)
def _alone_on_one_thread() -> Iterator[None]:
    with one_thread(), alone():
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(3, 7), (5,), ()], ids=["tokens", "rows", "one"])
def test_values_and_gradients_are_those_of_the_layer_in_float64(rows: tuple[int, ...], bias: bool):
    generator = torch.Generator().manual_seed(0)
    exact = nn.Linear(24, 40, bias, dtype=torch.float64)
    layer = nn.Linear(24, 40, bias)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())
    use_onednn(layer)
    assert isinstance(layer, OneDnnLinear)
    x = torch.randn(*rows, 24, generator=generator)
    weights = torch.randn(*rows, 40, generator=generator)
    found, wanted = [], []
    for to, results in ((layer, found), (exact, wanted)):
        dtype = to.weight.dtype
        given = x.to(dtype, copy=True).requires_grad_()
        y = to(given)
        (y * weights.to(dtype)).sum().backward()
        results += [y, given.grad, *(p.grad for p in to.parameters())]
    for ours, true in zip(found, wanted, strict=True):
        assert ours.shape == true.shape
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_layer_of_a_tuned_network_gives_the_same_bits_everywhere(tuning: str):
    """With and without gradients, on one thread and on two; the reference too."""
    policy = sampler(small_spec(TUNINGS[tuning], KL, ONEDNN))
    perturb(policy)
    networks = [policy.network, *filter(None, [policy.reference_network])]
    linear = [m for net in networks for m in net.modules() if isinstance(m, nn.Linear)]
    assert {type(layer) for layer in linear} == {OneDnnLinear}
    assert len(linear) > 40
    of = unit(schedule(range(1, 3)))
    condition = batch_condition(policy, conditions(), of.prompts)
    x = torch.randn(4, *policy.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    with_gradients = policy.velocity(x, 0.5, condition)
    assert with_gradients.requires_grad
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            assert torch.equal(policy.velocity(x, 0.5, condition), with_gradients)
    torch.set_num_threads(1)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_ratio_is_exactly_one_and_the_gradient_that_of_torch(tuning: str):
    grads = []
    for linear in (ONEDNN, "cluster.cpu_linear=torch"):
        spec = small_spec(TUNINGS[tuning], KL, linear)
        learner, policy = Learner(spec, CPU), sampler(spec)
        for each in (learner.policy, policy):
            perturb(each)
        ticket, _ = learner.publish(0)
        batch = draw_batch(policy, unit(schedule(range(1, 3))), ticket)
        assert batch.into(learner).gate_max == 0.0
        grads.append(torch.cat([grad.flatten() for grad in gradients(learner).values()]))
    ours, torchs = grads
    assert not torch.equal(ours, torchs), "another kernel"
    assert (ours - torchs).norm() < 1e-3 * torchs.norm()


def test_layers_of_other_precision_and_other_layers_stay():
    half = nn.Linear(4, 4, dtype=torch.bfloat16)
    network = nn.Sequential(half, nn.Conv2d(1, 1, 1), nn.Linear(4, 4))
    use_onednn(copy.deepcopy(network))
    use_onednn(network)
    assert [type(layer) for layer in network] == [nn.Linear, nn.Conv2d, OneDnnLinear]


def test_a_build_without_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"cluster\.cpu_linear = onednn: torch .* Set .*: torch"):
        use_onednn(nn.Linear(4, 4))


def test_both_are_timed():
    assert all(0 < seconds < 10 for seconds in time_linear().values())
