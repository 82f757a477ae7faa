"""What a run writes down: one JSON line per row, and pictures; trackers are told both.

`metrics.jsonl` holds what the seed decides, so a resumed run writes the same bytes as one that
never stopped; `timings.jsonl` holds what the clock says. Iterations count from 1: row N is written
before the checkpoint of iteration N, and evaluation 0 comes before any training.
"""

import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flowgrpo_ray.common.errors import RunFolderError, TrackingError
from flowgrpo_ray.common.files import write_atomic
from flowgrpo_ray.common.strict_json import parse

if TYPE_CHECKING:
    import numpy as np

    from flowgrpo_ray.run.trackers.base import Tracker

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
SUMMARY = "summary.json"
SAMPLES = "samples"
SOURCES = "sources"  # beside the samples, of prompts that change images
PER_PROMPT = "per_prompt"  # scores in the row of an evaluation: what the watch compares

Row = dict[str, Any]
Mirror = Callable[[str, Row], None]  # of a file's name and a row


class RunRecorder:
    """Appends rows to a run folder. Holds no file open: a row is on disk when `log` returns.

    `trackers` are told what was written, and ended on leaving; `tell` is told when one fails.
    """

    def __init__(
        self,
        folder: str | Path,
        trackers: "Sequence[Tracker]" = (),
        tell: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._trackers, self._tell = trackers, tell
        self._failing: set[Tracker] = set()
        self.mirrors: list[Mirror] = []  # see each row as well, once it is on disk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell_trackers(lambda tracker: tracker.finish(failed=error is not None))

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
        self._tell_trackers(lambda tracker: tracker.rewind(iteration))

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

    def log_samples(
        self,
        iteration: int,
        images: "np.ndarray",
        prompts: Sequence[str],
        scores: "Mapping[str, np.ndarray]",
        tracked: int,
    ) -> None:
        """Write an evaluation's samples (`save_samples`); show the first `tracked` to trackers."""
        save_samples(self.folder, iteration, images, prompts, scores)
        count = min(tracked, len(images)) if self._trackers else 0
        if not count:
            return
        from flowgrpo_ray.run.trackers.base import Picture

        shown = [
            Picture(images[i], prompts[i], {name: _plain(of[i]) for name, of in scores.items()})
            for i in range(count)
        ]
        self._tell_trackers(lambda tracker: tracker.pictures(shown, iteration))

    def _tell_trackers(self, say: "Callable[[Tracker], None]") -> None:
        """To each; one that fails is noted when it begins to."""
        for tracker in self._trackers:
            try:
                say(tracker)
            except TrackingError as error:
                if tracker not in self._failing:
                    self._tell(f"{error}. What it misses is in {self.folder}")
                self._failing.add(tracker)
            else:
                self._failing.discard(tracker)

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
        self._tell_trackers(lambda tracker: tracker.log(values, plain["iteration"]))


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
    """Flatten a row to `train/reward/mean`-like names, without spaces; a list of numbers becomes
    its mean."""
    for key, value in row.items():
        if key in ("kind", "iteration", "window", "digest", "per_step", PER_PROMPT):
            continue
        name = f"{prefix}/{key}".replace(" ", "_")
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


def of_sets(row: Mapping[str, Any]) -> dict[str, Row]:
    """Rewards of an evaluation's row for each prompt set, as ``ocr of signs``, where they score
    several: as they stand under ``rewards`` for all sets together."""
    sets: Mapping[str, Mapping[str, Row]] = row.get("sets", {})
    scoring = Counter(reward for rewards in sets.values() for reward in rewards)
    return {
        f"{reward} of {name}": values
        for name, rewards in sets.items()
        for reward, values in rewards.items()
        if scoring[reward] > 1
    }
