import numpy as np
import pytest
from PIL import Image
from test_rewards_pickscore import check_deployment

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.rewards import resolve
from flowgrpo_ray.rewards.golden import check_golden, score_golden
from flowgrpo_ray.rewards.jpeg import JpegCompressibilityReward, JpegIncompressibilityReward


def test_scores_are_the_bytes_of_files_that_pillow_writes(tmp_path):
    rng = np.random.default_rng(0)
    images = np.stack(
        [
            np.full((40, 56, 3), (200, 30, 90)),
            np.tile(np.linspace(0, 255, 56)[None, :, None], (40, 1, 3)),
            rng.integers(0, 256, (40, 56, 3)),
        ]
    ).astype(np.uint8)
    images.flags.writeable = False
    sizes = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size)
    assert sorted(sizes) == sizes
    assert sizes[0] < sizes[2] / 5
    large = JpegIncompressibilityReward()(images, ["x"] * 3, [{}] * 3)
    small = JpegCompressibilityReward()(images, ["y"] * 3, [{}] * 3)
    assert large.dtype == small.dtype == np.float32
    np.testing.assert_array_equal(large, np.array([size / 1000 for size in sizes], np.float32))
    np.testing.assert_array_equal(small, np.array([-size / 5e5 for size in sizes], np.float32))
    assert JpegCompressibilityReward()(images[:0], [], []).shape == (0,)


@pytest.mark.parametrize("reward", [JpegCompressibilityReward(), JpegIncompressibilityReward()])
def test_golden_tells_the_two_apart(reward):
    rankings = reward.golden()
    scores = score_golden(reward, rankings)
    check_golden(rankings, scores)
    with pytest.raises(RewardError, match="not within"):
        check_golden(rankings, -scores)
    with pytest.raises(RewardError, match="not below"):
        check_golden(rankings, scores[::-1])


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("jpeg_compressibility", JpegCompressibilityReward),
        ("jpeg_incompressibility", JpegIncompressibilityReward),
    ],
)
def test_config_file(name, reward):
    assert resolve(name) is reward
    check_deployment(name)
