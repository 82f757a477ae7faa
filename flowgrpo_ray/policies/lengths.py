"""Prompts by their lengths: in batches, and those of which a model reads a part only.

They are counted with the model's own tokenizer. Those that are short whatever it does, by their
bytes, are passed over, so that most sets need none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flowgrpo_ray.common.types import Overlong

MARKS = 16  # tokens at most that a tokenizer or template adds to those of the text


@dataclass(frozen=True)
class Tokens:
    """A tokenizer of transformers, and what it is given of a prompt: ``template.format(prompt)``,
    of whose tokens the first ``dropped`` ones do not count."""

    tokenizer: Any
    template: str = "{}"
    dropped: int = 0

    def cut(self, prompt: str, limit: int) -> tuple[int, int] | None:
        """Of a prompt of more than ``limit`` tokens: how many, and the characters of it that are
        read."""
        text = self.template.format(prompt)
        tokens = len(self.tokenizer(text).input_ids) - self.dropped
        if tokens <= limit:
            return None
        read = self.tokenizer(
            text,
            truncation=True,
            max_length=limit + self.dropped,
            return_offsets_mapping=True,
        )
        end = max(end for _, end in read["offset_mapping"]) - self.template.index("{}")
        return tokens, min(max(end, 0), len(prompt))


@dataclass(frozen=True)
class Reading:
    """How a model reads prompts: ``limit`` tokens of each, at most ``most`` if the key
    ``model.max_sequence_length`` is raised; ``load`` gives the tokenizer."""

    limit: int
    most: int
    load: Callable[[], Tokens]

    def overlong(self, prompts: Sequence[str]) -> Overlong:
        """Those that are read in part."""
        found: dict[str, tuple[int, int]] = {}
        if possible := [prompt for prompt in prompts if _most_tokens(prompt) > self.limit]:
            tokens = self.load()
            for prompt in possible:
                if cut := tokens.cut(prompt, self.limit):
                    found[prompt] = cut
        return Overlong(self.limit, self.most, found)


def _most_tokens(prompt: str) -> int:
    """No tokenizer makes more of it: none splits a byte, after what normalisation may add."""
    return len(unicodedata.normalize("NFKC", prompt).encode()) + MARKS


def batches(
    prompts: Sequence[str], length: Callable[[str], int], size: int
) -> Iterator[tuple[list[int], list[str]]]:
    """Places and texts of batches of ``size`` prompts of one length; the last text of a shorter one
    is repeated."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(length(prompt), []).append(place)
    for same in by_length.values():
        for start in range(0, len(same), size):
            places = same[start : start + size]
            texts = [prompts[place] for place in places]
            yield places, texts + texts[-1:] * (size - len(places))
