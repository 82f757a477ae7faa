"""The OCR reward: is the text that the prompt quotes legible in the image?

    reward = 1 - min(edit distance(read, target), |target|) / |target|

Both sides are lowercased and without white space, and a target that stands anywhere in what was
read counts as distance 0. This is the definition of the Flow-GRPO paper. Beyond it only that is
normalised which looks the same (accents composed or not, letters of full width); an apostrophe is
not a typographic apostrophe, so that scores compare with published ones. With `extra: penalise` the
whole of what was read is compared, so that a longer word or a page of text costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from flowgrpo_ray.rewards.golden import Golden, Rankings
from flowgrpo_ray.rewards.ocr_text import check_letters, is_read, plain, target_of
from flowgrpo_ray.rewards.paddle_reader import paddleocr_reader
from flowgrpo_ray.rewards.signs import render_plain
from flowgrpo_ray.rewards.text_readers import ReaderOptions, rapidocr_reader

ENGINES = {"rapidocr": rapidocr_reader, "paddleocr": paddleocr_reader}


class OcrReward:
    """Reads each image and compares with the text that its prompt quotes."""

    reads = ("target",)

    def __init__(
        self,
        engine: Annotated[
            Literal["rapidocr", "paddleocr"],
            Field(description="the text reader; the second needs `environment: paddleocr`"),
        ] = "rapidocr",
        detect: Annotated[
            bool,
            Field(
                description="find lines of text first. `false` only where the whole image IS one "
                "line, as a small sign: it is read as it stands, several times faster"
            ),
        ] = True,
        rec_width: Annotated[
            int | None,
            Field(
                ge=1,
                description="least width that a line, scaled to 48 rows, is padded to; by default "
                "320 with detection, which the model was trained on, and no padding without",
            ),
        ] = None,
        threads: Annotated[
            int, Field(ge=1, description="single-thread sessions that images are shared out to")
        ] = 1,
        batch: Annotated[int, Field(ge=1, description="lines that a session reads at once")] = 8,
        det_model: Annotated[
            str | None, Field(description="of `paddleocr`, which finds lines; as `rec_model`")
        ] = None,
        rec_model: Annotated[
            str | None,
            Field(
                description="of `paddleocr`, which reads lines: a folder with `inference.onnx` and "
                "`inference.yml`, or a model's name, as `PP-OCRv6_medium_rec`, that PaddleOCR "
                "downloads to `PADDLE_PDX_CACHE_HOME`; by default PP-OCRv6 small"
            ),
        ] = None,
        extra: Annotated[
            Literal["ignore", "penalise"],
            Field(
                description="text beyond the target; `penalise`: each of its letters counts in the "
                "distance, so that a longer word or a page of text scores less"
            ),
        ] = "ignore",
        unreadable: Annotated[
            Literal["refuse", "keep"],
            Field(description="prompts with letters that the reader has not"),
        ] = "refuse",
    ) -> None:
        self._whole = extra == "penalise"
        options = ReaderOptions(detect, rec_width, threads, batch, det_model, rec_model)
        self._reader = ENGINES[engine](options)

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
            [text_score(*pair, whole=self._whole) for pair in zip(texts, targets, strict=True)],
            dtype=np.float32,
        )

    def golden(self) -> Rankings:
        """A sign is worth 1 for the text that it shows, and 0 for three other digits."""
        sign = render_plain("407", "yellow", (128, 192))
        return [[Golden(sign, '"407"', low=1, high=1), Golden(sign, '"582"', low=0, high=0)]]

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError for options of the one reader with the other, or that exclude each other."""
        det_model, rec_model = options["det_model"], options["rec_model"]
        if options["engine"] != "paddleocr" and (det_model or rec_model):
            raise ValueError("det_model and rec_model are for engine: paddleocr")
        if options["rec_width"] and rec_model:
            raise ValueError("rec_width is for the default rec_model; any other brings its own")
        if det_model and not options["detect"]:
            raise ValueError("det_model finds lines, and with detect: false there are none to find")

    @staticmethod
    def check_prompt(
        prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        """ValueError for a prompt that names no text to render, or one that cannot be read."""
        target, options = target_of(prompt, metadata), options or {}
        if options.get("unreadable") != "keep":
            check_letters(target, options.get("rec_model"))

    @staticmethod
    def check_read(prompt: str, metadata: Mapping[str, Any], read: str) -> None:
        """ValueError where the model does not read the text to render."""
        if not is_read(prompt, metadata, read):
            target = target_of(prompt, metadata)
            raise ValueError(f"the text {target!r} is cut off the prompt {prompt!r}")


def text_score(read: str, target: str, *, whole: bool = False) -> float:
    """1 - min(edit distance, |target|) / |target|; 1 where `read` contains `target`, unless the
    `whole` of it is to be the target."""
    read, target = plain(read), plain(target)
    found = target in read and not whole
    distance = 0 if found else min(edit_distance(read, target), len(target))
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
