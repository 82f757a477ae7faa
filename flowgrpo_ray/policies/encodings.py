"""Prompt encodings on disk: a prompt is encoded once for a model, and read by whoever needs it.

One folder per fingerprint, which is a digest of all that encodings depend on but the prompt, and
one safetensors file per prompt in it. Text encoders are loaded only for prompts that are missing,
and dropped after them. Where all files take more than they may, those go that nobody has used for
the longest time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import socket
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import NEGATIVE, Condition, Overlong
from flowgrpo_ray.policies.hub import identity

if TYPE_CHECKING:
    from flowgrpo_ray.policies.base import Policy

FOLDER_VARIABLE = "FLOWGRPO_ENCODINGS"
LIMIT_VARIABLE = "FLOWGRPO_ENCODINGS_GIB"
LIMIT_GIB = 50.0  # about 30,000 prompts of SD3.5
CHUNK = 64  # prompts that are encoded before they are written


def encodings_folder() -> Path:
    """Where encodings live: FLOWGRPO_ENCODINGS, or a folder of the user's cache."""
    default = "~/.cache/flowgrpo_ray/encodings"
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser().absolute()


def most_bytes() -> int:
    """What the folder may hold: FLOWGRPO_ENCODINGS_GIB, or 50 GiB."""
    given = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GIB)
    try:
        gib = float(given)
    except ValueError:
        gib = -1.0
    if not 0 < gib < math.inf:
        raise ModelError(f"{LIMIT_VARIABLE} = {given!r} is no number of GiB above 0")
    return round(gib * 2**30)


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
        prompts = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in prompts if not _used(self.file(prompt))]
        if not missing:
            return 0
        most = most_bytes()
        _give_back_memory()
        self._policy.load_encoder()
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            for prompt, condition in zip(chunk, self._policy.encode(chunk), strict=True):
                own = {n: array for n, array in condition.items() if not n.startswith(NEGATIVE)}
                shared = {n: condition[n] for n in condition.keys() - own}
                if not self._shared.exists():
                    self._write(self._shared, save(shared))
                self._write(self.file(prompt), save(own))
        self._policy.drop_encoder()
        _give_back_memory()
        _make_room(most, keep={self.file(prompt) for prompt in prompts})
        return len(missing)

    def overlong(self, prompts: Sequence[str]) -> Overlong:
        """Those that the model reads in part; kept as encodings are, so that tokenizers are loaded
        once for a set of prompts."""
        reading = self._policy.reading()
        if reading is None:
            return Overlong(0, 0, {})
        texts = sorted(set(prompts))
        name = hashlib.sha256(json.dumps([reading.limit, texts]).encode()).hexdigest()[:32]
        file = self.folder / f"overlong-{name}.json"
        with suppress(OSError, ValueError):  # not counted yet
            return Overlong(reading.limit, reading.most, parse(file.read_bytes()))
        found = reading.overlong(texts)
        self._write(file, json.dumps(dict(found.cut)).encode())
        return found

    def get(self, prompt: str) -> Condition:
        """The encoding of a prompt that was added; ``ModelError`` if its files are torn or gone."""
        return {**_read(self.file(prompt), prompt), **_read(self._shared, prompt)}

    @property
    def _shared(self) -> Path:
        return self.folder / "negative.safetensors"

    def _write(self, file: Path, content: bytes) -> None:
        """Whole or not at all, whoever writes the same file at the same time."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
            partial.write_bytes(content)
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


def _used(file: Path) -> bool:
    """Whether it is there; if so, it is the last that goes."""
    with suppress(OSError):  # there is none, or the folder is another one's to fill
        os.utime(file)
    return file.exists()


def _make_room(most: int, keep: Collection[Path]) -> None:
    """Delete encodings of any model that were not used for the longest time, until all take
    ``most`` bytes; never ``keep``, nor what a model's prompts share."""
    found: list[tuple[float, int, Path]] = []
    total = 0
    for file in encodings_folder().glob("*/*/*.safetensors"):
        with suppress(FileNotFoundError):  # another process makes room as well
            stat = file.stat()
            total += stat.st_size
            if file not in keep:
                found.append((stat.st_mtime, stat.st_size, file))
    for _, size, file in sorted(found):
        if total <= most:
            return
        file.unlink(missing_ok=True)
        total -= size


def _give_back_memory() -> None:
    """To the GPU's other processes, and to whatever is loaded next: torch would keep it."""
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
                "negative_prompt": model.negative_prompt,
                "dtype": str(policy.encoder_dtype),
                "batch": policy.encoded_at_once,
                "device": policy.device.type,  # kernels differ in the last bits
                "versions": [version(name) for name in ("torch", "transformers", "diffusers")],
            },
            sort_keys=True,
        ).encode()
    ).hexdigest()[:32]
