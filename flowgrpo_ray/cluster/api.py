"""Training from Python, in a script or a notebook."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from flowgrpo_ray.cluster import run as running
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.common.paths import runs_root
from flowgrpo_ray.run.opened import Run
from flowgrpo_ray.run.tracking import METRICS
from flowgrpo_ray.spec.file import load_spec, overridden, validate
from flowgrpo_ray.spec.training import TrainingSpec
from flowgrpo_ray.view.console import shown

Row = Mapping[str, Any]
T = TypeVar("T")
POLL_S = 0.1  # in which Ctrl-C reaches a run in a thread


def train(
    spec: TrainingSpec | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    runs: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_iteration: Callable[[Row], object] | None = None,
    on_evaluation: Callable[[Row], object] | None = None,
    quiet: bool = False,
) -> Run:
    """Train a model, as `flowgrpo-ray train` does, and return the run.

    `spec` is a spec, its keys as a mapping, a recipe's name or a YAML file; `overrides` are those
    of `--set`, as `"iterations=3"`. The run's folder is made below `runs` (default: FLOWGRPO_RUNS,
    else `runs`); with `resume` a run that is there goes on, with `overwrite` it is deleted first.
    It joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine and ends it.

    `on_iteration` and `on_evaluation` are called in this process with each row of `metrics.jsonl`
    as soon as it is written. One that returns False ends the run after the iteration at hand, with
    a checkpoint; what it raises ends the run as an error.

    Ctrl-C (in a notebook: interrupt the kernel) once finishes the iteration and saves, twice stops
    at once with KeyboardInterrupt.
    """
    resolved = _resolved(spec, overrides)
    interrupts: list[Callable[[], None]] = []
    with shown(resolved, quiet=quiet) as display:
        called = _Calling(display, on_iteration, on_evaluation, interrupts)
        outcome = _beside_any_loop(
            lambda: running.train(
                resolved,
                runs_root(Path(runs) if runs is not None else None),
                resume=resume,
                overwrite=overwrite,
                display=called,
                seen=called.seen,
                begun=interrupts.append,
            ),
            interrupts,
        )
    return Run(outcome.folder)


def _resolved(
    spec: TrainingSpec | Mapping[str, Any] | str | Path, overrides: Sequence[str]
) -> TrainingSpec:
    if isinstance(spec, str | Path):
        return load_spec(str(spec), overrides)
    data = spec.model_dump(mode="json") if isinstance(spec, TrainingSpec) else dict(spec)
    return validate(overridden(data, overrides), "spec")


class _Calling:
    """A display that calls the user's functions as well."""

    def __init__(
        self,
        display: Display,
        on_iteration: Callable[[Row], object] | None,
        on_evaluation: Callable[[Row], object] | None,
        interrupts: Sequence[Callable[[], None]],
    ) -> None:
        self.stage, self.note = display.stage, display.note
        self.iteration, self.evaluation = display.iteration, display.evaluation
        self._calls = {"train": on_iteration, "eval": on_evaluation}
        self._interrupts, self._stopped = interrupts, False

    def seen(self, file: str, row: Row) -> None:
        """A row was written to a file of the run folder."""
        call = self._calls.get(row["kind"]) if file == METRICS else None
        if call and call(dict(row)) is False and not self._stopped:
            self._stopped = True
            self._interrupts[0]()


def _beside_any_loop(work: Callable[[], T], interrupts: Sequence[Callable[[], None]]) -> T:
    """What `work` gives, which runs an event loop: where one runs already, as in a notebook, in a
    thread, to which Ctrl-C is handed on as soon as `interrupts` holds its way in."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    pressed = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set()) if main else None
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="train") as pool:
            done = pool.submit(work)
            while not wait([done], POLL_S).done:
                if interrupts and pressed.is_set():
                    pressed.clear()
                    interrupts[0]()
            return done.result()
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
