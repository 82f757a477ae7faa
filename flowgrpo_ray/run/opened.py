"""A run folder as a Python object, for notebooks and scripts: its spec, rows, samples, models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import Images
from flowgrpo_ray.run.checkpoint import best_checkpoint, checkpoint_iteration, list_checkpoints
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.tracking import METRICS, SAMPLES, SOURCES, SUMMARY, TIMINGS, read_rows
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    from flowgrpo_ray.policies.base import Policy

Row = dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """The first held-out prompts of one evaluation, and what was drawn for them.

    `images` are uint8 `[n, H, W, 3]`; `scores` has a list per reward, with None for no score.
    `sources` are those that the prompts changed, `[n, k, H, W, 3]`; None in a run from text alone.
    """

    iteration: int
    prompts: Sequence[str]
    images: Images
    scores: Mapping[str, Sequence[float | None]]
    sources: Images | None = None


class Run:
    """A run, finished or still going; everything is read from its folder when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        """`RunFolderError` if `path` is no run folder."""
        self._folder = RunFolder.existing(Path(path))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @cached_property
    def spec(self) -> TrainingSpec:
        """The resolved training spec."""
        return self._folder.read_spec()

    @property
    def summary(self) -> Row | None:
        """`summary.json`: held-out means before and after, and so on; None while the run goes."""
        file = self.path / SUMMARY
        return parse(file.read_bytes()) if file.exists() else None

    def rows(self, kind: Literal["train", "eval"] | None = None) -> list[Row]:
        """The rows of `metrics.jsonl`, of one kind or all, as nested dictionaries."""
        return self._rows(METRICS, kind)

    def metrics(self, kind: Literal["train", "eval"] | None = None) -> Any:
        """The rows as a pandas DataFrame with a column per field, as `reward.mean`; where pandas is
        not installed, as they are."""
        return _framed(self.rows(kind))

    def timings(self, kind: Literal["start", "train", "eval"] | None = None) -> Any:
        """The rows of `timings.jsonl`, as those of `metrics`."""
        return _framed(self._rows(TIMINGS, kind))

    @property
    def evaluations(self) -> list[int]:
        """The iterations whose samples are there, in order."""
        files = (self.path / SAMPLES).glob("iteration-*.json")
        return sorted(int(file.stem.removeprefix("iteration-")) for file in files)

    def samples(self, iteration: int | None = None) -> Samples:
        """What the evaluation after `iteration` drew; by default the last one."""
        there = self.evaluations
        iteration = iteration if iteration is not None else there[-1] if there else None
        if iteration not in there:
            known = ", ".join(map(str, there)) or "none yet"
            raise RunFolderError(
                f"{self.path} has no samples of iteration {iteration}; there are: {known}"
            )
        about, images = _grid(self.path / SAMPLES / f"iteration-{iteration:06d}.png")
        count = len(about["prompts"])
        sources = self._sources(count)
        return Samples(iteration, about["prompts"], images[:count], about["scores"], sources)

    def _sources(self, count: int) -> Images | None:
        """Of the first prompts, if they name any."""
        picture = self.path / SAMPLES / f"{SOURCES}.png"
        if not picture.exists():
            return None
        about, tiles = _grid(picture)
        (height, width), each = about["tile"], about["per_image"]
        return tiles[:count].reshape(-1, height, each, width // each, 3).swapaxes(1, 2)

    @property
    def checkpoints(self) -> list[int]:
        """The iterations whose checkpoints are kept, in order."""
        return [checkpoint_iteration(path) for path in list_checkpoints(self._folder.checkpoints)]

    @property
    def best(self) -> Row | None:
        """The checkpoint that is kept by `checkpoint.best`: `reward`, `iteration` and `value`."""
        return best_checkpoint(self._folder.checkpoints)

    def policy(
        self,
        iteration: int | Literal["best"] | None = None,
        weights: Literal["ema", "last"] = "ema",
    ) -> Policy:
        """The trained model in this process: of a checkpoint's iteration, the `"best"` one (by
        `checkpoint.best`), or the newest."""
        from flowgrpo_ray.run.inference import load_trained

        return load_trained(self.spec, self._folder, weights, iteration)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        seed: int = 0,
        iteration: int | Literal["best"] | None = None,
        weights: Literal["ema", "last"] = "ema",
        images: Sequence[str | Path] = (),
    ) -> Images:
        """One image per prompt, uint8 `[n, H, W, 3]`, by the solver of the evaluations; `images`
        are files that each prompt changes."""
        from flowgrpo_ray.run.inference import generate
        from flowgrpo_ray.spec.sources import requests_for

        evaluation = self.spec.evaluation
        requests = requests_for(self.spec, prompts, images)
        policy = self.policy(iteration, weights)
        steps = steps or evaluation.steps
        return generate(policy, self.spec, requests, steps, seed, evaluation.micro_batch)

    def _rows(self, name: str, kind: str | None) -> list[Row]:
        file = self.path / name
        rows = read_rows(file) if file.exists() else []
        return [row for row in rows if kind in (None, row["kind"])]


def _grid(picture: Path) -> tuple[Row, Images]:
    """What the file beside a grid says, and its tiles `[n, H, W, 3]`; the last may be empty."""
    from PIL import Image

    about = parse(picture.with_suffix(".json").read_bytes())
    with Image.open(picture, formats=["PNG"]) as opened:
        grid = np.array(opened.convert("RGB"))
    (height, width), columns = about["tile"], about["columns"]
    tiles = grid.reshape(-1, height, columns, width, 3).swapaxes(1, 2)
    return about, tiles.reshape(-1, height, width, 3)


def _framed(rows: list[Row]) -> Any:
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return rows
    return pandas.json_normalize(rows)
