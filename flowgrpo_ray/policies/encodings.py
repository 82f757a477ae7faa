"""Prompt encodings on disk: a prompt is encoded once for a model, and read by whoever needs it.

One folder per fingerprint, which is a digest of all that encodings depend on but the prompt, and
one safetensors file per prompt in it. Text encoders are loaded only for prompts that are missing,
and dropped after them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import socket
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.types import Condition
from flowgrpo_ray.policies.hub import identity

if TYPE_CHECKING:
    from flowgrpo_ray.policies.base import Policy

FOLDER_VARIABLE = "FLOWGRPO_ENCODINGS"
CHUNK = 64  # prompts that are encoded before they are written
NEGATIVE = "negative_"  # arrays of these names are the same for all prompts: kept once


def encodings_folder() -> Path:
    """Where encodings live: FLOWGRPO_ENCODINGS, or a folder of the user's cache."""
    default = "~/.cache/flowgrpo_ray/encodings"
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser().absolute()


class EncodingCache:
    """The encodings of one model, under the settings that ``policy`` has."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.folder = encodings_folder() / fingerprint(policy)

    def file(self, prompt: str) -> Path:
        """Where the prompt's encoding stands, if it does."""
        name = hashlib.sha256(prompt.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def add(self, prompts: Sequence[str]) -> int:
        """Encode the prompts that are not there yet; returns how many those were."""
        missing = [p for p in dict.fromkeys(prompts) if not self.file(p).exists()]
        if not missing:
            return 0
        self._policy.load_encoder()
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            for prompt, condition in zip(chunk, self._policy.encode(chunk), strict=True):
                own = {n: array for n, array in condition.items() if not n.startswith(NEGATIVE)}
                shared = {n: condition[n] for n in condition.keys() - own}
                if not self._shared.exists():
                    self._write(self._shared, shared)
                self._write(self.file(prompt), own)
        self._policy.drop_encoder()
        _give_back_memory()
        return len(missing)

    def get(self, prompt: str) -> Condition:
        """The encoding of a prompt that was added; ``ModelError`` if its files are torn or gone."""
        return {**_read(self.file(prompt), prompt), **_read(self._shared, prompt)}

    @property
    def _shared(self) -> Path:
        return self.folder / "negative.safetensors"

    def _write(self, file: Path, arrays: Condition) -> None:
        """Whole or not at all, whoever writes the same file at the same time."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
            partial.write_bytes(save(dict(arrays)))
            partial.replace(file)
        except OSError as error:
            raise ModelError(
                f"encodings cannot be kept in {encodings_folder()}: {error}. Free space there, or "
                f"name another folder in the environment variable {FOLDER_VARIABLE}"
            ) from error


def _read(file: Path, prompt: str) -> Condition:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the encoding of prompt {prompt!r} cannot be read from {file}: {error}. Delete the "
            f"folder {file.parent} and start again (train --resume): it will be made anew"
        ) from error


def _give_back_memory() -> None:
    """Of the encoders: to the GPU's other processes too, for which torch would keep it."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def fingerprint(policy: Policy) -> str:
    """Digest of what an encoding depends on beside the prompt: model, revision, length, dtype."""
    model = policy.model
    return hashlib.sha256(
        json.dumps(
            {
                "family": model.family,
                "model": identity(model),
                "max_sequence_length": model.max_sequence_length,
                "passes": policy.passes(policy.guidance),  # a negative prompt is encoded, or none
                "dtype": str(policy.encoder_dtype),
                "device": policy.device.type,  # kernels differ in the last bits
                "versions": [version(name) for name in ("torch", "transformers", "diffusers")],
            },
            sort_keys=True,
        ).encode()
    ).hexdigest()[:32]
