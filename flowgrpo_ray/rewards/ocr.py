"""The OCR reward: is the text that the prompt quotes legible in the image?

    reward = 1 - min(edit distance(read, target), |target|) / |target|

Both sides are lowercased and without white space, and a target that stands anywhere in what was
read counts as distance 0. This is the definition of the Flow-GRPO paper; nothing else is
normalised (an apostrophe is not a typographic apostrophe), so that scores compare with published
ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class OcrReward:
    """Reads each image and compares with the text that its prompt quotes.

    engine: the text reader, `rapidocr`.
    detect: find lines of text first. Turn it off only where the whole image IS one line of text,
        such as a small sign: then it is read as it stands, several times faster.
    rec_width: least width that a line, scaled to 48 rows, is padded to before it is read. By
        default 320 with detection, which the model was trained on; without, no padding.
    threads: images are shared out to that many single-thread sessions.
    batch: lines read at once by a session.
    """

    def __init__(
        self,
        engine: str = "rapidocr",
        detect: bool = True,
        rec_width: int | None = None,
        threads: int = 1,
        batch: int = 8,
    ) -> None:
        if engine in PLANNED_ENGINES:
            raise ValueError(f"engine {engine!r} is not available yet in this version")
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; known: {', '.join(ENGINES)}")
        for name, value in (("rec_width", rec_width), ("threads", threads), ("batch", batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._reader: TextReader = ENGINES[engine](detect, rec_width, threads, batch)

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores in [0, 1], float32 [b], of `images`, uint8 [b, H, W, 3]."""
        targets = [target_of(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        texts = self._reader.read(images)
        return np.array(
            [text_score(text, target) for text, target in zip(texts, targets, strict=True)],
            dtype=np.float32,
        )

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
        """ValueError for a prompt that names no text to render."""
        target_of(prompt, metadata)


def quoted_target(prompt: str) -> str:
    """The text to render: the FIRST part of `prompt` in double quotes, straight or curly.

    Typographic single quotes and apostrophes belong to the text. A prompt with several quoted
    parts whose others matter needs the metadata key `target`.
    """
    match = QUOTED.search(prompt)
    if match is None:
        raise ValueError(f'no text in double quotes ("...") in the prompt {prompt!r}')
    target = match[1] if match[1] is not None else match[2]
    if not _plain(target):
        raise ValueError(f"the text in double quotes is empty in the prompt {prompt!r}")
    return target


def target_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text to render: the metadata's `target` if there is one, else the quoted part."""
    if "target" not in metadata:
        return quoted_target(prompt)
    target = metadata["target"]
    if not isinstance(target, str) or not _plain(target):
        raise ValueError(f"metadata 'target' is {target!r}, not a text, for the prompt {prompt!r}")
    return target


def text_score(read: str, target: str) -> float:
    """1 - min(edit distance, |target|) / |target|; 1 where `read` contains `target`."""
    read, target = _plain(read), _plain(target)
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions from `a` to `b`."""
    previous = list(range(len(b) + 1))
    for row, char_a in enumerate(a, 1):
        current = [row]
        for column, char_b in enumerate(b, 1):
            substituted = previous[column - 1] + (char_a != char_b)
            current.append(min(previous[column] + 1, current[-1] + 1, substituted))
        previous = current
    return previous[-1]


def _plain(text: str) -> str:
    """Lowercased, without any white space."""
    return "".join(text.lower().split())


class TextReader(Protocol):
    """Reads what stands in images; an image without text gives ''. A failure is an exception."""

    def read(self, images: np.ndarray) -> list[str]:
        """One text per image of uint8 [b, H, W, 3], lines in reading order."""
        ...


class RapidOcrReader:
    """RapidOCR with the PP-OCR models of its wheel, on the CPU; loads nothing from the network."""

    def __init__(self, detect: bool, rec_width: int | None, threads: int, batch: int) -> None:
        # Without detection a width of 1 is always exceeded by the image's own: no padding.
        width = rec_width or (320 if detect else 1)
        self._detect = detect
        self._engines = [_rapidocr(width, batch) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def read(self, images: np.ndarray) -> list[str]:
        """One text per image of uint8 [b, H, W, 3], lines in reading order."""
        read = self._read_lines if self._detect else self._read_signs
        bgr = np.ascontiguousarray(images[..., ::-1])
        shares = [share for share in np.array_split(bgr, len(self._engines)) if len(share)]
        return [text for texts in self._pool.map(read, self._engines, shares) for text in texts]

    @staticmethod
    def _read_lines(engine: Any, bgr: np.ndarray) -> list[str]:
        texts = []
        for image in bgr:
            # The engine remembers flags from call to call, so each call states them all.
            found = engine(image, use_det=True, use_cls=False, use_rec=True)
            if found.txts is None:
                texts.append("")
            else:
                texts.append(" ".join(found.txts[i] for i in reading_order(found.boxes)))
        return texts

    @staticmethod
    def _read_signs(engine: Any, bgr: np.ndarray) -> list[str]:
        from rapidocr.ch_ppocr_rec import TextRecInput

        return list(engine.text_rec(TextRecInput(img=list(bgr), return_word_box=False)).txts)


def _rapidocr(rec_width: int, batch: int) -> Any:
    """A RapidOCR engine with one thread, its models loaded and run once."""
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
            # Detect at the image's own resolution; the default enlarges to 736 rows, 4x slower.
            "Det.limit_type": "min",
            "Det.limit_side_len": 64,
            "Rec.rec_img_shape": [3, 48, rec_width],
            "Rec.rec_batch_num": batch,
        }
    )
    engine(np.zeros((48, 48, 3), np.uint8), use_det=False, use_cls=False, use_rec=True)
    return engine


def reading_order(boxes: np.ndarray) -> list[int]:
    """Order of text boxes, [n, 4, 2] corners (x, y): lines from the top, each from the left.

    A box belongs to the line above it if its middle lies higher than the bottom of that line's
    first box.
    """
    top, bottom = boxes[:, :, 1].min(axis=1), boxes[:, :, 1].max(axis=1)
    middle, left = (top + bottom) / 2, boxes[:, :, 0].min(axis=1)
    lines: list[list[int]] = []
    for i in np.argsort(middle, kind="stable").tolist():
        if lines and middle[i] < bottom[lines[-1][0]]:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=lambda i: left[i])]


ENGINES: dict[str, type[RapidOcrReader]] = {"rapidocr": RapidOcrReader}
PLANNED_ENGINES = ("paddleocr",)
