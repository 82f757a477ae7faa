"""Reading a training spec from YAML, with errors that a person can act on, and writing it back."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flowgrpo_ray.errors import SpecError
from flowgrpo_ray.spec import PACKAGE, TrainingSpec

RECIPES = PACKAGE / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML with ``1e-4`` as a number (YAML 1.1 wants ``1.0e-4``) and no repeated keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise SpecError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def recipe_names() -> list[str]:
    """The recipes of this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_spec(source: str, overrides: Sequence[str] = ()) -> TrainingSpec:
    """The spec in the YAML file or recipe ``source``, with ``a.b=c`` overrides applied."""
    path = Path(source)
    if not path.suffix and source in recipe_names():
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(source, recipe_names(), n=1)
        hint = f"; did you mean the recipe {near[0]!r}?" if near else ""
        raise SpecError(
            f"{source!r} is neither a file nor a recipe{hint} "
            f"(recipes: {', '.join(recipe_names())})"
        )
    try:
        data = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping of keys, not {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return validate(data, str(path))


def validate(data: Any, source: str) -> TrainingSpec:
    """The spec in ``data``; every problem in one ``SpecError``, a line each."""
    try:
        return TrainingSpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise SpecError(f"{source}:\n  " + "\n  ".join(lines)) from error
    except (TypeError, ValueError) as error:  # a YAML date, or a number that JSON lacks
        raise SpecError(f"{source}: {error}") from error


def dump_spec(spec: TrainingSpec) -> str:
    """The resolved spec as YAML; ``load_spec`` reads it back equal."""
    head = f"# flowgrpo-ray training spec, resolved; digest {spec.digest()}\n"
    return head + yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not YAML: {error}") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override!r}: write it as key=value, for example --set seed=1")
    *parents, last = key.split(".")
    place = data
    for i, parent in enumerate(parents):
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise SpecError(
                f"--set {override!r}: {'.'.join(parents[: i + 1])} has no keys below it"
            )
    place[last] = _parse(value, f"--set {override!r}")


def _explain(problem: Any) -> str:
    """One line for one pydantic error: key, what is wrong, the value found."""
    location = [part for part in problem["loc"] if part not in ("full", "lora", "all", "random")]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, not {problem['input']!r}"


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The keys of the spec's model at a pydantic error location."""
    model: Any = TrainingSpec
    for part in location:
        model = _descend(model, part)
    return list(model.model_fields) if isinstance(model, type) else []


def _descend(annotation: Any, part: str | int) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields[str(part)].annotation
    if typing.get_origin(annotation) is dict:
        return typing.get_args(annotation)[1]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            fields = getattr(option, "model_fields", {})
            if "kind" in fields and part in typing.get_args(fields["kind"].annotation):
                return option
            if part in fields:
                return fields[str(part)].annotation
    return None
