"""A training run from start to end: folder, Ray, trainer, signals, summary and report."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.cluster import machine
from flowgrpo_ray.cluster.interrupts import Interrupts
from flowgrpo_ray.cluster.live import Display, Live
from flowgrpo_ray.cluster.session import joined, probe, ray_session
from flowgrpo_ray.common.errors import RunFolderError
from flowgrpo_ray.estimate.preflight import (
    check_access,
    check_encodings,
    check_environments,
    check_run,
)
from flowgrpo_ray.run import trackers
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.state import read_json
from flowgrpo_ray.run.tracking import SUMMARY, Mirror, RunRecorder, StartClock
from flowgrpo_ray.spec.prompts import Prompt, prompts_digest
from flowgrpo_ray.spec.training import TrainingSpec
from flowgrpo_ray.view.report import write_report

if TYPE_CHECKING:
    from flowgrpo_ray.algorithm.gate import Floor
    from flowgrpo_ray.cluster.driver import Saved, Trainer
    from flowgrpo_ray.run.checkpoint import Progress
    from flowgrpo_ray.run.watch import Divergence


Begun = Callable[[Callable[[], None]], None] | None
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a disk says that takes no more


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, ``summary.json``'s content, whether it was stopped early, and
    what the over-optimization watch said if that stopped it."""

    folder: Path
    summary: dict[str, Any]
    stopped: bool
    diverged: Divergence | None = None


def train(
    spec: TrainingSpec,
    root: Path,
    *,
    resume: bool,
    display: Display,
    started: float | None = None,
    seen: Mirror | None = None,
    begun: Begun = None,
    overwrite: bool = False,
) -> Outcome:
    """Train ``spec`` in ``root/<name>``. SIGINT or SIGTERM once finishes the iteration and
    checkpoints; twice, or before the first iteration, it ends the run (``KeyboardInterrupt``).

    ``started`` is when the command began (``time.perf_counter``), for the start-up phases. ``seen``
    is told each row, and of which file; ``begun``, before anything, the function that does what a
    signal does, from any thread: in one that is not the main thread no signal comes.
    """
    clock = StartClock(time.perf_counter() if started is None else started)
    clock.lap("import")
    with Interrupts() as interrupts:
        if begun:
            begun(interrupts.interrupt)
        probe()
        sets = check_run(spec)
        if not joined():  # the machines of a cluster may have what this one lacks
            check_environments(spec)
            check_access(spec.model)
            check_encodings()
        folder = RunFolder.claim(root, spec, resume=resume, overwrite=overwrite)
        with contextlib.ExitStack() as ending:
            ending.callback(folder.release)
            if resume and (ended := _ended(folder, spec)):
                display.note(
                    f"{folder.path} is finished, with all of its {spec.iterations} iterations; to "
                    f"go on, ask for more: --resume --set iterations={2 * spec.iterations}"
                )
                return ended
            return _trained(spec, folder, sets, resume, display, clock, seen, interrupts)


def _ended(folder: RunFolder, spec: TrainingSpec) -> Outcome | None:
    """How a run ended that has nothing left to do."""
    summary = read_json(folder.path / SUMMARY)
    if summary is None or summary["iterations"] < spec.iterations:
        return None
    return Outcome(folder.path, summary, stopped=False)


