"""Real Ray, real Serve, real HTTP."""

import asyncio
import io
import json
import math
import os
import random
import re
import signal
import struct
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import yaml
from light_judge import levels_of, prefers_light
from PIL import Image
from ports import own_port
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema
from scripted_server import scripted
from waiting import PATIENCE_S

from flowgrpo_ray.common.errors import ClusterError, RewardError, SpecError
from flowgrpo_ray.rewards import build
from flowgrpo_ray.rewards.preservation import PreservationReward
from flowgrpo_ray.rewards.signs import make_prompts, parse_prompt, render
from flowgrpo_ray.serving import deploy, service, tokens
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.client import Patience, RewardClient
from flowgrpo_ray.serving.types import Sources

PROBE = "reward_samples:Probe"
TOKEN = os.environ["FLOWGRPO_TEST_TOKEN"]
CONFIG = Path(__file__).parents[2] / "deployments" / "ocr.yaml"


@pytest.fixture(scope="module")
def judge():
    """A judge that compares two images, on a socket."""
    with scripted(prefers_light) as server:
        yield server


@pytest.fixture(scope="module")
def port(ray_cluster, judge):
    """Seven rewards, served by handle and on this port."""
    port = own_port()
    serve.shutdown()  # it may run without HTTP, for other tests
    rewards = [
        RewardServiceArgs(name="ocr", options={"detect": False}),
        RewardServiceArgs(name="sign_colour"),
        RewardServiceArgs(name="preservation"),
        RewardServiceArgs(
            name="pairs",
            reward="pairwise_judge",
            options={"url": judge.url, "model": "mine"},
            cpus=0.125,
        ),
        RewardServiceArgs(name="sees", reward="reward_samples:Sees", max_batch_images=4),
        RewardServiceArgs(name="locked", reward=PROBE, token_env="FLOWGRPO_TEST_TOKEN"),
        RewardServiceArgs(
            name="probe",
            reward=PROBE,
            max_batch_images=8,
            batch_wait_ms=200,
            max_images_per_request=20,
            max_image_pixels=64 * 64,
            max_body_bytes=100_000,
        ),
    ]
    deploy.start_rewards(rewards, http_port=port, deadline_s=PATIENCE_S)
    yield port
    deploy.remove([reward.name for reward in rewards])  # other tests need their CPUs


@pytest.fixture(scope="module")
def signs():
    """Twelve signs, uint8 [12, 32, 48, 3], and prompts of which every third asks for another."""
    rng = random.Random(0)
    prompts = make_prompts(12, heldout=True, seed=0)
    images = np.stack([render(*parse_prompt(prompt), rng) for prompt in prompts])
    return images, [prompts[0] if i % 3 == 2 else prompt for i, prompt in enumerate(prompts)]


def _client(*names, **patience):
    """Of these rewards, by default without a second attempt."""
    return RewardClient(dict.fromkeys(names, Patience(**({"retries": 0} | patience))))


def _ask(client, images, metadata, prompts=None):
    """What `client` says of images given by reference, from a fresh event loop."""
    prompts = prompts or [f"prompt {i}" for i in range(len(images))]
    return asyncio.run(client.score(ray.put(images), prompts, metadata))


def _score(client, images, metadata, prompts=None):
    """The scores alone, where none is missing."""
    scored = _ask(client, images, metadata, prompts)
    assert not scored.failures
    return scored.rewards


def _failure(client, images, metadata, prompts=None):
    """Why the probe has no score; then it is NaN for every image."""
    scored = _ask(client, images, metadata, prompts)
    assert np.isnan(scored.rewards["probe"]).all()
    assert scored.rewards["probe"].shape == (len(prompts or images),)
    return scored.failures["probe"]


def _probe(images=1, size=(4, 4), retries=0, **asked):
    """The probe's answer to `images` grey images whose first one carries `asked`."""
    client = _client("probe", retries=retries, backoff_s=0.1)
    batch = np.full((images, *size, 3), 51, np.uint8)
    return _score(client, batch, [asked] + [{}] * (images - 1))["probe"]


