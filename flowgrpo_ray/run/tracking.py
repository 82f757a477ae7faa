"""What a run writes down: one JSON line per row, mirrored to TensorBoard and Weights & Biases.

`metrics.jsonl` holds what the seed decides, so a resumed run writes the same bytes as one that
never stopped; `timings.jsonl` holds what the clock says. Iterations count from 1: row N is written
before the checkpoint of iteration N, and evaluation 0 comes before any training.
"""

import importlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.common.errors import RunFolderError, SpecError
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.common.strict_json import parse

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
SUMMARY = "summary.json"
SAMPLES = "samples"
SOURCES = "sources"  # beside the samples, of prompts that change images
PER_PROMPT = "per_prompt"  # scores in the row of an evaluation: what the watch compares

Row = dict[str, Any]
Mirror = Callable[[str, Row], None]  # of a file's name and a row


class RunRecorder:
    """Appends rows to a run folder. Holds no file open: a row is on disk when `log` returns."""

    def __init__(
        self, folder: str | Path, tensorboard: bool = True, wandb: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = _TensorBoard(self.folder / "tensorboard") if tensorboard else None
        self._wandb = _start_wandb(wandb, self.folder) if wandb else None
        self.mirrors: list[Mirror] = []  # see each row as well, once it is on disk

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a `train` or `eval` row to metrics.jsonl; a number that is not finite is null."""
        self._append(METRICS, row, kinds=("train", "eval"), prefix="")

    def log_timing(self, row: Mapping[str, Any]) -> None:
        """Append a `train`, `eval` or `start` row to timings.jsonl."""
        self._append(TIMINGS, row, kinds=("train", "eval", "start"), prefix="time/")

    def truncate(self, iteration: int, *, drop_evaluation: bool = False) -> None:
        """Go back to the checkpoint of `iteration`: drop every later row and a torn last line.

        Rows of `iteration` itself stay, the evaluation too, since both precede the checkpoint;
        with `drop_evaluation` that one goes. Rows without an iteration (the start of each
        attempt) stay as well.
        """
        for name in (METRICS, TIMINGS):
            path = self.folder / name
            if not path.exists():
                continue
            kept = [
                line
                for line, row in _lines(path)
                if "iteration" not in row
                or row["iteration"] + (drop_evaluation and row.get("kind") == "eval") <= iteration
            ]
            write_atomic(path, b"".join(line + b"\n" for line in kept))
        if self._tensorboard:
            self._tensorboard.forget_from(iteration + 1)

    def rewind(self, iteration: int | None, evaluation_every: int) -> None:
        """Back to the checkpoint of `iteration`, or to before the first row: what came after it
        will be written again."""
        if iteration is None:
            self.truncate(-1)
            return
        # A run that ended off its rhythm was evaluated at its end; the longer run is not, there.
        off_rhythm = iteration % evaluation_every != 0
        self.truncate(iteration, drop_evaluation=off_rhythm)

    def metrics(self) -> list[Row]:
        """The rows of `metrics.jsonl` so far."""
        path = self.folder / METRICS
        return read_rows(path) if path.exists() else []

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json as a whole: a reader sees the old one or the new one."""
        text = json.dumps(_plain(summary), indent=2, allow_nan=False)
        write_atomic(self.folder / SUMMARY, text.encode() + b"\n")

    def close(self) -> None:
        """Finish the mirrors; the JSON files need no closing."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _append(
        self, name: str, row: Mapping[str, Any], kinds: tuple[str, ...], prefix: str
    ) -> None:
        if row.get("kind") not in kinds:
            raise ValueError(f"rows of {name} are of kind {kinds}, not {row.get('kind')!r}")
        if row["kind"] != "start" and not isinstance(row.get("iteration"), Integral):
            raise ValueError(f"a {row['kind']} row needs its iteration, not {row!r}")
        plain = _plain(row)
        # Timings keep their order: stages and phases are told as they happen.
        text = json.dumps(plain, sort_keys=name == METRICS, allow_nan=False)
        with (self.folder / name).open("ab") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint is never newer on disk than the rows before it
        if row["kind"] == "start":
            return
        for mirror in self.mirrors:
            mirror(name, plain)
        values = dict(scalars(plain, prefix + row["kind"]))
        if self._tensorboard:
            self._tensorboard.add(values, plain["iteration"])
        if self._wandb:
            self._wandb.log({**values, "iteration": plain["iteration"]})


class StartClock:
    """Seconds of each phase of a start, from the command to the first iteration."""

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End `phase`, which began with the end of the one before."""
        now = time.perf_counter()
        self._phases[phase] = now - self._last
        self._last = now

    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._began

    def row(self) -> Row:
        """For timings.jsonl."""
        return {"kind": "start", "seconds": self._last - self._began, "phases": self._phases}


def scalars(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Flatten a row to `train/reward/mean`-like names; a list of numbers becomes its mean."""
    for key, value in row.items():
        if key in ("kind", "iteration", "window", "digest", "per_step", PER_PROMPT):
            continue
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from scalars(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
        elif isinstance(value, list):
            numbers = [item for item in value if isinstance(item, int | float)]
            if numbers:
                yield name, sum(numbers) / len(numbers)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .jsonl file. Passes over a torn last line, and over nothing else."""
    return [row for _, row in _lines(Path(path))]


def save_grid(path: str | Path, images: "np.ndarray", columns: int) -> None:
    """Write images `uint8 [n, H, W, 3]` as one PNG, row by row, with no gap and exact pixels."""
    from PIL import Image

    if images.ndim != 4 or images.shape[-1] != 3 or str(images.dtype) != "uint8":
        raise ValueError(f"a grid takes uint8 [n, H, W, 3], not {images.dtype} {images.shape}")
    count, height, width, _ = images.shape
    if count < 1 or columns < 1:
        raise ValueError(f"a grid takes images and columns, not {count} and {columns}")
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * width, rows * height))
    for index in range(count):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(images[index]), (column * width, row * height))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    write_atomic(Path(path), buffer.getvalue())


