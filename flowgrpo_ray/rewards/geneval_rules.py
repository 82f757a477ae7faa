"""The rules of GenEval on plain data: what a prompt asks for, what was found, the verdict.

GenEval (Ghosh et al. 2023, arXiv 2310.11513). `GenevalReward` states the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo_ray.common.own_classes import nearest

OTHER_SPELLINGS = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"tvmonitor": "tv", "television": "tv", "motorbike": "motorcycle", "aeroplane": "airplane"},
    **{"sofa": "couch", "doughnut": "donut", "hairdryer": "hair drier"},
}
"""Detectors' names of the same classes, in lower case without spaces."""

ENTRY = ("class", "count", "color", "position")
"""Keys of an entry of `include` or `exclude`."""

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven"),
    *("toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
"""The 80 classes of COCO, in its order, as GenEval spells them."""


@dataclass(frozen=True)
class Wanted:
    """An entry of `include` or `exclude`.

    `target` is the place in `include` of the objects that `relation` refers to.
    """

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """What a prompt asks for."""

    tag: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()

    @property
    def names(self) -> set[str]:
        """The classes that the detections matter of."""
        return {wanted.name for wanted in (*self.include, *self.exclude)}


Box = tuple[float, float, float, float]
"""Left, top, right, bottom; right and bottom are one past the last pixel."""


@dataclass(frozen=True)
class Found:
    """A detected object; its colour is known only where it was asked."""

    name: str
    score: float
    box: Box
    colour: str | None = None
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Verdict:
    """An image against its task, under each of the three rules of `GenevalReward`."""

    graded: float
    strict: bool
    benchmark: bool


def task_of(prompt: str, metadata: Mapping[str, Any]) -> Task:
    """The task in a line of GenEval's jsonl; ValueError if it is malformed."""
    try:
        tag = _one_of(TAGS, "tag", metadata.get("tag"))
        include, exclude = metadata.get("include"), metadata.get("exclude", [])
        if not isinstance(include, list | tuple) or not include:
            raise ValueError(f"include is {include!r}, not a list of objects to show")
        if not isinstance(exclude, list | tuple):
            raise ValueError(f"exclude is {exclude!r}, not a list")
        return Task(
            tag,
            tuple(_wanted(entry, f"include[{i}]", i) for i, entry in enumerate(include)),
            tuple(_wanted(entry, f"exclude[{i}]", 0) for i, entry in enumerate(exclude)),
        )
    except ValueError as error:
        raise ValueError(f"metadata {error}, for the prompt {prompt!r}") from None


def _wanted(entry: Any, key: str, earlier: int) -> Wanted:
    """An entry with so many entries before it that a position may refer to."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{key} is {entry!r}, not an object with class and count")
    if unknown := sorted(map(str, entry.keys() - ENTRY)):
        raise ValueError(f"{key} has an unknown key {unknown[0]!r}{nearest(unknown[0], ENTRY)}")
    name = _one_of(CLASSES, f"{key}.class", entry.get("class"))
    count, colour, position = entry.get("count"), entry.get("color"), entry.get("position")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{key}.count is {count!r}, not a whole number from 1")
    if key.startswith("exclude") and (colour is not None or position is not None):
        raise ValueError(f"{key} has a color or position; only class and count can be excluded")
    if colour is not None:
        _one_of(COLOURS, f"{key}.color", colour)
    if position is None:
        return Wanted(name, count, colour)
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise ValueError(f"{key}.position is {position!r}, not [relation, index]")
    relation, target = _one_of(RELATIONS, f"{key}.position[0]", position[0]), position[1]
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < earlier:
        raise ValueError(f"{key}.position[1] is {target!r}, not the index of an earlier object")
    return Wanted(name, count, colour, relation, target)


def _one_of(known: Sequence[str], key: str, value: Any) -> str:
    if value not in known:
        raise ValueError(f"{key} is {value!r}; known: {', '.join(known)}")
    return value


def keep(objects: Iterable[Found], most: int, max_overlap: float = 1.0) -> dict[str, list[Found]]:
    """The objects that count, by class, the most certain first."""
    classes: dict[str, list[Found]] = {}
    for thing in sorted(objects, key=lambda thing: -thing.score):
        classes.setdefault(thing.name, []).append(thing)
    kept: dict[str, list[Found]] = {}
    for name, things in classes.items():
        kept[name] = []
        for thing in things[:most]:
            overlaps = (overlap(thing.box, other.box) for other in kept[name])
            if max_overlap == 1 or all(part < max_overlap for part in overlaps):
                kept[name].append(thing)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either


def relations(a: Box, b: Box, position_threshold: float = 0.1) -> set[str]:
    """How box `a` stands to box `b`: up to two of `RELATIONS`, none for boxes that are too near."""
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    sizes = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    clear = np.sign(offset) * np.maximum(np.abs(offset) - position_threshold * sizes, 0)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.hypot(*offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def judge(
    task: Task,
    found: Mapping[str, Sequence[Found]],
    position_threshold: float = 0.1,
    as_published: bool = False,
) -> Verdict:
    """The verdict on an image with the objects `found`, by class and the most certain first.

    Where a colour is asked, the first `count` objects of the class must carry theirs.
    `as_published`: `graded` has the authors' terms, which are others where a position is asked.
    """
    exact = _requirements(task, found, position_threshold, as_published=as_published)
    loose = _requirements(task, found, position_threshold, at_least=True)
    clean = all(len(found.get(no.name, ())) < no.count for no in task.exclude)
    return Verdict(
        graded=sum(exact) / len(exact),
        strict=clean and all(part == 1 for part in exact),
        benchmark=clean and all(part == 1 for part in loose),
    )


def _requirements(
    task: Task,
    found: Mapping[str, Sequence[Found]],
    position_threshold: float,
    *,
    at_least: bool = False,
    as_published: bool = False,
) -> list[float]:
    """How far each requirement is met, 1 for wholly; `at_least` overlooks objects in excess."""
    met: list[float] = []
    groups: list[Sequence[Found]] = []  # of each entry, none where anything of it was wrong
    for want in task.include:
        things = found.get(want.name, ())
        if at_least:
            things = things[: want.count]
        met.append(1 - abs(want.count - len(things)) / want.count)
        right = len(things) == want.count
        if want.colour is not None:
            matches = sum(thing.colour == want.colour for thing in things)
            met.append(matches / want.count if right else 0.0)
            right = right and matches == want.count
        if want.relation is not None:
            others = groups[want.target]
            compared = right and bool(others)
            stands = compared and all(
                want.relation in relations(thing.box, other.box, position_threshold)
                for thing in things
                for other in others
            )
            if right or want.colour is None or not as_published:
                met.append(float(stands))
            if as_published and compared and not stands:
                met.append(1.0)
            right = stands
        groups.append(things if right else ())
    return met
