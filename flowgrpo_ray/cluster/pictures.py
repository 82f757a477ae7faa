"""Prompts on their way to the actors that encode them; and source images, from the driver's
machine, which alone has their files, to these and to the rewards that compare with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import ObjectRef

from flowgrpo_ray.common.sources import pictures, read_sources
from flowgrpo_ray.common.types import Edit, Request
from flowgrpo_ray.serving.types import Sources

SENT = 64  # prompts that are encoded, and whose files travel, in one call
KEPT = 64  # prompts whose source images stay in the object store


def with_files(prompts: Sequence[Request]) -> tuple[Any, ...]:
    """Prompts as an actor is given them: with the files of the images that they name."""
    files = read_sources(prompts)
    return (prompts, files) if files else (prompts,)


class Encoding:
    """How many prompts are to be encoded, and how many are, by all actors together; ``tell``s."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self.done = self.whole = 0
        self._tell = tell

    def add(self, *, done: int = 0, whole: int = 0) -> None:
        self.done, self.whole = self.done + done, self.whole + whole
        if self.whole:
            self._tell(self.done, self.whole)


async def encode_on(
    actor: Any, prompts: Sequence[Request], progress: Encoding | None = None
) -> None:
    """Have an actor encode those prompts that its machine has not; files of others stay here."""
    progress = progress or Encoding(lambda done, whole: None)
    missing: list[Request] = await actor.missing.remote(prompts)
    progress.add(whole=len(missing))
    for start in range(0, len(missing), SENT):
        part, rest = missing[start : start + SENT], missing[start + SENT :]
        files = await asyncio.to_thread(read_sources, part)
        await actor.encode.remote(part, files, bool(rest))
        progress.add(done=len(part))


class Pictures:
    """Source images in the object store, for rewards: of the prompts last asked about."""

    def __init__(self) -> None:
        self._kept: dict[Edit, asyncio.Task[ObjectRef]] = {}

    async def of(self, edits: Sequence[Edit]) -> Sources:
        """Those of each prompt of a call, read once."""
        distinct = list(dict.fromkeys(edits))
        for edit in distinct:
            task = self._kept.pop(edit, None) or asyncio.create_task(self._put(edit))
            self._kept[edit] = task  # as the last one
        found = asyncio.gather(*(self._kept[edit] for edit in distinct))
        for old in list(self._kept)[:-KEPT]:
            del self._kept[old]
        arrays = await asyncio.shield(found)  # others wait for them, too
        return Sources(arrays, [distinct.index(edit) for edit in edits])

    async def _put(self, edit: Edit) -> ObjectRef:
        return ray.put(await asyncio.to_thread(pictures, edit))
