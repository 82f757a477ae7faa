"""Which stage holds an iteration up, by hand."""

import pytest

from flowgrpo_ray.bottleneck import Adviser, Bottleneck, Stage, find_bottleneck

OTHERS = {"sampling": Stage(12, 4), "training": Stage(2, 1)}  # loads of 3 and 2 seconds


@pytest.mark.parametrize(
    ("ocr", "expected"),
    [
        (Stage(20, 2), Bottleneck("ocr", 10, "sampling", 3, replicas=7)),  # 20/7 < 3 <= 20/6
        (Stage(9.1, 2), Bottleneck("ocr", 4.55, "sampling", 3, replicas=4)),
        (Stage(9, 2), Bottleneck("ocr", 4.5, "sampling", 3, replicas=3)),  # 3 s each: no later
        (Stage(5, 2), Bottleneck("sampling", 3, "ocr", 2.5, replicas=None)),
        (Stage(0, 0), Bottleneck("sampling", 3, "training", 2, replicas=None)),  # never answered
    ],
)
def test_the_stage_with_the_most_work_for_each_actor(ocr, expected):
    rewards = {"ocr": ocr, "watched": Stage(1, 1)}
    assert find_bottleneck(rewards, OTHERS) == expected


def test_the_slower_of_two_rewards_is_brought_to_the_other():
    rewards = {"ocr": Stage(40, 2), "judge": Stage(8, 1)}
    assert find_bottleneck(rewards, OTHERS) == Bottleneck("ocr", 20, "judge", 8, replicas=5)


def test_advice_comes_once_after_three_iterations_in_a_row():
    adviser = Adviser()
    slow, fast = {"ocr": Stage(20, 2)}, {"ocr": Stage(1, 2)}

    def said(*iterations):
        return [adviser.see(find_bottleneck(seen, OTHERS), seen) for seen in iterations]

    assert said(slow, slow, fast) == [None] * 3
    first, second, third, *later = said(*[slow] * 6)
    assert (first, second, *later) == (None,) * 5
    assert third == (
        "reward-ocr is the bottleneck: 10.0 s of work for each of its 2 replicas, 3.0 s for "
        "sampling; 7 replicas would remove it (flowgrpo-ray rewards scale ocr 7, or "
        "rewards.ocr.replicas)"
    )
    assert said(fast, fast, fast, fast) == [None] * 4  # nobody scales sampling by that command
