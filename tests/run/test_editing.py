"""Images that a model changes, outside of a run: drawn, scored beside their sources, shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from editing import FAMILY, add_family, write_image
from PIL import Image
from tiny_runs import SIZE, small_spec

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.sources import pictures
from flowgrpo_ray.common.types import Edit
from flowgrpo_ray.rewards.preservation import PreservationReward
from flowgrpo_ray.run.inference import generate, load_trained, score
from flowgrpo_ray.run.tracking import save_samples, save_sources
from flowgrpo_ray.spec.prompts import Prompt
from flowgrpo_ray.spec.sources import requests_for

SIGN = 'red sign "407"'


def test_an_edit_is_drawn_from_its_source_and_scored_beside_it(monkeypatch, tmp_path: Path):
    add_family(monkeypatch)
    spec = small_spec(
        f"model.family={FAMILY}", "rewards={preservation: {}, sign_colour: {weight: 1}}"
    )
    files = [write_image(tmp_path / f"{n}.png", (n, 0, 0), (64, 96)) for n in (10, 250)]
    dark, light = (requests_for(spec, [SIGN], [file])[0] for file in files)
    assert isinstance(dark, Edit)
    assert isinstance(light, Edit)
    policy = load_trained(spec, None, "ema")
    one = generate(policy, spec, [dark, light], 4, 0, 2)
    other = generate(policy, spec, [light, light], 4, 0, 2)
    assert one.shape == (2, *SIZE, 3)
    assert (one[0] != other[0]).any()
    assert (one[1] == other[1]).all()

    prompts = [Prompt(of.text, {}, images=of.sources) for of in (dark, light)]
    found = score(spec, one, prompts)
    sources = np.stack([pictures(dark), pictures(light)])
    expected = PreservationReward()(one, [SIGN] * 2, [{}] * 2, sources)
    np.testing.assert_array_equal(found["preservation"], expected)
    assert np.isfinite(found["sign_colour"]).all()

    with pytest.raises(PromptError, match=r"--image: 0 source images; .* takes 1 to 2 with each"):
        requests_for(spec, [SIGN], [])
    with pytest.raises(PromptError, match=r"--image: .*No such file"):
        requests_for(spec, [SIGN], [tmp_path / "no.png"])
    assert requests_for(small_spec(), [SIGN], []) == [SIGN]


def test_sources_lie_beside_the_samples_tile_for_tile(tmp_path: Path):
    levels = np.arange(6, dtype=np.uint8).reshape(3, 2)
    sources = np.broadcast_to(levels[..., None, None, None], (3, 2, 4, 5, 3)).copy()
    save_sources(tmp_path, sources, columns=2)
    save_samples(tmp_path, 0, sources[:, 0], ["a", "b", "c"], {}, columns=2)
    about = json.loads((tmp_path / "samples" / "sources.json").read_text())
    assert about == {"tile": [4, 10], "columns": 2, "per_image": 2}
    grid = np.array(Image.open(tmp_path / "samples" / "sources.png"))[::4, ::5, 0]
    assert grid.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    shown = json.loads((tmp_path / "samples" / "iteration-000000.json").read_text())
    assert (shown["tile"], shown["columns"]) == ([4, 5], 2)
