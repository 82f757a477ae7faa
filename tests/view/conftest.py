"""The live page for tests that look at it: a file says which runs are its `root`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from monitors import Served


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with Served(root) as monitor:
        yield monitor


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened
