"""A hub model, and a LoRA, come to every machine of a run before the clock of its start runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from flowgrpo_ray.cluster.actors import awaited
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.common.errors import ClusterError
from flowgrpo_ray.policies.hub import download, fetched_bytes, lora_repository, to_fetch
from flowgrpo_ray.serving.arrivals import start_on
from flowgrpo_ray.spec.sections import ModelSpec
from flowgrpo_ray.spec.training import TrainingSpec

LOOK_S = 1.0  # between two looks at what has come


class Downloader:
    """Of one machine: fetches what is not there yet, and tells how far it is meanwhile."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._work: Future[None] | None = None

    def progress(self) -> tuple[int, int, bool]:
        """Bytes that are there, of how many, and whether that was all.

        The first call begins: what is wrong is not raised in the constructor, whose errors Ray
        wraps beyond recognition.
        """
        if self._work is None:
            self._wanted = to_fetch(self._model)
            self._work = ThreadPoolExecutor(1).submit(self._fetch)
        if done := self._work.done():
            self._work.result()
        there = sum(fetched_bytes(model, files) for model, files in self._wanted)
        return there, sum(sum(files.values()) for _, files in self._wanted), done

    def _fetch(self) -> None:
        for model, files in self._wanted:
            download(model, files)


async def fetch_model(
    spec: TrainingSpec,
    nodes: Sequence[str],
    display: Display,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Have the model of ``spec``, and its LoRA, on these nodes, if they are the hub's.

    However long it takes: ``ClusterError`` if no byte came for ``cluster.ready_timeout_s``.
    """
    if spec.model.folder is not None and lora_repository(spec.model) is None:
        return
    actors = [start_on(n, Downloader, spec.model, environment=environment) for n in nodes]
    try:
        await _all_there(spec, actors, display)
    finally:
        for actor in actors:
            ray.kill(actor)


def _of(there: int, whole: int) -> str:
    unit, size = ("GB", 1e9) if whole >= 1e9 else ("MB", 1e6)
    return f"{there / size:.1f} of {whole / size:.1f} {unit}"


async def _all_there(spec: TrainingSpec, actors: Sequence[Any], display: Display) -> None:
    patience = spec.cluster.ready_timeout_s
    key = "path" if spec.model.folder is None else "lora"
    name = getattr(spec.model, key)
    before, moved = -1, time.monotonic()
    while True:
        answers = await asyncio.gather(*(awaited(actor.progress.remote()) for actor in actors))
        there, whole = max(before, sum(of[0] for of in answers)), sum(of[1] for of in answers)
        if all(done for _, _, done in answers):
            return
        if there != before:
            before, moved = there, time.monotonic()
        elif time.monotonic() - moved > patience:
            raise ClusterError(
                f"model.{key} = {name!r}: {_of(there, whole)} are there, and "
                f"no byte came for cluster.ready_timeout_s = {patience:g} s. What is "
                "there is kept: try again, or give a local folder"
            )
        display.stage(
            f"downloading {name}: {_of(there, whole)}"
            + (f" on {len(actors)} machines" if len(actors) > 1 else "")
        )
        await asyncio.sleep(LOOK_S)
