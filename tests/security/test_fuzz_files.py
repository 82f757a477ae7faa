"""Files that somebody else wrote, or a disk spoiled: what was saved, or an error; never code."""

# ruff: noqa: PT017 - an error and a result are both right, and both are looked at
from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from sample_runs import make_run
from torch import nn

from flowgrpo_ray.common.errors import (
    CheckpointError,
    FlowGrpoError,
    ModelError,
    RunFolderError,
    SpecError,
)
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.common.images import MOST_PIXELS, ImageError, decode_rgb
from flowgrpo_ray.common.types import LearnerState
from flowgrpo_ray.policies.bagel_weights import opened
from flowgrpo_ray.policies.lora_file import PEFT_CONFIG, PEFT_WEIGHTS, LoraFile, read_lora
from flowgrpo_ray.rewards.loading import read_weights
from flowgrpo_ray.run.brief import brief
from flowgrpo_ray.run.checkpoint import (
    NUMBERS,
    Progress,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.found import find_runs
from flowgrpo_ray.run.scoring import find_images, plan_batches
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.sections import ModelSpec
from flowgrpo_ray.view.compared import comparison
from flowgrpo_ray.view.monitor import Feed
from flowgrpo_ray.view.report import as_written, write_report

SECONDS = 2.0  # of this process, for one file


@contextlib.contextmanager
def quick() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def mangle(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three bits, ranges or lengths wrong."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed))
        match rng.choice(["flip", "cut", "remove", "insert", "zero", "repeat"]):
            case "flip":
                changed[at] ^= 1 << rng.randrange(8)
            case "cut":
                del changed[at:]
            case "remove":
                del changed[at : at + rng.randint(1, 9)]
            case "insert":
                changed[at:at] = rng.randbytes(rng.randint(1, 9))
            case "zero":
                changed[at : at + 8] = bytes(8)
            case _:
                changed[at:at] = changed[: at + 1]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


class Payload:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_the_payload_works(tmp_path: Path):
    """The test of the tests below: read as Python reads pickles by itself, the code is run."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


# --- checkpoints


def state() -> LearnerState:
    random_ = np.random.default_rng(0)
    parts = [{"a": random_.normal(size=(3, 4)).astype(np.float32)} for _ in range(4)]
    return LearnerState(*parts, updates=7, loss_scale=0.5, scale_held=3)


PROGRESS = Progress(5, 480, 1 / 3, 1, "abc", "def", {"ocr": 0.1}, {"ocr": None})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoints", [state()], PROGRESS, keep=2)


def resign(path: Path) -> None:
    """Give the checkpoint a manifest that fits what it holds now, as who wrote it could."""
    files = [file for file in path.iterdir() if file.is_file() and file.name != "manifest.json"]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / "manifest.json").write_text(json.dumps(digests))


def is_what_was_saved(loaded: tuple[LearnerState, Progress]) -> bool:
    found, exact = loaded[0], state()
    same = all(
        getattr(found, part)["a"].tobytes() == getattr(exact, part)["a"].tobytes()
        for part in ("weights", "ema", "exp_avg", "exp_avg_sq")
    )
    numbers = all(getattr(found, name) == getattr(exact, name) for name in NUMBERS)
    return same and numbers and loaded[1] == PROGRESS


def test_four_hundred_damaged_checkpoints(saved: Path):
    """Any file, and any two: never anything but the exact state or the error."""
    rng, whole = random.Random(3), {f.name: f.read_bytes() for f in saved.iterdir()}
    refused = 0
    for _ in range(400):
        for name in rng.sample(sorted(whole), rng.randint(1, 2)):
            other = rng.choice(sorted(whole))
            swap = rng.random() < 0.2
            (saved / name).write_bytes(whole[other] if swap else mangle(rng, whole[name]))
        with quick():
            try:
                assert is_what_was_saved(load_checkpoint(saved))
            except CheckpointError as error:
                refused += 1
                assert saved.name in str(error)
        for name, content in whole.items():
            (saved / name).write_bytes(content)
    assert refused > 380
    assert is_what_was_saved(load_checkpoint(saved))


def test_four_hundred_forged_checkpoints(saved: Path):
    """With digests that fit the damage: what is loaded then at least has the right types."""
    rng, whole = random.Random(5), {f.name: f.read_bytes() for f in saved.iterdir()}
    names = [name for name in sorted(whole) if name != "manifest.json"]
    loaded = 0
    for _ in range(400):
        name = rng.choice(names)
        (saved / name).write_bytes(mangle(rng, whole[name]))
        resign(saved)
        with quick():
            try:
                found, progress = load_checkpoint(saved)
            except CheckpointError:
                pass
            else:
                loaded += 1
                assert type(progress.iteration) is int
                assert type(found.updates) is int
                assert all(array.dtype == np.float32 for array in found.weights.values())
        (saved / name).write_bytes(whole[name])
    assert 5 < loaded < 380


STATE = {"updates": 7, "loss_scale": 0.5, "scale_held": 3, "behaviour_version": -1}
STATE |= {"iteration": 5, "images": 1, "seconds": 1.0, "failed_groups": 0}
STATE |= {"spec_identity": "", "prompts_digest": "", "eval_before": {}, "eval_last": {}}


@pytest.mark.parametrize(
    "content",
    [
        *("null", "[]", "7", "{}", '""', "[" * 100_000, '{"a":' * 5000, "NaN", "\ufeff{}", "{"),
        *(json.dumps(STATE | {"more": 1}), json.dumps({**STATE, "iteration": "5"})),
        json.dumps(STATE | {"iteration": 5.5}),
        json.dumps(STATE | {"iteration": True}),
        json.dumps(STATE | {"behaviour_version": "0"}),
        json.dumps(STATE | {"behaviour_version": 0}),  # and there is no such file
        json.dumps(STATE | {"eval_before": {"ocr": "high"}}),
        json.dumps(STATE | {"eval_last": []}),
        json.dumps(STATE).replace("0.5", "1e999"),
        json.dumps(STATE).replace("0.5", "9" * 5000),
    ],
    ids=range(20),
)
def test_a_forged_state_is_refused(saved: Path, content: str):
    (saved / "state.json").write_text(json.dumps(STATE))
    resign(saved)
    load_checkpoint(saved)  # the test of the test
    (saved / "state.json").write_text(content)
    resign(saved)
    with quick(), pytest.raises(CheckpointError, match=saved.name):
        load_checkpoint(saved)


def header(text: str | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "empty": b"",
    "no header": b"\0" * 8,
    "a huge header": header("{}", length=2**40),
    "a header of 2**64 bytes": b"\xff" * 8,
    "not JSON": header("{"),
    "deep": header('{"a":' * 2000 + "1" + "}" * 2000),
    "another type": header(json.dumps({"a": tensor("F64", [1], [0, 8])}), data=bytes(8)),
    "bfloat16": header(json.dumps({"a": tensor("BF16", [2], [0, 4])}), data=bytes(4)),
    "integers": header(json.dumps({"a": tensor("I32", [1], [0, 4])}), data=bytes(4)),
    "offsets beyond": header(json.dumps({"a": tensor("F32", [4], [0, 16])}), data=bytes(4)),
    "offsets overlap": header(
        json.dumps({"a": tensor("F32", [2], [0, 8]), "b": tensor("F32", [2], [4, 12])}),
        data=bytes(12),
    ),
    "a shape that overflows": header(
        json.dumps({"a": tensor("F32", [2**40, 2**40], [0, 16])}), data=bytes(16)
    ),
    "negative": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', data=bytes(4)),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_forged_arrays_are_refused(saved: Path, name: str):
    (saved / "weights.safetensors").write_bytes(SAFETENSORS[name])
    resign(saved)
    with quick(), pytest.raises(CheckpointError, match=saved.name):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "manifest",
    [
        *("[]", "null", '"x"', "7", "{}", "[" * 100_000, '{"../../secret": "0"}'),
        *('{"/etc/passwd": "0"}', '{"..": "0"}', '{"a/../state.json": "0"}', '{"": "0"}'),
        '{"state.json": ["0"]}',
    ],
    ids=range(12),
)
def test_a_forged_manifest_is_refused(saved: Path, manifest: str):
    (saved.parent.parent / "secret").write_text("0")
    known = json.loads((saved / "manifest.json").read_text())
    if manifest.startswith("{"):
        manifest = json.dumps({**known, **json.loads(manifest)}) if manifest != "{}" else manifest
    (saved / "manifest.json").write_text(manifest)
    with quick(), pytest.raises(CheckpointError, match=r"manifest\.json|missing or not"):
        load_checkpoint(saved)


def test_no_digest_is_taken_outside_of_the_checkpoint(saved: Path):
    """Else its fit would tell what another file holds."""
    secret = saved.parent.parent / "secret"
    secret.write_text("0")
    known = json.loads((saved / "manifest.json").read_text())
    known["../../secret"] = hashlib.sha256(b"0").hexdigest()
    (saved / "manifest.json").write_text(json.dumps(known))
    with pytest.raises(CheckpointError, match="no table of this folder's files"):
        load_checkpoint(saved)


def test_a_pickle_in_a_checkpoint_is_not_read(saved: Path, tmp_path: Path):
    for name in ("weights.safetensors", "state.json", "manifest.json"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
        if name != "manifest.json":
            resign(saved)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)
        (saved / name).write_bytes(whole)
    assert not (tmp_path / "mark").exists()


def test_links_are_no_checkpoints(saved: Path, tmp_path: Path):
    """Old checkpoints are deleted; what a link leads to is not."""
    precious = tmp_path / "precious"
    shutil.copytree(saved, precious)
    for name in ("iteration-000001", "iteration-000009"):
        (saved.parent / name).symlink_to(precious)
    for name in ("iteration-²", "iteration-", "iteration-x", "iteration-000010-copy"):
        (saved.parent / name).mkdir()
    (saved.parent / "iteration-000011").touch()
    assert list_checkpoints(saved.parent) == [saved]
    assert newest_checkpoint(saved.parent, 10**6) == saved
    save_checkpoint(saved.parent, [state()], PROGRESS, keep=1)
    assert sorted(path.name for path in precious.iterdir()) == sorted(
        path.name for path in saved.iterdir()
    )


# --- run folders


ROWS = [
    *("null", "[]", "7", "{}", '"x"', "[" * 100_000, '{"a":' * 5000, '{"kind": "train"}'),
    '{"kind": "train", "iteration": "1", "log_ratio": 7}',
    '{"kind": "train", "iteration": 1, "log_ratio": {"gate": "x"}, "images": "many"}',
    '{"kind": "eval", "iteration": 1, "rewards": [1, 2]}',
    '{"kind": "eval", "iteration": null, "rewards": {"ocr": 5}}',
    '{"kind": "train", "iteration": 1, "seconds": 1e308, "rewards": {"ocr": {"mean": []}}}',
    '{"kind": "train", "iteration": 1, "seconds": "1"}',
    '{"kind": "train", "iteration": 1e999}',
    '{"kind": "train", "iteration": ' + "9" * 4000 + "}",
    '{"kind": "start"}',
    '{"kind": ["train"], "reward": {"mean": "\\ud800"}}',
    '{"kind": "train", "watch": {"x": 1}, "iteration": 3, "updates": {}}',
    '{"kind": "train", "reward": 3, "log_ratio": [1]}',
    "\0\0\0\0",
    "\x1b[2J</script><script>alert(1)</script>",
]
SIDECAR = {"iteration": 0, "prompts": ["a"], "scores": {"x": [1]}, "tile": [8, 8], "columns": 1}
SIDECARS = [
    SIDECAR | change
    for change in (
        {"tile": [0, 0]},
        {"tile": [8, -8]},
        {"tile": "ab"},
        {"tile": [8]},
        {"tile": [1e300, 1]},
        {"prompts": 5},
        {"prompts": [5]},
        {"scores": []},
        {"scores": {"x": []}},
        {"scores": {"x": 5}},
        {"iteration": "../../x"},
        {"columns": 0.5},
    )
]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run", iterations=4, prompts=2)


@pytest.fixture
def run(a_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(a_run, tmp_path / "runs" / "run")


def read_all(run: Path) -> None:
    """As the report and the monitor read: a page, or the error of a run folder."""
    with quick():
        try:
            page = write_report(run).read_text("utf-8")
        except RunFolderError as error:
            assert str(run) in str(error)
        else:
            assert "</script><script>alert" not in page
            data = page.partition('id="run-data">')[2].partition("</script>")[0]
            json.loads(data)
        told = brief(run, "run")
        json.dumps(told, allow_nan=False)
        with contextlib.suppress(RunFolderError), as_written(run):  # as the endpoint does
            json.dumps(Feed(run, "run").news(""), allow_nan=False)
        beside = comparison({"run": run, "again": run}, lambda name, path: path.name)
        json.dumps(beside, allow_nan=False)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_hostile_rows(run: Path, name: str, row: str):
    path, whole = run / name, (run / name).read_bytes()
    for content in (
        row.encode(),
        whole + row.encode(),
        row.encode() + b"\n" + whole,
        whole.replace(b"\n", b"\n" + row.encode() + b"\n", 2),
    ):
        path.write_bytes(content)
        (run / "summary.json").unlink(missing_ok=True)
        read_all(run)


@pytest.mark.parametrize("name", ["live.json", "summary.json"])
@pytest.mark.parametrize("text", ROWS, ids=range(len(ROWS)))
def test_hostile_state_files(run: Path, name: str, text: str):
    (run / name).write_text(text)
    read_all(run)
    values = [None, "x", 7, [], {"a": 1}, -(10**4000), True]
    known = json.loads((run / "summary.json").read_text()) if name == "live.json" else {}
    for key in ("state", "updated", "iterations", "name", "eval_before", "message", *known):
        for value in values[:-2]:
            (run / name).write_text(json.dumps({"state": "running", "updated": 1, key: value}))
            read_all(run) if key in ("state", "name", "eval_before") else brief(run, "run")


@pytest.mark.parametrize("sidecar", SIDECARS, ids=range(len(SIDECARS)))
def test_a_hostile_sidecar_is_left_out_and_named(run: Path, sidecar: dict[str, Any]):
    (run / "samples" / "iteration-000000.json").write_text(json.dumps(sidecar))
    with quick():
        page = write_report(run).read_text()
    assert "iteration-000000.json was left out" in page
    read_all(run)


@pytest.mark.parametrize("tile", [[2**60, 1], [1, 2**60], [2**60, 2**60]])
def test_a_tile_larger_than_its_picture(run: Path, tile: list[int]):
    (run / "samples" / "iteration-000000.json").write_text(json.dumps(SIDECAR | {"tile": tile}))
    with quick(), pytest.raises(RunFolderError, match=r"iteration-000000\.png"):
        write_report(run)
    read_all(run)


def test_two_hundred_mangled_run_folders(run: Path):
    rng = random.Random(7)
    names = ["metrics.jsonl", "timings.jsonl", "summary.json", "spec.yaml"]
    names += [f"samples/{path.name}" for path in (run / "samples").iterdir()]
    whole = {name: (run / name).read_bytes() for name in names if (run / name).exists()}
    for _ in range(200):
        for name in rng.sample(sorted(whole), 2):
            (run / name).write_bytes(mangle(rng, whole[name]))
        read_all(run)
        for name, content in whole.items():
            (run / name).write_bytes(content)
    assert brief(run, "run")["state"] == "finished"


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A few bytes that say that they are an image of four billion pixels."""
    small = bytearray(png((8, 8)))
    small[16:24] = (65_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    return bytes(small)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 600 600\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [bomb(), EPS, b"", b"GIF89a", png((600, 600))[:200]])
def test_a_picture_that_is_none_becomes_an_error(run: Path, content: bytes):
    """The reader is PNG's, whatever the content says: no other program is started for it."""
    sidecar = run / "samples" / "iteration-000000.json"
    row = json.loads(sidecar.read_text()) | {"tile": [300, 300]}  # so that it is scaled down
    sidecar.write_text(json.dumps(row))
    sidecar.with_suffix(".png").write_bytes(content)
    with quick(), pytest.raises(RunFolderError, match=r"iteration-000000\.png"):
        write_report(run)


def test_links_out_of_a_run_folder_are_not_read(run: Path, tmp_path: Path):
    """A report of a folder from elsewhere must not carry away what its reader alone may read."""
    secret = tmp_path / "secret"
    secret.write_text('{"name": "the secret", "state": "running", "updated": 1}\n')
    for name in ("spec.yaml", "timings.jsonl", "summary.json", "live.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    picture = run / "samples" / "iteration-000000.png"
    picture.unlink()
    picture.symlink_to(secret)
    (run / "samples" / "iteration-000004.json").unlink()
    (run / "samples" / "iteration-000004.json").symlink_to(secret)
    page = write_report(run).read_text()
    assert "the secret" not in page
    assert base64.b64encode(secret.read_bytes())[:20].decode() not in page
    for told in (brief(run, "run"), Feed(run, "run").news("")):
        assert "the secret" not in json.dumps(told)


def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("report.html", "report.html.part"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
    write_report(run)
    write_atomic(run / "report.html", b"again")
    assert precious.read_text() == "mine"
    spec = load_spec("tiny-ocr", ["name=linked"])
    for name in ("metrics.jsonl", "live.json.part", ".lock", "spec.yaml"):
        folder = tmp_path / "linked"
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "absent" if name == ".lock" else precious)
        with pytest.raises(FlowGrpoError):
            RunFolder.claim(tmp_path, spec, resume=True)
        shutil.rmtree(folder)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "absent").exists()


def test_links_in_a_circle(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "live.json").symlink_to("live.json")
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "samples").symlink_to(".")
    assert list(find_runs(tmp_path)) == ["run"]
    assert brief(tmp_path / "run", "run")["state"] == "unknown"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").symlink_to("x.png")
    (tmp_path / "images" / "y.png").symlink_to(".")
    with pytest.raises(SpecError, match="holds no"):
        find_images(tmp_path / "images")


# --- images


def test_a_thousand_mangled_images():
    rng, outcomes = random.Random(2), []
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    files = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        files.append(file.getvalue())
    for _ in range(1000):
        with quick(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = decode_rgb(mangle(rng, rng.choice(files)), "x")
            except ImageError as error:
                outcomes.append(str(error))
            else:
                assert found.dtype == np.uint8
                assert found.ndim == 3
    assert len(outcomes) > 500


def test_bombs_are_refused_whatever_another_library_allows(tmp_path: Path, monkeypatch):
    (tmp_path / "1.png").write_bytes(png((4, 4)))
    (tmp_path / "2.png").write_bytes(bomb())
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with quick(), pytest.raises(SpecError, match=r"2\.png"):
            plan_batches(find_images(tmp_path), 4)
    with pytest.raises(ImageError, match=f"at most {MOST_PIXELS} pixels"):
        decode_rgb(bomb(), "x")
    with (tmp_path / "2.png").open("wb") as file:
        file.truncate(2**36)
    with quick(), pytest.raises(SpecError, match="larger than 512 MiB"):
        plan_batches(find_images(tmp_path), 4)


# --- weights


def lora_of(folder: Path) -> LoraFile:
    blocks = [nn.ModuleDict({"q": nn.Linear(6, 8)}) for _ in range(2)]
    network = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
    return read_lora(ModelSpec(family="bagel", path="x/y", lora=str(folder)), network, "", {})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    shapes = {"A": (4, 6), "B": (8, 4)}
    arrays = {
        f"base_model.model.blocks.{i}.q.lora_{half}.weight": np.ones(shape, np.float32)
        for i in range(2)
        for half, shape in shapes.items()
    }
    safetensors.numpy.save_file(arrays, folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    return folder


def test_four_hundred_mangled_loras(lora: Path):
    assert lora_of(lora).alpha == 8
    rng, refused = random.Random(9), 0
    whole = {file.name: file.read_bytes() for file in lora.iterdir()}
    for _ in range(400):
        name = rng.choice(sorted(whole))
        (lora / name).write_bytes(mangle(rng, whole[name]))
        with quick():
            try:
                found = lora_of(lora)
            except ModelError as error:
                refused += 1
                assert "model.lora" in str(error)
            else:
                assert found.rank >= 1
                assert all(weight.ndim == 2 for weight in found.weights.values())
        (lora / name).write_bytes(whole[name])
    assert 100 < refused < 400


@pytest.mark.parametrize(
    "config",
    [
        *("[]", "null", "7", "[" * 100_000, "{", '{"lora_alpha": {}}', '{"lora_alpha": "x"}'),
        *('{"lora_alpha": null}', '{"lora_alpha": 1e999}', '{"lora_alpha": -1}'),
        '{"lora_alpha": NaN}',
    ],
    ids=range(11),
)
def test_a_hostile_lora_config_is_refused(lora: Path, config: str):
    (lora / PEFT_CONFIG).write_text(config)
    with pytest.raises(ModelError, match=r"model\.lora"):
        lora_of(lora)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_arrays_of_models_are_refused(lora: Path, tmp_path: Path, name: str):
    (lora / PEFT_WEIGHTS).write_bytes(SAFETENSORS[name])
    with quick(), pytest.raises(ModelError):
        lora_of(lora)
    if name in ("another type", "bfloat16", "integers"):
        return  # sound files, which hold other tensors
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFETENSORS[name])
    if name != "no header":
        with quick(), pytest.raises(ModelError):
            read_weights(("head", str(path), None), "x")
    (tmp_path / "ema.safetensors").write_bytes(SAFETENSORS[name])
    (tmp_path / "llm_config.json").write_text("{}")
    model = ModelSpec(family="bagel", path=str(tmp_path))
    with quick(), pytest.raises(ModelError), opened(model, "ema.safetensors") as file:
        [file.get_tensor(key) for key in file.offset_keys()]


def test_three_hundred_mangled_files_of_weights(tmp_path: Path):
    """torch's format: tensors alone are read, and what cannot be is one kind of error."""
    rng, refused = random.Random(13), 0
    weights = {"layers.0.weight": torch.ones(4, 3), "layers.0.bias": torch.zeros(4)}
    for legacy in (False, True):
        file = tmp_path / f"{legacy}.pth"
        torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
        whole = file.read_bytes()
        for _ in range(150):
            file.write_bytes(mangle(rng, whole))
            with quick():
                try:
                    found = read_weights(("head", str(file), None), "x")
                except ModelError as error:
                    refused += 1
                    assert "head = " in str(error)
                else:
                    assert all(torch.is_tensor(value) for value in found.values())
    assert refused > 100


@pytest.mark.parametrize("kind", ["pickle", "zip", "tensors and code", "legacy", "protocol 5"])
def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path, kind: str):
    mark, file = tmp_path / "mark", tmp_path / "head.pth"
    payload: Any = Payload(mark)
    match kind:
        case "pickle":
            file.write_bytes(pickle.dumps(payload))
        case "protocol 5":
            file.write_bytes(pickle.dumps({"layers.0.weight": payload}, protocol=5))
        case "zip":
            torch.save(payload, file)
        case "legacy":
            torch.save({"a": payload}, file, _use_new_zipfile_serialization=False)
        case _:
            torch.save({"layers.0.weight": torch.ones(2), "code": payload}, file)
    with pytest.raises(ModelError, match="head = "):
        read_weights(("head", str(file), None), "x")
    assert not mark.exists()
