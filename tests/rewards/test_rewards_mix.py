import subprocess
import sys

import numpy as np
import pytest

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.rewards import BUILTIN, build, check_options, prompt_check, resolve
from flowgrpo_ray.rewards import weighted_total as total
from flowgrpo_ray.rewards.sign_colour import SignColourReward

NAN = float("nan")


def _scores(*values):
    return np.array(values, dtype=np.float32)


def test_weighted_total_by_hand():
    result = total({"a": _scores(1, 0.5), "b": _scores(0.25, 1)}, {"a": 2.0, "b": -1.0})
    assert result.dtype == np.float32
    assert result.tolist() == [1.75, 0.0]


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_a_missing_score_makes_the_total_missing(bad):
    result = total({"a": _scores(1, bad), "b": _scores(1, 1)}, {"a": 1.0, "b": 1.0})
    np.testing.assert_array_equal(result, _scores(2, NAN))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_weight_zero_is_watched_only(bad):
    result = total({"a": _scores(1, 2), "gold": _scores(bad, 7)}, {"a": 1.0, "gold": 0.0})
    assert result.tolist() == [1, 2]


def test_infinities_of_both_signs_do_not_cancel():
    inf = float("inf")
    result = total({"a": _scores(inf), "b": _scores(inf)}, {"a": 1.0, "b": -1.0})
    assert np.isnan(result).all()


def test_weighted_total_refuses_names_and_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"scores of \['a'\], but weights of \['b'\]"):
        total({"a": _scores(1)}, {"b": 1.0})
    with pytest.raises(ValueError, match="one shape"):
        total({"a": _scores(1), "b": _scores(1, 2)}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="one shape"):
        total({}, {})


def test_builtin_names_resolve_to_classes():
    assert resolve("sign_colour") is SignColourReward
    assert resolve("flowgrpo_ray.rewards.sign_colour:SignColourReward") is SignColourReward
    for name in BUILTIN:
        assert callable(prompt_check(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sign_color", "did you mean 'sign_colour'"),
        ("zzz", "unknown reward 'zzz'; built in: ocr"),
        ("no.such.module:Thing", "cannot import 'no.such.module'"),
        ("flowgrpo_ray.rewards.ocr:OcrRewards", "no class 'OcrRewards', did you mean 'OcrReward'"),
        ("flowgrpo_ray.rewards.ocr:quoted_target", "no class 'quoted_target'"),
    ],
)
def test_unknown_reward_is_named(name, message):
    with pytest.raises(SpecError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        ("ocr", {"detct": False}, "no option 'detct', did you mean 'detect'"),
        ("sign_colour", {"detect": False}, "no option 'detect'; options: none"),
        ("reward_samples:BadConstructor", {"size": 3}, "size=3 is not served here"),
        ("ocr", {"engine": "tesseract"}, "engine: .*'rapidocr' or 'paddleocr', not 'tesseract'"),
        ("ocr", {"threads": 0}, "threads: .*greater than or equal to 1, not 0"),
    ],
)
def test_bad_options_are_named(reward, options, message):
    with pytest.raises(SpecError, match=message):
        build(reward, options)


def test_options_are_checked_without_building():
    check_options("reward_samples:BadConstructor", {"size": 3})
    with pytest.raises(SpecError, match="did you mean 'size'"):
        check_options("reward_samples:BadConstructor", {"sise": 3})


def test_prompt_check_of_a_class_and_of_a_class_without_one():
    with pytest.raises(ValueError, match="double quotes"):
        prompt_check("ocr")("no text here", {})
    prompt_check("reward_samples:BadConstructor")("anything", {})


def test_rewards_import_no_heavy_library():
    code = (
        "import sys, flowgrpo_ray.rewards as r; [r.prompt_check(name) for name in r.BUILTIN];"
        "print([m for m in ('torch', 'ray', 'onnxruntime', 'rapidocr', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
