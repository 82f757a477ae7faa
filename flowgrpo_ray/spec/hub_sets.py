"""Data sets on the hub: their prompt files, and the images that these name."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowgrpo_ray.common.errors import PromptError

HUB = "hf://"
ON_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")
AT_ONCE = 8  # files


def fetch(path: str, named: str) -> Path:
    """The local copy of a file of a data set on the hub; ``PromptError``, which says how it is
    ``named``, if there is none to be had."""
    repository, revision, name = _parts(path, named)
    return _download(repository, name, revision, named)


def fetch_beside(path: str, names: Iterable[str], named: str) -> Path:
    """The local folder of a prompt file on the hub, with the files that it names by their paths
    from there: all of the commit that the prompt file is of."""
    repository, revision, inside = _parts(path, named)
    file = _download(repository, inside, revision, named)
    commit = file.parents[inside.count("/")].name  # .../snapshots/COMMIT/folder/file.jsonl
    wanted: dict[str, None] = {}
    for name in names:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(inside), name))
        if place.startswith(("../", "/")) or name.startswith("~"):
            raise PromptError(f"{named}: {name!r} leads out of the data set on the hub")
        wanted[place] = None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda place: _download(repository, place, commit, named), wanted):
            pass
    return file.parent


def _parts(path: str, named: str) -> tuple[str, str | None, str]:
    """The repository of a file of a data set on the hub, its revision if there is one, and the path
    inside."""
    match = ON_HUB.fullmatch(path)
    if match is None:
        raise PromptError(
            f"{named}: write a file of a data set on the hub as "
            "hf://datasets/owner/name@revision/folder/file.jsonl"
        )
    repository, revision, inside = match.groups()
    return repository, revision, inside


def _download(repository: str, name: str, revision: str | None, named: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{named}: {name!r} cannot be fetched from the hub. Is it there, has this machine "
            f"network, and your token access (hf auth login)? Cause: {error}"
        ) from error
