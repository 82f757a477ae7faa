"""A judge with a question of one's own, against a server on a real socket."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from scripted_server import scripted
from test_rewards_unified import chat, grey, parts_of, says

from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.rewards import build, http, prompt_check
from flowgrpo_ray.rewards.judge_client import WARMER
from flowgrpo_ray.rewards.vlm_judge import VlmJudge

QUESTION = "Is it {style}? Say {{0 to 10}}. Caption: {prompt}"


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_S", 0.01)


def judge(server, **options):
    return VlmJudge(**{"question": QUESTION, "url": server.url, "model": "mine", **options})


def asked_of(reward, levels=(7,), style="kind"):
    images, prompts, _ = grey(*levels)
    return reward(images, prompts, [{"style": style} for _ in levels])


def weighs(**probabilities):
    """An answer whose first token is likely to be these; `_2` stands for a token of 2."""
    tokens = [
        {"token": name.removeprefix("_"), "logprob": math.log(p)}
        for name, p in probabilities.items()
    ]
    found = {"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": tokens}]}}
    return lambda number, body: (200, json.dumps({"choices": [found]}))


def test_the_question_names_the_prompt_and_its_metadata():
    with scripted(says("8")) as server:
        scores = asked_of(judge(server))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.float32([0.8]))
    (body,) = map(json.loads, server.bodies)
    shown, question = parts_of(server.bodies[0])
    assert question == "Is it kind? Say {0 to 10}. Caption: grey 7"
    np.testing.assert_array_equal(shown, np.full((4, 4, 3), 7)), "as it is"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("mine", 0, 512)
    assert body.keys().isdisjoint({"logprobs", "seed"})


def test_of_an_edit_the_sources_are_shown_before_the_image():
    images, prompts, _ = grey(7, 9)
    sources = np.stack([np.stack([image + 100, image + 200]) for image in images])
    with scripted(says("8")) as server:
        judge(server)(images, prompts, [{"style": "kind"}] * 2, sources)
    shown = {}
    for body in map(json.loads, server.bodies):
        *pictures, question = body["messages"][0]["content"]
        urls = [picture["image_url"]["url"].partition(",")[2] for picture in pictures]
        levels = [np.array(Image.open(io.BytesIO(base64.b64decode(url))))[0, 0, 0] for url in urls]
        shown[question["text"][-1]] = levels
    assert shown == {"7": [107, 207, 7], "9": [109, 209, 9]}


def test_a_prompt_without_the_metadata_that_the_question_names_is_refused():
    check = prompt_check("vlm_judge", {"question": QUESTION})
    check("a cat", {"style": "kind"})
    with pytest.raises(ValueError, match=r"names \{style\}, which is no metadata .*'a cat'"):
        check("a cat", {"other": 1})


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "10", 1.0),
        ({}, "Of 10 points I give 7.5.", 0.75),
        ({}, "**Score:** 4/10 is wrong, 3", 0.3),
        ({}, "11", np.nan),
        ({}, "-1", np.nan),
        ({}, "none", np.nan),
        ({"low": -1, "high": 1}, "-0.5", 0.25),
        ({"low": 1, "high": 5, "pattern": r"score\W*(\d)"}, "score: 4, of 5", 0.75),
        ({"pattern": r"\d+"}, "3 and 4", 0.3),
        ({"pattern": r"(\d)|x"}, "x", np.nan),
    ],
)
def test_a_number_in_the_answer(options, text, expected):
    with scripted(says(text)) as server:
        scores = asked_of(judge(server, retries=0, **options))
    np.testing.assert_allclose(scores, [expected], rtol=1e-6)


def test_probabilities_of_yes_and_no():
    """Spellings of a word count together; of 0.6 for yes and 0.2 for no three quarters are yes."""
    with scripted(weighs(Yes=0.4, yes=0.1, YES=0.1, No=0.2, Maybe=0.1)) as server:
        scores = asked_of(judge(server, answer="yes_no"))
    np.testing.assert_allclose(scores, [0.75], rtol=1e-6)
    (body,) = map(json.loads, server.bodies)
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)


def test_the_expected_digit():
    with scripted(weighs(_1=0.25, _3=0.5, _9=0.25)) as server:
        scores = asked_of(judge(server, answer="digits", low=1, high=5))
    np.testing.assert_allclose(scores, [((1 * 0.25 + 3 * 0.5) / 0.75 - 1) / 4], rtol=1e-6)


@pytest.mark.parametrize("answer", ["yes_no", "digits"])
def test_a_first_token_that_says_nothing_is_no_score(answer):
    with scripted(weighs(Well=0.9)) as server:
        scores = asked_of(judge(server, answer=answer, low=1, high=5, retries=1))
    assert np.isnan(scores).all()
    assert len(server.bodies) == 2


@pytest.mark.parametrize("answer", ["yes_no", "digits"])
def test_a_server_without_probabilities_is_an_error(answer):
    with scripted(says("yes")) as server:
        reward = judge(server, answer=answer, low=1, high=5)
        with pytest.raises(RewardError, match="no chat completion with probabilities"):
            asked_of(reward)


def test_what_is_asked_again_may_be_answered_otherwise():
    """The first answer is the model's likeliest, which would only come again."""

    def script(number, body):
        return chat("7" if json.loads(body).get("seed") == 2 else "who knows")

    with scripted(script) as server:
        scores = asked_of(judge(server, retries=2))
    np.testing.assert_allclose(scores, [0.7], rtol=1e-6)
    bodies = [json.loads(body) for body in server.bodies]
    assert [(b["temperature"], b.get("seed")) for b in bodies] == [
        (0, None),
        (WARMER, 1),
        (WARMER, 2),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "maybe"}, "answer: .*'yes_no' or 'digits', not 'maybe'"),
        ({"low": 3, "high": 3}, "low = 3 must be below high = 3"),
        ({"answer": "digits", "high": 10}, "for digits single ones, from 0 to 9"),
        ({"pattern": "("}, "is no regular expression"),
        ({"model": None}, "url needs model"),
        ({"url": None}, "give either url"),
        ({"url": None, "launch": {"model": "m"}}, "launch has its own model"),
        ({"image_size": 0}, "image_size: .*greater than or equal to 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    given = {"question": QUESTION, "url": "http://127.0.0.1:9", "model": "mine", **options}
    with pytest.raises(SpecError, match=message):
        build("vlm_judge", {name: value for name, value in given.items() if value is not None})
