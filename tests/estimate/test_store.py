"""What an iteration keeps in shared memory, by hand; and what is said where that is too small."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from flowgrpo_ray.estimate import store
from flowgrpo_ray.spec.file import load_spec

Usage = namedtuple("Usage", "total used free")


def test_bytes_of_an_iteration_by_hand():
    """96 images of 32 x 48; 2 trained steps, so 3 latents; with KL 2 reference means more."""
    assert store.iteration_bytes(load_spec("tiny-ocr", ["objective.kl=null"])) == 96 * 1536 * (
        3 + 3
    )
    with_kl = ["objective.kl={beta: 0.1}", "sampling.max_lag=1"]
    assert store.iteration_bytes(load_spec("tiny-ocr", with_kl)) == 96 * 1536 * (3 + 3 + 2) * 2
    colocated = load_spec("tiny-ocr", ["cluster.layout=colocated"])
    assert store.iteration_bytes(colocated) == 96 * 1536 * 3, "trajectories stay where they are"


def test_a_shared_memory_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = load_spec("sd35-ocr", ["cluster.layout=separate"])
    monkeypatch.setattr(store, "SHM", tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: Usage(64 * 10**6, 0, 0))
    told = store.told(spec)
    assert told is not None
    wanted = 1.5 * store.iteration_bytes(spec)
    assert f"has 0.064 GB, and an iteration keeps up to {wanted / 1e9:.2g} GB there" in told
    assert f"--shm-size={int(wanted // 1e9) + 1}g" in told
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: Usage(10**12, 0, 0))
    assert store.told(spec) is None
    monkeypatch.setattr(store, "SHM", tmp_path / "nowhere")
    assert store.told(spec) is None, "not a Linux"


def test_the_store_grows_only_where_rays_own_is_too_small(monkeypatch: pytest.MonkeyPatch):
    spec = load_spec("sd35-ocr", ["cluster.layout=separate"])
    wanted = int(1.5 * store.iteration_bytes(spec))
    found = []
    for memory in (4 * wanted, 3 * wanted, wanted):
        machine = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}
        monkeypatch.setattr(store.os, "sysconf", machine.__getitem__)
        found.append(store.store_size(spec))
    assert found == [None, wanted, int(0.7 * wanted)]
