"""The GenEval reward: does the image hold the objects, colours and places that its prompt names?

GenEval (Ghosh et al. 2023, arXiv 2310.11513) finds objects with a detector, names their colours
with CLIP and compares with the prompt's metadata. This module finds and names; `geneval_rules`
compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.rewards.clip import CLIP_L, ClipEncoder
from flowgrpo_ray.rewards.geneval_rules import (
    CLASSES,
    COLOURS,
    OTHER_SPELLINGS,
    TAGS,
    Found,
    Task,
    judge,
    keep,
    task_of,
)
from flowgrpo_ray.rewards.golden import Golden, Rankings
from flowgrpo_ray.rewards.loading import (
    Batch,
    Device,
    Dtype,
    ModelSize,
    Revision,
    Source,
    load,
    load_model,
    pick_device,
)
from flowgrpo_ray.rewards.pixels import by_torchvision

if TYPE_CHECKING:
    import torch

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
BLANK = 153  # #999: what stands around an object whose colour is asked
MASK_SIZE = (384, 384)  # where transformers takes the certainty of a mask
Part = Annotated[float, Field(ge=0, le=1)]


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
    at 0. `exclude` does not enter. `as_published` takes two differences back: after the 0 of a
    wrong position the server adds a 1 (3/4 in all, here 2/3), taken for an oversight; and where an
    entry asks for colour AND position, as no public prompt does, it leaves a term out unless number
    and colour are right.

    `graded: false` gives 1 or 0. With `strict` every number must be met exactly, every colour and
    position be right and no class of `exclude` be there in its number: the server's strict
    accuracy. With `strict: false` as well it is GenEval's own rule, which published scores use:
    AT LEAST `count` objects, of which only the `count` most certain are looked at further.

    What counts as found: what is certain enough, at most `max_objects` per class, the most certain
    first. Overlap is intersection over union.

    Colour: of ten colours the one nearest in CLIP, by the mean over three prompt templates, to the
    object alone on grey, cropped to its box.
    """

    reads = ("tag", "include", "exclude")

    SIZE = ModelSize(CLIP_L.parameters + 68_741_083, 717_301_334)

    def __init__(
        self,
        detector: Annotated[
            str, Field(description="Mask2Former with the 80 classes of COCO: a folder or a hub id")
        ] = "facebook/mask2former-swin-small-coco-instance",
        clip: Annotated[
            str, Field(description="names the colours: a folder or a hub id")
        ] = "openai/clip-vit-large-patch14",
        graded: Annotated[bool, Field(description="parts of a point; the table above")] = True,
        strict: Annotated[bool, Field(description="exact numbers; the table above")] = True,
        as_published: Annotated[
            bool, Field(description="the terms of the server, its 1 for a wrong position with them")
        ] = False,
        threshold: Annotated[
            Part, Field(description="certainty above which an object counts")
        ] = 0.3,
        counting_threshold: Annotated[
            Part, Field(description="the same for the tag `counting`")
        ] = 0.9,
        max_objects: Annotated[int, Field(ge=1, description="that count per class")] = 16,
        max_overlap: Annotated[
            Part,
            Field(
                description="below 1: of two boxes of a class that overlap that much, only the "
                "more certain counts"
            ),
        ] = 1.0,
        position_threshold: Annotated[
            Part, Field(description="how far apart boxes must be, in parts of their sizes")
        ] = 0.1,
        detector_revision: Revision = None,
        clip_revision: Revision = None,
        device: Device = None,
        dtype: Annotated[Dtype, Field(description="of both models' weights")] = "float32",
        batch: Batch = 8,
    ) -> None:
        self._rule = "graded" if graded else "strict" if strict else "benchmark"
        self._thresholds = dict.fromkeys(TAGS, threshold) | {"counting": counting_threshold}
        self._max_objects, self._max_overlap = max_objects, max_overlap
        self._rules = {"position_threshold": position_threshold, "as_published": as_published}
        self._batch = batch
        where = pick_device(device)
        self._detector = Detector(("detector", detector, detector_revision), where, dtype)
        self._colours = ColourClassifier(("clip", clip, clip_revision), where, dtype, batch)

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
            else float(getattr(judge(task, found, **self._rules), self._rule))
            for task, found in zip(tasks, seen, strict=True)
        ]

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError for two rules at once."""
        if options["graded"] and not options["strict"]:
            raise ValueError("strict: false is a rule of its own, it needs graded: false")
        if options["as_published"] and not options["graded"]:
            raise ValueError("as_published: true is for graded: true")

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError for a prompt whose metadata is not that of a GenEval prompt."""
        task_of(prompt, metadata)

    def golden(self) -> Rankings:
        """Nothing is found on blank grey: worth 0 by every rule."""
        blank = np.full((256, 256, 3), 128, np.uint8)
        dog = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
        return [[Golden(blank, "a photo of a dog", dog, low=0, high=0)]]


class Detector:
    """Mask2Former: the objects of images, with their masks."""

    def __init__(self, source: Source, device: torch.device, dtype: str) -> None:
        import torch
        from transformers import (
            Mask2FormerForUniversalSegmentation,
            Mask2FormerImageProcessorPil,
        )

        self._dtype = getattr(torch, dtype)
        model = load_model(Mask2FormerForUniversalSegmentation, source)
        self._model = model.to(device=device, dtype=self._dtype)
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
            pixels = inputs["pixel_values"].to(self._dtype)
            out = self._model(pixel_values=pixels, pixel_mask=inputs["pixel_mask"])
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

    def __init__(self, source: Source, device: torch.device, dtype: str, batch: int) -> None:
        self._clip = ClipEncoder.load(
            source, source, by_torchvision, device=device, dtype=dtype, batch=batch
        )
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
