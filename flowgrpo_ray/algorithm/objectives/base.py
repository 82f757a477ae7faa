"""What an objective is: the page that Flow-GRPO, DiffusionNFT and each of their variants fill in.

An objective is made of its options in a spec, and of what it makes of them: where it trains an
image, its loss there (``terms``), what must be 0 before the first update (``gate``), and which
numbers it reports (``statistics``). Metrics, console, page, dashboard and plan take all that from
here. There are two kinds: a ``StepObjective`` (``steps``) trains the stochastic steps that an image
was sampled by, a ``NoisedObjective`` (``noised``) the finished image, noised anew.

Shapes: ``b`` samples of a micro-batch, ``*D`` latent dimensions. Nothing here loads torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from flowgrpo_ray.common.strict import Strict
from flowgrpo_ray.common.types import Noising

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo_ray.algorithm.objectives.noised import Follower
    from flowgrpo_ray.algorithm.objectives.tie import Adapt
    from flowgrpo_ray.spec.sampling import SamplingSpec


@dataclass(frozen=True)
class Gate:
    """What shows that sampler and learner agree: a number of each sample and point that is 0 before
    an iteration's first update. ``name`` is its key in a row of ``metrics.jsonl``."""

    name: str
    symbol: str  # on a screen
    title: str
    meaning: str  # one sentence
    signed: bool = True


@dataclass(frozen=True)
class Statistic:
    """A mean over samples and points, under its ``name`` in a row of ``metrics.jsonl``.

    With ``parts`` it is several that share a chart: ``{key in the row: name of its line}``. A
    ``penalty`` is absent where it has no weight in the loss.
    """

    name: str
    title: str
    unit: str
    meaning: str
    parts: Mapping[str, str] | None = None
    penalty: bool = False

    @property
    def paths(self) -> list[str]:
        """As ``Term`` has them, and where they stand in a row."""
        return [f"{self.name}.{part}" for part in self.parts] if self.parts else [self.name]

    @property
    def labels(self) -> list[str]:
        """Of their lines in a chart."""
        return list(self.parts.values()) if self.parts else [self.unit]


@dataclass(frozen=True)
class Term:
    """What an objective makes of one point of a micro-batch; everything is ``[b]``."""

    loss: Tensor  # of each sample; one that stays out of the update is left out of it later
    gate: Tensor
    statistics: Mapping[str, Tensor]  # by ``Statistic.paths``; numbers, or whether
    weight: float = 1.0  # of this point against others


@dataclass(frozen=True)
class Bounds:
    """Where a sample loses its gradient: the options that say so, and their values.

    They are ranges of the gate's quantity; or, if it ``masks``, of another one.
    """

    options: Mapping[str, float]
    masks: bool = False

    @property
    def keys(self) -> str:
        return "objective." + " / ".join(self.options)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(self.options.values())

    @property
    def smallest(self) -> str:
        """The key of the narrowest."""
        return f"objective.{min(self.options, key=lambda option: self.options[option])}"