def _pid():
    return int(_probe(pid=1)[0])


def _png(image, file_format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format)
    return buffer.getvalue()


def _post(port, name, files, prompts, **fields):
    data = {"prompts": prompts if isinstance(prompts, str) else json.dumps(prompts), **fields}
    return httpx.post(
        f"http://127.0.0.1:{port}/{name}/score",
        files=[("images", (f"{i}.png", file)) for i, file in enumerate(files)],
        data=data,
        timeout=30,
    )


def test_a_reward_over_groups_sees_whole_groups_one_at_a_time(port):
    """Of images in two parts, at places out of order; others' calls wait; no call is cut."""
    client = _client("sees")
    light = np.arange(0, 255, 51, dtype=np.uint8)
    parts = [np.broadcast_to(light[:, None, None, None], (5, 4, 4, 3)).copy() for _ in range(2)]
    group = lambda places: (["a"] * len(places), [{}] * len(places), places)  # noqa: E731

    async def ask():
        refs = [ray.put(part) for part in parts]
        return await asyncio.gather(
            client.ask("sees", refs, *group([9, 0, 3])),
            client.ask("sees", refs, *group(list(range(10)))),
            client.ask("sees", refs[:1], ["b"] * 5, [{}] * 5),
            client.ask("sees", refs[:1], ["a", "b"], [{}] * 2, [0, 1]),
        )

    few, all_of_two, one_part, mixed = asyncio.run(ask())
    np.testing.assert_allclose(few, [3.8, 3.0, 3.6], rtol=1e-6)
    np.testing.assert_allclose(all_of_two, 10 + np.tile(light / 255, 2), rtol=1e-6)
    np.testing.assert_allclose(one_part, 5 + light / 255, rtol=1e-6)
    assert "compares the images of one prompt" in mixed
    files = [_png(image) for image in parts[0][:2]]
    assert _post(port, "sees", files, ["a", "a"]).json()["scores"] == pytest.approx([2, 2.2])
    refused = _post(port, "sees", files, ["a", "b"])
    assert refused.status_code == 422
    assert "make one call of each group" in refused.json()["error"]


def test_class_handle_and_http_give_the_same_bits(port, signs):
    images, prompts = signs
    client = _client("ocr", "sign_colour")
    by_handle = _score(client, images, [{}] * 12, prompts)
    stats = client.take_stats()
    for name, options in (("ocr", {"detect": False}), ("sign_colour", {})):
        by_class = build(name, options)(images, prompts, [{}] * 12)
        assert len(set(by_class.tolist())) > 2
        assert by_handle[name].dtype == np.float32
        np.testing.assert_array_equal(by_handle[name], by_class)
        answer = _post(port, name, [_png(image) for image in images], prompts)
        assert answer.status_code == 200, answer.text
        assert answer.json()["reward"] == name
        by_http = np.array(answer.json()["scores"], dtype=np.float32)
        np.testing.assert_array_equal(by_http, by_class)
        assert (stats[name].calls, stats[name].images, stats[name].failures) == (1, 12, 0)
        assert 0 < stats[name].busy_s < stats[name].seconds < 30
        assert len(stats[name].replicas) == 1
    assert client.take_stats()["ocr"].calls == 0


