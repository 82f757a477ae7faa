"""A policy that changes images, for tests: the embedded model, moved by what it is to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.sd3 import SD3Policy
from flowgrpo_ray.spec.families import FAMILIES

FAMILY = "sd3_edit"


class EditingSD3(SD3Policy):
    """Its pooled embedding is moved by the mean colour of the images."""

    sources: ClassVar[range] = range(1, 3)

    def encode_edit(self, prompt: str, sources: Images) -> Condition:
        (condition,) = self.encode([prompt])
        assert sources.dtype == np.uint8
        assert sources.ndim == 4
        embeds, pooled = condition["embeds"], condition["pooled"]
        moved = pooled + np.float32(sources.mean() / 255)
        return {**condition, "embeds": embeds, "pooled": moved, "seen": sources[:, 0, 0].copy()}

    def collate(self, conditions: Sequence[Condition]):
        known = [{n: a for n, a in of.items() if n != "seen"} for of in conditions]
        return super().collate(known)


def add_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the family be known to this process."""
    adapter = f"{__name__}:{EditingSD3.__name__}"
    family = replace(FAMILIES["sd3"], adapter=adapter, sources=EditingSD3.sources)
    monkeypatch.setitem(FAMILIES, FAMILY, family)


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 48)) -> Path:
    """A file of one colour, ``size`` (height, width)."""
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(path)
    return path
