import random

import numpy as np
import pytest

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.rewards.golden import check_golden, golden_of, score_golden
from flowgrpo_ray.rewards.sign_colour import SignColourReward, named_colour
from flowgrpo_ray.rewards.signs import COLOURS, colour_error, render


def _plain(colour, size=(32, 48)):
    return np.full((1, *size, 3), colour, dtype=np.uint8)


def test_the_named_colour_itself_scores_one_at_any_size():
    for name, colour in COLOURS.items():
        for size in ((32, 48), (512, 512), (3, 5)):
            score = SignColourReward()(_plain(colour, size), [f'{name} sign "407"'], [{}])
            assert score.dtype == np.float32
            assert score.tolist() == [1.0]


def test_score_by_hand():
    # red is (225, 70, 60): black differs by 225 + 70 + 60 of 3 * 255
    score = SignColourReward()(_plain((0, 0, 0)), ['red sign "407"'], [{}])
    assert score[0] == np.float32(1 - 355 / 765)


def test_text_in_the_middle_does_not_count_and_the_frame_does():
    image = _plain(COLOURS["blue"])
    image[:, 4:-4] = 0
    assert SignColourReward()(image, ['blue sign "111"'], [{}])[0] == 1
    for frame in (slice(None, 4), slice(-4, None)):
        spoilt = image.copy()
        spoilt[:, frame] = 0
        assert SignColourReward()(spoilt, ['blue sign "111"'], [{}])[0] < 0.8


def test_agrees_with_the_colour_error_of_the_signs_and_does_not_depend_on_the_batch():
    rng = random.Random(0)
    images = np.stack([render("407", colour, rng) for colour in COLOURS])
    prompts = [f'{colour} sign "407"' for colour in COLOURS]
    scores = SignColourReward()(images, prompts, [{}] * 6)
    for i, colour in enumerate(COLOURS):
        assert scores[i] == pytest.approx(1 - colour_error(images[i], colour) / 255, abs=1e-6)
        assert scores[i] == SignColourReward()(images[i : i + 1], prompts[i : i + 1], [{}])[0]


def test_colour_is_looked_for_outside_the_quoted_text():
    assert named_colour('White sign "red"') == "white"
    assert named_colour("a sign “blue”, pink") == "pink"


@pytest.mark.parametrize("prompt", ['sign "407"', 'sign "red"', "", "redish sign"])
def test_prompt_without_colour_is_refused(prompt):
    with pytest.raises(ValueError, match="no colour of red, green"):
        SignColourReward.check_prompt(prompt, {})


def test_golden_images_by_hand():
    """Of red (225, 70, 60) blue (90, 140, 235) differs by 135 + 70 + 175 of 3 * 255."""
    rankings = golden_of(SignColourReward())
    scores = score_golden(SignColourReward(), rankings)
    assert scores.tolist() == [1, np.float32(1 - 380 / 765)]
    check_golden(rankings, scores)
    with pytest.raises(RewardError, match="not within"):
        check_golden(rankings, scores[::-1])
    with pytest.raises(RewardError, match="not below the 1"):
        check_golden(rankings, np.ones(2, np.float32))
