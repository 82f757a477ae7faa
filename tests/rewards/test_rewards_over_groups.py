"""Rewards that see all images of a group: ranks, and a judge that compares two."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from light_judge import answers, levels_of, prefers_light
from scripted_server import scripted

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.rewards import build, check_options, is_over_group, prompt_check
from flowgrpo_ray.rewards.golden import check_golden, golden_of, score_golden
from flowgrpo_ray.rewards.pairwise_judge import pairs
from flowgrpo_ray.rewards.rank import ranks

NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 1, 2], [1, 0, 0.5]),
        ([0.1, 0.1, 5, -2], [0.5, 0.5, 1, 0]),
        ([7, 7, 7], [0.5, 0.5, 0.5]),
        ([NAN, 4, NAN, 5, 1e9], [NAN, 0, NAN, 0.5, 1]),
        ([NAN, 2], [NAN, 0.5]),
        ([math.inf, 1, 2], [NAN, 0, 1]),
        ([], []),
    ],
)
def test_ranks_by_hand(scores, expected):
    found = ranks(np.float32(scores))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32(expected))


def test_rank_keeps_the_order_of_the_reward_that_it_ranks():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    images[[1, 4], :, :8] = 0  # these compress better
    images[4] = 0
    call = images, ["a"] * 6, [{}] * 6
    plain = build("jpeg_compressibility")(*call)
    ranked = build("rank", {"reward": "jpeg_compressibility"})(*call)
    assert np.argsort(ranked, kind="stable").tolist() == np.argsort(plain, kind="stable").tolist()
    assert (ranked[4], sorted(set(ranked))) == (1, sorted(set(ranks(plain))))


def test_rank_asks_its_reward_about_prompts_options_and_golden_pictures():
    assert is_over_group("rank")
    assert not is_over_group("ocr")
    options = {"reward": "sign_colour"}
    with pytest.raises(ValueError, match="no colour of"):
        prompt_check("rank", options)("a sign", {})
    prompt_check("rank", options)("red sign", {})
    with pytest.raises(SpecError, match="no option 'detekt', did you mean 'detect'"):
        check_options("rank", {"reward": "ocr", "options": {"detekt": 1}})
    with pytest.raises(SpecError, match=r"reward = 'rank' compares images itself"):
        check_options("rank", {"reward": "rank"})
    reward = build("rank", options)
    golden = golden_of(reward)
    assert score_golden(reward, golden * 2).tolist() == [1, 0] * 2, "each ranking is a group"
    check_golden(golden, score_golden(reward, golden))


def test_pairs_meet_once_and_all_alike():
    assert pairs(4, 3) == [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2), (1, 3)]
    for count in range(2, 9):
        for rounds in (1, 2, 3, 9):
            found = pairs(count, rounds)
            assert len(set(found)) == len(found)
            met = np.bincount(np.ravel(found), minlength=count)
            assert set(met) == {min(2 * rounds, count - 1)}
    assert pairs(1, 3) == []


def test_both_orders_cancel_what_a_judge_has_for_the_first_image():
    """The lighter one wins with (0.9 + 1 - 0.3) / 2 = 0.8, of each of its three meetings."""
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (200, 10, 90, 150)])
    with scripted(prefers_light) as server:
        judge = build("pairwise_judge", {"url": server.url, "model": "mine"})
        scores = judge(images, ["a"] * 4, [{}] * 4)
        judge.close()
    np.testing.assert_allclose(scores, [0.8, 0.2, 0.4, 0.6], rtol=1e-6)
    assert len(server.bodies) == 2 * 6
    bodies = list(map(json.loads, server.bodies))
    assert all(body["max_tokens"] == 1 and body["top_logprobs"] == 20 for body in bodies)
    assert 'for the prompt "a"' in bodies[0]["messages"][0]["content"][2]["text"]


def test_of_edits_the_sources_are_shown_before_the_two_that_are_compared():
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (200, 10, 90)])
    sources = np.broadcast_to(np.uint8([30, 60]).reshape(1, 2, 1, 1, 1), (3, 2, 4, 4, 3))
    with scripted(prefers_light) as server:
        judge = build("pairwise_judge", {"url": server.url, "model": "mine"})
        scores = judge(images, ["make it light"] * 3, [{}] * 3, sources)
        judge.close()
    np.testing.assert_allclose(scores, [0.8, 0.2, 0.5], rtol=1e-6)
    levels = [tuple(levels_of(body)) for body in server.bodies]
    pairs = [(a, b) for a in (200, 10, 90) for b in (200, 10, 90) if a != b]
    assert sorted(levels) == sorted((30, 60, *pair) for pair in pairs)
    question = json.loads(server.bodies[0])["messages"][0]["content"][-1]["text"]
    assert question.startswith('A picture was to be changed so: "make it light". It is shown first')


def test_a_meeting_without_an_answer_counts_for_nobody():
    def shy(number, body):
        return answers(("?", 1)) if 10 in levels_of(body) else prefers_light(number, body)

    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (200, 10, 90)])
    with scripted(shy) as server:
        judge = build("pairwise_judge", {"url": server.url, "model": "mine", "retries": 0})
        scores = judge(images, ["a"] * 3, [{}] * 3)
        alone = judge(images[:1], ["a"], [{}])
        judge.close()
    np.testing.assert_allclose(scores, [0.8, NAN, 0.2], rtol=1e-6)
    assert np.isnan(alone).tolist() == [True]


def test_a_question_that_names_what_a_prompt_has_not_is_refused():
    check = prompt_check("pairwise_judge", {"question": "{style}?"})
    check("a", {"style": "kind"})
    with pytest.raises(ValueError, match=r"names \{style\}"):
        check("a", {})
