"""The GenEval reward: does the image hold the objects, colours and places that its prompt names?

GenEval (Ghosh et al. 2023, arXiv 2310.11513) finds objects with a detector, names their colours
with CLIP and compares with the prompt's metadata. `judge` holds the rules and works on plain data;
the rest of this module makes that data from images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flowgrpo_ray.errors import ModelError
from flowgrpo_ray.rewards.clip import ClipEncoder
from flowgrpo_ray.rewards.loading import Source, load, load_model, pick_device

if TYPE_CHECKING:
    import torch

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

OTHER_SPELLINGS = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"tvmonitor": "tv", "television": "tv", "motorbike": "motorcycle", "aeroplane": "airplane"},
    **{"sofa": "couch", "doughnut": "donut", "hairdryer": "hair drier"},
}
"""Detectors' names of the same classes, as `_squash` leaves them."""

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
BLANK = 153  # #999: what stands around an object whose colour is asked
MASK_SIZE = (384, 384)  # where transformers takes the certainty of a mask


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


class GenevalReward:
    """Scores an image by the objects found in it, under one of three rules.

    `graded` (the default) is the reward that Flow-GRPO trains on (Liu et al. 2025, arXiv
    2505.05470; formula as in the authors' public reward server, yifan123/reward-server): the mean
    over all requirements of the prompt, which are, per entry of `include`,

        number     1 - |count - found| / count
        colour     objects of the right colour / count, and 0 unless found = count
        position   1 if every object of the entry stands so to every object of the other entry,
                   else 0; 0 too unless everything asked before of either entry was right

    With 16 objects found where 1 is asked the number is -14: like the authors' it is not cut off
    at 0. `exclude` does not enter. Two differences: after the 0 of a wrong position the server
    adds a 1 (0.75 in all, here 2/3), which is taken for an oversight; and where an entry asks for
    colour AND position, as none of the public prompts does, it leaves a term out at times.

    `graded: false` gives 1 or 0. With `strict` every number must be met exactly, every colour and
    position be right and no class of `exclude` be there in its number: the server's strict
    accuracy. With `strict: false` as well it is GenEval's own rule, which published scores use:
    AT LEAST `count` objects, of which only the `count` most certain are looked at further.

    What counts as found: certainty above `threshold` (for the tag `counting`,
    `counting_threshold`), at most `max_objects` per class, the most certain first. `max_overlap`
    below 1 also drops an object whose box overlaps a more certain one of its class that much
    (intersection over union); GenEval leaves it at 1.

    Position: with o the offset of two boxes' centres and s the sum of their sizes,
    r = sign(o) * max(|o| - position_threshold * s, 0); left of: r.x / |o| < -0.5, and so on.
    Colour: of ten colours the one nearest in CLIP, by the mean over three prompt templates, to the
    object alone on grey, cropped to its box.

    detector, detector_revision: Mask2Former with COCO instance classes, a folder or a hub id.
    clip, clip_revision: the colour classifier.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    batch: images (and crops of objects) that go through a model at once.
    """

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-large-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        graded: bool = True,
        strict: bool = True,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_threshold: float = 0.1,
        detector_revision: str | None = None,
        clip_revision: str | None = None,
        device: str | None = None,
        batch: int = 8,
    ) -> None:
        if graded and not strict:
            raise ValueError("strict: false is a rule of its own, it needs graded: false")
        for name, value in (("max_objects", max_objects), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        parts = {"threshold": threshold, "counting_threshold": counting_threshold}
        parts |= {"max_overlap": max_overlap, "position_threshold": position_threshold}
        for name, value in parts.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self._rule = "graded" if graded else "strict" if strict else "benchmark"
        self._thresholds = dict.fromkeys(TAGS, threshold) | {"counting": counting_threshold}
        self._max_objects, self._max_overlap = max_objects, max_overlap
        self._position_threshold = position_threshold
        self._batch = batch
        where = pick_device(device)
        self._detector = Detector(("detector", detector, detector_revision), where)
        self._colours = ColourClassifier(("clip", clip, clip_revision), where, batch)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; at most 1."""
        tasks = [task_of(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        if len(tasks) != len(images):
            raise ValueError(f"{len(images)} images, {len(tasks)} prompts")
        scores: list[float] = []
        for i in range(0, len(images), self._batch):
            scores += self._score(images[i : i + self._batch], tasks[i : i + self._batch])
        return np.array(scores, dtype=np.float32)

    def _score(self, images: np.ndarray, tasks: Sequence[Task]) -> list[float]:
        thresholds = [self._thresholds[task.tag] for task in tasks]
        names = [task.names for task in tasks]
        seen = [
            None if objects is None else keep(objects, self._max_objects, self._max_overlap)
            for objects in self._detector(images, names, thresholds)
        ]
        self._colours.fill_in(images, tasks, seen)
        return [
            float("nan")
            if found is None
            else float(getattr(judge(task, found, self._position_threshold), self._rule))
            for task, found in zip(tasks, seen, strict=True)
        ]

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError for a prompt whose metadata is not that of a GenEval prompt."""
        task_of(prompt, metadata)


# --- the rules, on plain data


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
    task: Task, found: Mapping[str, Sequence[Found]], position_threshold: float = 0.1
) -> Verdict:
    """The verdict on an image with the objects `found`, by class and the most certain first.

    Where a colour is asked, the first `count` objects of the class must carry theirs.
    """
    exact = _requirements(task, found, position_threshold, at_least=False)
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
    at_least: bool,
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
            right = right and bool(others)
            right = right and all(
                want.relation in relations(thing.box, other.box, position_threshold)
                for thing in things
                for other in others
            )
            met.append(float(right))
        groups.append(things if right else ())
    return met


