"""Rewards as Ray Serve applications, one application per reward so that each scales alone.

`app` builds the application `reward-<name>` for `serve deploy`; `deploy` and `wait` start several
from a driver; `RewardClient` calls them.
"""
# Serve reads the annotation of `app` at run time, so annotations are not postponed in this module.

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import ObjectRef, serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from flowgrpo_ray.errors import RewardError, SpecError
from flowgrpo_ray.rewards import build, prompt_check

Metadata = Sequence[Mapping[str, Any]]


class RewardServiceArgs(BaseModel):
    """How one reward is served: the `args` of its application in a Serve config file."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    reward: str = ""
    """A built-in reward or an import path `module:Class`; by default the one called `name`."""
    options: dict[str, Any] = {}
    """Arguments of the reward's constructor."""
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.25, ge=0)
    """CPUs, and below GPUs, that Ray sets aside for one replica."""
    gpus: float = Field(default=0.0, ge=0)
    max_batch_images: int = Field(default=64, ge=1)
    """Images that the reward is given at once; calls are merged up to it, or cut."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long a call waits for others to merge with."""
    max_images_per_request: int = Field(default=64, ge=1)
    """This and the next two limit a request over HTTP."""
    max_image_pixels: int = Field(default=2**21, ge=1)
    max_body_bytes: int = Field(default=64 * 2**20, ge=1)

    @model_validator(mode="after")
    def _reward_is_name(self) -> "RewardServiceArgs":
        self.reward = self.reward or self.name
        return self


def app_name(reward: str) -> str:
    """Name of the Serve application that serves a reward."""
    return f"reward-{reward}"


@dataclass(frozen=True)
class _Call:
    """What one call, or a part of a large one, asks to score."""

    images: np.ndarray  # uint8 [b, H, W, 3]
    prompts: Sequence[str]
    metadata: Metadata


def _image_count(calls: list[_Call]) -> int:
    return sum(len(call.images) for call in calls)


