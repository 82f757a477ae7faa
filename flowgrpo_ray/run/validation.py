"""The verdict on a few iterations without a tie to the base model: is a spec worth a full run?

``validation_spec`` says what to run, ``verdict`` reads the rows that it wrote. Neither decides
anything about the numbers of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.run.trend import CLEAR, trend

if TYPE_CHECKING:
    from flowgrpo_ray.algorithm.objectives.base import Bounds, Objective
    from flowgrpo_ray.spec.training import TrainingSpec

Row = Mapping[str, Any]


def validation_spec(spec: TrainingSpec, iterations: int) -> TrainingSpec:
    """``spec`` for ``iterations`` without KL or its like, evaluated at start and end, checkpointed
    at the end.

    Its name gets ``-validate``: it runs in a folder of its own. The watch does not cut it short.
    """
    if iterations < 1:
        raise SpecError(f"--validate {iterations}: give 1 iteration or more, 8 to begin with")
    return spec.model_copy(
        update={
            "name": f"{spec.name}-validate",
            "iterations": iterations,
            "objective": spec.objective.untied(),
            "evaluation": spec.evaluation.model_copy(update={"every": iterations}),
            "checkpoint": spec.checkpoint.model_copy(update={"every": iterations}),
            "watch": spec.watch.model_copy(update={"action": "report"}),
        }
    )


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``ok`` is ``None`` where nothing can be told.

    ``warning`` marks what is no failure but should be looked at before a full run.
    """

    name: str
    ok: bool | None
    says: str
    warning: bool = False


@dataclass(frozen=True)
class Verdict:
    """All findings on a validation run."""

    name: str
    iterations: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; what cannot be told does not count against it."""
        return all(finding.ok is not False for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without NaN."""
        return {
            "name": self.name,
            "iterations": self.iterations,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
        }


def verdict(spec: TrainingSpec, rows: Sequence[Row], ratio_floor: float | None) -> Verdict:
    """Judge the rows of ``metrics.jsonl`` (NaN or ``None`` is "no value").

    ``ratio_floor`` is the largest gate quantity of a fresh trajectory on this hardware, ``None``
    if it was not measured.
    """
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    judges: Sequence[Callable[[], Finding | None]] = (
        lambda: _reward(train, evaluations),
        lambda: _gate(spec.objective, train, ratio_floor),
        lambda: _groups(train),
        lambda: _clipping(spec.objective, train),
        lambda: _clip_range(spec.objective, ratio_floor),
        lambda: _gradients(spec, train),
    )
    findings = tuple(finding for judge in judges if (finding := judge()))
    return Verdict(spec.name, len(train), findings)


# --- the reward


def _reward(train: Sequence[Row], evaluations: Sequence[Row]) -> Finding:
    points = [(r["iteration"], r["reward"]["mean"]) for r in train if _known(r["reward"]["mean"])]
    line, held_out = trend(points), _held_out(evaluations)
    if line is None:
        says = f"{_count(len(points), 'iteration')} with a reward: no trend below 3; {held_out}"
        return Finding("reward", None, says)
    slope = f"{line.slope:+.2g} ± {line.error:.1g} per iteration"
    first, last = f"{points[0][1]:.3g}", f"{points[-1][1]:.3g}"
    moved = f"{first} to {last} over {_count(line.count, 'iteration')} ({slope})"
    if line.slope > CLEAR * line.error:
        return Finding("reward", True, f"the trained reward rises: {moved}; {held_out}")
    if line.slope < -CLEAR * line.error:
        return Finding("reward", False, f"the trained reward falls: {moved}; {held_out}")
    more = "at this slope more iterations would not help"
    if line.slope > 0 and (needed := line.iterations_needed):
        more = f"this slope and noise would be clear after about {needed - line.count} more"
    says = f"no clear movement of the trained reward: {moved}; {more}; {held_out}"
    return Finding("reward", None, says)


