"""Prompt encodings on disk: a prompt is encoded once for a model, and read by whoever needs it.

One folder per fingerprint, which is a digest of all that encodings depend on but the prompt, and
one safetensors file per prompt in it, or per prompt and the images that it changes. Encoders are
loaded only for what is missing, and dropped after it. Where all files take more than they may,
those go that nobody has used for the longest time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.sources import pictures
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import NEGATIVE, Condition, Edit, Overlong, Request
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
        self._loaded = False  # is what encodes
        self._needed: set[Path] = set()  # what was asked about last: makes room for nothing

    def file(self, request: Request) -> Path:
        """Where the encoding of a prompt stands, if it does."""
        if isinstance(request, Edit):
            digests = [source.digest for source in request.sources]
            pixels = [request.size, digests, str(self._policy.decoder_dtype)]
            key = json.dumps([request.text, *pixels])
        else:
            key = request
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Those that are not there yet, each once. From now on all ``requests`` are needed, and
        make room for no other."""
        self._needed = {self.file(request) for request in requests}
        return self._missing(requests)

    def _missing(self, requests: Sequence[Request]) -> list[Request]:
        return [request for request in dict.fromkeys(requests) if not _used(self.file(request))]

    def add(
        self,
        requests: Sequence[Request],
        files: Mapping[str, bytes] | None = None,
        *,
        more: bool = False,
    ) -> int:
        """Encode what is not there yet; returns how many those were. ``files`` are those of the
        images, by digest, where they are not this machine's; ``more`` will come at once."""
        missing = self._missing(requests)
        if missing:
            most = most_bytes()
            self._load()
            self._encode([request for request in missing if isinstance(request, str)])
            for edit in (request for request in missing if isinstance(request, Edit)):
                condition = self._policy.encode_edit(edit.text, pictures(edit, files))
                self._write(self.file(edit), save(dict(condition)))
            if not more:
                _make_room(most, keep=self._needed | {self.file(request) for request in requests})
        if self._loaded and not more:
            self._policy.drop_encoder()
            self._loaded = False
            _give_back_memory()
        return len(missing)

    def _load(self) -> None:
        if not self._loaded:
            _give_back_memory()
            self._policy.load_encoder()
            self._loaded = True

    def _encode(self, prompts: Sequence[str]) -> None:
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            for prompt, condition in zip(chunk, self._policy.encode(chunk), strict=True):
                own = {n: array for n, array in condition.items() if not n.startswith(NEGATIVE)}
                shared = {n: condition[n] for n in condition.keys() - own}
                if not self._shared.exists():
                    self._write(self._shared, save(shared))
                self._write(self.file(prompt), save(own))

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

    def get(self, request: Request) -> Condition:
        """The encoding of a prompt that was added; ``ModelError`` if its files are torn or gone."""
        if isinstance(request, Edit):  # whose arrays are all its own
            return _read(self.file(request), request.text)
        return {**_read(self.file(request), request), **_read(self._shared, request)}

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
