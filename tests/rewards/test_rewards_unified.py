"""The judge's client, against a server on a real socket that answers as each test tells it to."""

import base64
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image
from scripted_server import HangUpError, scripted
from test_rewards_pickscore import check_deployment

from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.rewards import build, http
from flowgrpo_ray.rewards.golden import check_golden, score_golden
from flowgrpo_ray.rewards.unified_reward import GOLDEN_PROMPT, VERSIONS, UnifiedReward

ACS = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}"


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_S", 0.01)


def chat(text):
    """The answer of a server whose model wrote `text`."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def says(text):
    return lambda number, body: chat(text)


def parts_of(body):
    """Image, uint8 [h, w, 3], and question of a request."""
    image, text = json.loads(body)["messages"][0]["content"]
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"]) as opened:
        return np.array(opened), text["text"]


def grey(*levels, size=(4, 4)):
    """Images of one brightness each, and prompts and metadata of them."""
    images = np.stack([np.full((*size, 3), level, np.uint8) for level in levels])
    images.flags.writeable = False
    return images, [f"grey {level}" for level in levels], [{}] * len(levels)


@pytest.mark.parametrize(
    ("version", "label", "model"),
    [
        ("1.5", "'Final Score:'", "CodeGoat24/UnifiedReward-7b-v1.5"),
        ("2.0", ACS.format("X", "Y", "Z"), "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"),
    ],
)
def test_the_request(version, label, model, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    prompt = "a cat [left] of {two} dogs"
    with scripted(says("")) as server:
        own = {"model": "mine", "api_key_env": "JUDGE_KEY", "max_tokens": 9, "image_size": 8}
        for options in ({}, own):
            reward = UnifiedReward(server.url + "/", version=version, retries=0, **options)
            assert np.isnan(reward(image[None], [prompt], [{}])).all()
    assert server.paths == ["/v1/chat/completions"] * 2
    first, second = (json.loads(body) for body in server.bodies)
    assert (first["model"], second["model"]) == (model, "mine")
    assert (first["temperature"], first["max_tokens"], second["max_tokens"]) == (0, 512, 9)
    assert [h.get("authorization") for h in server.headers] == [None, "Bearer s3cret"]
    for body, size in zip(server.bodies, (512, 8), strict=True):
        sent, question = parts_of(body)
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(sent, np.array(resized))
        assert question.endswith(f"Text Caption: [{prompt}]")
        assert label in question
        assert "<image>" not in question


@pytest.mark.parametrize(
    ("version", "text", "expected"),
    [
        ("1.5", "Final Score: 4.5", 0.9),
        ("1.5", "cat (object): 1\nFinal Score:\n 1", 0.2),
        ("1.5", "Final Score: 5", 1.0),
        ("1.5", "Final Score: 3.25.\nFinal Score: 1", 0.65),
        ("1.5", "Final Score: 10", np.nan),
        ("1.5", "Final Score: 5.5", np.nan),
        ("1.5", "**Final Score:** 4", 0.8),
        ("1.5", "**Final Score**: **4.5**", 0.9),
        ("1.5", "Final score: 4", 0.8),
        ("1.5", "FINAL SCORE (1-5): 4", 0.8),
        ("1.5", "`Final Score: 4`", 0.8),
        ("1.5", "Final Score: 4.5.1", np.nan),
        ("1.5", "Final Score: 0.5", np.nan),
        ("1.5", "Final Score: high", np.nan),
        ("1.5", "Score: 4", np.nan),
        ("1.5", None, np.nan),
        ("2.0", ACS.format(1, 1, 1), 0.0),
        ("2.0", ACS.format(5, 5, 5), 1.0),
        ("2.0", ACS.format("4.5", 2, "1.75"), 0.4375),  # (8.25 / 3 - 1) / 4
        ("2.0", "Style Score: 3 Coherence Score: 3 Alignment Score: 3", 0.5),
        ("2.0", "**Alignment Score (1-5):** 3\n- coherence score: 3\n_Style Score_: 3", 0.5),
        ("2.0", ACS.format(5, "none", 5), np.nan),
        ("2.0", ACS.format(5, 5, 6), np.nan),
        ("2.0", "Final Score: 4", np.nan),
    ],
)
def test_what_an_answer_is_worth(version, text, expected):
    with scripted(says(text)) as server:
        scores = UnifiedReward(server.url, version=version, retries=0)(*grey(0))
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, np.float32([expected]))


def test_each_image_goes_with_its_prompt_and_so_many_at_once():
    """The server answers only when three requests are in flight, and never sees a fourth."""
    together, lock, in_flight, most = threading.Barrier(3, timeout=20), threading.Lock(), 0, 0

    def script(number, body):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        together.wait()
        with lock:
            in_flight -= 1
        image, question = parts_of(body)
        level = image.mean()
        assert question.endswith(f"[grey {level:.0f}]")
        return chat(f"Final Score: {1 + level / 100}")

    levels = [0, 250, 10, 200, 30, 100, 40, 50, 60]
    with scripted(script) as server:
        scores = UnifiedReward(server.url, concurrency=3, retries=0, timeout_s=30)(*grey(*levels))
    np.testing.assert_array_equal(scores, np.float32([(1 + x / 100) / 5 for x in levels]))
    assert most == 3


def test_an_answer_without_a_score_is_asked_again_and_then_nan():
    asked = {}

    def script(number, body):
        level = round(parts_of(body)[0].mean())
        asked[level] = asked.get(level, 0) + 1
        late = {0: 1, 100: 3, 200: 4}[level]
        return chat("Final Score: 2" if asked[level] == late else "I cannot tell")

    with scripted(script) as server:
        scores = UnifiedReward(server.url, retries=2)(*grey(0, 100, 200))
    np.testing.assert_array_equal(scores, np.float32([0.4, 0.4, np.nan]))
    assert asked == {0: 1, 100: 3, 200: 3}


def test_a_failure_is_never_a_score():
    passing = {0: (500, "oops"), 1: (429, "slow down"), 2: chat("Final Score: 4")}
    with scripted(lambda number, body: passing[number]) as server:
        assert UnifiedReward(server.url, retries=2)(*grey(0)) == np.float32(0.8)

    done = threading.Event()

    def late(number, body):
        done.wait(20)
        raise HangUpError

    def hangs_up(number, body):
        raise HangUpError

    for script, error in (
        (late, r"ReadTimeout: .*\(asked 2 times\)"),
        (lambda number, body: (503, "no GPU"), r"503 \(no replica .*\): no GPU \(asked 2 times\)"),
        (hangs_up, r"RemoteProtocolError: .*\(asked 2 times\)"),
    ):
        with scripted(script) as server:
            with pytest.raises(RewardError, match=f"^{server.url}/v1/chat/completions: {error}"):
                UnifiedReward(server.url, retries=1, timeout_s=0.3)(*grey(0))
            assert len(server.paths) == 2
            done.set()
    with pytest.raises(RewardError, match=r"ConnectError: .*asked 2 times"):
        UnifiedReward(server.url, retries=1)(*grey(0))


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (400, "two placeholders", "400: two placeholders"),
        (401, "no key", "401: no key"),
        (200, "<html>", "no chat completion: '<html>'"),
        (200, "[]", "no chat completion"),
        (200, '{"choices": []}', "no chat completion"),
        (200, '{"choices": [{"message": {}}]}', "no chat completion"),
    ],
)
def test_an_answer_that_is_none_is_an_error_at_once(status, text, error):
    with scripted(lambda number, body: (status, text)) as server:
        with pytest.raises(RewardError, match=f"^{server.url}/v1/chat/completions: {error}"):
            UnifiedReward(server.url)(*grey(0))
        assert len(server.paths) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_pictures_tell_a_judge_from_a_bad_one(version):
    """One that looks for red amid white, and one that prefers all else."""

    def judge(good, bad):
        def script(number, body):
            image, question = parts_of(body)
            assert question.endswith(f"[{GOLDEN_PROMPT}]")
            middle, corner = image[256, 256].tolist(), image[8, 8].tolist()
            score = good if (middle, corner) == ([255, 0, 0], [255] * 3) else bad
            return chat(f"Final Score: {score}\n{ACS.format(score, score, score)}")

        return script

    with scripted(judge(5, 1)) as server:
        reward = UnifiedReward(server.url, version=version)
        scores = score_golden(reward, reward.golden())
        check_golden(reward.golden(), scores)
        assert scores.tolist() == [1, np.float32({"1.5": 0.2, "2.0": 0}[version])]
    with scripted(judge(2, 3)) as server:
        reward = UnifiedReward(server.url, version=version)
        with pytest.raises(RewardError, match=r"golden image 1 .*not below"):
            check_golden(reward.golden(), score_golden(reward, reward.golden()))
    assert reward.golden()[0][1].low == {"1.5": 0.2, "2.0": 0}[version]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either url .* or launch"),
        ({"url": "http://x", "launch": {"model": "m"}}, "give either url .* or launch"),
        ({"url": "x:1"}, "url: .*http.*not 'x:1'"),
        ({"url": "http://x", "version": "1"}, "version: .*'1.5' or '2.0', not '1'"),
        ({"url": "http://x", "api_key_env": "NOT_SET"}, "api_key_env = 'NOT_SET': .*no such"),
        ({"launch": {"model": "m"}, "model": "n"}, "model and api_key_env belong to url"),
        ({"url": "http://x", "concurrency": 0}, "concurrency: .*greater than or equal to 1"),
        ({"url": "http://x", "image_size": 0}, "image_size: .*greater than or equal to 1"),
        ({"url": "http://x", "max_tokens": 0}, "max_tokens: .*greater than or equal to 1"),
        ({"url": "http://x", "timeout_s": -1}, "timeout_s: .*greater than 0"),
        ({"url": "http://x", "retries": -1}, "retries: .*greater than or equal to 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        build("unified_reward", options)


def test_no_images_and_uneven_lists():
    reward = UnifiedReward("http://127.0.0.1:1")
    images, prompts, metadata = grey(1, 2)
    assert reward(images[:0], [], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        reward(images, prompts[1:], metadata)


def test_config_file():
    check_deployment("unified_reward")