def test_sources_by_class_handle_and_http_give_the_same_bits(port):
    """Of images in two parts of three prompts, whose sources are sent once each."""
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 256, (3, 1, 12, 16, 3), np.uint8)
    images = np.concatenate([sources[:, 0], rng.integers(0, 256, (3, 12, 16, 3), np.uint8)])
    images[4, :6] = sources[1, 0, :6]
    of, shown = [2, 0, 1, 1], [2, 3, 4, 1]
    expected = PreservationReward()(images[shown], ["x"] * 4, [{}] * 4, sources[of])
    assert expected[0] == expected[3] == 1 > expected[2] > expected[1]
    client = _client("preservation", "sign_colour")
    names = ["red x"] * 4, [{}] * 4

    async def ask(name="preservation", **more):
        refs = [ray.put(part) for part in (images[:2], images[2:])]
        return await client.ask(name, refs, *names, shown, **more)

    given = Sources([ray.put(of_prompt) for of_prompt in sources], of)
    np.testing.assert_array_equal(asyncio.run(ask(sources=given)), expected)
    assert "compares with source images, and this call has none" in asyncio.run(ask())
    refused = asyncio.run(ask("sign_colour", sources=given))
    assert "sign_colour takes no source images" in refused

    def post(name, *sent):
        files = [("images", ("i.png", _png(image))) for image in images[shown]]
        files += [("sources", ("s.png", file)) for file in sent]
        data = {"prompts": json.dumps(names[0])}
        url = f"http://127.0.0.1:{port}/{name}/score"
        answer = httpx.post(url, files=files, data=data, timeout=30)
        return answer.status_code, answer.json()

    as_files = [_png(source[0]) for source in sources[of]]
    _, answer = post("preservation", *as_files)
    np.testing.assert_array_equal(np.float32(answer["scores"]), expected)
    large = [_png(source[0].repeat(3, 0).repeat(3, 1)) for source in sources[of]]
    _, fitted = post("preservation", *large)
    assert fitted["scores"] == pytest.approx(expected, abs=0.3), "files are brought to the size"
    assert post("preservation")[0] == 422
    code, told = post("preservation", *as_files[:3])
    assert (code, told["error"]) == (
        422,
        "uint8 [3, 12, 16, 3] sources of uint8 [4, 12, 16, 3] images: as many for each image, of "
        "its size",
    )
    code, told = post("sign_colour", *as_files)
    assert (code, "takes no source images" in told["error"]) == (422, True)


def test_a_judge_compares_edits_beside_their_source_by_handle_and_http(port, judge):
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (200, 10, 90)])
    source = np.full((1, 4, 4, 3), 30, np.uint8)
    judge.bodies.clear()

    async def ask():
        given = Sources([ray.put(source)], [0] * 3)
        call = ["pairs", [ray.put(images)], ["lighter"] * 3, [{}] * 3]
        return await _client("pairs").ask(*call, sources=given)

    def post(sent):
        files = [("images", ("i.png", _png(image))) for image in images]
        files += [("sources", ("s.png", _png(image))) for image in sent]
        data = {"prompts": json.dumps(["lighter"] * 3)}
        return httpx.post(f"http://127.0.0.1:{port}/pairs/score", files=files, data=data)

    expected = np.float32([0.8, 0.2, 0.5])
    np.testing.assert_allclose(asyncio.run(ask()), expected, rtol=1e-6)
    np.testing.assert_allclose(post([source[0]] * 3).json()["scores"], expected, rtol=1e-6)
    shown = [tuple(levels_of(body)) for body in judge.bodies]
    assert len(shown) == 2 * 6
    assert {levels[0] for levels in shown} == {30}
    refused = post([source[0], source[0], images[0]])
    assert refused.status_code == 422
    assert "their source images differ" in refused.text


def test_metadata_travels_over_http(port, signs):
    images, _ = signs
    fields = {"metadata": json.dumps([{"target": "zzz"}])}
    answer = _post(port, "ocr", [_png(images[0])], ["a sign"], **fields)
    assert answer.json() == {"reward": "ocr", "scores": [0.0]}


def test_replicas_do_not_load_torch(port):
    assert _probe(torch=1).tolist() == [0]
    own_maps = _maps_of_replica("reward-ocr")
    assert "onnxruntime" in own_maps
    assert "libtorch" not in own_maps


def _maps_of_replica(app):
    for folder in Path("/proc").glob("[0-9]*"):
        if f"ServeReplica:{app}:" in (folder / "cmdline").read_text():
            return (folder / "maps").read_text()
    raise AssertionError(f"no replica of {app}")


