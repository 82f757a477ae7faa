"""The images that prompt lines name: which files they are, and that they can be read.

A line names one image under "image" or several under "images", as paths beside its prompt file; and
under "mask", where a reward needs it, what of the first one may change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.common.images import ImageError, decode_rgb, read_bytes
from flowgrpo_ray.common.paths import builtin_path, expand
from flowgrpo_ray.common.sources import PNG_URL, find_source, mask_url
from flowgrpo_ray.common.types import Edit, Request, Source
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.hub_sets import HUB, fetch_beside
from flowgrpo_ray.spec.prompt_files import IMAGES, Prompt, check_alike
from flowgrpo_ray.spec.prompt_keys import MASK
from flowgrpo_ray.spec.training import TrainingSpec

KEYS = 'keys "image", "images" and "mask"'
Size = tuple[int, int]  # height, width


def with_sources(
    prompts: Sequence[Prompt], file: str, key: str, allowed: range, who: str
) -> list[Prompt]:
    """The prompts of ``file`` with the images that their lines name, of which ``who`` takes
    ``allowed``; all name as many.

    ``PromptError``, which names the prompts ``key``, for a line that does not, or an image that is
    not there or cannot be read. A mask becomes text that travels with the metadata.
    """
    names: list[list[str]] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            names.append(_named(prompt.metadata))
            check_count(len(names[-1]), allowed, who)
        except ValueError as error:
            raise PromptError(f"{key}: prompt {number}, {KEYS}: {error}") from error
    check_alike(map(len, names), key)
    folder = _folder(file, prompts, key)
    named = [[folder / expand(name) for name in of_prompt] for of_prompt in names]
    found = _look_at({path: n for n, paths in enumerate(named, 1) for path in paths}, key)
    whole: list[Prompt] = []
    for number, (prompt, paths) in enumerate(zip(prompts, named, strict=True), 1):
        images = tuple(found[path][0] for path in paths)
        metadata = dict(prompt.metadata)
        try:
            if images and MASK in metadata:
                metadata[MASK] = _mask(metadata[MASK], folder, found[paths[0]][1])
        except ValueError as error:
            raise PromptError(f"{key}: prompt {number}, {KEYS}: {error}") from error
        whole.append(replace(prompt, metadata=metadata, images=images))
    return whole


def _folder(file: str, prompts: Sequence[Prompt], key: str) -> Path:
    """From where the paths of a prompt file lead, with all that they name."""
    if file.startswith(HUB):
        files = (name for prompt in prompts for name in files_of(prompt))
        return fetch_beside(file, files, f"{key} = {file!r}")
    return (builtin_path(file) or expand(file)).parent


def check_count(count: int, allowed: range, who: str) -> None:
    """``ValueError`` for another number of images than ``who`` takes."""
    if count not in allowed:
        few, most = allowed[0], allowed[-1]
        wanted = f"{few} to {most}" if few < most else f"{few}"
        raise ValueError(f"{count} source images; {who} takes {wanted} with each prompt")


def requests_for(
    spec: TrainingSpec, prompts: Sequence[str], images: Sequence[str | Path]
) -> list[Request]:
    """What the spec's model is asked for: each of the prompts, of the same image files."""
    family = spec.model.family
    try:
        check_count(len(images), FAMILIES[family].sources, f"family {family!r}")
        sources = tuple(find_source(expand(image))[0] for image in images)
    except ValueError as error:
        raise PromptError(f"--image: {error}") from error
    size = spec.sampling.size
    return [Edit(text, sources, size) if sources else text for text in prompts]


def files_of(prompt: Prompt) -> list[str]:
    """Paths of its images and mask, as its line has them."""
    files, mask = _named(prompt.metadata), prompt.metadata.get(MASK)
    if isinstance(mask, str) and not mask.startswith(PNG_URL):
        files = [*files, mask]
    return files


def _named(metadata: Mapping[str, Any]) -> list[str]:
    one, several = (metadata.get(key) for key in IMAGES)
    if one is not None and several is not None:
        raise ValueError('it has both keys, "image" and "images": write one of them')
    names = [one] if one is not None else several or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'"image" is the path of a file, "images" a list of paths, not {names!r}')
    return names


def _look_at(paths: Mapping[Path, int], key: str) -> dict[Path, tuple[Source, Size]]:
    """Each file once, whole; ``paths`` says which prompt names it."""

    def look(path: Path) -> tuple[Source, Size]:
        try:
            return find_source(path)
        except ImageError as error:
            raise PromptError(f"{key}: prompt {paths[path]}: its source image: {error}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes beside Python
        return dict(zip(paths, pool.map(look, paths), strict=True))


def _mask(value: Any, folder: Path, size: Size) -> str:
    """What may change of the first source, of ``size``, as a data URL."""
    height, width = size
    if isinstance(value, str) and value.startswith(PNG_URL):
        return value
    if isinstance(value, str):
        file = folder / expand(value)
        mask = decode_rgb(read_bytes(file), f"'{file}'").mean(axis=-1) > 127
        if mask.shape != size:
            raise ValueError(
                f"the mask '{file}' is {mask.shape[1]}x{mask.shape[0]} and the source image "
                f"{width}x{height}: a mask has the size of the first source"
            )
        return mask_url(mask)
    numbers = value if isinstance(value, list) and len(value) == 4 else []
    whole = all(isinstance(number, int) for number in numbers) and bool(numbers)
    left, top, right, bottom = numbers if whole else (0, 0, 0, 0)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f'"mask" is {value!r}: write the path of a picture, or a box [left, top, right, '
            f"bottom] in pixels of the source image, which is {width}x{height}"
        )
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask_url(mask)
