"""The section ``sampling`` of a spec: its windows, and what goes into groups and micro-batches."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from flowgrpo_ray.common.strict import Strict


class AllSteps(Strict):
    """Every step but the last is stochastic and trained (Flow-GRPO)."""

    kind: Literal["all"]


class RandomWindow(Strict):
    """A contiguous window at a random place, one per iteration (Flow-GRPO-Fast)."""

    kind: Literal["random"]
    length: int = Field(ge=1, description="stochastic steps")
    within: tuple[int, int] = Field(description="[first, end): the window stays inside these steps")


class ProgressiveWindow(Strict):
    """A window that moves from the noisy steps to the clean ones as training goes on (MixGRPO)."""

    kind: Literal["progressive"]
    length: int = Field(ge=1, description="stochastic steps, at every position")
    start: int = Field(default=0, ge=0, description="first step of the first position")
    stride: int = Field(
        default=1, ge=1, description="steps it moves by; below length, positions overlap"
    )
    iterations: int = Field(ge=1, description="spent at each position")
    roll_back: bool = Field(
        default=False, description="after the last position begin again; else stay there"
    )


Pixels = Annotated[int, Field(ge=1)]
Window = Annotated[AllSteps | RandomWindow | ProgressiveWindow, Field(discriminator="kind")]


Solver = Annotated[
    Literal["euler", "dpm2"],
    Field(
        description="of steps without noise; each step is one evaluation of the network (two with "
        "guidance). `dpm2` is second order, from the step before (DPM-Solver++ 2M)"
    ),
]


class SamplingSpec(Strict):
    """How the images of an iteration are sampled."""

    size: tuple[Pixels, Pixels] = Field(description="height and width of an image, in pixels")
    steps: int = Field(ge=2, description="denoising steps in training (Denoising Reduction)")
    guidance: float = Field(
        default=1.0,
        ge=1,
        description="classifier-free guidance, 1 is off; FLUX.1-dev's is an input of its network",
    )
    kernel: Literal["flow_sde", "cps", "dance_sde"] = "flow_sde"
    likelihood: Literal["gaussian", "squared_error"] = Field(
        default="gaussian",
        description="squared_error is the log-probability that published cps clip ranges mean",
    )
    eta: float | None = Field(default=None, gt=0, description="noise level of stochastic steps")
    window: Window | None = Field(
        default=None, description="the stochastic steps, of objectives that train them"
    )
    solver: Solver = "euler"
    group_size: int = Field(ge=2, description="images per prompt; advantages compare them")
    groups: int = Field(ge=1, description="prompts per iteration")
    micro_batch: int = Field(ge=1, description="images per forward, in sampling and training alike")
    same_latent: bool = Field(
        default=False,
        description="the images of a group share their initial noise, and so the steps before the "
        "window, which are computed once for each prompt of a micro-batch",
    )
    max_lag: Literal[0, 1] = Field(
        default=0,
        description="1 samples each iteration during the one before, under the weights which that "
        "one began with: faster, and off-policy by its updates",
    )

    @model_validator(mode="after")
    def _window_fits(self) -> SamplingSpec:
        if self.solver != "euler" and self.window:
            raise ValueError(
                f"solver = {self.solver} is for sampling without noise, and window = "
                f"{self.window.kind} adds some: leave out one of the two"
            )
        if self.kernel == "cps" and (self.eta or 0) > 1:
            raise ValueError(f"eta = {self.eta}: the cps kernel takes at most 1")
        last, window = self.steps - 1, self.window  # the last step is never stochastic
        if isinstance(window, RandomWindow):
            first, end = window.within
            if not 0 <= first < end <= last:
                raise ValueError(
                    f"window.within = [{first}, {end}] is outside the steps: with steps = "
                    f"{self.steps} it must lie in [0, {last}] (the last step is never stochastic)"
                )
            if window.length > end - first:
                raise ValueError(
                    f"window.length = {window.length} does not fit window.within = [{first}, {end}]"
                )
        if isinstance(window, ProgressiveWindow) and window.start + window.length > last:
            raise ValueError(
                f"window.start = {window.start} and window.length = {window.length} reach step "
                f"{window.start + window.length}: with steps = {self.steps} a window must end by "
                f"{last} (the last step is never stochastic)"
            )
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> SamplingSpec:
        if self.images % self._images_per_block:
            raise ValueError(
                f"group_size x groups = {self.group_size} x {self.groups} = {self.images} images "
                f"are not divisible by {self._images_per_block}, the fewest that are whole groups "
                f"of {self.group_size} and whole micro-batches of {self.micro_batch}"
            )
        return self

    @property
    def images(self) -> int:
        """Images per iteration."""
        return self.group_size * self.groups

    @property
    def units(self) -> int:
        """Micro-batches per iteration."""
        return self.images // self.micro_batch

    @property
    def units_per_block(self) -> int:
        """A block is the fewest micro-batches that hold whole groups."""
        return self._images_per_block // self.micro_batch

    @property
    def groups_per_block(self) -> int:
        return self._images_per_block // self.group_size

    @property
    def _images_per_block(self) -> int:
        return math.lcm(self.group_size, self.micro_batch)

    @property
    def trained_steps(self) -> int:
        """Stochastic steps of an iteration, wherever its window lies."""
        if self.window is None:
            return 0
        return self.steps - 1 if isinstance(self.window, AllSteps) else self.window.length
