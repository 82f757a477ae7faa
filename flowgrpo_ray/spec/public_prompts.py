"""The public prompt sets that recipes name: where they come from, and fetching them.

A file is known by its git id, the SHA-1 of its length and content, which is what the repository's
own history pins: a copy from any place is the same file or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.files import write_atomic

COMMIT = "ac4c86e8cae021841f1fde853d340e0db67690dd"
REPOSITORY = "yifan123/flow_grpo"
SOURCE = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/dataset"
LICENCE = "MIT, Copyright (c) 2025 Jie Liu"
MOST_BYTES = 2**28
SECONDS = 60


@dataclass(frozen=True)
class PublicFile:
    """A file of a public set: as recipes name it below ``prompts/``, and as its source does."""

    name: str
    source: str
    git_id: str
    holds: str


SETS = {
    "ocr": (
        PublicFile(
            "ocr-train.txt",
            "ocr/train.txt",
            "3ce0521b77b0a9031191d66ecc36ebaaf27a3922",
            "a prompt per line, with the text to draw in double quotes",
        ),
        PublicFile(
            "ocr-test.txt",
            "ocr/test.txt",
            "8deb4f8d8f2e863f45353354243669b3c991a6a2",
            "1,018 prompts, one per line, with the text to draw in double quotes",
        ),
    ),
    "geneval": (
        PublicFile(
            "geneval-train.jsonl",
            "geneval/train_metadata.jsonl",
            "0b97e8a6802c08fc7537cd00c76ae79c851bddcb",
            "a JSON object per line: prompt, tag, include, exclude",
        ),
        PublicFile(
            "geneval-test.jsonl",
            "geneval/test_metadata.jsonl",
            "27cdaf5cc1356fe15aeadbb8df55682ca74228f0",
            "2,212 JSON objects, one per line: prompt, tag, include, exclude",
        ),
    ),
    "pickscore": (
        PublicFile(
            "pickscore-train.txt",
            "pickscore/train.txt",
            "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b",
            "25,432 prompts, one per line",
        ),
        PublicFile(
            "pickscore-test.txt",
            "pickscore/test.txt",
            "45f05231b969fb5f74c8debd606b22cd3be27f8e",
            "2,048 prompts, one per line",
        ),
    ),
}


def where_from(path: str) -> str:
    """What a message adds about a file that is not there, if it is one of the public ones."""
    for name, files in SETS.items():
        for file in files:
            if Path(path).name == file.name:
                return (
                    f". It is the public set {name!r} ({file.holds}), which "
                    f"`flowgrpo-ray prompts fetch {name}` puts below prompts/"
                )
    return ""


def git_id(content: bytes) -> str:
    """By which git knows a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetch(
    name: str, folder: Path, source: str, overwrite: bool, told: Callable[[str], None]
) -> None:
    """Write the files of the set ``name`` into ``folder``, from the address ``source``.

    ``told`` hears what was written. ``PromptError`` for a file that cannot be had, that is not what
    it should be, or in whose place another one stands.
    """
    for file in SETS[name]:
        target = folder / file.name
        if target.exists():
            if target.is_file() and git_id(target.read_bytes()) == file.git_id:
                told(f"{target} is there already")
                continue
            if not overwrite:
                raise PromptError(f"{target} exists and is another file: move it, or --overwrite")
        content = _download(f"{source.rstrip('/')}/{file.source}")
        if git_id(content) != file.git_id:
            raise PromptError(
                f"{source}/{file.source} is not the file of commit {COMMIT[:12]} of {REPOSITORY}: "
                f"{len(content):,} bytes with git id {git_id(content)}, not {file.git_id}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content)
        told(f"{target}: {file.holds}")


def _download(url: str) -> bytes:
    try:
        with httpx.stream("GET", url, timeout=SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            content = b""
            for part in response.iter_bytes():
                content += part
                if len(content) > MOST_BYTES:
                    raise PromptError(f"{url}: more than {MOST_BYTES >> 20} MiB")
            return content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PromptError(
            f"{url}: cannot be fetched: {error}. On a machine without network, fetch the set on "
            "another one and copy the files, or name a mirror with --source"
        ) from error