def _trained(
    spec: TrainingSpec,
    folder: RunFolder,
    sets: tuple[list[Prompt], list[Prompt]],
    resume: bool,
    display: Display,
    clock: StartClock,
    seen: Mirror | None,
    interrupts: Interrupts,
) -> Outcome:
    """``train`` in a folder of its own, under ``interrupts``."""
    prompts, held_out = sets
    spec = spec.with_linear(folder.read_spec().cluster.cpu_linear)  # what an earlier attempt took
    with contextlib.ExitStack() as ending:
        live = ending.enter_context(Live(folder, spec, display))
        saved = _continued(folder, [*prompts, *held_out]) if resume else None
        followers = trackers.start(spec, folder.path, live.note)
        recorder = ending.enter_context(RunRecorder(folder.path, followers, live.note))
        _go_back(recorder, spec, saved, live)
        if resume and saved is None:
            near = "".join(f"; did you mean --set name={name}?" for name in folder.near()[:1])
            live.note(f"{folder.path} holds no checkpoint: the run begins{near}")
        live.note(f"watch it: flowgrpo-ray monitor {quote(str(folder.path))}")
        live.stage("joining the Ray cluster" if joined() else "starting Ray")
        for note in () if joined() else machine.notes(spec):
            live.note(note)
        interrupts.hold()
        with ray_session(spec, folder.logs):
            interrupts.check()
            clock.lap("ray")
            from flowgrpo_ray.cluster.driver import Trainer

            trainer = Trainer(spec, prompts, held_out, folder, recorder, live, clock, saved=saved)
            del saved  # so that the trainer can free it
            live.follow(trainer)
            if seen:
                recorder.mirrors.append(seen)
            progress = _run(trainer, interrupts)
        summary = _summary(spec, progress, trainer.floors)
        recorder.write_summary(summary)
        write_report(folder.path)
        stopped = progress.iteration < spec.iterations
        return Outcome(folder.path, summary, stopped, trainer.journal.diverged)


def _continued(folder: RunFolder, prompts: Sequence[Prompt]) -> Saved | None:
    """The checkpoint to go on from; ``RunFolderError`` if it is of other prompts."""
    saved = folder.latest()
    if saved and saved[1].prompts_digest != prompts_digest(prompts):
        raise RunFolderError(
            f"{folder.path} was trained on other prompts: prompts.train or prompts.evaluate "
            "has changed since. Restore the files, or choose another name (--set name=...)"
        )
    return saved


def _go_back(
    recorder: RunRecorder, spec: TrainingSpec, saved: Saved | None, display: Display
) -> None:
    """The run's rows, back where the checkpoint was saved."""
    (recorder.folder / SUMMARY).unlink(missing_ok=True)
    recorder.rewind(saved[1].iteration if saved else None, spec.evaluation.every)
    if saved:
        display.note(f"resuming {recorder.folder} after iteration {saved[1].iteration}")


def _run(trainer: Trainer, interrupts: Interrupts) -> Progress:
    """Train; ``RunFolderError`` where the run folder's disk takes no more."""
    from flowgrpo_ray.serving import deploy

    try:
        return asyncio.run(_until_stopped(trainer, interrupts))
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise RunFolderError(
            f"{trainer.folder.path} cannot be written: {error}. The checkpoints in it are whole: "
            "free space on that disk and continue with --resume"
        ) from error
    finally:
        if joined():  # a private cluster ends whole, and sooner
            deploy.remove(trainer.crew.own_rewards)


async def _until_stopped(trainer: Trainer, interrupts: Interrupts) -> Progress:
    """Train; interrupted once a run finishes its iteration, twice, or as long as it starts, it ends
    at once."""
    loop = asyncio.get_running_loop()
    own = threading.current_thread()
    task = asyncio.ensure_future(trainer.train())

    def interrupt() -> None:
        if trainer.stopping or trainer.journal.starting:
            task.cancel()
        else:
            trainer.display.note("stopping after this iteration; once more to stop at once")
            trainer.stop()

    def take() -> None:
        if threading.current_thread() is own:
            interrupt()  # at once: before the next iteration begins
            loop.call_soon_threadsafe(lambda: None)  # wakes it, where a signal met it asleep
        else:
            loop.call_soon_threadsafe(interrupt)

    with interrupts.taken(take):
        try:
            return await task
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _summary(spec: TrainingSpec, progress: Progress, floors: Mapping[int, Floor]) -> dict[str, Any]:
    return {
        "name": spec.name,
        "eval_before": progress.eval_before,
        "eval_after": progress.eval_last,
        "seconds": progress.seconds,
        "iterations": progress.iteration,
        "images": progress.images,
        "failed_groups": progress.failed_groups,
        "best": progress.best,
        "ratio_floor": max((floor.largest for floor in floors.values()), default=None),
        "ratio_noise": {at: floor.as_json() for at, floor in floors.items() if not floor.exact},
        "seed": spec.seed,
        "spec_digest": spec.digest(),
    }
