"""What reads text in images: sharing out to threads, the order of lines, and RapidOCR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

TRAINED_WIDTH = 320  # least columns of a line of 48 rows that recognition models were trained on
MIN_CONFIDENCE = 0.5  # of a line that detection found; one below it is not taken for text


@dataclass(frozen=True)
class ReaderOptions:
    """As `OcrReward` describes them."""

    detect: bool = True
    rec_width: int | None = None
    threads: int = 1
    batch: int = 8
    det_model: str | None = None
    rec_model: str | None = None

    @property
    def least_width(self) -> int:
        """Columns that a line is padded to; a width of 1 is always exceeded: no padding."""
        return self.rec_width or (TRAINED_WIDTH if self.detect else 1)


class TextReader:
    """Shares images out to single-thread engines; a failure is an exception.

    read_share: gives one text per BGR image, uint8 [b, H, W, 3], by one engine; '' for no text.
    """

    def __init__(
        self, engines: Sequence[Any], read_share: Callable[[Any, np.ndarray], list[str]]
    ) -> None:
        self._engines = engines
        self._read_share = read_share
        self._pool = ThreadPoolExecutor(len(engines))

    def read(self, images: np.ndarray) -> list[str]:
        """One text per image of uint8 [b, H, W, 3], lines in reading order."""
        bgr = np.ascontiguousarray(images[..., ::-1])
        shares = [share for share in np.array_split(bgr, len(self._engines)) if len(share)]
        texts = self._pool.map(self._read_share, self._engines, shares)
        return [text for share in texts for text in share]


def rapidocr_reader(options: ReaderOptions) -> TextReader:
    """RapidOCR with the PP-OCR models of its wheel, on the CPU; loads nothing from the network."""
    engines = [_rapidocr(options) for _ in range(options.threads)]
    return TextReader(engines, _rapidocr_lines if options.detect else _rapidocr_signs)


def _rapidocr(options: ReaderOptions) -> Any:
    """A RapidOCR engine with one thread, its models loaded and run once."""
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": MIN_CONFIDENCE,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
            # Detect at the image's own resolution; the default enlarges to 736 rows, 4x slower.
            "Det.limit_type": "min",
            "Det.limit_side_len": 64,
            "Rec.rec_img_shape": [3, 48, options.least_width],
            "Rec.rec_batch_num": options.batch,
        }
    )
    engine(np.zeros((48, 48, 3), np.uint8), use_det=False, use_cls=False, use_rec=True)
    return engine


def _rapidocr_lines(engine: Any, bgr: np.ndarray) -> list[str]:
    texts = []
    for image in bgr:
        # The engine remembers flags from call to call, so each call states them all.
        found = engine(image, use_det=True, use_cls=False, use_rec=True)
        if found.txts is None:
            texts.append("")
        else:
            texts.append(" ".join(found.txts[i] for i in reading_order(found.boxes)))
    return texts


def _rapidocr_signs(engine: Any, bgr: np.ndarray) -> list[str]:
    from rapidocr.ch_ppocr_rec import TextRecInput

    return list(engine.text_rec(TextRecInput(img=list(bgr), return_word_box=False)).txts)


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
