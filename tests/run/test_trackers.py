"""Trackers: the spec, rows by iteration and pictures with their scores, read back by the services'
own readers; one run after a resume; what fails does not end a run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from waiting import wait_until

from flowgrpo_ray.common.errors import SpecError, TrackingError
from flowgrpo_ray.run import trackers
from flowgrpo_ray.run.trackers import Picture, TrackedRun, Tracker
from flowgrpo_ray.run.tracking import RunRecorder
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.training import TrainingSpec

ABOUT = ["tracking.group=seeds", "tracking.tags=[a, b]", "tracking.notes=why", "name=kept"]
PROMPTS = ["a sign | red", "a sign"]
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)


def spec_with(*overrides: str) -> TrainingSpec:
    return load_spec("tiny-ocr", [*ABOUT, "tracking.tensorboard=false", *overrides])


def row(iteration: int, kind: str = "train", mean: float | None = None) -> dict[str, Any]:
    mean = iteration / 4 if mean is None else mean
    return {"kind": kind, "iteration": iteration, "reward": {"mean": mean}}


def samples(recorder: RunRecorder, iteration: int, tracked: int = 2) -> None:
    scores = {"ocr": np.array([0.5, np.nan, 1], np.float32)}
    recorder.log_samples(iteration, PIXELS, [*PROMPTS, "not tracked"], scores, tracked)


def twice(spec: TrainingSpec, folder: Path, told: Callable[[str], None]) -> None:
    """Three iterations, of which the third is lost; then back to the second, and on."""
    with RunRecorder(folder, trackers.start(spec, folder, told), told) as recorder:
        recorder.rewind(None, 1)
        recorder.log(row(0, "eval"))
        samples(recorder, 0)
        for iteration in (1, 2, 3):
            recorder.log(row(iteration))
            recorder.log_timing({"kind": "train", "iteration": iteration, "seconds": 2.0})
    with RunRecorder(folder, trackers.start(spec, folder, told), told) as recorder:
        recorder.rewind(2, 1)
        recorder.log(row(3))
        recorder.log(row(4))
        samples(recorder, 4)


# --- TensorBoard


def test_tensorboard_has_spec_rows_and_pictures_and_forgets_the_undone(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    spec = spec_with("tracking.tensorboard=true")
    twice(spec, tmp_path, print)
    with RunRecorder(tmp_path, trackers.start(spec, tmp_path, print)) as again:
        again.rewind(3, 1)
        again.log(row(4, mean=9.0))
    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(tmp_path / "tensorboard"), sizes).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/reward/mean")]
    assert points == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 9.0)]
    assert events.Tags()["scalars"] == [
        *("eval/reward/mean", "train/reward/mean", "time/train/seconds"),
    ]
    packed = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(packed).hparams
    assert hparams["optimizer.learning_rate"].number_value == spec.optimizer.learning_rate
    assert hparams["sampling.window.kind"].string_value == "random"
    assert hparams["tracking.group"].string_value == "seeds"
    assert hparams["tracking.wandb"].string_value == "null"

    def text(tag: str) -> list[tuple[int, str]]:
        found = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
        return list(dict.fromkeys(found))

    assert text("notes") == [(0, "why")]
    ((_, shown),) = text("spec")
    assert yaml.safe_load(shown.strip("`yaml")) == spec.model_dump(mode="json")
    table = "| picture | prompt | ocr |\n| --- | --- | --- |\n| 00 | a sign \\| red | 0.5 |"
    assert text("eval/pictures")[0] == (0, f"{table}\n| 01 | a sign | – |")
    assert events.SummaryMetadata("eval/pictures/00").summary_description == PROMPTS[0]
    shown = sorted(tag for tag in events.Tags()["images"])
    assert shown == ["eval/pictures/00", "eval/pictures/01"]
    (encoded,) = events.Images("eval/pictures/01")  # that of iteration 4 is undone
    (tmp_path / "one.png").write_bytes(encoded.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), PIXELS[1])


def test_tensorboard_loads_no_torch(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; import numpy; from flowgrpo_ray.run import trackers;"
        "from flowgrpo_ray.run.tracking import RunRecorder;"
        "from flowgrpo_ray.spec.file import load_spec; folder = Path(sys.argv[1]);"
        "run = RunRecorder(folder, trackers.start(load_spec('tiny-ocr'), folder, print));"
        "run.log({'kind': 'train', 'iteration': 1, 'loss': 0.5}); run.__exit__(None, None, None);"
        "found = ('torch', 'tensorflow', 'wandb', 'mlflow', 'trackio');"
        "print([name for name in found if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- Weights & Biases


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, as wandb's own messages.

    The frames are those of a LevelDB log: blocks of 32 KiB, in which each piece of a record has
    its checksum, length and kind before it; 1 is a whole record, 4 the last piece of one.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(pieces)
            pieces = b""


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    """Histories by slash-joined names, without those of wandb's clock."""
    histories = [record.history for record in records if record.HasField("history")]
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in history.item
            if (item.nested_key or [item.key])[0] not in ("_timestamp", "_runtime")
        }
        for history in histories
    ]


