"""The client of a scorer elsewhere, against our own API and against a server that misbehaves."""

import asyncio
import socket
import threading
import time

import numpy as np
import pytest
import uvicorn
from scripted_server import HangUpError, scripted
from test_rewards_pickscore import check_deployment

from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.rewards import build, http
from flowgrpo_ray.rewards.http import HttpReward
from flowgrpo_ray.serving.http import Limits, build_api


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_S", 0.01)


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    images.flags.writeable = False
    return images, ["a", 'b "ü"', "c", "d", "e"], [{"w": i, "deep": {"x": [i]}} for i in range(5)]


def checksum(images, prompts, metadata):
    """A number of every bit of the images, the prompt and the metadata; NaN for the prompt d."""
    weights = np.random.default_rng(1).random(images[0].size)
    scores = images.reshape(len(images), -1) @ weights
    scores += [1e3 * len(p) + ord(p[-2:][0]) for p in prompts]
    scores += [7 * m["w"] + m["deep"]["x"][0] for m in metadata]
    return np.where([p == "d" for p in prompts], np.nan, scores).astype(np.float32)


@pytest.fixture(scope="module")
def own_api():
    """The URL of this program's own API, which scores by `checksum`; the sizes of its calls."""
    sizes = []

    async def score(call):
        sizes.append(len(call.images))
        scores = checksum(call.images, call.prompts, call.metadata)
        if call.sources is None:
            return scores
        last = call.sources[:, -1].mean(axis=(1, 2, 3))  # of each image
        return (scores + 1e5 * last).astype(np.float32)

    def check(call):
        if "" in call.prompts:
            raise ValueError("an empty prompt")

    api = build_api("sums", Limits(images=3, pixels=100, body_bytes=10**6), check, score)
    server = uvicorn.Server(uvicorn.Config(api, log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", sizes
        server.should_exit = True
        thread.join()


def test_the_scores_of_our_own_api_are_those_of_the_class(own_api, batch):
    url, sizes = own_api
    scores = build("http", {"url": url + "/", "batch": 2})(*batch)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, checksum(*batch))
    assert np.isnan(scores).tolist() == [False, False, False, True, False]
    assert sizes == [2, 2, 1]
    assert HttpReward(url)(batch[0][:0], [], []).shape == (0,)


def test_source_images_are_sent_where_the_server_wants_them(own_api, batch):
    """Two with each image, in requests of at most three files of a kind."""
    url, sizes = own_api
    levels = np.arange(10, dtype=np.uint8).reshape(5, 2)
    sources = np.broadcast_to(levels[..., None, None, None], (5, 2, 6, 9, 3)).copy()
    sizes.clear()
    np.testing.assert_array_equal(
        HttpReward(url, batch=3)(*batch, sources), checksum(*batch), "not asked for"
    )
    assert sizes == [3, 2]
    sizes.clear()
    found = HttpReward(url, batch=3, sources=True)(*batch, sources)
    assert sizes == [1] * 5
    expected = checksum(*batch).astype(np.float64) + 1e5 * levels[:, 1]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("size", "prompt", "error"), [((6, 9), "", "422: .*an empty prompt"), ((20, 20), "x", "413: ")]
)
def test_what_our_own_api_refuses_is_told(own_api, size, prompt, error):
    with pytest.raises(RewardError, match=rf"^{own_api[0]}/score: {error}"):
        HttpReward(own_api[0])(np.zeros((1, *size, 3), np.uint8), [prompt], [{}])


def fails(number, body):
    return 503, "busy"


def hangs_up(number, body):
    raise HangUpError


def one_in_three(answer):
    """The third request is scored, those before it get `answer`."""
    return lambda number, body: (200, '{"scores": [0.5, null]}') if number == 2 else answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, ""), "500: "),
        ((503, "busy"), r"503 \(no replica or server takes requests now\): busy"),
        ((429, "slow down"), "429: slow down"),
    ],
)
def test_a_passing_failure_is_asked_again(batch, answer, said):
    images, prompts, metadata = (part[:2] for part in batch)
    with scripted(one_in_three(answer)) as server:
        np.testing.assert_array_equal(
            HttpReward(server.url)(images, prompts, metadata), np.float32([0.5, np.nan])
        )
        assert server.paths == ["/score"] * 3
        assert len(set(server.bodies)) == 3, "each try has a boundary of its own"
    with (
        scripted(one_in_three(answer)) as server,
        pytest.raises(RewardError, match=rf"/score: {said} \(asked 2 times\)"),
    ):
        HttpReward(server.url, retries=1)(images, prompts, metadata)


