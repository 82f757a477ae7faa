"""Checkpoints come back bit for bit or not at all; the digest of weights sees every change."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo_ray.algorithm import weights
from flowgrpo_ray.algorithm.learner import LearnerState
from flowgrpo_ray.algorithm.weights import digest, load_arrays, share
from flowgrpo_ray.common.errors import CheckpointError, ContractError
from flowgrpo_ray.run.checkpoint import (
    Progress,
    checkpoint_iteration,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.watch import Watch
from flowgrpo_ray.spec.file import load_spec

PARTS = ("weights", "ema", "exp_avg", "exp_avg_sq")


def state(seed: int) -> LearnerState:
    """Four different sets of arrays, with values that text or rounding would not keep."""
    random = np.random.default_rng(seed)
    odd = np.array([-0.0, np.float32(1) / 3, 1e-42, np.inf], np.float32)
    parts = {
        part: {"a.weight": random.normal(size=(3, 4)).astype(np.float32), "b": odd * (seed + 1)}
        for part in PARTS
    }
    return LearnerState(**parts, updates=2 * seed, loss_scale=2.0**-seed, scale_held=seed)


def progress(iteration: int) -> Progress:
    return Progress(
        iteration=iteration,
        images=96 * iteration,
        seconds=1 / 3,
        failed_groups=1,
        spec_identity="abc",
        prompts_digest="def",
        eval_before={"ocr": 0.1},
        eval_last={"ocr": 0.7, "sign_colour": 1 / 3},
    )


def save(folder: Path, iteration: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, [state(iteration)], progress(iteration), keep)


def assert_is(path: Path, iteration: int) -> None:
    """The checkpoint at ``path`` is that of ``iteration``, every bit of it."""
    found, where = load_checkpoint(path)
    assert where == progress(iteration)
    for number in ("updates", "loss_scale", "scale_held"):
        assert getattr(found, number) == getattr(state(iteration), number)
    for part in PARTS:
        arrays, exact = getattr(found, part), getattr(state(iteration), part)
        assert arrays.keys() == exact.keys()
        for name, array in arrays.items():
            assert array.dtype == exact[name].dtype
            assert array.shape == exact[name].shape
            assert array.tobytes() == exact[name].tobytes()


def test_round_trip_bit_for_bit(tmp_path: Path):
    path = save(tmp_path, 7)
    assert path.name == "iteration-000007"
    assert_is(path, 7)


def test_files_follow_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 7)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_no_averages_is_no_error(tmp_path: Path):
    """A run with ``ema: null`` has an empty set of them."""
    plain = LearnerState(state(1).weights, {}, state(1).exp_avg, state(1).exp_avg_sq, 2)
    assert load_checkpoint(save_checkpoint(tmp_path, [plain], progress(1), 1))[0].ema == {}


def test_nothing_is_pickled(tmp_path: Path):
    """A checkpoint from a stranger can be read: arrays and JSON, no code."""
    files = sorted(save(tmp_path, 1).iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    assert [file.stem for file in files if file.suffix == ".safetensors"] == sorted(PARTS)
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_only_the_newest_are_kept(tmp_path: Path):
    for iteration in (2, 9, 10, 100):
        save(tmp_path, iteration, keep=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["iteration-000010", "iteration-000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


# --- protection


def test_a_protected_checkpoint_is_kept_beside_the_newest(tmp_path: Path):
    """Of each protected iteration the newest checkpoint up to it; released when it moves on."""
    for iteration in (10, 20, 30, 40, 50):
        save_checkpoint(tmp_path, [state(1)], progress(iteration), 2, protect={25, 5})
    assert kept(tmp_path) == [20, 40, 50]  # there is none up to 5
    save_checkpoint(tmp_path, [state(1)], progress(60), 2, protect=[49, 20])
    assert kept(tmp_path) == [20, 40, 50, 60]
    save_checkpoint(tmp_path, [state(1)], progress(70), 2, protect=[60])
    assert kept(tmp_path) == [60, 70]
    save_checkpoint(tmp_path, [state(1)], progress(80), 2)
    assert kept(tmp_path) == [70, 80]


def kept(folder: Path) -> list[int]:
    return [checkpoint_iteration(path) for path in list_checkpoints(folder)]


def test_the_newest_checkpoint_up_to_an_iteration(tmp_path: Path):
    for iteration in (9, 10, 100):
        save(tmp_path, iteration, keep=3)
    (tmp_path / "iteration-000010-copy").mkdir()
    found = [newest_checkpoint(tmp_path, i) for i in (8, 9, 99, 100, 10**7)]
    assert [path and checkpoint_iteration(path) for path in found] == [None, 9, 10, 100, 100]
    assert newest_checkpoint(tmp_path / "absent", 5) is None


@settings(deadline=None, max_examples=10)
@given(
    colours=st.lists(st.one_of(st.just(float("nan")), st.floats(0, 1)), min_size=4, max_size=24),
    window=st.integers(1, 4),
    every=st.integers(1, 5),
    keep=st.integers(1, 2),
    stops=st.sets(st.integers(1, 24), max_size=2),
)
def test_the_checkpoint_before_over_optimization_is_always_there(
    colours: list[float], window: int, every: int, keep: int, stops: set[int]
):
    """After every iteration of a run, whatever the best window does and wherever it was stopped:
    the newest checkpoint that was ever saved up to the best iteration is still on the disk."""
    rewards = "rewards={ocr: {}, sign_colour: {weight: 0}}"
    spec = load_spec("tiny-ocr", [f"watch.window={window}", rewards])
    watch, saved = Watch(spec), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for iteration, colour in enumerate(colours, start=1):
            scores = {"total": [iteration / 100] * 3, "rewards": {"sign_colour": [colour] * 3}}
            row = {"kind": "eval", "iteration": iteration, "per_prompt": scores}
            watch.see({**row, "unscored": {"sign_colour": 3 * math.isnan(colour)}})
            if iteration % every == 0 or iteration in stops:
                small = LearnerState({}, {}, {}, {}, 0)
                save_checkpoint(folder, [small], progress(iteration), keep, watch.protected)
                saved.append(iteration)
            for best in watch.protected:
                right = max((i for i in saved if i <= best), default=None)
                found = newest_checkpoint(folder, best)
                assert (found and checkpoint_iteration(found)) == right
            assert len(kept(folder)) <= keep + len(watch.protected)


# --- crashes


class Crash(BaseException):
    """The process ends here; nothing catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    """End the process, so to say, before the n-th thing that a save does to the disk."""
    count = iter(range(10**6))

    def counted(original):
        def call(*args, **kwargs):
            if next(count) == operation:
                raise Crash
            return original(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"),
        (os, "open"),
        (shutil, "rmtree"),
        (safetensors.numpy, "save_file"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "rename"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, keep: int):
    """Before every single operation in turn, until a save goes through."""
    for operation in range(1000):
        folder = tmp_path / str(operation)
        save(folder, 1, keep)
        crashed = False
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, operation)
            try:
                save(folder, 2, keep)
            except Crash:
                crashed = True
        found = list_checkpoints(folder)
        assert found, f"operation {operation}: no checkpoint is left"
        for path in found:
            assert_is(path, int(path.name[-6:]))
        if not crashed:
            break
        save(folder, 2, keep)  # the next attempt works, and clears up
        assert [path.name[-1] for path in list_checkpoints(folder)] == ["1", "2"][-keep:]
        assert len(list(folder.iterdir())) == keep
    assert operation > 15  # it did go through the writes


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch):
    """Else a power cut could leave a checkpoint of the right name with empty files."""
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged_rename(self: Path, target: Path) -> Path:
        log.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    path = save(tmp_path, 1)
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert {file.name for file in path.iterdir()} <= set(before)
    assert before[-1] == f".{path.name}.partial"  # the folder's own entries, after its files
    assert after == [tmp_path.name]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, [state(5)], progress(2), 2)
    save(tmp_path, 2)
    assert_is(list_checkpoints(tmp_path)[-1], 2)
    assert len(list_checkpoints(tmp_path)) == 2