def test_calls_are_merged_by_size_and_cut_at_the_limit(port):
    client = _client("probe")

    async def sizes(*calls):
        asked = [
            client.score(
                np.zeros((count, *size, 3), np.uint8),
                ["x"] * count,
                [{"batch size": 1}] * count,
            )
            for count, size in calls
        ]
        return [scored.rewards["probe"].tolist() for scored in await asyncio.gather(*asked)]

    assert asyncio.run(sizes((3, (4, 4)), (4, (4, 4)))) == [[7] * 3, [7] * 4]
    assert asyncio.run(sizes((3, (4, 4)), (4, (4, 8)))) == [[3] * 3, [4] * 4]
    assert asyncio.run(sizes((19, (4, 4)))) == [[8] * 16 + [3] * 3]
    assert asyncio.run(sizes((0, (4, 4)))) == [[]]


def test_calls_at_once_over_http_all_wait_in_the_replica_and_fill_its_batches(port, tmp_path):
    """None waits with Serve's proxy, where it would come late to a batch."""
    count, gate, arrived = 129, tmp_path / "gate", tmp_path / "arrived"
    arrived.mkdir()
    asked = {"batch size": 1, "sign in": str(arrived), "until": str(gate)}
    data = {"prompts": '["x"]', "metadata": json.dumps([asked])}

    async def at_once():
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits()) as client:
            url, files = f"http://127.0.0.1:{port}/probe/score", {"images": ("0.png", GREY)}
            posts = [client.post(url, data=data, files=files) for _ in range(count)]
            calls = [asyncio.create_task(post) for post in posts]
            end = time.monotonic() + PATIENCE_S
            # Each is checked when it has been read, and again when it queues.
            while len(list(arrived.iterdir())) < 2 * count and time.monotonic() < end:
                await asyncio.sleep(0.05)
            waiting = len(list(arrived.iterdir()))
            gate.touch()
            return waiting, [answer.json()["scores"][0] for answer in await asyncio.gather(*calls)]

    waiting, sizes = asyncio.run(at_once())
    assert waiting == 2 * count
    assert sum(1 / size for size in sizes) == pytest.approx(math.ceil(count / 8)), "batches"


def test_one_bad_call_does_not_fail_those_merged_with_it(port):
    client = _client("probe")

    async def both():
        image = np.full((1, 4, 4, 3), 255, np.uint8)
        calls = [client.score(image, ["x"], [asked]) for asked in ({"fail": 1}, {"batch size": 1})]
        return await asyncio.gather(*calls)

    failed, scored = asyncio.run(both())
    assert failed.failures.keys() == {"probe"}
    assert scored.rewards["probe"].tolist() == [1]
    assert not scored.failures


def test_nan_passes_through(port):
    scores = _probe(images=2, nan=1)
    np.testing.assert_array_equal(scores, np.array([np.nan, 0.2], np.float32))
    image = _png(np.full((4, 4, 3), 51, np.uint8))
    answer = _post(port, "probe", [image] * 2, ["x", "y"], metadata='[{"nan": 1}, {}]')
    assert answer.json()["scores"] == [None, pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("fail", "RuntimeError: the probe was asked to fail"),
        ("short", r"must return float32 \[2\], not float32 \[1\]"),
        ("garbage", r"must return float32 \[2\], not list"),
        ("double", r"must return float32 \[2\], not float64 \[2\]"),
    ],
)
def test_a_failing_reward_is_retried_and_then_named(port, asked, message):
    client = _client("sign_colour", "probe", retries=1, backoff_s=0.1)
    images = np.zeros((2, 4, 4, 3), np.uint8)
    why = _failure(client, images, [{asked: 1}, {}], ["red one", "red two"])
    assert re.search(message, why)
    assert why.startswith("reward-probe failed 2 times")
    assert "'red one'" in why
    stats = client.take_stats()
    assert stats["probe"].failures == 2
    assert stats["sign_colour"].calls == 1
    image = _png(images[0])
    answer = _post(port, "probe", [image] * 2, ["x", "y"], metadata=json.dumps([{asked: 1}, {}]))
    assert answer.status_code == 500
    assert re.fullmatch(
        r"reward probe failed; its log tells why, at reference [0-9a-f]{8}", answer.json()["error"]
    )


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), ["x"], "2 images, 1 prompts, 2 metadata"),
        (np.zeros((1, 4, 4, 3), np.float32), ["x"], r"got float32 \[1, 4, 4, 3\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), [""], "the probe wants a prompt"),
    ],
)
def test_a_bad_call_by_handle_is_named(port, images, prompts, message):
    assert re.search(message, _failure(_client("probe"), images, [{}] * len(images), prompts))