def _held_out(evaluations: Sequence[Row]) -> str:
    """Every reward before and after."""
    if len(evaluations) < 2:
        return "held-out prompts were not scored before and after"
    before, after = evaluations[0]["rewards"], evaluations[-1]["rewards"]
    moves = (
        f"{name} {_score(before[name]['mean'])} to {_score(after[name]['mean'])}"
        for name in after
        if name in before
    )
    return f"held-out {', '.join(moves)}"


# --- the gate


def _gate(objective: Objective, train: Sequence[Row], floor: float | None) -> Finding:
    key, symbol = objective.gate.name, objective.gate.symbol
    name = key.removeprefix("log_")
    fresh = [r for r in train if not r.get("staleness")]  # others differ by updates
    gates = [r[key]["gate"] for r in fresh if _known(r[key]["gate"])]
    if not gates:
        return Finding(name, None, "no iteration recorded a gate of its own samples")
    gate = max(abs(value) for value in gates)
    largest = _largest(train, key)
    moved = f"updates move |{symbol}| up to {_small(largest)}"
    moved += _spread_per_step(train, objective) if objective.stochastic else ""
    counted = f"in {len(gates)} of {_count(len(train), 'iteration')}"
    if gate == 0:
        return Finding(name, True, f"the gate is exactly 0 {counted}; {moved}")
    value = f"the gate is up to {gate:.2g} {counted}"
    if floor is None:
        return Finding(name, None, f"{value}, with no measured floor to hold it against")
    if floor == 0:
        says = f"{value}, above the measured floor 0: sampler and learner disagree; {moved}"
        return Finding(name, False, says)
    excess = sum(r[key].get("excess") or 0 for r in fresh)
    says = f"{value}; the measured floor reaches {floor:.2g}, and {_count(excess, 'value')} lay far"
    return Finding(name, True, f"{says} above it; {moved}", warning=excess > 0)


def _spread_per_step(train: Sequence[Row], objective: Objective) -> str:
    """The standard deviation of the gate's quantity at each step, over all iterations."""
    squares: dict[int, list[float]] = {}
    for row in train:
        steps = row[objective.gate.name].get("per_step") or {"step": [], "std": []}
        for step, std in zip(steps["step"], steps["std"], strict=True):
            if _known(std):
                squares.setdefault(step, []).append(std * std)
    parts = [f"{k}: {math.sqrt(fmean(values)):.1e}" for k, values in sorted(squares.items())]
    return f", with a standard deviation per step of {', '.join(parts)}" if parts else ""


# --- groups


def _groups(train: Sequence[Row]) -> Finding:
    total, flat, dropped = (
        sum(row["groups"][key] for row in train) for key in ("total", "no_spread", "dropped")
    )
    unscored = [row["iteration"] for row in train if not _all_scored(row)]
    if unscored:
        says = (
            f"a reward has no mean in iteration {unscored[0]}"
            + (f" and {len(unscored) - 1} more" if len(unscored) > 1 else "")
            + f": nothing could be scored there; {dropped} of {total} groups were dropped"
        )
        return Finding("groups", False, says)
    if not total:
        return Finding("groups", None, "no group was sampled")
    says = f"{flat} of {total} groups ({flat / total:.0%}) are without spread"
    says += f", {dropped} were dropped" if dropped else ", none was dropped"
    if flat == total:
        says += ": no image has an advantage; train on prompts between always and never solved"
        return Finding("groups", False, says)
    if flat > total / 2:
        says += ": raise sampling.group_size, set advantages.refill, or change the prompts"
    return Finding("groups", True, says, warning=flat > total / 2 or dropped > 0)


def _all_scored(row: Row) -> bool:
    return all(_known(value["mean"]) for value in [row["reward"], *row["rewards"].values()])


# --- clipping


def _clipping(objective: Objective, train: Sequence[Row]) -> Finding | None:
    """``None`` for an objective that lets every sample count."""
    bounds = objective.bounds
    if bounds is None:
        return None
    low, high = (_mean(row["clip_fraction"][key] for row in train) for key in ("low", "high"))
    if low is None or high is None:
        return Finding("clipping", None, "no iteration recorded what was clipped")
    return _clipped(objective, bounds, train, low, high)


