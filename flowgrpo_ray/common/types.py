"""What travels between driver, rollout workers, rewards and learner.

Everything here is plain Python and numpy: the driver plans and routes without loading torch, and
arrays cross process boundaries without a copy. Shapes: ``b`` samples of a micro-batch, ``T`` steps,
``K`` stochastic steps, ``*D`` latent dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Images = NDArray[np.uint8]  # [b, H, W, 3], RGB
Condition = Mapping[str, NDArray[Any]]  # one PROMPT's encodings; opaque outside its policy
NEGATIVE = "negative_"  # begins the names of its arrays that all prompts of a model share


@dataclass(frozen=True)
class Source:
    """An image that a prompt line names, which a model shall change: a file of the driver's
    machine, and the SHA-256 of its content."""

    path: str
    digest: str


@dataclass(frozen=True)
class Edit:
    """A prompt with the images that it changes, at ``size`` (height, width), that of the images to
    be drawn."""

    text: str
    sources: tuple[Source, ...]
    size: tuple[int, int]


Request = str | Edit  # what a condition is of: a prompt's text, alone or with images


@dataclass(frozen=True)
class Overlong:
    """Prompts of which a model reads the first ``limit`` tokens only: ``cut[prompt]`` is how many
    it has, and the characters of it that are read. The limit may be raised to ``most``."""

    limit: int
    most: int
    cut: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Parallel:
    """How learner ranks hold one network: each a copy of it, or each a shard.

    ``groups`` are the ranks that share one copy: all of them, or those of each machine. Sharded
    ranks may keep whole, from one micro-batch to the next, the weights that they gathered, and the
    gradients (float32) until the update.
    """

    sharded: bool = False
    groups: tuple[tuple[int, ...], ...] = ((0,),)
    keep_weights: bool = False
    keep_gradients: bool = False

    @property
    def shards(self) -> int:
        """That the network is cut into."""
        return len(self.groups[0]) if self.sharded else 1

    @property
    def ranks(self) -> int:
        return sum(map(len, self.groups))

    def __str__(self) -> str:
        """For the console, after the name of those who do."""
        if not self.sharded:
            return "each holds the whole network"
        share = f"each holds 1/{self.shards} of the network"
        copies = f" ({len(self.groups)} copies)" if len(self.groups) > 1 else ""
        kept = {"weights": self.keep_weights, "gradients": self.keep_gradients}
        whole = " and ".join(name for name, is_kept in kept.items() if is_kept)
        return f"{share}{copies}, and {whole or 'one block at a time'} whole while it trains"


@dataclass(frozen=True)
class Noising:
    """Noise levels at which finished images are trained, ``count`` for each image.

    ``draw``: ``uniform`` in ``within``, ``stratified`` over it, or ``steps``: those of sampling.
    """

    count: int
    draw: str
    within: tuple[float, float]


@dataclass(frozen=True)
class Schedule:
    """Noise levels and where noise is added: all that defines an iteration's transitions.

    ``sigma`` (``T + 1`` float32 values, 1 to 0) comes from the policy's own shift; ``eta`` (``T``
    values) is the kernel's noise level of each step, and 0 makes it an ODE step. The stochastic
    steps are contiguous. ``likelihood`` says what counts as the log-probability of a step, and
    ``solver`` how steps without noise go.
    """

    kernel: str
    sigma: tuple[float, ...]
    eta: tuple[float, ...]
    likelihood: str = "gaussian"
    solver: str = "euler"

    def __post_init__(self) -> None:
        if len(self.sigma) != len(self.eta) + 1:
            raise ValueError(f"{len(self.sigma)} noise levels do not fit {len(self.eta)} steps")
        if self.stochastic_steps.stop == self.steps:
            raise ValueError("the last step (to sigma = 0) is never stochastic")

    @property
    def steps(self) -> int:
        return len(self.eta)

    @property
    def stochastic_steps(self) -> range:
        """The window of steps with noise; empty for an ODE schedule."""
        noisy = [i for i, eta in enumerate(self.eta) if eta > 0]
        if not noisy:
            return range(0)
        if noisy != list(range(noisy[0], noisy[-1] + 1)):
            raise ValueError(f"stochastic steps must be contiguous: eta = {self.eta}")
        return range(noisy[0], noisy[-1] + 1)

    def stops(self, noising: Noising) -> list[float]:
        """The noise levels of this sampling that ``noising`` may draw from."""
        low, high = noising.within
        return [sigma for sigma in self.sigma[:-1] if low <= sigma <= high]

    @property
    def sigma_max(self) -> float:
        """The second noise level: stands in for 1 where a kernel would divide by zero."""
        return self.sigma[1]


@dataclass(frozen=True)
class WorkUnit:
    """What one rollout call does: one micro-batch, a pure function of these fields and the weights.

    ``prompts[i]`` is the data-set index of sample ``i``'s prompt and ``samples[i]`` its place in
    that prompt's group. ``index`` is the unit's place in the iteration's order of accumulation.
    """

    seed: int
    stream: str  # "train" or "eval": the two never share noise
    iteration: int
    index: int
    prompts: tuple[int, ...]
    samples: tuple[int, ...]
    schedule: Schedule
    same_latent: bool = False  # the samples of a prompt share their initial noise
    noising: Noising | None = None  # where finished images are trained, if they are

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def points(self) -> tuple[int, ...]:
        """Where each image is trained: its stochastic steps, or the numbers of its noise levels."""
        return tuple(range(self.noising.count) if self.noising else self.schedule.stochastic_steps)

    @property
    def key(self) -> tuple[str, int, int]:
        """Tells it apart from all other units of the run."""
        return self.stream, self.iteration, self.index

    @property
    def distinct_prompts(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.prompts))


@dataclass(frozen=True)
class Provenance:
    """Under what a trajectory was sampled: if the ratio contract breaks, the cause is here."""

    weights_version: int
    weights_digest: str
    batch: int
    dtype: str
    schedule: Schedule


@dataclass(frozen=True)
class Trajectory:
    """One micro-batch around the K points at which it is trained; it stays one up to the learner.

    Points are stochastic steps, and predictions there are means of the next latents; or they are
    noise levels of the finished images, which alone are kept, and predictions are velocities.
    """

    latents: Float32  # [b, K + 1, *D], or [b, 1, *D]: the finished ones
    log_probs: Float32  # [b, K] of stochastic steps, or [b, 0]
    provenance: Provenance
    old: Float32 | None = None  # [b, K, *D], predictions of the sampling policy
    reference: Float32 | None = None  # [b, K, *D], of the untrained model


@dataclass(frozen=True)
class WeightsTicket:
    """One published version of the trainable weights, with the digest of the parameters."""

    version: int
    digest: str


@dataclass(frozen=True)
class MicrobatchStats:
    """Sums over the samples of one micro-batch that have a gradient, ready to be added up.

    ``gate`` is the objective's quantity that was 0 before any update; its arrays hold one value
    per point, ``[K]``. ``sums`` are the objective's statistics, over points as well.
    """

    samples: int
    gate_sum: Float64
    gate_square_sum: Float64
    gate_max: float  # of the absolute value, over all points
    gated: bool  # whether the weights that sampled are those that the iteration began to train
    policy_loss_sum: float
    sums: Mapping[str, float]
    seconds: float
    gate_excess: int = 0  # values far above what this hardware cannot reproduce


@dataclass(frozen=True)
class StepStats:
    """One optimizer update; ``grad_norm`` is ``None`` where there was none.

    There is none without a sample that has a gradient, and (``overflow``) where float16 gradients
    ran out of range. ``loss_scale`` is what float16 losses were multiplied by.
    """

    grad_norm: float | None
    learning_rate: float
    seconds: float
    overflow: bool = False
    loss_scale: float = 1.0


@dataclass(frozen=True)
class LearnerState:
    """Everything that the next update depends on, as whole float32 arrays by parameter name."""

    weights: dict[str, Float32]
    ema: dict[str, Float32]
    exp_avg: dict[str, Float32]
    exp_avg_sq: dict[str, Float32]
    updates: int
    loss_scale: float = 1.0  # and since how many updates it held, for float16
    scale_held: int = 0
    follower: dict[str, Float32] = field(default_factory=dict)  # where the objective has one
    # With max_lag 1: the weights that the last iteration began with; the next is sampled with them.
    behaviour: dict[str, Float32] = field(default_factory=dict)
    behaviour_version: int = -1
