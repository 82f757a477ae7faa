"""Keys of prompt lines: who reads which, and those that nearly name one that is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.spec.prompt_files import IMAGES, Prompt

MASK = "mask"  # of what may change of an image
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ALIKE = 0.7  # of two names, as difflib counts; `img` and `image` have 0.75

Readers = Mapping[str, frozenset[str] | None]


def check_keys(prompts: Sequence[Prompt], named: str, family: str | None, rewards: Readers) -> None:
    """``PromptError`` for a line with a key that nobody reads, where it lacks a key of nearly that
    name which the ``family`` of an editing model or a reward would read.

    ``named``: how the spec names the file. ``rewards``: what each reads, as it is called; ``None``
    where it may be anything: then no key is unknown to rewards, and only the family's are looked
    for.
    """
    wanted = {key: f"family {family!r}" for key in IMAGES if family}
    of_rewards = {key: who for who, keys in rewards.items() for key in keys or ()}
    read = {*IMAGES, MASK, *of_rewards}
    if None not in rewards.values():
        wanted |= of_rewards
    for prompt in prompts:
        for name in sorted(prompt.metadata.keys() - read):
            given = {*prompt.metadata, *(IMAGES if prompt.names_images else ())}
            if near := _nearest(name, prompt.metadata[name], wanted.keys() - given):
                raise PromptError(
                    f"{named}: {prompt.place} has a key {name!r} that nobody reads: did you mean "
                    f"{near!r}, which {wanted[near]} reads? Rename it, or leave it out"
                )


def _nearest(name: str, value: Any, known: set[str]) -> str | None:
    """The key that is meant, if one is: in what names pictures by a word of it, as
    ``input_image``."""
    whole, images = name.casefold(), known.intersection(IMAGES)
    values = value if isinstance(value, list) else [value]
    pictures = all(str(of).casefold().endswith(PICTURES) for of in values)
    asked = [(whole, known - images if "_" in whole else known)]  # `image_id` is no image
    asked += [(word, images) for word in re.split(r"[\W_]+", whole) if pictures]
    for word, keys in asked:
        alike = [key for key in sorted(keys) if key[:1].casefold() == word[:1]]
        if near := difflib.get_close_matches(word, alike, n=1, cutoff=ALIKE):
            return near[0]
    return None