class Objective(Strict):
    """The options that all share, and what an objective says of itself."""

    called: ClassVar[str] = ""  # on a page; default: the name of the class
    gate: ClassVar[Gate]
    statistics: ClassVar[tuple[Statistic, ...]] = ()
    stochastic: ClassVar[bool]  # trains stochastic steps of sampling; else draws by ODE steps
    keeps_old: ClassVar[bool]  # a trajectory keeps what the sampling policy predicted
    samples_with_follower: ClassVar[bool] = False  # not with the weights that are trained
    tie: ClassVar[str] = ""  # the penalty that holds on to the untrained model
    without_tie: ClassVar[str] = ""  # the setting that drops it
    adapt_key: ClassVar[str] = ""  # where ``adapts`` stands in a spec

    kind: Any  # text; each class narrows it to its own
    updates: int = Field(default=2, ge=1, description="optimizer updates per pass over the samples")
    epochs: int = Field(default=1, ge=1, description="passes over an iteration's samples")
    clip_in_noise: bool = Field(
        default=False,
        description="train although rounding errors alone carry over a tenth of fresh samples "
        "beyond the clip range",
    )

    @abstractmethod
    def terms(self, point: Any, advantage: Tensor) -> Term:
        """The loss and its statistics at one ``Step`` or ``Noised``; ``advantage [b]``."""

    @property
    def penalties(self) -> Mapping[str, float]:
        """Statistics that are added to the loss, each with its weight."""
        return {}

    @property
    def compares_reference(self) -> bool:
        """Whether a trajectory keeps what the untrained model predicts."""
        return bool(self.penalties)

    @property
    def bounds(self) -> Bounds | None:
        """Those that rounding errors must stay inside of."""
        return None

    @property
    def noising(self) -> Noising | None:
        """Where finished images are trained; ``None``: stochastic steps are."""
        return None

    @property
    def follower(self) -> Follower | None:
        """A second set of weights that follows the trained ones, if there is one."""
        return None

    def points(self, trained_steps: int) -> int:
        """Where each image is trained, in a sampling of so many stochastic steps."""
        return self.noising.count if self.noising else trained_steps

    def forwards(self, trained_steps: int) -> int:
        """Network evaluations without gradient that an image takes beside its sampling."""
        points = self.points(trained_steps)
        anchored = self.follower is not None and not self.samples_with_follower
        old = self.keeps_old and not self.stochastic
        return points * (self.compares_reference + old + anchored)

    @property
    def adapts(self) -> Adapt | None:
        """How the weight of the tie to the untrained model follows a reward; ``None``: it stays."""
        return None

    def tied(self, weight: float) -> Objective:
        """The same with another weight of its tie to the untrained model."""
        raise NotImplementedError(f"{type(self).__name__} has no tie that adapts")

    def untied(self) -> Objective:
        """The same without its tie to the untrained model."""
        return self

    def card(self) -> dict[str, Any]:
        """What the page of a run must know to show it, as plain values."""
        return {
            "kind": self.kind,
            "called": vars(type(self)).get("called", type(self).__name__),
            "gate": asdict(self.gate),
            "gated": "first" if self.samples_with_follower else "all",
            "steps": self.stochastic,
            "charts": [
                {
                    "title": statistic.title,
                    "unit": statistic.unit,
                    "penalty": statistic.penalty,
                    "lines": [
                        {"label": label, "path": path}
                        for label, path in zip(statistic.labels, statistic.paths, strict=True)
                    ],
                }
                for statistic in (*self.statistics, *self._of_tie)
            ],
        }

    @property
    def _of_tie(self) -> tuple[Statistic, ...]:
        """What is reported of a weight that adapts, by the driver who sets it."""
        if self.adapts is None:
            return ()
        kept = f"the fall of {self.adapts.reward}"
        return (
            Statistic("tie.weight", "Weight of the tie", "weight in the loss", "", penalty=True),
            Statistic("tie.fall", f"What the tie follows: {kept}", "allowed: 1", "", penalty=True),
        )

    def numbers(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The objective's own numbers that a row of ``metrics.jsonl`` has, by their paths."""
        paths = [f"{self.gate.name}.{what}" for what in ("gate", "max_abs", "mean", "std")]
        paths += [path for of in (*self.statistics, *self._of_tie) for path in of.paths]
        found: dict[str, Any] = {}
        for path in paths:
            head, _, rest = path.partition(".")
            value: Any = row.get(head)
            found[path] = value.get(rest) if rest and value is not None else value
        return found

    def check(self, sampling: SamplingSpec) -> None:
        """``ValueError`` for a sampling that this objective cannot train on; it names both keys."""
        given = {key: getattr(sampling, key) for key in ("eta", "window")}
        for key, value in given.items():
            if self.stochastic and value is None:
                raise ValueError(
                    f"objective.kind = {self.kind} trains stochastic steps: set sampling.{key}"
                )
            if not self.stochastic and value is not None:
                raise ValueError(
                    f"objective.kind = {self.kind} draws its samples without noise: leave out "
                    f"sampling.{key} (or set it to null)"
                )