class RewardReplica:
    """One process that holds a reward.

    The event loop only takes calls in; the reward runs in one thread beside it, so that it is
    never entered twice at a time and health checks are answered while it works.
    """

    def __init__(self, args: RewardServiceArgs) -> None:
        self._args = args
        self._check_prompt = prompt_check(args.reward)
        self._reward = build(args.reward, args.options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        merge: Any = self._merge  # @serve.batch added two setters
        merge.set_max_batch_size(args.max_batch_images)
        merge.set_batch_wait_timeout_s(args.batch_wait_ms / 1000)

    def __serve_build_asgi_app__(self) -> Any:
        from flowgrpo_ray.cluster.reward_http import Limits, build_api

        args = self._args
        limits = Limits(args.max_images_per_request, args.max_image_pixels, args.max_body_bytes)
        return build_api(args.name, limits, self._check, self.score)

    def describe(self) -> dict[str, Any]:
        """What is served here: decides whether a run may use this deployment."""
        return {"reward": self._args.reward, "options": self._args.options}

    async def score(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Metadata
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; ValueError for a bad call."""
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [b, H, W, 3], got {_describe(images)}")
        if not len(images) == len(prompts) == len(metadata):
            counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            raise ValueError(f"one prompt and one metadata per image: got {counts}")
        self._check(prompts, metadata)
        size = self._args.max_batch_images
        parts = [
            _Call(images[i : i + size], prompts[i : i + size], metadata[i : i + size])
            for i in range(0, len(images), size)
        ]
        scores = [np.zeros(0, np.float32)]
        for outcome in await asyncio.gather(*[self._merge(part) for part in parts]):
            if isinstance(outcome, BaseException):
                raise outcome
            scores.append(outcome)
        return np.concatenate(scores)

    @serve.batch(batch_size_fn=_image_count)
    async def _merge(self, calls: list[_Call]) -> list[np.ndarray | BaseException]:
        """Scores calls together where their images have one size; one outcome per call.

        If that fails, each call is scored alone, so that only the one at fault fails.
        """
        outcomes: dict[int, np.ndarray | BaseException] = {}
        for indices in _by_size(calls):
            (outcome,) = await self._run([[calls[i] for i in indices]])
            if not isinstance(outcome, BaseException):
                ends = np.cumsum([len(calls[i].images) for i in indices])
                found = np.split(outcome, ends[:-1])
            elif len(indices) == 1:
                found = [outcome]
            else:
                found = await self._run([[calls[i]] for i in indices])
            outcomes.update(zip(indices, found, strict=True))
        return [outcomes[i] for i in range(len(calls))]

    async def _run(self, groups: list[list[_Call]]) -> list[np.ndarray | BaseException]:
        """Scores each group as one batch, in the reward's thread; failures are returned."""
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._thread, self._score_together, g) for g in groups]
        return await asyncio.gather(*jobs, return_exceptions=True)

    def _score_together(self, calls: list[_Call]) -> np.ndarray:
        """Scores, float32 [sum of b], of calls whose images have one size."""
        images = calls[0].images
        if len(calls) > 1:
            images = np.concatenate([call.images for call in calls])
        prompts = [prompt for call in calls for prompt in call.prompts]
        metadata = [data for call in calls for data in call.metadata]
        scores = self._reward(images, prompts, metadata)
        if (
            not isinstance(scores, np.ndarray)
            or scores.shape != (len(images),)
            or scores.dtype != np.float32
        ):
            raise TypeError(
                f"reward {self._args.reward!r} must return float32 [{len(images)}], "
                f"got {_describe(scores)}"
            )
        return scores

    def _check(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """ValueError for a prompt that the reward could never score."""
        for prompt, data in zip(prompts, metadata, strict=True):
            self._check_prompt(prompt, data)


def _by_size(calls: list[_Call]) -> list[list[int]]:
    """Indices of the calls, together where their images have the same height and width."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, call in enumerate(calls):
        groups.setdefault(call.images.shape[1:], []).append(i)
    return list(groups.values())


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


# FastAPI's application is built in the replica, by __serve_build_asgi_app__.
HttpRewardReplica = serve.ingress()(RewardReplica)


def app(args: RewardServiceArgs) -> serve.Application:
    """The application of one reward: the `import_path` of a Serve config file."""
    deployment = serve.deployment(
        name=args.name,
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        # A call holds at least one image, so this many can fill a batch.
        max_ongoing_requests=args.max_batch_images,
        # A replica that was killed is noticed by its next health check; Serve's own period is 10.
        health_check_period_s=2.0,
        # A constructor that fails, mostly fails again: say so soon.
        max_constructor_retry_count=2,
        logging_config=_quiet(),
    )
    return deployment(HttpRewardReplica).bind(args)


def _quiet() -> LoggingConfig:
    return LoggingConfig(enable_access_log=False, log_level="WARNING")


def deploy(args: Sequence[RewardServiceArgs], *, http_port: int | None) -> list[str]:
    """Asks Serve for one application per reward and returns while they start.

    Serve is started if it does not run, its HTTP on 127.0.0.1 alone, or without any if
    `http_port` is None. An application that is there already, from whomever and with whatever
    options, is used as it is: the names of these rewards are returned.
    """
    names = [arg.name for arg in args]
    if len(set(names)) < len(names):
        raise SpecError(f"rewards need different names, got {names}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="Disabled" if http_port is None else "HeadOnly",
        http_options=None if http_port is None else {"host": "127.0.0.1", "port": http_port},
        logging_config=_quiet(),
    )
    usable = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY)
    applications = serve.status().applications
    present = [name for name in names if _status(applications, name) in usable]
    targets = [
        serve.RunTarget(
            app(arg),
            name=app_name(arg.name),
            route_prefix=f"/{arg.name}",
            logging_config=_quiet(),
            external_scaler_enabled=True,
        )
        for arg in args
        if arg.name not in present
    ]
    if targets:
        serve.run_many(
            targets,
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    return present


def remove(names: Sequence[str]) -> None:
    """Deletes the applications of these rewards."""
    for name in names:
        serve.delete(app_name(name))


async def check_same(args: RewardServiceArgs) -> None:
    """RewardError if the application of this name serves another reward or other options."""
    served = await serve.get_app_handle(app_name(args.name)).describe.remote()
    wanted = {"reward": args.reward, "options": args.options}
    if served != wanted:
        raise RewardError(
            f"{app_name(args.name)} is deployed on this cluster with {served}, and the spec asks "
            f"for {wanted}. Name the reward otherwise in the spec (its `reward` key says what it "
            "is), or delete that application"
        )


def _status(
    applications: Mapping[str, ApplicationStatusOverview], name: str
) -> ApplicationStatus | None:
    overview = applications.get(app_name(name))
    return overview.status if overview else None


def wait(names: Sequence[str], *, deadline_s: float) -> None:
    """Returns when the applications of all these rewards run; RewardError if one cannot."""
    end = time.monotonic() + deadline_s
    while True:
        applications = serve.status().applications
        waiting = {}
        for name in map(app_name, names):
            overview = applications.get(name)
            if overview is None:
                raise RewardError(f"{name}: no such application on this cluster")
            if overview.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise RewardError(f"{name}: {overview.status.value}: {_messages(overview)}")
            if overview.status != ApplicationStatus.RUNNING:
                waiting[name] = f"{overview.status.value} {_messages(overview)}".strip()
        if not waiting:
            return
        if time.monotonic() > end:
            raise RewardError(f"not running after {deadline_s:g} s: {waiting}")
        time.sleep(0.1)


def _messages(overview: ApplicationStatusOverview) -> str:
    """What Serve says of an application and of its deployments."""
    parts = [overview.message, *(d.message for d in overview.deployments.values())]
    return " ".join(dict.fromkeys(part for part in parts if part))


def start_rewards(
    args: Sequence[RewardServiceArgs], *, http_port: int | None, deadline_s: float
) -> list[str]:
    """Deploys all rewards at once and waits until they run; names of those found there already."""
    present = deploy(args, http_port=http_port)
    wait([arg.name for arg in args], deadline_s=deadline_s)
    return present


@dataclass
class RewardStats:
    """What a client saw of one reward since it was made."""

    calls: int = 0  # that were answered
    seconds: float = 0.0  # of these, from the call to the answer, retries included
    failures: int = 0  # attempts that failed or were not answered in time


class RewardClient:
    """Scores images with several rewards at once, through handles; for asyncio.

    retries: further attempts after a failed one; the first waits `backoff_s`, each next twice as
        long. deadline_s: of one attempt.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        retries: int = 2,
        deadline_s: float = 60.0,
        backoff_s: float = 1.0,
    ) -> None:
        self._retries = retries
        self._deadline_s = deadline_s
        self._backoff_s = backoff_s
        self._handles: dict[str, DeploymentHandle] = {}
        self._stats = {name: RewardStats() for name in names}
        for name in names:
            try:
                self._handles[name] = serve.get_app_handle(app_name(name))
            except RayServeException as error:
                raise RewardError(f"{app_name(name)}: {error}") from error

    async def score(
        self, images: ObjectRef | np.ndarray, prompts: Sequence[str], metadata: Metadata
    ) -> dict[str, np.ndarray]:
        """Scores per reward, float32 [b]; `images` is, or refers to, uint8 [b, H, W, 3]."""
        calls = [self._score_one(name, images, prompts, metadata) for name in self._handles]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        scores: dict[str, np.ndarray] = {}
        for name, outcome in zip(self._handles, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            scores[name] = outcome
        return scores

    def stats(self) -> dict[str, RewardStats]:
        """Calls, seconds and failures per reward."""
        return self._stats

    async def _score_one(
        self, name: str, images: Any, prompts: Sequence[str], metadata: Metadata
    ) -> np.ndarray:
        stats, start = self._stats[name], time.perf_counter()
        last = ""
        for attempt in range(1 + self._retries):
            if attempt:
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
            response = self._handles[name].score.remote(images, list(prompts), list(metadata))
            try:
                scores = await asyncio.wait_for(response, self._deadline_s)
            except TimeoutError:
                response.cancel()
                last = f"no answer within {self._deadline_s:g} s"
            except (RayError, RayServeException) as error:
                cause = getattr(error, "cause", None) or error
                last = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
            else:
                stats.calls += 1
                stats.seconds += time.perf_counter() - start
                return scores
            stats.failures += 1
        raise RewardError(
            f"{app_name(name)} failed {1 + self._retries} times, last with {last}; "
            f"first prompt: {prompts[0]!r}"
        )