def test_wandb_offline_has_spec_rows_and_pictures_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    spec, notes = spec_with("tracking.wandb=signs"), []
    twice(spec, tmp_path, notes.append)
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"), key=lambda p: p.stat().st_mtime)
    assert [note.rpartition("wandb sync ")[2] for note in notes] == [str(first), str(second)]
    assert capfd.readouterr().err == "", "the console is the run's own"
    known = (tmp_path / "wandb-run-id.txt").read_text().strip()
    records = []
    for folder in (first, second):
        file = folder / f"run-{known}.wandb"

        def ended(file: Path = file) -> list[Any]:
            return [record.exit for record in wandb_records(file) if record.HasField("exit")]

        wait_until(ended, "wandb's own process has written all")
        of_folder = list(wandb_records(file))
        (run,) = [record.run for record in of_folder if record.HasField("run")]
        assert (run.run_id, run.project, run.display_name) == (known, "signs", "kept")
        assert (run.run_group, list(run.tags), run.notes) == ("seeds", ["a", "b"], "why")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert {key: config[key] for key in config if key != "_wandb"} == spec.model_dump(
            mode="json"
        )
        records.append(of_folder)
    start, resumed = map(rows_of, records)
    assert [(line["_step"], line["iteration"]) for line in start] == [(i, i) for i in range(4)]
    assert [line["train/reward/mean"] for line in start[1:]] == [0.25, 0.5, 0.75]
    assert start[3]["time/train/seconds"] == 2.0
    assert [line["_step"] for line in resumed] == [3, 4]
    pictures = {k.rpartition("/")[2]: v for k, v in start[0].items() if "eval/pictures/" in k}
    assert pictures["captions"] == ["a sign | red\nocr 0.5", "a sign\nocr –"]
    shown = [np.asarray(Image.open(first / "files" / name)) for name in pictures["filenames"]]
    assert np.array_equal(shown, PIXELS[:2])
    assert [r.exit.exit_code for r in records[1] if r.HasField("exit")] == [0]


def test_wandb_without_a_key_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from flowgrpo_ray.run import trackers;"
        "from flowgrpo_ray.spec.file import load_spec;"
        "trackers.start(load_spec('tiny-ocr', ['tracking.wandb=signs']), Path(sys.argv[1]), print)"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", code, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "there is no key for Weights & Biases. Log in with `wandb login`" in told.stderr


# --- MLflow, Trackio


