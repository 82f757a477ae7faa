"""The PickScore reward: how much would people prefer this image for its prompt?

    reward = exp(logit scale) * cosine(image, text) / 26

PickScore (Kirstain et al. 2023, arXiv 2305.01569) is a CLIP-H tuned on choices between pairs of
images; the division by 26 is the scale on which Flow-GRPO trains. The CLIP encoder of this module
also names colours for the GenEval reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowgrpo_ray.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
SCALE = 26.0


class PickScoreReward:
    """Scores each image against its own prompt.

    path: the PickScore weights, a local folder or a hub id.
    processor: the folder or hub id of their tokenizer and image processor.
    revision: of `path`, where that is a hub id.
    device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
    dtype: of the weights: `float32`, `bfloat16` or `float16`. The cosine is always float32.
    batch: images that go through the model at once.
    """

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self._clip = ClipEncoder(
            ("path", path, revision),
            ("processor", processor, None),
            device=pick_device(device),
            dtype=dtype,
            batch=batch,
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: the model gave no numbers."""
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
            )
        if not len(images):
            return np.zeros(0, np.float32)
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self._clip.texts(list(place))[[place[prompt] for prompt in prompts]]
        cosine = (self._clip.images(list(images)) * texts).sum(dim=-1)
        return (self._clip.scale * cosine / SCALE).cpu().numpy()


Source = tuple[str, str, str | None]
"""An option of a reward, the folder or hub id that it names, and the revision of a hub id."""


class ClipEncoder:
    """A CLIP model of transformers: unit vectors, float32, of images and of texts.

    Images are prepared with Pillow, as for the published scores, whether or not torchvision is
    installed: the two give scores that differ in the fourth digit.
    """

    def __init__(
        self, model: Source, processor: Source, *, device: torch.device, dtype: str, batch: int
    ) -> None:
        import torch
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        # The logit scale is read before the weights are cast: a rounded logarithm is 1% off.
        clip = load_model(CLIPModel, model)
        self.scale = float(clip.logit_scale.exp())
        self._model = clip.to(device=device, dtype=getattr(torch, dtype))
        self._max_length = clip.config.text_config.max_position_embeddings
        self._prepare = load(CLIPImageProcessorPil, processor)
        self._tokenizer = load(CLIPTokenizer, processor)
        _check_tokenizer(self._tokenizer, clip.config.text_config.vocab_size, processor, model)
        self._device, self._dtype, self._batch = device, getattr(torch, dtype), batch

    def images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Unit vectors [n, d] of images, each uint8 [h, w, 3] of any size; NaN where undefined."""

        def features(part: Sequence[np.ndarray]) -> Any:
            # A strip of 3 rows would be taken for channels if the format were left to be guessed.
            pixels = self._prepare(
                images=list(part), input_data_format="channels_last", return_tensors="pt"
            )["pixel_values"]
            return self._model.get_image_features(
                pixel_values=pixels.to(device=self._device, dtype=self._dtype)
            )

        return self._unit_vectors(features, images)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [n, d] of texts, each cut to the length that the text model takes."""

        def features(part: Sequence[str]) -> Any:
            tokens = self._tokenizer(
                list(part),
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            return self._model.get_text_features(**tokens.to(self._device))

        return self._unit_vectors(features, texts)

    def _unit_vectors(self, features: Any, inputs: Sequence[Any]) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            parts = [
                features(inputs[i : i + self._batch]).pooler_output.float()
                for i in range(0, len(inputs), self._batch)
            ]
            vectors = torch.cat(parts)
            # Not normalize(): it would make a zero of a vector without direction, this a NaN.
            return vectors / vectors.norm(dim=-1, keepdim=True)


def pick_device(device: str | None) -> torch.device:
    """The torch device called `device`; without a name, a GPU if there is one."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown to torch: {error}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}, but this process sees {torch.cuda.device_count()} GPUs; "
            "give the reward a share of one (gpus), or ask for device: cpu"
        )
    return found


def load(cls: Any, source: Source, **more: Any) -> Any:
    """`cls.from_pretrained` of what an option names; ModelError if that is not to be had."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    option, place, revision = source
    folder = Path(place).expanduser()
    if not folder.is_dir() and place.startswith(("/", ".", "~")):
        raise ModelError(f"{option} = {place!r}: there is no such folder")
    if revision is not None:
        more["revision"] = revision
    try:
        return cls.from_pretrained(str(folder) if folder.is_dir() else place, **more)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{option} = {place!r}: cannot be loaded as {cls.__name__}. Give a local folder, or "
            "the id of a hub model that this machine can reach or has in its cache "
            f"(hf download). Cause: {error}"
        ) from error


def load_model(cls: Any, source: Source) -> Any:
    """A model, float32 and for inference, all of whose weights came from its place."""
    import torch

    model, info = load(cls, source, dtype=torch.float32, output_loading_info=True)
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        # To transformers this is a warning, and the weights are random.
        option, place, _ = source
        raise ModelError(
            f"{option} = {place!r}: the checkpoint is not one of a {cls.__name__}: it lacks "
            f"{len(missing)} of its weights, such as {missing[0]!r}"
        )
    return model.eval().requires_grad_(False)


def _check_tokenizer(tokenizer: Any, vocabulary: int, source: Source, model: Source) -> None:
    """To transformers absent tokenizer files are no error: it makes an empty tokenizer."""
    option, place, _ = source
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(
            f"{option} = {place!r}: no tokenizer files there, or no connection to the hub. Give a "
            "folder or hub id that holds tokenizer.json, or vocab.json and merges.txt"
        )
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{option} = {place!r}: its tokenizer knows {len(tokenizer)} tokens, the text model of "
            f"{model[0]} = {model[1]!r} only {vocabulary}: they do not belong together"
        )
