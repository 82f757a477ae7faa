"""A reward as a Ray Serve deployment: its arguments, its replicas, and the builder of its app.

Each reward is an application of its own, `reward-<name>`, so that each scales alone. `app` builds
it for a Serve config file and for a driver alike.
"""
# Serve reads the annotation of `app` at run time, so annotations are not postponed in this module.

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.gpus import hide_gpus
from flowgrpo_ray.common.heard import heard, listen
from flowgrpo_ray.common.images import decode_rgb, fitted
from flowgrpo_ray.rewards import (
    ask,
    build,
    check_options,
    checked,
    describe,
    is_over_group,
    prompt_check,
)
from flowgrpo_ray.rewards.environments import python_of
from flowgrpo_ray.rewards.golden import Golden, Rankings, check_golden, golden_of, score_golden
from flowgrpo_ray.serving import metric_table as table
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.batches import (
    Call,
    Scored,
    by_size,
    check_sources,
    image_count,
    joined,
    shares,
)
from flowgrpo_ray.serving.exporter import Exporter
from flowgrpo_ray.serving.http import Limits, build_api
from flowgrpo_ray.serving.ray_private import stay_on_loopback
from flowgrpo_ray.serving.tokens import token_of
from flowgrpo_ray.serving.types import Answer, Metadata, ReplicaStats

T = TypeVar("T")
ROUTER: Any = "flowgrpo_ray.serving.router:RetryElsewhere"
CALLS_TAKEN_IN = 256