def save_samples(
    folder: str | Path,
    iteration: int,
    images: "np.ndarray",
    prompts: Sequence[str],
    scores: "Mapping[str, Sequence[float | None] | np.ndarray]",
    *,
    columns: int = 8,
) -> Path:
    """Write one evaluation's images `[n, H, W, 3]`, prompts and scores below `folder`/samples.

    The scores file is written last: where it is, the picture is whole.
    """
    lengths = {"images": len(images), "prompts": len(prompts)}
    lengths |= {f"scores of {name}": len(values) for name, values in scores.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"one entry per image is needed, found {lengths}")
    samples = Path(folder) / SAMPLES
    samples.mkdir(parents=True, exist_ok=True)
    columns = min(columns, len(images))
    picture = samples / f"iteration-{iteration:06d}.png"
    save_grid(picture, images, columns)
    sidecar = {
        "iteration": iteration,
        "prompts": list(prompts),
        "scores": {name: list(values) for name, values in scores.items()},
        "tile": list(images.shape[1:3]),
        "columns": columns,
    }
    text = json.dumps(_plain(sidecar), allow_nan=False)
    write_atomic(picture.with_suffix(".json"), text.encode() + b"\n")
    return picture


def save_sources(folder: str | Path, sources: "np.ndarray", *, columns: int = 8) -> None:
    """Write the source images `[count, n, H, W, 3]` of the samples' prompts, in the samples' order:
    a grid as theirs, whose tiles show the `n` of a prompt side by side."""
    count, each, height, width, _ = sources.shape
    columns = min(columns, count)
    picture = Path(folder) / SAMPLES / f"{SOURCES}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    tiles = sources.swapaxes(1, 2).reshape(count, height, each * width, 3)
    save_grid(picture, tiles, columns)
    about = {"tile": [height, each * width], "columns": columns, "per_image": each}
    write_atomic(picture.with_suffix(".json"), json.dumps(about).encode() + b"\n")


def sources_per_prompt(folder: Path) -> int:
    """How many images each prompt of a run changes, by its evaluations."""
    about = folder / SAMPLES / f"{SOURCES}.json"
    return parse(about.read_bytes())["per_image"] if about.exists() else 0


def _lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    """Each line as written, without its newline, and the row it holds."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        unfinished = number == len(lines)  # no newline after it: empty, torn, or just complete
        if unfinished and not line:
            return
        try:
            row = parse(line)
            if not isinstance(row, dict):
                raise ValueError(f"a row is a JSON object, not {type(row).__name__}")
        except ValueError as cause:
            if unfinished:
                return
            raise RunFolderError(
                f"{path}, line {number} is not a row ({cause}): {line[:80]!r}. "
                "Remove that line, or restore the file."
            ) from cause
        yield line, row


def _plain(value: Any) -> Any:
    """Plain JSON types: numpy scalars become numbers, NaN and infinities null, tuples lists."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"a row holds numbers, text, lists and mappings, not {type(value).__name__}")


class _TensorBoard:
    """Scalars as event files, by the tensorboard package alone: no torch, no tensorflow.

    protobuf makes its message classes at import, so the type checker cannot see them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: Any = None

    def add(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step, summary=Summary(value=points))

    def forget_from(self, step: int) -> None:
        """Make readers drop what earlier event files hold from `step` on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        if self._folder.exists():
            self._write(step, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        if self._open:
            self._open.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._open is None:
            self._open = EventFileWriter(str(self._folder))
        self._open.add_event(Event(wall_time=time.time(), step=step, **content))
        self._open.flush()


def _start_wandb(project: str, folder: Path) -> Any:
    """Start or continue the run whose id the folder keeps."""
    try:
        wandb: ModuleType = importlib.import_module("wandb")
    except ImportError as cause:
        raise SpecError(
            f"wandb: {project!r} asks for Weights & Biases, which is not installed. "
            "Install it with `pip install wandb`, or set wandb to null."
        ) from cause
    kept = folder / "wandb-run-id.txt"
    known = kept.read_text().strip() if kept.exists() else None
    run = wandb.init(project=project, name=folder.name, dir=str(folder), id=known, resume="allow")
    write_atomic(kept, f"{run.id}\n".encode())
    # The x axis is ours: wandb's own step refuses to go back, as a resumed run has to.
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    return run
