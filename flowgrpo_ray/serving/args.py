"""How one reward is served: the typed `args` of its application in a Serve config file."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flowgrpo_ray.common.images import WHITE, check_colour
from flowgrpo_ray.rewards.bounds import check_device
from flowgrpo_ray.spec.cluster import Resources
from flowgrpo_ray.spec.sections import RewardSpec


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True)


class Autoscaling(Strict):
    """Serve adds and removes replicas by the number of calls that wait."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(default=2.0, gt=0)
    """Calls, running and waiting, that Serve aims at for one replica."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas} is above max_replicas = {self.max_replicas}"
            )
        return self


class GoldenFile(Strict):
    """A picture of the user's whose score is known to lie within [low, high]."""

    image: str
    """PNG, JPEG or WebP, on every machine that a replica may run on."""
    prompt: str
    metadata: dict[str, Any] = {}
    low: float = float("-inf")
    high: float = float("inf")
    sources: list[str] = []
    """The images that it is an edit of, for a reward that compares with them."""


class RewardServiceArgs(Strict):
    """How one reward is served: the `args` of its application in a Serve config file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    reward: str = ""
    """A built-in reward or an import path `module:Class`; by default the one called `name`."""
    options: dict[str, Any] = {}
    """Arguments of the reward's constructor."""
    environment: str | None = None
    """The environment that its replicas run in: flowgrpo-ray rewards env build NAME."""
    replicas: int = Field(default=1, ge=1)
    autoscaling: Autoscaling | None = None
    """Instead of `replicas`."""
    cpus: float = Field(default=0.25, ge=0)
    """CPUs, and below GPUs, that Ray sets aside for one replica."""
    gpus: float = Field(default=0.0, ge=0)
    resources: Resources = {}
    """Custom Ray resources that each replica reserves: it runs on machines that have them."""
    max_batch_images: int = Field(default=64, ge=1)
    """Images that the reward is given at once; calls are merged up to it, or cut."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long a call waits for others to merge with."""
    golden: list[GoldenFile] | None = None
    """Pictures of the user's in place of the reward's own; an empty list turns the check off."""
    golden_every_s: float = Field(default=60.0, gt=0)
    """How often an idle replica scores them again."""
    hang_s: float = Field(default=600.0, gt=0)
    """A batch that takes longer has hung: its replica is replaced."""
    drain_s: float = Field(default=120.0, ge=0)
    """How long a replica that is taken away may still work on the calls that it has."""
    max_images_per_request: int = Field(default=64, ge=1)
    """This and the next two limit a request over HTTP."""
    max_image_pixels: int = Field(default=2**21, ge=1)
    max_body_bytes: int = Field(default=64 * 2**20, ge=1)
    background: str = WHITE
    """What shows through where an image that comes over HTTP is transparent: a colour's name."""
    token_env: str = "FLOWGRPO_REWARD_TOKEN"
    """Variable, in the environment of the cluster's nodes, of the bearer token over HTTP. One that
    is named here must be set there."""

    @field_validator("background")
    @classmethod
    def _colour(cls, name: str) -> str:
        return check_colour(name)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.reward = self.reward or self.name
        check_device(self.options, self.gpus)
        if self.autoscaling and self.replicas != 1:
            raise ValueError(
                f"replicas = {self.replicas} and autoscaling exclude each other: give "
                "autoscaling.min_replicas and max_replicas"
            )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores: a run uses a deployment only if it has the same."""
        return self.model_dump(include={"reward", "options", "environment"})


def args_of(name: str, reward: RewardSpec) -> RewardServiceArgs:
    """How a training run serves the reward `name` of its spec."""
    return RewardServiceArgs(
        name=name,
        reward=reward.reward or name,
        options=reward.options,
        environment=reward.environment,
        golden=None if reward.golden else [],
        replicas=reward.replicas,
        cpus=reward.cpus,
        gpus=reward.gpus,
        resources=reward.resources,
    )
