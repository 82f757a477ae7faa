"""Command lines that nobody means, against a small finished run: a message, or work."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from command_lines import COMMANDS, call, command_line, keep_inside, make_world

MANY = int(os.environ.get("FLOWGRPO_TEST_LINES", "2000"))  # command lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.mark.parametrize(
    ("seed", "count"),
    [(11, 200), pytest.param(7, MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_random_command_lines_end_in_a_message_or_work(
    world: Path, monkeypatch: pytest.MonkeyPatch, seed: int, count: int
) -> None:
    keep_inside(monkeypatch, world)
    rng, ends, commands = random.Random(seed), Counter[int](), set[tuple[str, ...]]()
    for _ in range(count):
        words = command_line(rng)
        status, text = call(words, monkeypatch, rng.choice(["utf-8", "ascii", "latin-1"]))
        assert status in (0, 1, 2), (words, text)
        assert "Traceback" not in text, (words, text)
        assert status != 2 or "rror" in text or "Usage" in text, (words, text)
        ends[status] += 1
        commands |= {path for path, _ in COMMANDS if tuple(words[: len(path)]) == path}
    assert min(ends[0], ends[2]) > count / 20, "most must be wrong, and not all"
    assert commands == {path for path, _ in COMMANDS}


def test_a_terminal_that_lacks_a_letter_shows_it_another_way(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_inside(monkeypatch, world)
    words = ["sample", "spec.yaml", "red sign", "--steps", "1", "--out", "\u5370.png"]
    status, text = call(words, monkeypatch, "ascii")
    assert (status, text.splitlines()[0]) == (0, "1 image in \\u5370.png")
    assert call(words, monkeypatch, "utf-8")[1].startswith("error: --out \u5370.png exists")
