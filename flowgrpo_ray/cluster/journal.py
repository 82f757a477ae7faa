"""What is written, counted and shown of a run while it trains.

The loop hands over each finished iteration and evaluation; from them come the rows of
metrics.jsonl and timings.jsonl, the watch's alarms, the ledger's advice, the progress that a
checkpoint keeps, and what the person at the console reads. Only ``progress`` and ``complete`` go
back to the loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from flowgrpo_ray.algorithm.objectives import Tie
from flowgrpo_ray.cluster.crew import Crew
from flowgrpo_ray.cluster.live import Display
from flowgrpo_ray.cluster.stages import StageReader
from flowgrpo_ray.cluster.stream import Stream
from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.types import MicrobatchStats, StepStats, WeightsTicket
from flowgrpo_ray.run import best
from flowgrpo_ray.run.checkpoint import Progress, checkpoint_iteration, list_checkpoints
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.metrics import Scores, eval_row, means_by_set, train_row
from flowgrpo_ray.run.scoring import sources_of
from flowgrpo_ray.run.tracking import RunRecorder, StartClock, save_sources
from flowgrpo_ray.run.watch import Divergence, Watch, describe, export_of_best
from flowgrpo_ray.spec.prompts import Prompt
from flowgrpo_ray.spec.training import TrainingSpec


@dataclass(frozen=True)
class Iterated:
    """A finished iteration: the weights it published, its units, and each update's statistics."""

    iteration: int
    ticket: WeightsTicket
    stream: Stream
    updates: Sequence[tuple[list[MicrobatchStats], StepStats]]


