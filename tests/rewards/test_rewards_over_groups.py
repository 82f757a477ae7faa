"""Rewards that see all images of a group: ranks, and a judge that compares two."""

from __future__ import annotations

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
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


def levels_of(body):
    """How light the two images of a request are."""
    *images, question = json.loads(body)["messages"][0]["content"]
    assert question["type"] == "text"
    for image in images:
        file = base64.b64decode(image["image_url"]["url"].partition(",")[2], validate=True)
        yield float(np.array(Image.open(io.BytesIO(file))).mean())


def answers(*tokens):
    """An answer that begins with these, each a text and its probability."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
    found = {"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return 200, json.dumps({"choices": [found]})


def prefers_light(number, body):
    """0.9 for the first of two if it is lighter, else 0.3: light ones, and the first a little."""
    one, other = levels_of(body)
    first = 0.9 if one > other else 0.3
    return answers(("1", first / 2), (" 1", first / 2), ("2", 1 - first), ("x", 1e-3))


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