def test_a_call_without_answer_ends_at_its_deadline(port):
    client = _client("probe", deadline_s=0.5)
    start = time.monotonic()
    why = _failure(client, np.zeros((1, 4, 4, 3), np.uint8), [{"seconds": 2}])
    assert "no answer within 0.5 s; first prompt: 'prompt 0'" in why
    assert time.monotonic() - start < 1.5


GREY = _png(np.full((4, 4, 3), 51, np.uint8))


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _header_of(width, height):
    """A PNG of 60 bytes that promises that many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"x") + b"\0" * 15


DEEP = "[" * 50_000


@pytest.mark.parametrize(
    ("files", "prompts", "fields", "status", "message"),
    [
        ([b"not an image"], ["x"], {}, 422, "image 0 is not a readable PNG"),
        ([GREY, GREY[:-30]], ["x", "y"], {}, 422, "image 1 is not a readable PNG"),
        ([GREY[:40] + b"\xff" * 20 + GREY[60:]], ["x"], {}, 422, "image 0 is not a readable"),
        ([_png(np.zeros((4, 4, 3), np.uint8), "BMP")], ["x"], {}, 422, "not a readable PNG"),
        ([_header_of(9000, 9000)], ["x"], {}, 413, "image 0 is 9000x9000; at most 4096 pixels"),
        ([_header_of(60000, 60000)], ["x"], {}, 413, "image 0: Image size (3600000000 pixels)"),
        ([_png(np.zeros((64, 65, 3), np.uint8))], ["x"], {}, 413, "image 0 is 65x64; at most 4096"),
        ([GREY, _png(np.zeros((4, 5, 3), np.uint8))], ["x", "y"], {}, 422, "must have one size"),
        ([GREY] * 21, ["x"] * 21, {}, 413, "21 images; at most 20"),
        ([b"\0" * 200_000], ["x"], {}, 413, "request body over 100000 bytes"),
        ([GREY], ["x", "y"], {}, 422, "1 images, but 2 prompts"),
        ([GREY], ["x"], {"metadata": "[]"}, 422, "1 images, but 0 metadata"),
        ([GREY], ["x"], {"metadata": "[1]"}, 422, "metadata must be a JSON list of objects"),
        ([GREY], ["x"], {"metadata": '[{"a": 1, "a": 2}]'}, 422, "has the key 'a' more than once"),
        ([GREY], "x", {}, 422, "prompts is not JSON"),
        ([GREY], DEEP, {}, 422, "prompts is not JSON"),
        ([GREY], '{"a": 1}', {}, 422, "prompts must be a JSON list of texts"),
        ([GREY], "[1]", {}, 422, "prompts must be a JSON list of texts"),
        ([GREY], [""], {}, 422, "the probe wants a prompt"),
        ([], ["x"], {}, 422, "images: Field required"),
    ],
)
def test_bad_requests_are_answered_and_the_replica_lives(
    port, *, files, prompts, fields, status, message
):
    before = _pid()
    answer = _post(port, "probe", files, prompts, **fields)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]
    assert _pid() == before


def test_malformed_requests_and_unknown_paths_are_json_errors(port):
    url = f"http://127.0.0.1:{port}/probe"
    body = {"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    for answer in (
        httpx.post(f"{url}/score", **body),
        httpx.post(f"{url}/score", json={"prompts": []}),
        httpx.get(f"{url}/score"),
        httpx.get(f"{url}/nothing"),
    ):
        assert 400 <= answer.status_code < 500
        assert list(answer.json()) == ["error"]


def _raw(images, shape=None):
    """A request's fields with the images as one part of raw bytes."""
    shape = shape or ",".join(map(str, images.shape))
    part = ("images.raw", images.tobytes(), "application/octet-stream", {"X-Shape": shape})
    return {"files": [("images", part)]}


