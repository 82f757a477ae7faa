"""The section ``objective`` of a spec: one of those built in by its kind, or a class of the user's.

The classes themselves, with their options and their mathematics, are ``algorithm.objectives``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, PlainValidator, SerializeAsAny, Tag, WithJsonSchema

from flowgrpo_ray.algorithm.objectives import BUILTIN, Objective, own
from flowgrpo_ray.common.errors import SpecError

OWN = "module:Class"  # the tag of all that are named by an import path

_OWN_SCHEMA = {
    "type": "object",
    "description": "A class of yours, with its own options beside `kind`; docs/objectives.md.",
    "properties": {"kind": {"type": "string", "pattern": ":", "description": "its import path"}},
    "required": ["kind"],
}


def _tag(given: Any) -> Any:
    kind = given.get("kind") if isinstance(given, Mapping) else getattr(given, "kind", None)
    return OWN if isinstance(kind, str) and ":" in kind else kind


def _own(given: Any) -> Objective:
    if isinstance(given, Objective):
        return given
    try:
        return own(given)
    except SpecError as error:
        raise ValueError(str(error)) from error


if TYPE_CHECKING:
    ObjectiveField = Objective
else:
    _KINDS = (
        *(Annotated[cls, Tag(kind)] for kind, cls in BUILTIN.items()),
        Annotated[Objective, PlainValidator(_own), WithJsonSchema(_OWN_SCHEMA), Tag(OWN)],
    )
    ObjectiveField = Annotated[SerializeAsAny[Union[_KINDS]], Discriminator(_tag)]  # noqa: UP007
