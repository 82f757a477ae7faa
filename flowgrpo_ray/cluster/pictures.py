"""Source images on their way from the driver's machine, which alone has their files, to the actors
that encode them and to the rewards that compare with them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from flowgrpo_ray.common.sources import read_sources
from flowgrpo_ray.common.types import Edit, Request

SENT = 64  # prompts whose files travel in one call


def with_files(prompts: Sequence[Request]) -> tuple[Any, ...]:
    """Prompts as an actor is given them: with the files of the images that they name."""
    files = read_sources(prompts)
    return (prompts, files) if files else (prompts,)


async def encode_on(actor: Any, prompts: Sequence[Request]) -> None:
    """Have an actor encode prompts; files of images that its machine has encoded stay here."""
    if not any(isinstance(prompt, Edit) for prompt in prompts):
        await actor.encode.remote(prompts)
        return
    missing: list[Request] = await actor.missing.remote(prompts)
    for start in range(0, len(missing), SENT):
        part, rest = missing[start : start + SENT], missing[start + SENT :]
        files = await asyncio.to_thread(read_sources, part)
        await actor.encode.remote(part, files, bool(rest))
