"""Rewards in environments of their own, served by real Ray and Serve at once."""

import asyncio
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml
from overlays import build_or_skip
from ray import serve
from waiting import PATIENCE_S

from flowgrpo_ray.common.errors import RewardEnvironmentError, RewardError
from flowgrpo_ray.rewards import environments
from flowgrpo_ray.rewards.signs import render_plain
from flowgrpo_ray.serving import deploy, service
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.client import Patience, RewardClient

VERSION = "reward_samples:LibraryVersion"
CONFIG = Path(__file__).parents[2] / "deployments" / "ocr_paddle.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of environments: an older `six`, and the user's own `paddleocr`."""
    build_or_skip("paddleocr")
    paddle = environments.environments_folder() / "paddleocr"
    folder = tmp_path_factory.mktemp("environments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(environments.FOLDER_VARIABLE, str(folder))
        build_or_skip("older", "six==1.16.0")
        (folder / "paddleocr").symlink_to(paddle)
        yield folder


@pytest.fixture(scope="module")
def scores(folder, ray_cluster):
    """Scores of two signs that show 407 and 582, for prompts that ask for 407."""
    (paddle,) = yaml.safe_load(CONFIG.read_text())["applications"]
    paddle["args"] |= {"replicas": 1, "cpus": 0.25}
    args = [
        RewardServiceArgs(name="six-base", reward=VERSION, options={"library": "six"}),
        RewardServiceArgs(
            name="six-older", reward=VERSION, options={"library": "six"}, environment="older"
        ),
        RewardServiceArgs(**paddle["args"]),
        RewardServiceArgs(name="ocr-base", reward="ocr"),
    ]
    deploy.start_rewards(args, http_port=None, deadline_s=PATIENCE_S)
    names = [arg.name for arg in args]
    images = np.stack([render_plain(text, "yellow", (96, 160)) for text in ("407", "582")])
    client = RewardClient({name: Patience(retries=0) for name in names})
    scored = asyncio.run(client.score(ray.put(images), ['a sign "407"'] * 2, [{}, {}]))
    assert not scored.failures
    yield scored.rewards
    deploy.remove(names)


@pytest.mark.slow
def test_two_versions_of_a_library_serve_at_once(scores):
    major, minor, *_ = importlib.metadata.version("six").split(".")
    assert scores["six-base"].tolist() == [np.float32(f"{major}.{minor}")] * 2
    assert scores["six-older"].tolist() == [np.float32("1.16")] * 2
    assert scores["six-base"][0] != scores["six-older"][0]


@pytest.mark.slow
def test_paddleocr_serves_beside_rapidocr(scores):
    assert scores["ocr_paddle"].tolist() == [1, 0]
    assert scores["ocr-base"].tolist() == [1, 0]


@pytest.mark.slow
def test_what_is_served_says_its_environment(scores):
    same = RewardServiceArgs(
        name="six-older", reward=VERSION, options={"library": "six"}, environment="older"
    )
    asyncio.run(deploy.check_same(same))
    with pytest.raises(RewardError, match="'environment': 'older'"):
        asyncio.run(deploy.check_same(same.model_copy(update={"environment": None})))


@pytest.mark.parametrize(
    "start",
    [
        service.app,
        lambda args: deploy.start_rewards([args], http_port=None, deadline_s=PATIENCE_S),
    ],
    ids=["builder", "driver"],
)
def test_a_missing_environment_is_an_error_at_once(ray_cluster, tmp_path, monkeypatch, start):
    """Ray itself would wait for the interpreter for ever."""
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path))
    args = RewardServiceArgs(name="lost", reward="ocr", environment="paddleocr")
    with pytest.raises(RewardEnvironmentError, match="flowgrpo-ray rewards env build paddleocr"):
        start(args)
    assert "reward-lost" not in serve.status().applications


def test_environments_that_one_side_alone_names_are_told(ray_cluster, tmp_path, monkeypatch):
    """An application that is built on the cluster looks where the cluster's variable says."""
    args = [RewardServiceArgs(name="ours", reward="ocr", environment="only-here")]
    deploy.check_environments_there(args, built_there=True)  # neither side has it
    (tmp_path / "only-here").mkdir()
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path))
    deploy.check_environments_there(args, built_there=False)  # its path is right there too
    with pytest.raises(RewardEnvironmentError) as caught:
        deploy.check_environments_there(args, built_there=True)
    assert f"environments only-here: here they are in {tmp_path} (FLOWGRPO_ENVIRONMENTS is" in str(
        caught.value
    )
    assert "(FLOWGRPO_ENVIRONMENTS is not set)" in str(caught.value)
