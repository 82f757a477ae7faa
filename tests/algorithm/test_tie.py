"""The weight that holds on to the untrained model, where it follows a watched reward."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from flowgrpo_ray.algorithm.objectives import Adapt, FlowGrpo, KlSpec, Tie

ADAPT = Adapt(reward="colour", fall=0.5, window=3, rate=0.1, pull=2.0)


def test_the_controller_by_hand():
    tie = Tie.of(0.1)
    assert (tie.weight, tie.ground, tie.seen) == (0.1, 0.1, 0)
    tie = ADAPT.follow(tie, mean=0.9, std=0.1)
    assert (tie.level, tie.spread, tie.smoothed, tie.fall) == (0.9, 0.1, 0.9, 0)
    assert tie.weight == tie.ground == pytest.approx(0.1 * math.exp(-0.4)), "by 4 x rate"
    tie = ADAPT.follow(tie, mean=0.8, std=0.2)
    assert (tie.level, tie.smoothed, tie.fall) == pytest.approx((0.85, 0.85, 0))
    tie = ADAPT.follow(tie, mean=0.7, std=0.3)
    assert (tie.level, tie.spread, tie.smoothed) == pytest.approx((0.8, 0.2, 0.775))
    assert tie.fall == pytest.approx(0.25), "of 0.1, which is allowed"
    assert tie.ground == pytest.approx(0.1 * math.exp(-0.4 - 0.4 - 0.3))
    assert tie.weight == pytest.approx(0.1 * math.exp(-1.1 + 0.5))
    tie = ADAPT.follow(tie, mean=0.625, std=9.0)  # no longer of the start
    assert (tie.level, tie.spread, tie.smoothed, tie.fall) == pytest.approx((0.8, 0.2, 0.7, 1))
    assert tie.weight == pytest.approx(0.1 * math.exp(-1.1 + 2)), "the ground stays"
    tie = ADAPT.follow(tie, mean=0.55, std=0.1)
    assert (tie.smoothed, tie.fall) == pytest.approx((0.625, 1.75))
    assert tie.weight == pytest.approx(0.1 * math.exp(-1.1 + 0.075 + 3.5))
    tie = ADAPT.follow(tie, mean=-5, std=0.1)
    assert tie.fall == 6, "one broken iteration moves no more"
    assert tie.weight == pytest.approx(0.1 * math.exp(-1.025 + 0.5 + 12))
    back = ADAPT.follow(replace(tie, ground=0.1, smoothed=0.8), mean=0.8, std=0.1)
    assert back.weight == pytest.approx(0.1 * math.exp(-0.05)), "it sinks by half of the rate"


def test_an_iteration_without_scores_changes_nothing():
    tie = ADAPT.follow(Tie.of(0.1), 0.9, 0.1)
    assert ADAPT.follow(tie, math.nan, math.nan) == tie


def test_a_reward_without_spread_holds_as_strongly_as_it_can_once_it_falls():
    tie = Tie.of(1.0)
    for _ in range(3):
        tie = ADAPT.follow(tie, 1.0, 0.0)
    assert tie.fall == 0
    assert ADAPT.follow(tie, 0.5, 0.5).fall == 6


def test_a_reward_that_never_falls_lets_go_but_for_a_thousandth():
    tie = Tie.of(2.0)
    for _ in range(100):
        tie = ADAPT.follow(tie, 0.9, 0.1)
    assert tie.weight == 0.002


def test_its_state_survives_a_checkpoint_exactly():
    tie = ADAPT.follow(ADAPT.follow(Tie.of(0.1), 1 / 3, 0.1), 0.2, 0.7)
    assert Tie(**json.loads(json.dumps(asdict(tie)))) == tie


@pytest.mark.parametrize("start", [0.004, 0.04, 0.4, 4.0])
def test_from_either_side_it_comes_to_the_weight_that_holds_the_fall(start: float):
    """In a run whose colours lose 0.0015 an iteration and are pulled back by 3 x weight x loss, the
    weight that loses what is allowed is 0.05; noise is that of 96 images with a spread of 0.02."""
    allowed, noise = 0.5 * 0.02, np.random.default_rng(0).normal(0, 0.004, 600)
    adapt, tie, lost = Adapt(reward="colour", fall=0.5), Tie.of(start), 0.0
    weights, losses = [], []
    for of_iteration in noise:
        lost += 0.0015 - min(1.0, 3 * tie.weight) * lost
        tie = adapt.follow(tie, 0.97 - lost + of_iteration, 0.02)
        weights.append(tie.weight)
        losses.append(lost)
    assert max(losses) < 4 * allowed
    assert np.mean(losses[300:]) == pytest.approx(allowed, rel=0.5)
    assert np.exp(np.mean(np.log(weights[300:]))) == pytest.approx(0.05, rel=0.5)


def test_page_and_prometheus_show_the_tie_of_an_objective_that_adapts():
    plain = FlowGrpo(kind="flow_grpo", kl=KlSpec(beta=0.1))
    adapting = FlowGrpo(kind="flow_grpo", kl=KlSpec(beta=0.1, adapt=ADAPT))
    row = {"kl": 0.5, "tie": {"weight": 0.2, "fall": 1.5}}
    of_tie = {"tie.weight": 0.2, "tie.fall": 1.5}
    assert adapting.numbers(row) == plain.numbers(row) | of_tie
    charts = {line["path"] for chart in adapting.card()["charts"] for line in chart["lines"]}
    assert charts >= of_tie.keys()
    assert plain.tied(0.2).penalties == {"kl": 0.2}
