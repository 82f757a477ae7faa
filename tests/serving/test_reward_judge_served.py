"""A judge behind a Serve deployment: the replica starts the server, survives its death, ends it."""

import asyncio
import sys

import numpy as np
import psutil
import pytest
import ray
from tiny_judge import tiny_judge
from waiting import PATIENCE_S

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.rewards.pairwise_judge import PairwiseJudge
from flowgrpo_ray.rewards.vlm_judge import VlmJudge
from flowgrpo_ray.serving import deploy
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.client import Patience, RewardClient


def _servers(model):
    """The processes that serve `model`, on whatever port."""
    found = [p for p in psutil.process_iter(["cmdline"]) if model in (p.info["cmdline"] or ())]
    return [p for p in found if "-I" not in p.info["cmdline"]]  # without its two supervisors


@pytest.fixture
def model(pytestconfig):
    return str(tiny_judge(pytestconfig.cache.mkdir("judges")))


def ask_a_question_of_ones_own(server, model):
    """The server that runs already, by its address; it has no probabilities and says so."""
    words = server.cmdline()
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    images = np.stack([np.full((64, 64, 3), level, np.uint8) for level in (240, 10)])

    def scores(**options):
        judge = VlmJudge("Is {prompt} bright?", low=1, high=5, url=url, model=model, **options)
        try:
            return judge(images, ["a cat"] * 2, [{}] * 2).tolist()
        finally:
            judge.close()

    assert scores(max_tokens=16) == [(4.5 - 1) / 4, (1.5 - 1) / 4]
    for answer in ("yes_no", "digits"):
        with pytest.raises(RewardError, match="no chat completion with probabilities"):
            scores(answer=answer)
    pairs = PairwiseJudge(url=url, model=model)
    with pytest.raises(RewardError, match="no chat completion with probabilities"):
        pairs(images, ["a cat"] * 2, [{}] * 2, images[:, None][[0, 0]])  # three pictures are read
    pairs.close()


@pytest.mark.slow
def test_a_served_judge_scores_after_its_server_died_and_ends_with_its_deployment(
    model, ray_cluster, tmp_path
):
    launch = {"model": model, "server": "transformers", "log": str(tmp_path / "judge.log")}
    options = {"launch": launch, "concurrency": 4, "max_tokens": 16}
    args = RewardServiceArgs(name="judge", reward="unified_reward", options=options)
    deploy.start_rewards([args], http_port=None, deadline_s=PATIENCE_S)
    client = RewardClient({"judge": Patience(deadline_s=90, retries=0)})
    images = ray.put(
        np.stack([np.full((64, 64, 3), level, np.uint8) for level in (230, 20, 220, 30)])
    )

    def scores():
        scored = asyncio.run(client.score(images, ["a cat"] * 4, [{}] * 4))
        assert not scored.failures
        return scored.rewards["judge"].tolist()

    bright, dark = np.float32(4.5 / 5), np.float32(1.5 / 5)
    assert scores() == [bright, dark, bright, dark]
    (server,) = _servers(model)
    server.kill()
    assert scores() == [bright, dark, bright, dark]
    (restarted,) = _servers(model)
    assert restarted.pid != server.pid
    assert sys.executable in restarted.cmdline()[0]
    ask_a_question_of_ones_own(restarted, model)
    deploy.remove(["judge"])
    psutil.wait_procs([restarted], timeout=20)
    assert _servers(model) == []
