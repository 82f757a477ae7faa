"""A model comes from a hub before the clock of a start runs: real Ray, sockets, and a slow hub."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny_hub import REPO, tiny_hub
from tiny_runs import small_spec

from flowgrpo_ray.cluster.download import fetch_model
from flowgrpo_ray.common.errors import ClusterError

FOLDER = small_spec().model.folder


class Stages:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def stage(self, stage: str) -> None:
        self.seen.append(stage)


def fetch(address: str, home: Path, patience: float) -> list[str]:
    """The stages that were shown."""
    import ray

    spec = small_spec(f"model.path={REPO}", f"cluster.ready_timeout_s={patience}")
    node = ray.get_runtime_context().get_node_id()
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    shown = Stages()
    asyncio.run(fetch_model(spec, [node], shown, environment))  # pyright: ignore[reportArgumentType]
    return shown.seen


def test_a_slow_hub_takes_longer_than_the_start_may(ray_cluster: None, tmp_path: Path):
    assert FOLDER is not None
    with tiny_hub(FOLDER, seconds=2.0) as (address, asked):
        shown = fetch(address, tmp_path, patience=6.0)
        wanted = [path for path in asked if path.endswith(".safetensors")]
        assert wanted, "the weights came over the socket"
        asked.clear()
        again = fetch(address, tmp_path, patience=6.0)
        assert all(stage.endswith(": 4.4 of 4.4 MB") for stage in again)
        assert not [path for path in asked if path.endswith(".safetensors")], "they are there"
    assert len(shown) > 7, "it took longer than the patience, file by file"
    assert all(stage.startswith(f"downloading {REPO}: ") for stage in shown)
    come = [float(stage.split()[2]) for stage in shown]
    assert come == sorted(come)
    assert come[0] < come[-1] <= 4.4


def test_a_hub_that_goes_silent_is_told(ray_cluster: None, tmp_path: Path):
    assert FOLDER is not None
    with (
        tiny_hub(FOLDER, seconds=40.0) as (address, _),
        pytest.raises(ClusterError, match=f"'{REPO}'.*no byte came for cluster.ready_timeout_s"),
    ):
        fetch(address, tmp_path, patience=1.0)