def test_mlflow_has_spec_rows_and_pictures_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the light package has no other
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    spec = spec_with("tracking.mlflow=signs")
    twice(spec, tmp_path, print)
    client = mlflow.MlflowClient()
    known = (tmp_path / "mlflow-run-id.txt").read_text().strip()
    (run,) = client.search_runs([client.get_experiment_by_name("signs").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (known, "kept", "FINISHED")
    assert run.data.params["optimizer.learning_rate"] == str(spec.optimizer.learning_rate)
    assert run.data.params["tracking.mlflow"] == "signs"
    assert run.data.tags.items() >= {"group": "seeds", "tags": "a, b"}.items()
    assert run.data.tags["mlflow.note.content"] == "why"
    points = client.get_metric_history(known, "train/reward/mean")
    assert {(p.step, p.value) for p in points} == {(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)}
    said = mlflow.artifacts.load_dict(f"runs:/{known}/pictures/iteration-000004.json")
    assert said == [
        {"prompt": PROMPTS[0], "scores": {"ocr": 0.5}},
        {"prompt": PROMPTS[1], "scores": {"ocr": None}},
    ]
    images = [Path(file.path) for file in client.list_artifacts(known, "images")]
    steps = sorted((p.name.split("~")[2][:2], p.name.split("+")[2]) for p in images)
    assert sorted(set(steps)) == [("00", "0"), ("00", "4"), ("01", "0"), ("01", "4")]
    written = mlflow.artifacts.load_text(f"runs:/{known}/spec.yaml")
    assert yaml.safe_load(written) == spec.model_dump(mode="json")


def test_mlflow_that_cannot_be_reached_is_told(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri("nonsense://host")
    with pytest.raises(SpecError, match=r"tracking.mlflow = 'signs': .*Set MLFLOW_TRACKING_URI"):
        trackers.start(spec_with("tracking.mlflow=signs"), tmp_path, print)


def test_mlflow_is_told_again_what_it_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    notes: list[str] = []
    followers = trackers.start(spec_with("tracking.mlflow=signs"), tmp_path, print)

    def down(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("nobody answers")

    with RunRecorder(tmp_path, followers, notes.append) as recorder:
        with monkeypatch.context() as outage:
            outage.setattr(mlflow.MlflowClient, "log_batch", down)
            recorder.log(row(1))
            recorder.log(row(2))
        recorder.log(row(3))
    assert notes == [f"MLflow cannot be told: nobody answers. What it misses is in {tmp_path}"]
    known = (tmp_path / "mlflow-run-id.txt").read_text().strip()
    points = mlflow.MlflowClient().get_metric_history(known, "train/reward/mean")
    assert sorted((p.step, p.value) for p in points) == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_trackio_has_spec_rows_and_pictures_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    spec = spec_with("tracking.trackio=signs")
    twice(spec, tmp_path, print)
    (run,) = trackio.Api().runs("signs")
    assert run.name == "kept"
    assert run.config["optimizer.learning_rate"] == spec.optimizer.learning_rate
    assert run.config["tracking.notes"] == "why"
    rows = SQLiteStorage.get_logs("signs", "kept")
    points = {(line["step"], line.get("train/reward/mean")) for line in rows}
    assert points >= {(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)}
    shown = [line["eval/pictures/01"] for line in rows if "eval/pictures/01" in line]
    assert [one["caption"] for one in shown] == ["a sign\nocr –"] * 2


# --- your own


class Told(Tracker):
    """Keeps what it is told; ``broken`` is an iteration of which it can be told nothing."""

    heard: list[tuple[Any, ...]]

    def __init__(self, broken: int = -1) -> None:
        self._broken = broken
        type(self).heard = []

    def start(self, run: TrackedRun) -> str:
        self.heard.append(("start", run.name, run.group, run.tags, run.notes, run.spec["seed"]))
        return "see Told"

    def log(self, values: Any, iteration: int) -> None:
        if iteration == self._broken:
            raise TrackingError(f"lost {iteration}")
        self.heard.append((iteration, dict(values)))

    def pictures(self, pictures: Any, iteration: int) -> None:
        self.heard.append((iteration, [picture.caption for picture in pictures]))

    def rewind(self, iteration: int) -> None:
        self.heard.append(("rewind", iteration))

    def finish(self, failed: bool) -> None:
        self.heard.append(("finish", failed))


class NoTracker:
    pass


OWN = f"tracking.kind={__name__}:Told"


def test_your_own_tracker_is_told_all(tmp_path: Path):
    spec, notes = spec_with(OWN, "tracking.options={broken: 1}"), []
    recorder = RunRecorder(tmp_path, trackers.start(spec, tmp_path, notes.append), notes.append)
    samples(recorder, 0)
    samples(recorder, 0, tracked=0)
    recorder.log(row(1))
    recorder.log_timing({"kind": "start", "seconds": 1.0, "phases": {}})
    recorder.log_timing({"kind": "train", "iteration": 1, "seconds": 1.0})
    recorder.log(row(2))
    recorder.log(row(1))
    recorder.rewind(1, 1)
    with pytest.raises(KeyError), recorder:
        raise KeyError
    assert Told.heard == [
        ("start", "kept", "seeds", ["a", "b"], "why", spec.seed),
        (0, ["a sign | red\nocr 0.5", "a sign\nocr –"]),
        (2, {"train/reward/mean": 0.5}),
        ("rewind", 1),
        ("finish", True),
    ]
    missed = f"lost 1. What it misses is in {tmp_path}"
    assert notes == ["see Told", missed, missed], "once, and once more when it fails again"
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        *("iteration-000000.json", "iteration-000000.png"),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([OWN, "tracking.options={brokn: 1}"], "no option 'brokn', did you mean 'broken'"),
        ([f"tracking.kind={__name__}:NoTracker"], "NoTracker is no tracker"),
        ([f"tracking.kind={__name__}:Tolds"], "did you mean 'Told'"),
    ],
)
def test_a_wrong_tracker_is_named(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(SpecError, match=message):
        trackers.start(spec_with(*overrides), tmp_path, print)


def test_options_are_those_of_a_kind():
    with pytest.raises(SpecError, match="name its class in kind"):
        spec_with("tracking.options={a: 1}")


@pytest.mark.parametrize("service", ["wandb", "mlflow", "trackio"])
def test_a_service_has_to_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str
):
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(SpecError, match=f"tracking.{service} needs the package {service}"):
        trackers.start(spec_with(f"tracking.{service}=signs"), tmp_path, print)


def test_those_that_had_started_are_ended_where_one_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Unlucky(Told):
        def start(self, run: TrackedRun) -> str:
            raise SpecError("no luck")

    made = [Told(), Unlucky()]
    monkeypatch.setattr(trackers, "_asked_for", lambda tracking: made)
    with pytest.raises(SpecError, match="no luck"):
        trackers.start(spec_with(), tmp_path, print)
    assert Told.heard[-1] == ("finish", True)


def test_a_caption_is_the_prompt_and_its_scores():
    picture = Picture(PIXELS[0], "a sign", {"ocr": 0.123456, "sign_colour": None, "b": 12.0})
    assert picture.caption == "a sign\nocr 0.1235 · sign_colour – · b 12"
