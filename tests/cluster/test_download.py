"""A model comes from a hub before the clock of a start runs: real Ray, sockets, and a slow hub."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny_hub import REPO, tiny_hub
from tiny_runs import small_spec

from flowgrpo_ray.cluster.download import fetch_model
from flowgrpo_ray.common.errors import ClusterError, RewardError
from flowgrpo_ray.serving.arrivals import arrivals
from flowgrpo_ray.serving.waiting import until_running

FOLDER = small_spec().model.folder


class Stages:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def stage(self, stage: str) -> None:
        self.seen.append(stage)


def environment_of(address: str, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def fetch(address: str, home: Path, patience: float, key: str = "model.path") -> list[str]:
    """The stages that were shown."""
    import ray

    spec = small_spec(f"{key}={REPO}", f"cluster.ready_timeout_s={patience}")
    node = ray.get_runtime_context().get_node_id()
    environment = environment_of(address, home)
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


def test_a_lora_comes_before_the_start_as_well(ray_cluster: None, tmp_path: Path):
    """Of its repository the adapters alone; and what has come is seen while rewards start."""
    published, home = tmp_path / "published", tmp_path / "home"
    for name in ("lora.safetensors", "adapter_config.json", "picture.png", "other/a.safetensors"):
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        (published / name).write_bytes(name.encode().ljust(200_000))
    with tiny_hub(published, seconds=1.0) as (address, _):
        with arrivals(environment_of(address, home)) as arrived:
            assert arrived() == 0
            shown = fetch(address, home, patience=6.0, key="model.lora")
            assert shown[0].startswith(f"downloading {REPO}: ")
            assert arrived() == 400_000
        snapshots = [file for file in home.rglob("snapshots/**/*") if file.is_file()]
        assert {file.name for file in snapshots} == {"lora.safetensors", "adapter_config.json"}


def test_a_hub_that_goes_silent_is_told(ray_cluster: None, tmp_path: Path):
    assert FOLDER is not None
    with (
        tiny_hub(FOLDER, seconds=40.0) as (address, _),
        pytest.raises(ClusterError, match=f"'{REPO}'.*no byte came for cluster.ready_timeout_s"),
    ):
        fetch(address, tmp_path, patience=1.0)


def test_a_start_waits_as_long_as_something_comes(monkeypatch):
    """Four looks without a byte more are the deadline, however much came before."""
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    come = iter([5, 7, 7, 9, 9, 9, 9, 9, 9])
    looks: list[int] = []

    def arrived() -> int:
        looks.append(next(come))
        return looks[-1]

    with pytest.raises(RewardError, match="not running after 8 s without a download"):
        until_running(
            lambda: {"reward-a": "DEPLOYING"},
            deadline_s=8.0,
            setting="key",
            every_s=0.0,
            arrived=arrived,
        )
    assert looks == [5, 7, 7, 9, 9, 9, 9]