def test_raw_images_score_as_their_files_do(port, signs):
    images, prompts = signs
    data = {"prompts": json.dumps(prompts)}
    url = f"http://127.0.0.1:{port}/ocr/score"
    raw = httpx.post(url, data=data, **_raw(images), timeout=30)
    files = _post(port, "ocr", [_png(image) for image in images], prompts)
    assert len(set(raw.json()["scores"])) > 2
    assert raw.json() == files.json()


@pytest.mark.parametrize(
    ("shape", "status", "message"),
    [
        ("1,4,4,3", 422, "but 96 bytes"),
        ("2,4,4", 422, "raw images are one part"),
        ("2,4,4,4", 422, "raw images are one part"),
        ("-2,-4,4,3", 422, "raw images are one part"),
        ("0,4,4,3", 422, "but 96 bytes"),
        ("999999999,999999999,999999999,3", 413, "at most 20 images of 4096 pixels"),
        ("1,64,65,3", 413, "at most 20 images of 4096 pixels"),
        ("٢,4,4,3".encode().decode("latin-1"), 422, "raw images are one part"),
    ],
)
def test_bad_shapes_are_refused(port, shape, status, message):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    data = {"prompts": '["x", "y"]'}
    answer = httpx.post(f"http://127.0.0.1:{port}/probe/score", data=data, **_raw(images, shape))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


