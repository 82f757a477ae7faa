"""Which stage holds an iteration up, by hand."""

import pytest

from flowgrpo_ray.bottleneck import Adviser, Bottleneck, Stage, find_bottleneck

OTHERS = {"sampling": Stage(12, 4), "training": Stage(2, 1)}  # loads of 3 and 2 seconds


@pytest.mark.parametrize(
    ("ocr", "expected"),
    [
        (Stage(21, 2, calls=9), Bottleneck("ocr", 10.5, "sampling", 3, replicas=7, then=3)),
        (Stage(20, 2, calls=9), Bottleneck("ocr", 10, "sampling", 3, replicas=7, then=20 / 7)),
        (Stage(20, 2, calls=4), Bottleneck("ocr", 10, "sampling", 3, replicas=4, then=5)),
        (Stage(20, 2, calls=2), Bottleneck("ocr", 10, "sampling", 3)),  # each has one already
        (Stage(5, 2, calls=9), Bottleneck("sampling", 3, "ocr", 2.5)),
        (Stage(0, 0), Bottleneck("sampling", 3, "training", 2)),  # it never answered
    ],
)
def test_the_stage_with_the_most_work_for_each_actor(ocr, expected):
    rewards = {"ocr": ocr, "watched": Stage(1, 1, calls=9)}
    assert find_bottleneck(rewards, OTHERS) == expected


def test_a_reward_that_is_the_only_work_is_not_advised_about():
    found = find_bottleneck({"ocr": Stage(5, 1, calls=9)}, {"sampling": Stage(0, 1)})
    assert found == Bottleneck("ocr", 5, "sampling", 0)


def test_the_slower_of_two_rewards_is_brought_to_the_other():
    rewards = {"ocr": Stage(40, 2, calls=9), "judge": Stage(8, 1, calls=9)}
    expected = Bottleneck("ocr", 20, "judge", 8, replicas=5, then=8)
    assert find_bottleneck(rewards, OTHERS) == expected


def test_advice_comes_once_after_three_iterations_in_a_row():
    adviser = Adviser()
    slow, fast = {"ocr": Stage(20, 2, calls=9)}, {"ocr": Stage(1, 2, calls=9)}

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


def test_advice_does_not_promise_more_than_the_calls_allow():
    seen = {"ocr": Stage(20, 2, calls=4)}
    (*_, said) = [adviser.see(find_bottleneck(seen, OTHERS), seen) for adviser in [Adviser()] * 3]
    assert "4 replicas would bring it to 5.0 s, one call for each (flowgrpo-ray rewards" in said