class RewardReplica:
    """One process that holds a reward.

    The event loop only takes calls in; the reward runs in one thread beside it, so that it is
    never entered twice at a time and health checks are answered while it works.
    """

    def __init__(self, args: RewardServiceArgs) -> None:
        listen()
        stay_on_loopback()
        if not args.gpus:
            hide_gpus()
        self._args = args
        self._token = token_of(args)
        self._check_prompt = prompt_check(args.reward, args.options)
        self._over_group = is_over_group(args.reward)
        self._reward = build(args.reward, args.options)
        self._golden = _golden(args, self._reward)
        self._check_golden()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._working_since: float | None = None
        self._doubtful = False  # something failed since the golden images were last right
        self._golden_job: asyncio.Future[None] | None = None
        self._started = time.monotonic()
        self._calls = self._images = self._failures = self._ongoing = 0
        self._busy_s = 0.0
        self._latencies: deque[float] = deque(maxlen=1000)
        self._last_error = ""
        replica = serve.get_replica_context().replica_id.unique_id
        self._export = Exporter(table.OF_REPLICAS, reward=args.name, replica=replica)
        merge: Any = self._merge  # @serve.batch added two setters
        merge.set_max_batch_size(args.max_batch_images)
        merge.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)

    def __serve_build_asgi_app__(self) -> Any:
        args = self._args
        sizes = args.max_images_per_request, args.max_image_pixels, args.max_body_bytes
        limits = Limits(*sizes, args.background)
        return build_api(args.name, limits, self._check, self.score, self._token)

    def describe(self) -> dict[str, Any]:
        """What is served here: decides whether a run may use this deployment."""
        return self._args.identity

    def stats(self) -> ReplicaStats:
        """What this replica has done; asked of all replicas at once for `rewards status`."""
        return ReplicaStats(
            replica=serve.get_replica_context().replica_id.unique_id,
            pid=os.getpid(),
            environment=self._args.environment,
            calls=self._calls,
            images=self._images,
            failures=self._failures,
            ongoing=self._ongoing,
            seconds=time.monotonic() - self._started,
            busy_s=self._busy_s,
            latencies=tuple(self._latencies),
            last_error=self._last_error,
        )

    async def check_health(self) -> None:
        """Serve asks this every few seconds, and replaces a replica that raises."""
        self._export.set(table.REPLICA_QUEUE, self._ongoing)
        if self._working_since is not None:
            took = time.monotonic() - self._working_since
            if took > self._args.hang_s:
                raise RewardError(f"a batch has run for {took:.0f} s, over hang_s")
            return
        if self._golden_job is not None:
            await self._golden_job  # done, because the reward does not work
            self._golden_job, self._doubtful = None, False
        due = time.monotonic() - self._golden_checked > self._args.golden_every_s
        if due or self._doubtful:
            # Not waited for: it may take longer than Serve waits for this answer.
            self._golden_job = asyncio.ensure_future(self._in_thread(self._check_golden))

    def _check_golden(self) -> None:
        """RewardError if the golden images are not scored as they must be."""
        try:
            check_golden(self._golden, score_golden(self._reward, self._golden))
        except RewardError as error:
            raise RewardError(
                f"reward {self._args.reward!r} loads but does not score as it must: {error}. Look "
                "at its weights and options; `golden` of the deployment names other pictures"
            ) from error
        self._golden_checked = time.monotonic()

    async def answer(
        self,
        prompts: Sequence[str],
        metadata: Metadata,
        shown: Sequence[int] | None,
        *parts: np.ndarray,
        call: str,  # for the router, which has sent it here
        sources: Sequence[int] | None = None,
    ) -> Answer:
        """`score` for `RewardClient`, with what it took: of all images of `parts`, one after the
        other, or of those at the places `shown`. The last of `parts` are source images, of which
        each image has those at its place of `sources`."""
        began = time.monotonic()
        given = None
        if sources is not None:
            count = len(parts) - max(sources) - 1
            parts, given = parts[:count], np.stack([parts[count + place] for place in sources])
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if shown is not None:
            images = images[list(shown)]
        scored = await self._score(Call(images, prompts, metadata, given))
        replica = serve.get_replica_context().replica_id.unique_id
        took = time.monotonic() - began
        return Answer(scored.scores, replica, scored.seconds, took, heard())

    async def score(self, call: Call) -> np.ndarray:
        """Scores, float32 [b], of what `call` asks; ValueError for a bad one."""
        return (await self._score(call)).scores

    async def _score(self, call: Call) -> Scored:
        began = time.monotonic()
        self._ongoing += 1
        try:
            scored = await self._score_parts(call)
        except Exception as error:
            self._failures += 1
            self._export.add(table.REPLICA_FAILURES, 1)
            self._last_error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._ongoing -= 1
        seconds = time.monotonic() - began
        self._calls += 1
        self._images += len(call.images)
        self._latencies.append(seconds)
        self._export.add(table.REPLICA_CALLS, 1)
        self._export.add(table.REPLICA_IMAGES, len(call.images))
        self._export.add(table.REPLICA_SECONDS, seconds)
        self._export.observe(table.REPLICA_LATENCY, seconds)
        return scored

    async def _score_parts(self, call: Call) -> Scored:
        images, prompts, metadata = call.images, call.prompts, call.metadata
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [b, H, W, 3], got {describe(images)}")
        if not len(images) == len(prompts) == len(metadata):
            counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"one prompt and one metadata per image: got {counts}")
        self._check(call)
        size = max(1, len(images)) if self._over_group else self._args.max_batch_images
        scores, seconds = [np.zeros(0, np.float32)], 0.0
        for outcome in await self._outcomes(call.parts(size)):
            if isinstance(outcome, BaseException):
                raise outcome
            scores.append(outcome.scores)
            seconds += outcome.seconds
        return Scored(np.concatenate(scores), seconds)

    async def _outcomes(self, parts: list[Call]) -> list[Scored | BaseException]:
        """Of parts of a call, with those of other calls where images are scored one by one."""
        if self._over_group:
            return await self._run([[part] for part in parts])
        return await asyncio.gather(*[self._merge(part) for part in parts])

    @serve.batch(batch_size_fn=image_count)
    async def _merge(self, calls: list[Call]) -> list[Scored | BaseException]:
        """Scores calls together where their images have one size; one outcome per call.

        If that fails, each call is scored alone, so that only the one at fault fails.
        """
        outcomes: dict[int, Scored | BaseException] = {}
        for indices in by_size(calls):
            group = [calls[i] for i in indices]
            (found,) = await self._run([group])
            if isinstance(found, Scored):
                outcomes.update(zip(indices, shares(found, group), strict=True))
                continue
            self._doubtful = True
            alone = [found] if len(group) == 1 else await self._run([[call] for call in group])
            outcomes.update(zip(indices, alone, strict=True))
        return [outcomes[i] for i in range(len(calls))]

    async def _run(self, groups: list[list[Call]]) -> list[Scored | BaseException]:
        """Scores each group as one batch; failures are returned."""
        jobs = [self._in_thread(self._score_together, group) for group in groups]
        return await asyncio.gather(*jobs, return_exceptions=True)

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """`work` in the reward's thread, which notes since when it works."""

        def noted() -> T:
            self._working_since = time.monotonic()
            try:
                return work(*args)
            finally:
                self._working_since = None

        return await asyncio.get_running_loop().run_in_executor(self._thread, noted)

    def _score_together(self, calls: list[Call]) -> Scored:
        """Scores, float32 [sum of b], of calls whose images have one size."""
        began = time.monotonic()
        of = joined(calls)
        found = ask(self._reward, of.images, of.prompts, of.metadata, of.sources)
        scores = checked(found, len(of.images))
        seconds = time.monotonic() - began
        self._busy_s += seconds
        self._export.add(table.REPLICA_BUSY, seconds)
        return Scored(scores, seconds)

    def _check(self, call: Call) -> None:
        """ValueError for what the reward could never score."""
        prompts = call.prompts
        for prompt, data in zip(prompts, call.metadata, strict=True):
            self._check_prompt(prompt, data)
        check_sources(self._args, call)
        if self._over_group and any(of != prompts[0] for of in prompts):
            raise ValueError(
                f"{self._args.name} compares the images of one prompt, and this call has several: "
                f"{prompts[0]!r} and others; make one call of each group"
            )
        sources = call.sources
        if self._over_group and sources is not None and (sources != sources[:1]).any():
            raise ValueError(
                f"{self._args.name} compares the images of one prompt, and their source images "
                "differ: those of all are the same"
            )


