"""Structural similarity to the source, against its formula written out, and what a mask leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_rewards_pickscore import check_deployment

from flowgrpo_ray.common.sources import mask_url
from flowgrpo_ray.rewards import ask, build, needs_sources, prompt_check, takes_sources
from flowgrpo_ray.rewards.calibration import calibration_set, check_reward
from flowgrpo_ray.rewards.golden import check_golden, golden_of, score_golden
from flowgrpo_ray.rewards.preservation import PreservationReward, similarity
from flowgrpo_ray.serving import service
from flowgrpo_ray.serving.args import RewardServiceArgs

SIZE = (24, 31)
RNG = np.random.default_rng(0)
SOURCE, OTHER = RNG.integers(0, 256, (2, *SIZE, 3), np.uint8)


def score(image: np.ndarray, source: np.ndarray = SOURCE, **metadata: object) -> float:
    found = PreservationReward()(image[None], ["x"], [metadata], source[None, None])
    assert found.dtype == np.float32
    return float(found[0])


def test_each_pixel_is_the_formula_over_its_11_by_11_neighbours():
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    row, column, channel = 9, 14, 2
    near = np.s_[row - 5 : row + 6, column - 5 : column + 6, channel]
    x, y = SOURCE[near].astype(float), OTHER[near].astype(float)
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    both = (window * (x - mx) * (y - my)).sum()
    c1, c2 = 6.5025, 58.5225
    expected = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert similarity(SOURCE, OTHER)[row, column, channel] == pytest.approx(expected, rel=1e-9)
    assert score(OTHER) == pytest.approx(similarity(SOURCE, OTHER).mean(), rel=1e-6)


def test_what_can_be_computed_by_hand():
    assert score(SOURCE) == 1.0
    light, dark = (np.full((*SIZE, 3), value, np.uint8) for value in (200, 100))
    by_hand = (2 * 200 * 100 + 6.5025) / (200**2 + 100**2 + 6.5025)  # no variance: luminance alone
    assert score(light, dark) == pytest.approx(by_hand, rel=1e-6)
    assert score(255 - SOURCE) < 0, "where one is light the other is dark"


def test_what_may_change_has_no_part_in_the_score():
    mask = np.zeros(SIZE, bool)
    mask[4:12, 8:20] = True
    edited = SOURCE.copy()
    edited[mask] = OTHER[mask]
    assert score(edited) < 1
    assert score(edited, mask=mask_url(mask)) == 1.0
    spoilt, both = SOURCE.copy(), edited.copy()
    spoilt[20:], both[20:] = OTHER[20:], OTHER[20:]
    assert score(both, mask=mask_url(mask)) == score(spoilt, mask=mask_url(mask)) < 1
    assert np.isnan(score(OTHER, mask=mask_url(np.ones(SIZE, bool))))
    with pytest.raises(ValueError, match="a mask is text that begins with"):
        prompt_check("preservation")("x", {"mask": "mask.png"})


def test_it_needs_sources_and_passes_its_checks():
    assert needs_sources("preservation")
    assert takes_sources("vlm_judge")
    assert takes_sources("http")
    assert takes_sources("rank")
    assert not needs_sources("vlm_judge")
    assert needs_sources("rank", {"reward": "preservation"})
    assert not needs_sources("rank", {"reward": "ocr"})
    assert [needs_sources("http", {"sources": sends}) for sends in (True, False)] == [True, False]
    assert not takes_sources("ocr")
    reward = build("preservation")
    rankings = golden_of(reward)
    check_golden(rankings, score_golden(reward, rankings))
    report = check_reward(reward, calibration_set((48, 64)), with_sources=True)
    assert report.passed, report.findings
    assert report.clean == 1.0


def test_a_rank_is_that_of_the_reward_with_its_sources():
    ranked = build("rank", {"reward": "preservation"})
    images = np.stack([OTHER, SOURCE])
    sources = np.stack([SOURCE[None]] * 2)
    assert ask(ranked, images, ["x"] * 2, [{}] * 2, sources).tolist() == [0.0, 1.0]
    plain = build("rank", {"reward": "jpeg_compressibility"})
    assert len(ask(plain, images, ["x"] * 2, [{}] * 2, sources)) == 2


def test_a_deployment_may_name_pictures_of_its_own(tmp_path: Path):
    """Their sources are brought to their size."""
    source = np.repeat(np.repeat(RNG.integers(0, 256, (6, 8, 3), np.uint8), 8, 0), 8, 1)
    Image.fromarray(source).save(tmp_path / "image.png")
    Image.fromarray(source.repeat(2, 0).repeat(2, 1)).save(tmp_path / "source.png")
    golden = {"prompt": "", "image": str(tmp_path / "image.png"), "low": 0.9}
    golden |= {"sources": [str(tmp_path / "source.png")]}
    args = RewardServiceArgs.model_validate({"name": "preservation", "golden": [golden]})
    reward = build("preservation")
    rankings = service._golden(args, reward)
    check_golden(rankings, score_golden(reward, rankings))


def test_config_file():
    check_deployment("preservation")
