"""Which rows and columns of an image a reward sees, by torchvision's rounding and by its own."""

import numpy as np
import pytest
from test_rewards_pickscore import PIXELS

from flowgrpo_ray.rewards.pixels import MEAN, STD, bilinear, by_torchvision, by_transformers, centre


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from transformers import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("processor")
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return ("processor", str(folder), None)


@pytest.mark.parametrize(
    ("excess", "torchvision", "transformers"),
    [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2), (7, 4, 3), (11, 6, 5)],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_where_the_centre_begins(source, excess, torchvision, transformers, axis):
    """Of images that need no resizing, each row or column of another brightness."""
    lines = np.arange(PIXELS + excess, dtype=np.uint8)
    image = np.broadcast_to(lines[:, None, None], (PIXELS + excess, PIXELS, 3))
    image = np.ascontiguousarray(image if axis == 0 else image.swapaxes(0, 1))
    for prepare, begins in (
        (by_torchvision, torchvision),
        (bilinear, torchvision),
        (by_transformers, transformers),
    ):
        (seen,) = prepare(source)([image]).numpy()
        mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
        shown = np.rint(255 * (seen * std + mean)).astype(int)
        first = shown[:, :, 0] if axis == 0 else shown[:, 0]
        np.testing.assert_array_equal(first, [range(begins, begins + PIXELS)] * 3)


@pytest.mark.parametrize(("lacks", "before"), [(1, 0), (2, 1), (3, 1)])
def test_what_is_smaller_is_padded(lacks, before):
    image = np.ones((3, 8 - lacks, 8), np.float32)
    expected = np.pad(image, [(0, 0), (before, lacks - before), (0, 0)])
    np.testing.assert_array_equal(centre(image, 8, 8), expected)