# --- from images to objects


class Detector:
    """Mask2Former: the objects of images, with their masks."""

    def __init__(self, source: Source, device: torch.device) -> None:
        from transformers import (
            Mask2FormerForUniversalSegmentation,
            Mask2FormerImageProcessorPil,
        )

        self._model = load_model(Mask2FormerForUniversalSegmentation, source).to(device)
        self._prepare = load(Mask2FormerImageProcessorPil, source)
        self._names = class_names(self._model.config.id2label, source)
        self._device = device

    def __call__(
        self, images: np.ndarray, names: Sequence[set[str]], thresholds: Sequence[float]
    ) -> list[list[Found] | None]:
        """Per image the objects of its `names` above its threshold; None: the model failed."""
        import torch

        inputs = self._prepare(
            images=list(images), input_data_format="channels_last", return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            out = self._model(**inputs)
            found: list[list[Found] | None] = []
            for logits, masks, wanted, threshold in zip(
                out.class_queries_logits, out.masks_queries_logits, names, thresholds, strict=True
            ):
                if logits.isfinite().all() and masks.isfinite().all():
                    labels = {i: name for i, name in self._names.items() if name in wanted}
                    found.append(objects_of(logits, masks, labels, threshold, images.shape[1:3]))
                else:  # a NaN is above no threshold: it would pass for an empty image
                    found.append(None)
        return found


def objects_of(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    labels: Mapping[int, str],
    threshold: float,
    size: tuple[int, int],
) -> list[Found]:
    """The objects with one of `labels` that the queries of ONE image stand for.

    The same as transformers' `post_process_instance_segmentation`, but on the device, and masks
    are only enlarged where they can matter. class_logits: [q, classes + 1], mask_logits:
    [q, h, w], size: height and width of the image.
    """
    from torch.nn.functional import interpolate

    queries, classes = class_logits.shape[0], class_logits.shape[1] - 1
    certain, places = class_logits.float().softmax(-1)[:, :-1].flatten().topk(queries)
    chosen = [
        k
        for k, (score, place) in enumerate(zip(certain.tolist(), places.tolist(), strict=True))
        if score > threshold and place % classes in labels
    ]
    if not chosen:
        return []
    certain, places = certain[chosen], places[chosen]
    logits = mask_logits[places // classes].float()[None]
    logits = interpolate(logits, size=MASK_SIZE, mode="bilinear", align_corners=False)[0]
    inside = (logits > 0).float()
    area = inside.sum(dim=(1, 2))
    certain = certain * (logits.sigmoid() * inside).sum(dim=(1, 2)) / (area + 1e-6)
    masks = interpolate(inside[None], size=size, mode="nearest")[0].bool().cpu().numpy()
    found: list[Found] = []
    for score, place, mask in zip(certain.tolist(), places.tolist(), masks, strict=True):
        if score > threshold and mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            left, top, right, bottom = (float(edge) for edge in box)
            name = labels[place % classes]
            found.append(Found(name, score, (left, top, right, bottom), mask=mask))
    return found


def class_names(id2label: Mapping[int, str], source: Source) -> dict[int, str]:
    """GenEval's name of each of the detector's labels that has one; all 80 must be there."""
    spellings = {_squash(name): name for name in CLASSES} | OTHER_SPELLINGS
    names = {
        i: spellings[_squash(label)] for i, label in id2label.items() if _squash(label) in spellings
    }
    missing = [name for name in CLASSES if name not in names.values()]
    if missing:
        option, place, _ = source
        raise ModelError(
            f"{option} = {place!r}: the detector's labels (id2label) lack {len(missing)} of the "
            f"{len(CLASSES)} classes of COCO: {', '.join(missing)}. Give a Mask2Former that was "
            "trained on COCO instances"
        )
    return names


def _squash(label: str) -> str:
    """Letters only, small: `Dining-Table` and `diningtable` are one."""
    return "".join(letter for letter in label.lower() if letter.isalpha())


class ColourClassifier:
    """CLIP without training: which of `COLOURS` an object has."""

    def __init__(self, source: Source, device: torch.device, batch: int) -> None:
        self._clip = ClipEncoder(source, source, device=device, dtype="float32", batch=batch)
        self._known: dict[str, torch.Tensor] = {}

    def fill_in(
        self,
        images: np.ndarray,
        tasks: Sequence[Task],
        seen: list[dict[str, list[Found]] | None],
    ) -> None:
        """Gives the objects of `seen` their colours where a task asks and enough were found.

        An image whose colours cannot be told becomes None.
        """
        asked: list[tuple[int, str, int]] = []  # image, class, place in its list
        for i, (task, found) in enumerate(zip(tasks, seen, strict=True)):
            counts: dict[str, int] = {}
            for want in task.include:
                things = [] if found is None else found.get(want.name, [])
                if want.colour is not None and len(things) >= want.count:
                    counts[want.name] = max(counts.get(want.name, 0), want.count)
            asked += [(i, name, k) for name, count in counts.items() for k in range(count)]
        if not asked:
            return
        things = [(i, _at(seen, i)[name][k]) for i, name, k in asked]
        vectors = self._clip.images([cut_out(images[i], thing) for i, thing in things])
        for (i, name, k), (_, thing), vector in zip(asked, things, vectors, strict=True):
            nearness = self._vectors(name) @ vector
            found = seen[i]
            if not nearness.isfinite().all():
                seen[i] = None
            elif found is not None:
                found[name][k] = replace(thing, colour=COLOURS[int(nearness.argmax())])

    def _vectors(self, name: str) -> torch.Tensor:
        """A unit vector per colour, [10, d], for objects of a class."""
        if name not in self._known:
            texts = [text.format(colour=c, name=name) for c in COLOURS for text in TEMPLATES]
            means = self._clip.texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1)
            self._known[name] = means / means.norm(dim=-1, keepdim=True)
        return self._known[name]


def _at(seen: Sequence[dict[str, list[Found]] | None], i: int) -> dict[str, list[Found]]:
    found = seen[i]
    assert found is not None
    return found


def cut_out(image: np.ndarray, thing: Found) -> np.ndarray:
    """The object alone on grey, uint8 [h, w, 3], from an image uint8 [H, W, 3]."""
    assert thing.mask is not None
    left, top, right, bottom = (int(edge) for edge in thing.box)
    alone = np.where(thing.mask[..., None], image, np.uint8(BLANK))
    return np.ascontiguousarray(alone[top:bottom, left:right])