def test_a_connection_that_ends_is_asked_again(batch):
    images, prompts, metadata = (part[:2] for part in batch)
    with scripted(hangs_up) as server:
        with pytest.raises(RewardError, match=r"/score: RemoteProtocolError: .*\(asked 3 times\)"):
            HttpReward(server.url)(images, prompts, metadata)
        assert len(server.paths) == 3
    with pytest.raises(RewardError, match=rf"^{server.url}/score: ConnectError: .*asked 3 times"):
        HttpReward(server.url)(images, prompts, metadata)


def test_a_timeout_is_an_error_at_once(batch):
    images, prompts, metadata = (part[:2] for part in batch)
    done = threading.Event()

    def late(number, body):
        done.wait(10)
        raise HangUpError

    with scripted(late) as server:
        with pytest.raises(RewardError, match=rf"^{server.url}/score: ReadTimeout: "):
            HttpReward(server.url, timeout_s=0.2)(images, prompts, metadata)
        done.set()
        assert len(server.paths) == 1


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (400, '{"error": "no such prompt"}', "400: .*no such prompt"),
        (401, "who are you", "401: who are you"),
        (302, "", "302: "),
        (200, "<html>", "not JSON: '<html>'"),
        (200, "[0.5, 0.5]", "no list of 2 scores"),
        (200, "{}", "no list of 2 scores"),
        (200, '{"scores": [0.5]}', "no list of 2 scores: .*0.5"),
        (200, '{"scores": [0.5, 0.5, 0.5]}', "no list of 2 scores"),
        (200, '{"scores": "ab"}', "no list of 2 scores"),
        (200, '{"scores": [0.5, "0.5"]}', "score 1 is '0.5', neither"),
        (200, '{"scores": [true, 0.5]}', "score 0 is True, neither"),
        (200, '{"scores": [0.5, NaN]}', "not JSON: "),
        (200, '{"scores": [0.5, -1e39]}', r"score 1 is -1e\+39, neither"),
        (200, '{"scores": [0.5, [1]]}', r"score 1 is \[1\], neither"),
    ],
)
def test_an_answer_that_would_be_the_same_again_is_an_error_at_once(batch, status, text, error):
    images, prompts, metadata = (part[:2] for part in batch)
    with scripted(lambda number, body: (status, text)) as server:
        with pytest.raises(RewardError, match=rf"^{server.url}/score: {error}"):
            HttpReward(server.url)(images, prompts, metadata)
        assert len(server.paths) == 1


def test_whole_numbers_are_scores_too(batch):
    with scripted(lambda number, body: (200, '{"scores": [1, -3]}')) as server:
        scores = HttpReward(server.url)(*(part[:2] for part in batch))
    assert scores.dtype == np.float32
    assert scores.tolist() == [1, -3]


def test_the_token_comes_from_the_environment(batch, monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    images, prompts, metadata = (part[:1] for part in batch)
    with scripted(lambda number, body: (200, '{"scores": [0]}')) as server:
        HttpReward(server.url)(images, prompts, metadata)
        HttpReward(server.url, token_env="SCORER_TOKEN")(images, prompts, metadata)
    assert [h.get("authorization") for h in server.headers] == [None, "Bearer s3cret"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url: .*http.*not 'localhost:8000'"),
        ({"url": "http://x", "token_env": "NOT_SET"}, "token_env = 'NOT_SET': .*no such"),
        ({"url": "http://x", "timeout_s": 0}, "timeout_s: .*greater than 0, not 0"),
        ({"url": "http://x", "retries": -1}, "retries: .*greater than or equal to 0, not -1"),
        ({"url": "http://x", "batch": 0}, "batch: .*greater than or equal to 1, not 0"),
        ({}, "url: this key is required"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        build("http", options)


def test_uneven_lists_are_refused(batch):
    images, prompts, metadata = batch
    with pytest.raises(ValueError, match="5 images, 4 prompts, 5 metadata"):
        HttpReward("http://127.0.0.1:1")(images, prompts[1:], metadata)


def test_config_file():
    check_deployment("http")
