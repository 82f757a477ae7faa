"""Scoring with several rewards at once, through Serve handles, under one failure policy.

A call has a deadline; one that fails or is not answered in time is repeated on another replica
after a pause. What still fails is NaN for every image of the call, together with the reason: the
caller drops what needs that score, and counts it. A score is never made up.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from ray import ObjectRef, serve
from ray.exceptions import ObjectLostError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.run.ledger import Ledger
from flowgrpo_ray.serving.types import Answer, Metadata, Sources, app_name


@dataclass(frozen=True)
class Patience:
    """How long one reward is waited for, and how often it is asked."""

    deadline_s: float = 60.0  # of one attempt
    retries: int = 2  # further attempts after a failed one
    backoff_s: float = 1.0  # before the first of these; each next waits twice as long


@dataclass
class RewardStats:
    """What a client saw of one reward since the last look."""

    calls: int = 0  # that were answered
    images: int = 0  # of these
    seconds: float = 0.0  # of these calls, from the call to the answer, retries included
    busy_s: float = 0.0  # that the reward worked on them, summed over replicas
    failures: int = 0  # attempts that failed or were not answered in time
    replicas: set[str] = field(default_factory=set)  # that answered

    def as_json(self) -> dict[str, int | float]:
        """For timings.jsonl: the replicas as their number."""
        return {**vars(self), "replicas": len(self.replicas)}


@dataclass
class Traffic:
    """What a client saw of one reward since it began."""

    queue: int = 0  # calls that wait for their answer
    calls: int = 0  # that were answered
    seconds: float = 0.0  # of these, from the call to the answer, retries included
    failures: int = 0  # attempts that failed or were not answered in time

    def answered(self, images: int, seconds: float) -> None:
        self.calls += 1
        self.seconds += seconds

    def failed(self) -> None:
        self.failures += 1


@dataclass(frozen=True)
class Scored:
    """Scores per reward, float32 [b], and why those of a reward are missing."""

    rewards: Mapping[str, np.ndarray]
    failures: Mapping[str, str]


class RewardClient:
    """Calls the deployments of these rewards; for asyncio."""

    def __init__(
        self,
        rewards: Mapping[str, Patience],
        traffic: Mapping[str, Traffic] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._patience = dict(rewards)
        self._ledger = ledger or Ledger({})
        self._traffic = traffic or {name: Traffic() for name in rewards}
        self._handles: dict[str, DeploymentHandle] = {}
        self._stats = {name: RewardStats() for name in rewards}
        self.heard: dict[tuple[str, str], Mapping[str, str]] = {}  # by reward and replica
        for name in rewards:
            try:
                self._handles[name] = serve.get_app_handle(app_name(name))
            except RayServeException as error:
                raise RewardError(f"{app_name(name)}: {error}") from error

    async def score(
        self,
        images: ObjectRef | np.ndarray,
        prompts: Sequence[str],
        metadata: Metadata,
    ) -> Scored:
        """Every reward's scores of images uint8 [b, H, W, 3], or of what `images` refers to."""
        calls = [self.ask(name, [images], prompts, metadata) for name in self._handles]
        rewards: dict[str, np.ndarray] = {}
        failures: dict[str, str] = {}
        for name, outcome in zip(self._handles, await asyncio.gather(*calls), strict=True):
            if isinstance(outcome, str):
                failures[name] = outcome
                rewards[name] = np.full(len(prompts), np.nan, np.float32)
            else:
                rewards[name] = outcome
        return Scored(rewards, failures)

    def take_stats(self) -> dict[str, RewardStats]:
        """What was seen of each reward since this was last asked."""
        taken = self._stats
        self._stats = {name: RewardStats() for name in taken}
        return taken

    async def ask(
        self,
        name: str,
        images: Sequence[ObjectRef | np.ndarray],
        prompts: Sequence[str],
        metadata: Metadata,
        shown: Sequence[int] | None = None,
        sources: Sources | None = None,
    ) -> np.ndarray | str:
        """One reward's scores, float32 [b], infinite ones as NaN; or why there are none.

        ``images`` are parts, uint8 [., H, W, 3], of which one after the other all images are
        scored, or those at the places ``shown``. ``ObjectLostError`` if they went away with their
        machine: no replica can help that.
        """
        self._traffic[name].queue += 1
        try:
            return await self._ask(name, images, prompts, metadata, shown, sources)
        finally:
            self._traffic[name].queue -= 1

    async def _ask(
        self,
        name: str,
        images: Sequence[ObjectRef | np.ndarray],
        prompts: Sequence[str],
        metadata: Metadata,
        shown: Sequence[int] | None,
        sources: Sources | None,
    ) -> np.ndarray | str:
        patience, call, began = self._patience[name], uuid.uuid4().hex, time.perf_counter()
        last, parts, more = "", [*images], {}
        if sources:
            parts, more = [*images, *sources.arrays], {"sources": list(sources.of)}
        for attempt in range(1 + patience.retries):
            if attempt:
                await asyncio.sleep(patience.backoff_s * 2 ** (attempt - 1))
            response = self._handles[name].answer.remote(
                list(prompts), list(metadata), shown, *parts, call=call, **more
            )
            stats = self._stats[name]
            token = self._ledger.start(app_name(name), "", "score")
            try:
                answer: Answer = await asyncio.wait_for(response, patience.deadline_s)
            except TimeoutError:
                response.cancel()
                last = f"no answer within {patience.deadline_s:g} s"
            except (RayError, RayServeException) as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, ObjectLostError):
                    raise cause from error
                last = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
            else:
                seconds = time.perf_counter() - began
                stats.calls += 1
                stats.images += len(prompts)
                stats.seconds += seconds
                self._traffic[name].answered(len(prompts), seconds)
                stats.busy_s += answer.busy_s
                stats.replicas.add(answer.replica)
                self.heard[name, answer.replica] = answer.heard
                self._ledger.end(token, answer.busy_s)
                return np.where(np.isfinite(answer.scores), answer.scores, np.float32(np.nan))
            finally:
                self._ledger.drop(token)  # where it was not answered
            stats.failures += 1
            self._traffic[name].failed()
        return (
            f"{app_name(name)} failed {1 + patience.retries} times, last with {last}; "
            f"first prompt: {prompts[0]!r}"
        )
