"""Rewards that are models, behind real Serve: what the class scores, and no untrained model."""

import asyncio

import numpy as np
import pytest
import ray
import torch
from test_rewards_geneval import tiny_detector
from test_rewards_hps import tiny_hps
from test_rewards_imagereward import WORDS, checkpoint
from test_rewards_pickscore import one_thread, tiny_clip
from transformers import BertTokenizer
from waiting import PATIENCE_S

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.rewards import build
from flowgrpo_ray.serving import deploy
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.client import Patience, RewardClient

__all__ = ["one_thread"]  # as the replicas have it
DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of each reward, with a tiny random model of the real class."""
    folder = tmp_path_factory.mktemp("models")
    clip, hps = tiny_clip(folder / "clip"), tiny_hps(folder / "hps")
    tokenizer, blip = folder / "tokenizer", folder / "ImageReward.pt"
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tokenizer)
    torch.save(checkpoint(), blip)
    return {
        "pickscore": {"path": clip, "processor": clip},
        "hps": {"path": hps, "processor": hps},
        "imagereward": {"path": str(blip), "tokenizer": str(tokenizer)},
        "geneval": {"detector": tiny_detector(folder / "detector"), "clip": clip},
    }


@pytest.mark.slow
def test_served_models_score_as_their_classes_do(options, ray_cluster):
    args = [
        RewardServiceArgs(name=name, options=of_reward | {"device": "cpu"}, golden=[])
        for name, of_reward in options.items()
    ]
    deploy.start_rewards(args, http_port=None, deadline_s=PATIENCE_S)
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)
    prompts, metadata = ["a red cat", "two dogs", "", "a dog", "cat"], [DOG] * 5
    client = RewardClient(dict.fromkeys(options, Patience(retries=0)))
    scored = asyncio.run(client.score(ray.put(images), prompts, metadata))
    assert not scored.failures
    for arg in args:
        by_class = build(arg.name, arg.options)(images, prompts, metadata)
        assert np.isfinite(by_class).all()
        np.testing.assert_allclose(scored.rewards[arg.name], by_class, rtol=1e-5)
    assert len(set(scored.rewards["pickscore"].tolist())) == 5
    deploy.remove(list(options))


@pytest.mark.slow
def test_a_model_without_training_is_refused(options, ray_cluster):
    args = RewardServiceArgs(name="untrained", reward="pickscore", options=options["pickscore"])
    with pytest.raises(RewardError, match="reward-untrained: DEPLOY_FAILED") as caught:
        deploy.start_rewards([args], http_port=None, deadline_s=PATIENCE_S)
    assert "loads but does not score as it must: golden image" in str(caught.value)
    deploy.remove(["untrained"])
