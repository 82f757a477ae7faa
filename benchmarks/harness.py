"""What the programs here share: the driver on a cluster of its own, processes beside it, tables."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil

TURN = 4  # iterations, where they take turns with something else
WARM_UP = 1  # turns


class Silent:
    """A display that shows notes alone."""

    def stage(self, stage: str) -> None: ...
    def iteration(self, row: dict[str, Any], seconds: float) -> None: ...
    def evaluation(self, iteration: int, rewards: dict[str, float | None]) -> None: ...
    def note(self, message: str) -> None:
        print(f"  ({message})", file=sys.stderr)


@asynccontextmanager
async def trainer(settings: Sequence[str], *simulated: type) -> AsyncIterator[Any]:
    """The real driver of ``tiny-ocr`` with ``settings``, its actors up, on a cluster of its own.

    ``simulated`` are the classes in place of rollout workers and learner ranks.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ["GRPC_VERBOSITY"] = "NONE"  # else a line for every process that is started
    from flowgrpo_ray.cluster.session import ray_session
    from flowgrpo_ray.run.folder import RunFolder
    from flowgrpo_ray.run.tracking import RunRecorder, StartClock
    from flowgrpo_ray.spec.file import load_spec
    from flowgrpo_ray.spec.prompts import load_prompt_sets

    spec = load_spec("tiny-ocr", list(settings))
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder.claim(Path(root), spec, resume=False)
        recorder = RunRecorder(folder.path)
        with ray_session(spec, folder.logs):
            from flowgrpo_ray.cluster.crew import Kinds
            from flowgrpo_ray.cluster.driver import Trainer

            clock = StartClock(time.perf_counter())
            sets = load_prompt_sets(spec)
            made = Trainer(spec, *sets, folder, recorder, Silent(), clock, Kinds(*simulated))
            await made.start()
            try:
                yield made
            finally:
                made.drop_ahead()


async def turn(trainer: Any) -> float:
    """Wall seconds of an iteration: the mean of the next ``TURN``."""
    began = time.perf_counter()
    for _ in range(TURN):
        await trainer.iterate(trainer.journal.progress.iteration + 1)
    return (time.perf_counter() - began) / TURN


def quiet() -> None:
    """Before diffusers or transformers are imported: no advice and no progress bars."""
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


@contextmanager
def process(serve: Callable[..., None], *args: Any) -> Iterator[tuple[Connection, int]]:
    """``serve(connection, *args)`` in a process of its own, which says when it is ready; its id."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    made = context.Process(target=serve, args=(there, *args), daemon=True)
    made.start()
    there.close()  # so that its death ends our waiting
    try:
        assert here.recv() == "ready"
        yield here, made.pid or 0
    finally:
        made.terminate()
        made.join()


@contextmanager
def frozen(*running: int) -> Iterator[None]:
    """Within it, every process below this one stands still, but those with these ids.

    A cluster that waits still takes a few percent of the cores, and what it does ahead goes on;
    neither may be at the cost of what it is compared with.
    """
    below = [p for p in psutil.Process().children(recursive=True) if p.pid not in running]
    for each in below:
        with suppress(psutil.NoSuchProcess):
            each.suspend()
    try:
        yield
    finally:
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.resume()


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Median and range."""
    found = sorted(values)
    low, middle, high = (f"{x:.{digits}f}" for x in (found[0], median(found), found[-1]))
    return f"{middle} ({low}-{high})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows in columns: the first to the left, all others to the right."""
    lines = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("   ".join((first.ljust(widths[0]), *cells)))


def save(file: Path | None, data: dict[str, Any]) -> None:
    """Writes what was measured, and on what, if a file was asked for."""
    if file:
        packages = ("torch", "ray", "diffusers", "onnxruntime", "numpy")
        where = {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        }
        file.write_text(json.dumps({"machine": where, **data}, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
