"""PaddleOCR 3 as a text reader, on onnxruntime: no paddlepaddle is needed.

It lives in an environment of its own, because it wants another numpy and another OpenCV than the
base environment holds.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowgrpo_ray.common.errors import ModelError, RewardEnvironmentError
from flowgrpo_ray.common.paths import expand
from flowgrpo_ray.rewards.ocr_text import WHEEL_MODEL, wheel_file, wheel_letters
from flowgrpo_ray.rewards.text_readers import (
    MIN_CONFIDENCE,
    ReaderOptions,
    TextReader,
    reading_order,
)

RUNTIME: dict[str, Any] = {
    "engine": "onnxruntime",
    "engine_config": {"intra_op_num_threads": 1, "inter_op_num_threads": 1},
    "device": "cpu",
}
# How the inference.yml of PaddleOCR's own models prepares an image.
DECODE = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NORMALIZE = {"NormalizeImage": {"mean": MEAN, "std": STD, "scale": "1./255.", "order": "hwc"}}


@dataclass(frozen=True)
class Model:
    """A model of PaddleOCR; without a folder PaddleOCR looks in its cache or downloads it."""

    name: str
    folder: str | None = None


def paddleocr_reader(options: ReaderOptions) -> TextReader:
    """Engines with the PP-OCRv6 small models of RapidOCR's wheel, or those that options name."""
    _package()
    with tempfile.TemporaryDirectory() as scratch:
        # What is here the engines read once, when they are made.
        rec = _named("rec_model", options.rec_model) or _recogniser(scratch, options.least_width)
        if not options.detect:
            engines = [_lines_engine(rec) for _ in range(options.threads)]
            return TextReader(engines, functools.partial(_read_signs, batch=options.batch))
        det = _named("det_model", options.det_model) or _detector(scratch)
        engines = [_page_engine(det, rec, options.batch) for _ in range(options.threads)]
        return TextReader(engines, _read_pages)


def _package() -> Any:
    """The package paddleocr, which the base environment does not have."""
    try:
        return importlib.import_module("paddleocr")
    except ImportError as error:
        raise RewardEnvironmentError(
            f"engine 'paddleocr': cannot import paddleocr ({error}). It has an environment of its "
            "own: build it with `flowgrpo-ray rewards env build paddleocr` on every machine, and "
            "write `environment: paddleocr` beside the reward, in the spec or the Serve config"
        ) from error


def _page_engine(det: Model, rec: Model, batch: int) -> Any:
    return _package().PaddleOCR(
        text_detection_model_name=det.name,
        text_detection_model_dir=det.folder,
        text_recognition_model_name=rec.name,
        text_recognition_model_dir=rec.folder,
        text_recognition_batch_size=batch,
        # As RapidOCR is told: at the image's own resolution, without doubtful lines.
        text_det_limit_type="min",
        text_det_limit_side_len=64,
        text_rec_score_thresh=MIN_CONFIDENCE,
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
        **RUNTIME,
    )


def _read_pages(engine: Any, bgr: np.ndarray) -> list[str]:
    texts = []
    for found in engine.predict(list(bgr)):
        lines, polygons = found["rec_texts"], found["rec_polys"]
        order = reading_order(np.array(polygons)) if len(polygons) else []
        texts.append(" ".join(lines[i] for i in order))
    return texts


def _lines_engine(rec: Model) -> Any:
    return _package().TextRecognition(model_name=rec.name, model_dir=rec.folder, **RUNTIME)


def _read_signs(engine: Any, bgr: np.ndarray, batch: int) -> list[str]:
    return [found["rec_text"] for found in engine.predict(list(bgr), batch_size=batch)]


def _named(option: str, place: str | None) -> Model | None:
    """The model that an option names: a local folder, or a name that PaddleOCR knows."""
    if place is None:
        return None
    folder = expand(place)
    if not folder.is_dir() and not place.startswith(("/", ".", "~")):
        return Model(place)
    for file in ("inference.yml", "inference.onnx"):
        if not (folder / file).is_file():
            raise ModelError(f"{option} = {place!r}: there is no file {folder / file}")
    try:
        config = yaml.safe_load((folder / "inference.yml").read_text("utf-8"))
        return Model(str(config["Global"]["model_name"]), str(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(
            f"{option} = {place!r}: {folder / 'inference.yml'} does not name its model: {error}"
        ) from error


def _detector(scratch: str) -> Model:
    resize = {"DetResizeForTest": {"limit_side_len": 64, "limit_type": "min"}}
    return _wrapped(
        Path(scratch, "det"),
        wheel_file("PP-OCRv6_det_small.onnx"),
        "PP-OCRv6_small_det",
        [DECODE, resize, NORMALIZE, {"ToCHWImage": None}],
        {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "unclip_ratio": 1.5},
    )


def _recogniser(scratch: str, least_width: int) -> Model:
    return _wrapped(
        Path(scratch, "rec"),
        wheel_file(WHEEL_MODEL),
        "PP-OCRv6_small_rec",
        [DECODE, {"RecResizeImg": {"image_shape": [3, 48, least_width]}}],
        {"name": "CTCLabelDecode", "character_dict": wheel_letters()},
    )


def _wrapped(
    folder: Path, onnx: Path, name: str, prepare: list[dict[str, Any]], post: Mapping[str, Any]
) -> Model:
    """`folder` made into what PaddleOCR takes for the model called `name`."""
    folder.mkdir()
    (folder / "inference.onnx").symlink_to(onnx)
    config = {
        "Global": {"model_name": name},
        "PreProcess": {"transform_ops": prepare},
        "PostProcess": post,
    }
    text = yaml.safe_dump(config, allow_unicode=True, default_flow_style=None)
    (folder / "inference.yml").write_text(text, "utf-8")
    return Model(name, str(folder))