def _clipped(
    objective: Objective, bounds: Bounds, train: Sequence[Row], low: float, high: float
) -> Finding:
    """Shares ``low`` and ``high`` of samples x steps have no gradient."""
    says = f"{low:.2%} of samples x steps are clipped from below, {high:.2%} from above"
    if bounds.masks:
        says = f"{low + high:.2%} of samples x steps are masked"
    if low + high > 0.5:
        says += f": most give no gradient; widen {bounds.keys} or lower optimizer.learning_rate"
        return Finding("clipping", True, says, warning=True)
    if low + high > 0:
        return Finding("clipping", True, says)
    if objective.updates * objective.epochs == 1:
        says += ": with one update per iteration every ratio is 1, so nothing can be clipped"
        return Finding("clipping", True, says)
    values = " / ".join(f"{value:g}" for value in bounds.values)
    if bounds.masks:
        says += f": {bounds.keys} = {values} never bites"
        return Finding("clipping", True, says, warning=True)
    largest = _largest(train, objective.gate.name)
    times = f"{min(bounds.values) / largest:.2g} times" if largest else "above"
    says += (
        f": the clip range never bites; {bounds.keys} = {values} is {times} the largest "
        f"|{objective.gate.symbol}| {_small(largest)}"
    )
    return Finding("clipping", True, says, warning=True)


def _clip_range(objective: Objective, floor: float | None) -> Finding | None:
    """``None`` for an objective that does not clip by the gate's quantity."""
    bounds = objective.bounds
    if bounds is None or bounds.masks:
        return None
    value = min(bounds.values)
    range_ = f"{bounds.smallest} = {value:g}"
    if floor is None:
        return Finding("clip range", None, f"{range_}; the ratio floor was not measured")
    if floor == 0:
        return Finding("clip range", True, f"{range_} lies above the measured ratio floor, 0")
    if value > floor:
        says = f"{range_} is {value / floor:.2g} times the measured ratio floor {floor:.2g}"
        return Finding("clip range", True, says)
    says = (
        f"{range_} is only {value / floor:.2g} times the measured ratio floor {floor:.2g}: "
        "rounding errors alone clip some samples; widen it or use model.dtype: float32"
    )
    return Finding("clip range", True, says, warning=True)


# --- gradients


def _gradients(spec: TrainingSpec, train: Sequence[Row]) -> Finding:
    """A norm that is not finite is ``null`` in a row like that of no update, but is counted."""
    norms = [norm for row in train for norm in row["grad_norm"] if _known(norm)]
    updates, tried = sum(row["updates"] for row in train), sum(len(r["grad_norm"]) for r in train)
    overflows = sum((row.get("loss_scale") or {}).get("overflows", 0) for row in train)
    if not tried:
        return Finding("gradients", None, "no update was tried")
    bad = updates - len(norms)
    if bad:
        says = (
            f"{bad} of {updates} gradient norms are not finite; lower optimizer.learning_rate = "
            f"{spec.optimizer.learning_rate:g} or use model.dtype: float32"
        )
        return Finding("gradients", False, says)
    if not norms:
        says = f"none of {tried} updates took place: no sample had a gradient"
        return Finding("gradients", False, says)
    limit = spec.optimizer.grad_norm
    clipped = sum(norm > limit for norm in norms)
    says = (
        f"all {_count(len(norms), 'gradient norm')} are finite, {fmean(norms):.2g} on average and "
        f"{max(norms):.2g} at most; {clipped} were clipped at optimizer.grad_norm = {limit:g}"
    )
    left_out = tried - updates
    if left_out:
        says += f"; {_count(left_out, 'update')} did not take place"
        says += f", {overflows} for float16 overflow" if overflows else ""
    return Finding("gradients", True, says, warning=left_out > 0)


# --- numbers


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if _known(value)]
    return fmean(known) if known else None


def _largest(train: Sequence[Row], key: str) -> float | None:
    """The gate's quantity at most, of all iterations."""
    values = [row[key]["max_abs"] for row in train]
    return max((value for value in values if _known(value)), default=None)


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _score(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and _known(value) else "-"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