# --- damage


@pytest.mark.parametrize("name", [*(f"{part}.safetensors" for part in PARTS), "state.json"])
def test_one_changed_byte_is_an_error_that_names_the_file(tmp_path: Path, name: str):
    file = save(tmp_path, 1) / name
    whole = file.read_bytes()
    step = 1 if name == "state.json" else max(1, len(whole) // 20)
    for place in [*range(0, len(whole), step), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        file.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(file.parent)
        assert str(file) in str(caught.value)
        assert "Delete" in str(caught.value)
    file.write_bytes(whole)
    load_checkpoint(file.parent)


def test_a_changed_manifest_is_an_error(tmp_path: Path):
    """Its own damage shows as that of a file, or as a checkpoint that is not whole."""
    path = save(tmp_path, 1)
    whole = (path / "manifest.json").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        if bytes(damaged).split() == whole.split():
            continue  # white space
        (path / "manifest.json").write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_out_arrays_the_same_way_whatever_their_order(tmp_path: Path, ranks: int):
    """As they are after a load; and a checkpoint of all shares is the whole state."""
    whole = state(4)
    tensors = {name: torch.tensor(array) for name, array in whole.weights.items()}
    turned = dict(reversed(tensors.items()))
    shares = [share(tensors, rank, ranks) for rank in range(ranks)]
    for rank, mine in enumerate(shares):
        again = share(turned, rank, ranks)
        assert mine.keys() == again.keys()
        assert all(np.array_equal(mine[name], again[name]) for name in mine)
    parts = [replace(whole, weights=shares[0])]
    parts += [
        LearnerState(weights=mine, ema={}, exp_avg={}, exp_avg_sq={}, updates=8)
        for mine in shares[1:]
    ]
    path = save_checkpoint(tmp_path, parts, progress(1), 1)
    found, _ = load_checkpoint(path)
    assert found.weights.keys() == whole.weights.keys()
    assert all(np.array_equal(found.weights[name], whole.weights[name]) for name in whole.weights)
    files = sorted(file.name for file in path.glob("weights*"))
    counted = sum(map(bool, shares))
    expected = [f"weights-{n:05d}-of-{counted:05d}.safetensors" for n in range(1, counted + 1)]
    assert files == (expected if counted > 1 else ["weights.safetensors"])
    if counted > 1:
        (path / files[0]).unlink()
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


@pytest.mark.parametrize("change", ["missing", "cut"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "ema.safetensors"])
def test_a_missing_or_cut_file_is_an_error(tmp_path: Path, name: str, change: str):
    file = save(tmp_path, 1) / name
    content = file.read_bytes()
    file.unlink()
    if change == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(file.parent)
    assert name in str(caught.value)


def test_a_run_starts_from_its_newest_checkpoint(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.latest() is None
    save(folder.checkpoints, 9)
    save(folder.checkpoints, 10)
    latest = folder.latest()
    assert latest is not None
    assert latest[1].iteration == 10


# --- the digest of weights


def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(2, 6, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.randn((), generator=generator),
    }


def test_digest_of_equal_weights_is_equal():
    """Whatever the order of the names and the strides in memory."""
    plain = parameters()
    turned = dict(reversed(parameters().items()))
    turned["a"] = turned["a"].t().contiguous().t()
    assert not turned["a"].is_contiguous()
    assert digest(turned) == digest(plain)
    assert digest({n: torch.nn.Parameter(p) for n, p in plain.items()}) == digest(plain)


def test_digest_sees_every_change():
    def one_bit(p):  # the least change of a float32
        p["a"].view(torch.int32)[1, 3] ^= 1

    def one_bit_of_bfloat16(p):
        p["b"].view(torch.int16)[4] ^= 1

    def sign_of_zero(p):
        p["c"].zero_().neg_()

    def zero(p):
        p["c"].zero_()

    def swap_near(p):
        p["a"][0, [0, 1]] = p["a"][0, [1, 0]]

    def swap_far(p):
        p["a"][[0, 1]] = p["a"][[1, 0]]

    def move_between_tensors(p):
        p["a"][0, 0], p["c"][()] = p["c"].item(), p["a"][0, 0].item()

    def shape(p):
        p["a"] = p["a"].view(3, 4)

    def dtype(p):
        p["a"] = p["a"].view(torch.int32)

    def name(p):
        p["d"] = p.pop("c")

    def swapped_names(p):
        p["a"], p["c"] = p["c"], p["a"]

    def missing(p):
        del p["b"]

    changes = [one_bit, one_bit_of_bfloat16, sign_of_zero, zero, swap_near, swap_far]
    changes += [move_between_tensors, shape, dtype, name, swapped_names, missing]
    digests = {"unchanged": digest(parameters())}
    for change in changes:
        changed = parameters()
        change(changed)
        digests[change.__name__] = digest(changed)
    assert len(set(digests.values())) == len(digests), digests


def test_digest_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch):
    whole = digest(parameters())
    monkeypatch.setattr(weights, "_CHUNK", 5)
    assert digest(parameters()) == whole


def test_load_arrays_makes_the_digest_that_was_published():
    """In place, in each parameter's own dtype; the copies do not follow later updates."""
    source = {n: p.float() for n, p in parameters().items()}
    arrays, published = share(source, 0, 1), digest(source)
    source["a"].zero_()
    target = {n: torch.nn.Parameter(torch.zeros_like(p)) for n, p in source.items()}
    places = {n: p.data_ptr() for n, p in target.items()}
    load_arrays(target, arrays)
    assert digest(target) == published
    assert {n: p.data_ptr() for n, p in target.items()} == places


def test_load_arrays_refuses_what_does_not_fit():
    target = {n: p.float() for n, p in parameters().items()}
    arrays = share(target, 0, 1)
    with pytest.raises(ContractError, match="'c'"):
        load_arrays(target, {n: a for n, a in arrays.items() if n != "c"})
    with pytest.raises(ContractError, match="'extra'"):
        load_arrays(target, arrays | {"extra": arrays["a"]})
    with pytest.raises(ContractError) as caught:
        load_arrays(target, arrays | {"a": arrays["a"][:1]})  # would broadcast
    assert "a is (2, 6) here and (1, 6) there" in str(caught.value)