def test_a_deployment_with_a_token_asks_for_it(port):
    files, data = {"images": ("0.png", GREY)}, {"prompts": '["x"]'}
    url = f"http://127.0.0.1:{port}/locked"

    def post(*headers):
        return httpx.post(f"{url}/score", files=files, data=data, headers=list(headers))

    scheme = "Authorization"
    for headers in (
        [],
        [(scheme, "Bearer wrong")],
        [(scheme, TOKEN)],
        [(scheme, f"Basic {TOKEN}")],
    ):
        answer = post(*headers)
        assert answer.status_code == 401
        assert "Authorization: Bearer <token>" in answer.json()["error"]
    assert post((scheme, f"Bearer {TOKEN}")).json()["scores"] == [pytest.approx(0.2)]
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "token", "refused"),
    [
        ("0.0.0.0", None, True),
        ("0.0.0.0", "secret", False),
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("::", None, True),
        ("no.such.host.invalid", None, True),
        (None, None, False),
    ],
)
def test_http_beyond_loopback_needs_a_token(monkeypatch, host, token, refused):
    monkeypatch.setattr(tokens, "http_address", lambda: host and (host, 8000))
    monkeypatch.delenv("FLOWGRPO_REWARD_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("FLOWGRPO_REWARD_TOKEN", token)
    args = RewardServiceArgs(name="ocr")
    if refused:
        with pytest.raises(RewardError, match=r"beyond this machine.*set FLOWGRPO_REWARD_TOKEN"):
            tokens.token_of(args)
    else:
        assert tokens.token_of(args) == token


@pytest.mark.parametrize("name", ["MY_TOKEN", "FLOWGRPO_REWARD_TOKEN"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_token_that_is_named_must_be_there(monkeypatch, name, value):
    """Who names one means to be protected, on loopback too."""
    monkeypatch.setattr(tokens, "http_address", lambda: ("127.0.0.1", 8000))
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(RewardError, match=rf"token_env = '{name}': the replica .* has no such"):
        tokens.token_of(RewardServiceArgs(name="ocr", token_env=name))


def _mangled(rng):
    """Method, path and body of a request that is wrong in one to four places."""
    good = httpx.Request(
        "POST",
        "http://x",
        data={"prompts": '["x"]', "metadata": "[{}]"},
        files=[("images", ("0.png", GREY))],
    )
    body, kind = bytearray(good.read()), good.headers["content-type"]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(body))
        change = rng.choice(["flip", "cut", "insert", "repeat", "kind"])
        if change == "flip":
            body[at] ^= 1 << rng.randrange(8)
        elif change == "cut":
            del body[at : at + rng.randint(1, 200)]
        elif change == "insert":
            body[at:at] = rng.randbytes(rng.randint(1, 60))
        elif change == "repeat":
            body[at:at] = body[: rng.randint(1, len(body))]
        else:
            kind = rng.choice(["", "application/json", "multipart/form-data", kind[:-3], "x" * 999])
        body = body or bytearray(b"x")
    return bytes(body), kind


def test_two_hundred_mangled_requests_leave_the_replica_alive(port):
    before, rng = _pid(), random.Random(4)
    statuses = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/probe", timeout=30) as client:
        for _ in range(200):
            body, kind = _mangled(rng)
            answer = client.post("/score", content=body, headers={"content-type": kind})
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                assert list(answer.json()) == ["error"], answer.text
    assert set(statuses) <= {200, 400, 413, 415, 422}
    assert statuses.count(200) < 60, "most must be wrong"
    assert _pid() == before


def test_jpeg_webp_and_transparent_png_are_read(port):
    grey = np.full((4, 4, 3), 51, np.uint8)
    files = [_png(grey, "JPEG"), _png(grey, "WEBP"), _png(np.dstack([grey, grey[..., 0]]))]
    answer = _post(port, "probe", files, ["x"] * 3)
    on_white = 0.2 * 0.2 + 0.8
    assert answer.json()["scores"] == pytest.approx([0.2, 0.2, on_white], abs=0.01)


def test_health_and_docs_answer_while_the_reward_works(port):
    async def both():
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/probe") as client:
            busy = asyncio.create_task(
                _client("probe").score(np.zeros((1, 4, 4, 3), np.uint8), ["x"], [{"seconds": 3}])
            )
            await asyncio.sleep(0.5)
            start = time.monotonic()
            answers = [await client.get(path) for path in ("/health", "/docs", "/openapi.json")]
            seconds = time.monotonic() - start
            assert not busy.done()
            await busy
            return answers, seconds

    (health, docs, schema), seconds = asyncio.run(both())
    assert seconds < 2
    assert health.json() == {"reward": "probe", "status": "ok"}
    assert 'href="openapi.json"' in docs.text
    assert "/score" in schema.json()["paths"]
    fields = ("POST /score", "images", "prompts", "metadata", "GET /health")
    assert all(f"<code>{field}</code>" in docs.text for field in fields)
    assert not re.search("<script|<link|//", docs.text), "it needs nothing from elsewhere"


def test_a_killed_replica_is_replaced_and_the_call_repeated(port, tmp_path):
    before = _pid()
    client = _client("probe", retries=2, backoff_s=0.5)
    asked = {"die once": str(tmp_path / "died"), "pid": 1}
    scores = _score(client, np.zeros((1, 4, 4, 3), np.uint8), [asked])["probe"]
    assert (tmp_path / "died").exists()
    assert scores[0] != before
    stats = client.take_stats()["probe"]
    assert stats.failures >= 1
    assert stats.calls == 1

    os.kill(_pid(), signal.SIGKILL)  # and between two calls
    assert _probe(retries=2).tolist() == [np.float32(0.2)]


def test_errors_of_the_proxy_are_json(port, tmp_path):
    url = f"http://127.0.0.1:{port}"
    unknown = httpx.post(f"{url}/nobody/score")
    assert unknown.status_code == 404
    assert unknown.json() == {"error": "no reward is served at this path"}
    died = json.dumps([{"die once": str(tmp_path / "died")}])
    answer = _post(port, "probe", [GREY], ["x"], metadata=died)
    assert (tmp_path / "died").exists()
    assert answer.status_code == 500
    assert answer.json() == {"error": "the replica that had this call was lost; try again"}
    assert _probe(retries=2).tolist() == [np.float32(0.2)]


def test_what_is_deployed_already_is_used_as_it_is(port):
    deploy.wait(["probe"], deadline_s=PATIENCE_S)
    before = _pid()
    again = RewardServiceArgs(name="probe", reward="ocr")
    assert deploy.start_rewards([again], http_port=port, deadline_s=PATIENCE_S) == ["probe"]
    assert _pid() == before


def test_another_port_than_that_of_a_running_serve_is_refused(port):
    with pytest.raises(ClusterError, match=rf"reward_http_port = 1, but .*127.0.0.1:{port}.*keeps"):
        deploy.deploy([RewardServiceArgs(name="late", reward=PROBE)], http_port=1)
    assert "reward-late" not in serve.status().applications


def test_a_reward_that_cannot_start_is_named_with_its_cause(port):
    bad = RewardServiceArgs(name="bad", reward="reward_samples:BadConstructor", options={"size": 9})
    with pytest.raises(RewardError, match="reward-bad: DEPLOY_FAILED") as caught:
        deploy.start_rewards([bad], http_port=port, deadline_s=PATIENCE_S)
    assert "size=9 is not served here" in str(caught.value)
    corrected = RewardServiceArgs(name="bad", reward=PROBE)
    assert deploy.start_rewards([corrected], http_port=port, deadline_s=PATIENCE_S) == []
    serve.delete("reward-bad")


def test_deadline_and_absence_are_named(port):
    slow = RewardServiceArgs(name="slow", reward=PROBE, cpus=64.0)  # too many CPUs
    with pytest.raises(RewardError, match=r"not running after 1 s.*reward-slow"):
        deploy.start_rewards([slow], http_port=port, deadline_s=1)
    began = time.monotonic()
    deploy.remove(["slow"])
    assert time.monotonic() - began < slow.drain_s, "nothing is asked of what never started"
    assert "reward-slow" not in serve.status().applications
    with pytest.raises(RewardError, match="reward-nobody: no such application"):
        deploy.wait(["nobody"], deadline_s=1)
    with pytest.raises(RewardError, match="reward-nobody"):
        _client("nobody")


def test_config_file_is_what_serve_accepts_and_it_runs(port, signs):
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert config.http_options.host == "127.0.0.1"
    (application,) = config.applications
    assert application.import_path == "flowgrpo_ray.serving.service:app"
    assert application.name == "reward-ocr"
    args = RewardServiceArgs.model_validate(application.args)
    assert application.route_prefix == f"/{args.name}"
    serve.run(service.app(args), name="reward-from-file", route_prefix="/file")
    images, prompts = signs
    answer = _post(port, "file", [_png(images[0])], prompts[:1])
    assert answer.json() == {"reward": "ocr", "scores": [1.0]}
    serve.delete("reward-from-file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replicas": "2"}, "valid integer"),
        ({"replica": 2}, "Extra inputs"),
        ({"name": "a/b"}, "match pattern"),
    ],
)
def test_service_args_are_strict(change, message):
    with pytest.raises(ValidationError, match=message):
        RewardServiceArgs.model_validate({"name": "ocr", **change})


def test_two_rewards_of_one_name_are_refused(ray_cluster):
    args = [RewardServiceArgs(name="ocr"), RewardServiceArgs(name="ocr")]
    with pytest.raises(SpecError, match="different names"):
        deploy.deploy(args, http_port=None)