class Journal:
    """Of one run; ``digest`` is that of its prompts, ``resumed`` the progress that it continues."""

    def __init__(
        self,
        spec: TrainingSpec,
        digest: str,
        folder: RunFolder,
        recorder: RunRecorder,
        display: Display,
        clock: StartClock,
        crew: Crew,
        resumed: Progress | None,
    ) -> None:
        self._spec, self._folder, self._recorder = spec, folder, recorder
        self._display, self._clock, self._crew = display, clock, crew
        self._begun = Progress(
            iteration=0,
            images=0,
            seconds=0.0,
            failed_groups=0,
            spec_identity=spec.identity(),
            prompts_digest=digest,
        )
        self._stand_at(resumed or self._begun)
        self._earlier_seconds = self.progress.seconds  # of the attempts that this one continues
        self._sources_kept = False  # of the evaluations, which all show the same prompts
        self._stages = StageReader(spec)
        self.starting = True  # until the first iteration
        self._furthest = 0  # iteration
        self._began = 0.0  # the iteration or evaluation at hand

    # --- where the run stands

    @property
    def complete(self) -> bool:
        """Whether the last iteration is done, or the watch ended the run."""
        return self.progress.iteration >= self._spec.iterations or self.diverged is not None

    @property
    def owes_evaluation(self) -> bool:
        """Whether the iteration is one of those to evaluate after, and has not been evaluated: at
        the beginning, and where an interrupt met it and the run goes on."""
        done = self.progress.iteration
        return done % self._spec.evaluation.every == 0 and self._evaluated != done

    def started(self, phase: str) -> None:
        """A phase of the start is over."""
        self._clock.lap(phase)

    def begin(self) -> None:
        """The first iteration is next; a run that went back was started before."""
        if self.starting:
            warnings = {"warnings": self._crew.warnings} if self._crew.warnings else {}
            self._recorder.log_timing(self._clock.row() | warnings)
        self.starting = False

    def go_back(self, progress: Progress | None) -> None:
        """Forget what came after a checkpoint, or after the start."""
        at = progress.iteration if progress else None
        self._recorder.rewind(at, self._spec.evaluation.every)
        self._stand_at(progress or self._begun)
        done = self.progress.iteration
        self._display.note(f"going on after iteration {done}, the last saved one")

    def now(self) -> Progress:
        """The progress, with the seconds that it took, all attempts together."""
        seconds = self._earlier_seconds + self._clock.elapsed()
        self.progress = replace(self.progress, seconds=seconds)
        return self.progress

    def _stand_at(self, progress: Progress) -> None:
        """Begin at that progress, with what the rows that there are say: the best evaluation that
        is saved, the last one, and what the watch saw."""
        rows = self._recorder.metrics()
        saved = [checkpoint_iteration(path) for path in list_checkpoints(self._folder.checkpoints)]
        self.progress = best.continued(self._spec, progress, rows, saved)
        evaluated = (row["iteration"] for row in rows if row["kind"] == "eval")
        self._evaluated = max(evaluated, default=None)
        self.watch = Watch(self._spec)
        self.watch.replay(rows)
        self.diverged: Divergence | None = None  # why the watch ended the run

    # --- iterations

    def begin_iteration(self) -> None:
        self._began = time.perf_counter()
        self._crew.rewards.take_stats()  # of an evaluation before it
        self._crew.ledger.begin()

    def iterated(self, done: Iterated) -> None:
        """An iteration has ended; ``RewardError`` if too many groups could not be scored."""
        seconds, accounts = time.perf_counter() - self._began, self._crew.ledger.cut()
        results, stream = done.stream.results, done.stream
        tie = self.tie and self.tie.weight
        row = train_row(
            self._spec, stream.plan, done.ticket, stream.ticket, results, done.updates, tie
        )
        self._follow(row)
        self._recorder.log(row)
        speed = row["images"] / seconds
        where, advice = self._stages.read(accounts, seconds, self._crew.rewards.take_stats())
        self._record_time("train", done.iteration, seconds, images_per_second=speed, **where)
        if advice:
            self._display.note(advice)
        scores = [result.scores for result in results]
        self._advance(done.iteration, row, scores)
        self._tell_missing(row, scores)
        self._display.iteration(row, seconds)

    @property
    def tie(self) -> Tie | None:
        """Of the next iteration to the untrained model, where its weight follows a reward."""
        objective = self._spec.objective
        if objective.adapts is None:
            return None
        begun = Tie.of(objective.penalties[objective.tie])
        return Tie(**self.progress.tie) if self.progress.tie else begun

    def _follow(self, row: dict[str, Any]) -> None:
        """Set the tie of the next iteration; add to ``row`` that of this one, and what was seen."""
        objective, tie = self._spec.objective, self.tie
        if objective.adapts is None or tie is None:
            return
        found = row["rewards"][objective.adapts.reward]
        then = objective.adapts.follow(tie, found["mean"], found["std"])
        self.progress = replace(self.progress, tie=asdict(then))
        row["tie"] = then.row(tie.weight)

    def _look_for_divergence(self, row: dict[str, Any]) -> None:
        """Add the watch's readings to ``row``; say when one diverges, and stop if the spec does."""
        known = {name for name, reading in self.watch.readings.items() if reading.diverging}
        readings = self.watch.see(row)
        if readings:
            row["watch"] = {name: reading.as_json() for name, reading in readings.items()}
        for name, reading in readings.items():
            if not reading.diverging:
                continue
            found = Divergence(describe(name, reading), export_of_best(self._folder.path, reading))
            if name not in known:
                self._display.note(str(found))
            if self._spec.watch.action == "stop":
                self.diverged = found

    def _advance(self, iteration: int, row: dict[str, Any], scores: Sequence[Scores]) -> None:
        if iteration > self._furthest:
            self._furthest = iteration
            self._crew.losses.advanced()
        failed = self.progress.failed_groups + row["groups"]["dropped"]
        self.progress = replace(
            self.progress,
            iteration=iteration,
            images=self.progress.images + row["images"],
            failed_groups=failed,
        )
        allowed = self._spec.cluster.max_failed_groups
        if failed > allowed:
            weights = self._spec.weights
            why = [text for s in scores for name, text in s.failures.items() if weights[name]]
            silent = ", ".join(f"{name} {count}" for name, count in row["unscored"].items())
            raise RewardError(
                f"{failed} groups could not be scored and were left out, more than "
                f"cluster.max_failed_groups = {allowed}. "
                + (why[-1] if why else f"Images without a score in the last iteration: {silent}")
            )

    def _tell_missing(self, row: Mapping[str, Any], scores: Sequence[Scores]) -> None:
        """Note every reward whose deployment gave up."""
        for name, why in {n: why for unit in scores for n, why in unit.failures.items()}.items():
            self._display.note(f"{name}: {row['unscored'][name]} images without a score: {why}")

    # --- evaluations

    def begin_evaluation(self) -> None:
        self._display.stage("evaluating")
        self._began = time.perf_counter()

    def evaluated(
        self, scores: Sequence[Scores], images: np.ndarray, prompts: Sequence[Prompt]
    ) -> None:
        """The held-out ``prompts`` are scored; ``images [n, H, W, 3]`` are of the first of them."""
        iteration = self.progress.iteration
        row = eval_row(self._spec, iteration, scores, prompts)
        self._look_for_divergence(row)
        self._recorder.log(row)
        self._evaluated = iteration
        self._tell_missing(row, scores)
        means = {
            name: None if np.isnan(values["mean"]) else round(values["mean"], 6)
            for name, values in row["rewards"].items()
        }
        if iteration == 0:
            self.progress = replace(self.progress, eval_before=means)
        progress = replace(self.progress, eval_last=means)
        self.progress = best.with_evaluation(self._spec, progress, row)
        shown = len(images)
        texts = [prompt.text for prompt in prompts[:shown]]
        of_images = {
            name: np.concatenate([score.rewards[name] for score in scores])[:shown]
            for name in self._spec.rewards
        }
        if not self._sources_kept:
            sources = sources_of(prompts[:shown], self._spec.sampling.size)
            if sources is not None:
                save_sources(self._folder.path, sources)
            self._sources_kept = True
        tracked = self._spec.tracking.pictures
        self._recorder.log_samples(iteration, images, texts, of_images, tracked)
        self._record_time("eval", iteration, time.perf_counter() - self._began)
        self._display.evaluation(iteration, means | means_by_set(row))

    def _record_time(self, kind: str, iteration: int, seconds: float, **more: Any) -> None:
        row = {"kind": kind, "iteration": iteration, "seconds": seconds, **more}
        self._recorder.log_timing(row)
