"""The verdict on a few iterations without KL: each finding from rows whose answer is known."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.run.trend import trend
from flowgrpo_ray.run.validation import Finding, Verdict, validation_spec, verdict
from flowgrpo_ray.spec.file import dump_spec, load_spec
from flowgrpo_ray.spec.training import TrainingSpec
from flowgrpo_ray.view.console import verdict_table

NAN = float("nan")
RISING = (0.30, 0.35, 0.38, 0.45)


def spec_of(*overrides: str) -> TrainingSpec:
    return load_spec("tiny-ocr", list(overrides))


def train_row(iteration: int, mean: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "train",
        "iteration": iteration,
        "reward": {"mean": mean, "std": 0.3},
        "rewards": {"ocr": {"mean": mean, "std": 0.3}, "sign_colour": {"mean": 0.9, "std": 0.1}},
        "groups": {"total": 8, "no_spread": 1, "dropped": 0, "refilled": 0},
        "log_ratio": {
            "gate": 0.0,
            "max_abs": 2e-3,
            "mean": 0.0,
            "std": 2e-4,
            "per_step": {"step": [1, 2], "mean": [0.0, 0.0], "std": [3e-4, 1e-4]},
        },
        "clip_fraction": {"low": 0.02, "high": 0.01},
        "grad_norm": [0.5, 1.5],
        "updates": 2,
    }
    return row | changes


def eval_row(iteration: int, ocr: float | None) -> dict[str, Any]:
    rewards = {"ocr": {"mean": ocr, "std": 0.3}, "sign_colour": {"mean": 0.9, "std": 0.1}}
    return {"kind": "eval", "iteration": iteration, "rewards": rewards, "prompts": 64}


def run_of(means: Sequence[float | None] = RISING, **changes: Any) -> list[dict[str, Any]]:
    rows = [train_row(i, mean, **changes) for i, mean in enumerate(means, start=1)]
    return [eval_row(0, 0.3), *rows, eval_row(len(means), 0.4)]


def find(name: str, rows: Sequence[dict], floor: float | None = 0.0, *overrides: str) -> Finding:
    judged = verdict(spec_of(*overrides), rows, floor)
    (finding,) = [finding for finding in judged.findings if finding.name == name]
    return finding


# --- the spec


def test_the_spec_of_a_validation_run():
    spec = spec_of("watch.action=stop")
    assert spec.objective.kl is not None
    short = validation_spec(spec, 8)
    before, after = spec.model_dump(), short.model_dump()
    assert after["name"] == "tiny-ocr-validate"
    assert after["iterations"] == 8
    assert after["objective"]["kl"] is None
    assert after["evaluation"]["every"] == 8  # before the first iteration and after the last
    assert after["checkpoint"]["every"] == 8
    assert after["watch"].pop("action") == "report"
    assert before["watch"].pop("action") == "stop"
    for changed in (before, after):
        del changed["name"], changed["iterations"], changed["objective"]["kl"]
        del changed["evaluation"]["every"], changed["checkpoint"]["every"]
    assert after == before
    assert TrainingSpec.model_validate(short.model_dump()) == short
    assert short.identity() != spec.identity()
    check_run(short)


def test_the_spec_of_a_validation_run_can_be_written_and_read(tmp_path):
    short = validation_spec(spec_of(), 8)
    file = tmp_path / "spec.yaml"
    file.write_text(dump_spec(short))
    assert load_spec(str(file)) == short


@pytest.mark.parametrize("iterations", [0, -3])
def test_no_iterations_are_an_error(iterations: int):
    with pytest.raises(SpecError, match=f"--validate {iterations}: give 1"):
        validation_spec(spec_of(), iterations)


# --- the trend


def test_a_trend_by_hand():
    """x = -1, 0, 1; y = 0, 2, 1 - mean 1: slope 1/2, residuals -1/2, 1, -1/2."""
    line = trend([(1, 0.0), (2, 2.0), (3, 1.0)])
    assert line is not None
    assert line.slope == pytest.approx(0.5)
    assert line.noise == pytest.approx(math.sqrt(1.5))
    assert line.error == pytest.approx(math.sqrt(1.5 / 2))
    # slope > 2 error: n (n^2 - 1) > 12 (2 sqrt(1.5) / 0.5)^2 = 288; 6 x 35 = 210, 7 x 48 = 336
    assert line.iterations_needed == 7
    assert trend([(1, 0.0), (2, 2.0)]) is None


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=3, max_size=12))
def test_a_trend_against_numpy(means: list[float]):
    x, y = np.arange(1, len(means) + 1), np.array(means)
    line = trend(list(zip(x.tolist(), means, strict=True)))
    assert line is not None
    design = np.stack([x, np.ones_like(x)], 1).astype(float)
    (slope, start), *_ = np.linalg.lstsq(design, y)
    rest = y - slope * x - start
    error = math.sqrt(rest @ rest / (len(y) - 2) / ((x - x.mean()) ** 2).sum())
    assert line.slope == pytest.approx(slope, abs=1e-9)
    assert line.error == pytest.approx(error, abs=1e-7)
    if 1e-3 < line.slope <= 2 * line.error:  # the fewest that would do
        n = line.iterations_needed
        assert n is not None
        assert n > len(means)
        errors = [line.noise * math.sqrt(12 / (k * (k * k - 1))) for k in (n - 1, n)]
        assert line.slope > 2 * errors[1] * (1 - 1e-9)
        assert n == len(means) + 1 or line.slope <= 2 * errors[0] * (1 + 1e-9)


# --- the reward


def test_a_rising_reward():
    finding = find("reward", run_of())
    assert finding.ok is True
    assert "rises: 0.3 to 0.45 over 4 iterations (+0.048 ± 0.005 per iteration)" in finding.says
    assert "held-out ocr 0.300 to 0.400, sign_colour 0.900 to 0.900" in finding.says


def test_a_falling_reward_fails():
    finding = find("reward", run_of(RISING[::-1]))
    assert finding.ok is False
    assert "falls: 0.45 to 0.3" in finding.says
    assert "-0.048" in finding.says


def test_an_unclear_reward_says_how_many_more_iterations():
    finding = find("reward", run_of((0.0, 2.0, 1.0)))
    assert finding.ok is None
    assert "no clear movement" in finding.says
    assert "would be clear after about 4 more" in finding.says


@pytest.mark.parametrize("means", [(0.5,) * 6, (1.0, 2.0, 0.0)])
def test_a_reward_that_does_not_rise_asks_for_no_more_iterations(means: tuple[float, ...]):
    finding = find("reward", run_of(means))
    assert finding.ok is None
    assert "more iterations would not help" in finding.says


def test_a_reward_over_too_few_iterations():
    finding = find("reward", run_of((0.1, 0.9, None)))
    assert finding.ok is None
    assert "2 iterations with a reward: no trend below 3" in finding.says


def test_an_iteration_without_a_mean_is_left_out_of_the_trend():
    """By its number: the line goes on at iteration 4."""
    finding = find("reward", run_of((0.1, 0.2, NAN, 0.4)))
    assert "(+0.1 ± " in finding.says
    assert finding.ok is True


def test_held_out_prompts_without_a_score_and_without_an_evaluation():
    rows = [eval_row(0, None), *run_of()[1:-1], eval_row(4, 0.4)]
    assert "held-out ocr - to 0.400" in find("reward", rows).says
    assert "not scored before and after" in find("reward", rows[1:]).says


# --- the ratio


def ratio_of(gate: float | None) -> dict[str, Any]:
    return {"log_ratio": train_row(1, 0)["log_ratio"] | {"gate": gate}}


def test_an_exact_gate():
    finding = find("ratio", run_of())
    assert (finding.ok, finding.warning) == (True, False)
    assert finding.says == (
        "the gate is exactly 0 in 4 of 4 iterations; updates move |log rho| up to 2.0e-03, with a "
        "standard deviation per step of 1: 3.0e-04, 2: 1.0e-04"
    )


@pytest.mark.parametrize(
    ("gate", "floor", "ok", "warning"),
    [
        (5e-4, 1e-4, True, False),  # the learner bears it: the distribution did not move
        (1e-9, 0.0, False, False),
        (1e-4, None, None, False),
        (None, 0.0, None, False),
    ],
)
def test_a_gate_against_the_floor(gate, floor, ok, warning):
    finding = find("ratio", run_of(**ratio_of(gate)), floor)
    assert (finding.ok, finding.warning) == (ok, warning)


def test_values_far_above_a_noisy_floor_are_counted():
    rows = run_of(**ratio_of(5e-4))
    for row in rows[1:-1]:
        row["log_ratio"]["excess"] = 2
    finding = find("ratio", rows, 1e-4)
    assert (finding.ok, finding.warning) == (True, True)
    assert "the measured floor reaches 0.0001, and 8 values lay far above it" in finding.says


def test_with_a_lag_the_gate_of_older_samples_is_no_disagreement():
    """They differ by the updates since; only the first iteration has samples of its own weights."""
    rows = run_of()
    for row in rows[2:-1]:
        row |= {"staleness": 1, **ratio_of(3e-3)}
    finding = find("ratio", rows)
    assert finding.ok
    assert finding.says.startswith("the gate is exactly 0 in 1 of 4 iterations")


def test_the_spread_per_step_is_pooled_over_windows_that_move():
    rows = run_of()
    for row, steps, stds in ((rows[1], [1, 2], [3e-4, 4e-4]), (rows[2], [2, 3], [2e-4, 0.0])):
        row["log_ratio"]["per_step"] = {"step": steps, "mean": [0, 0], "std": stds}
    for row in rows[3:5]:
        del row["log_ratio"]["per_step"]
    says = find("ratio", rows).says
    assert says.endswith("of 1: 3.0e-04, 2: 3.2e-04, 3: 0.0e+00")  # sqrt((16 + 4) / 2) = 3.16


# --- groups


def groups_of(no_spread: int, dropped: int = 0) -> dict[str, Any]:
    return {"groups": {"total": 8, "no_spread": no_spread, "dropped": dropped, "refilled": 0}}


@pytest.mark.parametrize(
    ("no_spread", "dropped", "ok", "warning", "says"),
    [
        (0, 0, True, False, "0 of 32 groups (0%) are without spread, none was dropped"),
        (4, 0, True, False, "16 of 32 groups (50%)"),
        (5, 0, True, True, "raise sampling.group_size, set advantages.refill"),
        (8, 0, False, False, "no image has an advantage"),
        (0, 1, True, True, "4 were dropped"),
    ],
)
def test_groups(no_spread: int, dropped: int, ok: bool, warning: bool, says: str):
    finding = find("groups", run_of(**groups_of(no_spread, dropped)))
    assert (finding.ok, finding.warning) == (ok, warning)
    assert says in finding.says


@pytest.mark.parametrize("nothing", [NAN, None])
def test_a_mean_that_is_nan_fails(nothing: float | None):
    """Of the total or of any reward, the watched ones too."""
    rows = run_of()
    rows[3]["rewards"]["sign_colour"]["mean"] = nothing
    finding = find("groups", rows)
    assert finding.ok is False
    assert "no mean in iteration 3:" in finding.says
    rows[2]["reward"]["mean"] = nothing
    assert "no mean in iteration 2 and 1 more:" in find("groups", rows).says


# --- clipping


def clip_of(low: float, high: float) -> dict[str, Any]:
    return {"clip_fraction": {"low": low, "high": high}}


def test_some_clipping_is_as_it_should_be():
    finding = find("clipping", run_of())
    assert (finding.ok, finding.warning) == (True, False)
    assert finding.says == "2.00% of samples x steps are clipped from below, 1.00% from above"


def test_clipping_that_never_bites_says_by_how_much():
    """0.001 against a largest |log rho| of 0.002."""
    finding = find("clipping", run_of(**clip_of(0, 0)))
    assert (finding.ok, finding.warning) == (True, True)
    assert (
        "objective.clip_low / clip_high = 0.001 / 0.001 is 0.5 times the largest |log rho| 2.0e-03"
    ) in finding.says


def test_one_update_cannot_clip_and_is_no_warning():
    finding = find("clipping", run_of(**clip_of(0, 0)), 0.0, "objective.updates=1")
    assert (finding.ok, finding.warning) == (True, False)
    again = find(
        "clipping", run_of(**clip_of(0, 0)), 0, "objective={kind: flow_grpo, updates: 1, epochs: 2}"
    )
    assert again.warning


def test_mostly_clipped_is_a_warning():
    assert not find("clipping", run_of(**clip_of(0.25, 0.25))).warning
    finding = find("clipping", run_of(**clip_of(0.3, 0.25)))
    assert (finding.ok, finding.warning) == (True, True)
    assert "widen objective.clip_low / clip_high" in finding.says


def test_masking_is_told_in_its_own_words():
    dppo = "objective={kind: flow_dppo, max_divergence: 1e-5}"
    assert "3.00% of samples x steps are masked" in find("clipping", run_of(), 0.0, dppo).says
    never = find("clipping", run_of(**clip_of(0, 0)), 0.0, dppo)
    assert never.warning
    assert "objective.max_divergence = 1e-05 never bites" in never.says
    assert "clip range" not in {f.name for f in verdict(spec_of(dppo), run_of(), 0.0).findings}


@pytest.mark.parametrize(
    ("floor", "ok", "says"),
    [
        (2.5e-4, True, "objective.clip_high = 0.0005 is 2 times the measured ratio floor"),
        (5e-4, True, "only 1 times"),
        (1e-3, True, "only 0.5 times"),
        (0.0, True, "lies above the measured ratio floor, 0"),
        (None, None, "was not measured"),
    ],
)
def test_the_clip_range_against_the_floor(floor: float | None, ok: bool | None, says: str):
    finding = find("clip range", run_of(), floor, "objective.clip_high=5e-4")
    assert finding.ok is ok
    assert finding.warning == says.startswith("only")
    assert says in finding.says


# --- gradients


def test_gradients_are_counted_against_the_clip_norm():
    finding = find("gradients", run_of())
    assert (finding.ok, finding.warning) == (True, False)
    assert finding.says == (
        "all 8 gradient norms are finite, 1 on average and 1.5 at most; 4 were clipped at "
        "optimizer.grad_norm = 1"
    )


@pytest.mark.parametrize("bad", [NAN, math.inf, None])
def test_a_norm_that_is_not_finite_fails(bad: float | None):
    """In a written row it is null, but it counts as an update."""
    finding = find("gradients", run_of(grad_norm=[0.5, bad]))
    assert finding.ok is False
    assert "4 of 8 gradient norms are not finite; lower optimizer.learning_rate" in finding.says


def test_updates_that_did_not_take_place():
    missing = {"grad_norm": [0.5, None], "updates": 1}
    finding = find("gradients", run_of(**missing))
    assert (finding.ok, finding.warning) == (True, True)
    assert "4 updates did not take place" in finding.says
    half = find("gradients", run_of(**missing, loss_scale={"last": 1024, "overflows": 1}))
    assert half.says.endswith("4 updates did not take place, 4 for float16 overflow")
    none = find("gradients", run_of(grad_norm=[None, None], updates=0))
    assert none.ok is False
    assert "none of 8 updates took place" in none.says


# --- the whole


def test_the_verdict_is_ok_unless_something_failed():
    good = verdict(spec_of(), run_of(), 0.0)
    assert good.ok
    assert good.iterations == 4
    names = [finding.name for finding in good.findings]
    assert names == ["reward", "ratio", "groups", "clipping", "clip range", "gradients"]
    unclear = verdict(spec_of(), run_of((0.5, 0.4, 0.5)), None)
    assert {finding.ok for finding in unclear.findings} == {True, None}
    assert unclear.ok
    assert not verdict(spec_of(), run_of(**groups_of(8)), 0.0).ok


def test_a_run_without_rows_says_that_it_cannot_tell():
    empty = verdict(spec_of(), [], 0.0)
    assert {finding.ok for finding in empty.findings if finding.name != "clip range"} == {None}


def test_the_verdict_as_json():
    judged = verdict(spec_of(), run_of((0.1, NAN, None, math.inf), **ratio_of(None)), None)
    plain = json.loads(json.dumps(judged.as_json(), allow_nan=False))
    assert plain["ok"] is False
    assert plain["iterations"] == 4
    assert [Finding(**finding) for finding in plain["findings"]] == list(judged.findings)


def test_the_table_of_the_console():
    def shown(*findings: Finding) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(verdict_table(Verdict("run", 8, findings)))
        return " ".join(text.getvalue().split())

    good, odd = Finding("ratio", True, "exact"), Finding("clipping", True, "[never]", warning=True)
    open_, bad = Finding("reward", None, "unclear slope"), Finding("groups", False, "all flat")
    assert "run, 8 iterations: fit for a full run" in shown(good)
    page = shown(good, odd, open_)
    assert "nothing failed; look at clipping, reward before a full run" in page
    assert "[never]" in page
    page = shown(good, odd, open_, bad)
    assert "not fit for a full run (groups)" in page
    for word in ("ok", "look", "unclear", "failed", "all flat"):
        assert word in page