def _golden(args: RewardServiceArgs, reward: object) -> Rankings:
    """The pictures that a deployment names, else those that the reward brings."""
    if args.golden is None:
        return golden_of(reward)
    pictures = []
    for file in args.golden:
        image, *of = (decode_rgb(Path(f).read_bytes(), f) for f in (file.image, *file.sources))
        sources = np.stack([fitted(s, image.shape[:2]) for s in of]) if of else None
        known = file.prompt, file.metadata, file.low, file.high
        pictures.append([Golden(image, *known, sources)])
    return pictures


# FastAPI's application is built in the replica, by __serve_build_asgi_app__.
HttpRewardReplica = serve.ingress()(RewardReplica)


def app(args: RewardServiceArgs) -> serve.Application:
    """The application of one reward: the `import_path` of a Serve config file."""
    check_options(args.reward, args.options)
    actor: dict[str, Any] = {
        "num_cpus": args.cpus,
        "num_gpus": args.gpus,
        "resources": args.resources,
    }
    if args.environment is not None:
        # Checked here, because Ray waits for ever for an interpreter that is not there.
        actor["runtime_env"] = {"py_executable": python_of(args.environment)}
    scale: dict[str, Any] = {"num_replicas": args.replicas}
    if args.autoscaling:
        scale = {"autoscaling_config": args.autoscaling.model_dump()}
    deployment = serve.deployment(
        name=args.name,
        **scale,
        ray_actor_options=actor,
        max_ongoing_requests=_most_ongoing(args),
        # A replica that was killed is noticed by its next health check; Serve's own period is 10.
        health_check_period_s=2.0,
        # One that hangs is replaced after three checks in a row without an answer; 30 is Serve's.
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        # A constructor that fails, mostly fails again: say so soon.
        max_constructor_retry_count=2,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        logging_config=quiet(),
    )
    return deployment(HttpRewardReplica).bind(args)


def _most_ongoing(args: RewardServiceArgs) -> int:
    """Calls that one replica takes in; what is beyond them waits with its caller.

    Calls that wait in the replica are merged as soon as it is free. They are not moved to replicas
    that come later, so one that Serve adds replicas to takes no more than its next batch.
    """
    two_batches = 2 * args.max_batch_images  # a call holds at least one image
    if args.autoscaling:
        return max(two_batches, math.ceil(args.autoscaling.target_ongoing_requests))
    return max(two_batches, CALLS_TAKEN_IN)


def quiet() -> LoggingConfig:
    """Serve's logs without a line per request."""
    return LoggingConfig(enable_access_log=False, log_level="WARNING")
