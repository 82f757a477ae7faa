"""Reading a training spec from YAML, with errors that a person can act on, and writing it back."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Tag, ValidationError

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.common.own_classes import look_in
from flowgrpo_ray.common.paths import PACKAGE
from flowgrpo_ray.common.strict import mistake, mistakes, short, word
from flowgrpo_ray.spec.objective import OWN
from flowgrpo_ray.spec.training import TrainingSpec

RECIPES = PACKAGE / "recipes"


MOST_BYTES = 2**17  # of a spec; the longest recipe has 2,000
DEEPEST = 32  # levels of keys and lists; a spec has five
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,24})")
FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?)")


class _Loader(yaml.SafeLoader):
    """YAML with ``1e-4`` as a number (YAML 1.1 wants ``1.0e-4``) and no repeated keys.

    Without tags, which choose a type, and without anchors, by which a few lines stand for
    gigabytes.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            raise SpecError(f"line {line}: anchors (&) and aliases (*) are not read; write it out")
        if getattr(event, "tag", None) is not None:
            raise SpecError(f"line {line}: the tag {event.tag!r} is not read; leave it out")
        if self._depth == DEEPEST:
            raise SpecError(f"line {line}: nested more than {DEEPEST} levels deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would read as numbers, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    # A date is text to us: a spec has no dates, and a run may be named after one.
    _yaml.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith("timestamp")]
        for first, resolvers in _yaml.yaml_implicit_resolvers.items()
    }


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise SpecError(f"line {line}: a key is a word, not {key!r}")
        if key in seen:
            raise SpecError(f"line {line}: the key {key!r} stands twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """Decimal ones: to YAML 1.1 ``010`` is 8, and ``1:30`` is 90."""
    text: str = node.value
    if INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    line = node.start_mark.line + 1
    raise SpecError(f"line {line}: {short(text)} is no decimal number; a text wants quotes")


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def recipe_names() -> list[str]:
    """The recipes of this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_spec(source: str, overrides: Sequence[str] = ()) -> TrainingSpec:
    """The spec in the YAML file or recipe ``source``, with ``a.b=c`` overrides applied."""
    path = Path(source)
    if not path.suffix and source in recipe_names():
        path = RECIPES / f"{source}.yaml"
    if not os.path.isfile(path):  # a name that no file can have is no error to it
        raise unknown_recipe(source)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SpecError(f"{path}: larger than {MOST_BYTES:,} bytes, which no spec is")
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping of keys, not {type(data).__name__}")
    look_in(path.parent)  # for classes of the user's
    return validate(overridden(data, overrides), str(path))


def overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of a spec with ``a.b=c`` overrides applied, in place.

    Another ``kind`` of a section takes its own defaults: numbers that were another kind's go.
    """
    for override in sorted(overrides, key=lambda of: not of.partition("=")[0].endswith(".kind")):
        _override(data, override)
    return data


def unknown_recipe(source: str) -> SpecError:
    """The error of a name that is neither a file nor a recipe."""
    near = difflib.get_close_matches(source, recipe_names(), n=1)
    hint = f"; did you mean the recipe {near[0]!r}?" if near else ""
    names = ", ".join(recipe_names())
    return SpecError(f"{source!r} is neither a file nor a recipe{hint} (recipes: {names})")


def validate(data: Any, source: str) -> TrainingSpec:
    """The spec in ``data``; every problem in one ``SpecError``, a line each."""
    try:
        return TrainingSpec.model_validate_json(json.dumps(data, ensure_ascii=False).encode())
    except ValidationError as error:
        raise SpecError(f"{source}:\n  " + "\n  ".join(mistakes(error, _explain))) from error
    except UnicodeEncodeError as error:
        text = error.object[error.start : error.end]
        raise SpecError(f"{source}: {text!r} in a text is half of a character") from error


def dump_spec(spec: TrainingSpec) -> str:
    """The resolved spec as YAML; ``load_spec`` reads it back equal."""
    head = f"# flowgrpo-ray training spec, resolved; digest {spec.digest()}\n"
    data = spec.model_dump(mode="json")
    return head + yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flat_keys(value: object, prefix: str = "", *, keep_empty: bool = False) -> dict[str, Any]:
    """A spec, or a part of one, by dotted keys; a list is one value, and to ``keep_empty`` so is a
    mapping of nothing."""
    if not isinstance(value, dict) or (keep_empty and prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= flat_keys(inner, name, keep_empty=keep_empty)
    return flat


def parse_yaml(text: str, source: str) -> Any:
    """The value in ``text``; ``SpecError``, which names ``source``, for what is not plain YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not YAML: {error}") from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override!r}: write it as key=value, for example --set seed=1")
    *parents, last = key.split(".")
    if len(parents) >= DEEPEST:
        raise SpecError(f"--set {override!r}: nested more than {DEEPEST} levels deep")
    place = data
    for i, parent in enumerate(parents):
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise SpecError(
                f"--set {override!r}: {'.'.join(parents[: i + 1])} has no keys below it"
            )
    chosen = parse_yaml(value, f"--set {override!r}")
    if last == "kind" and place.get("kind", chosen) != chosen:
        place.clear()
    place[last] = chosen


def _explain(problem: Any) -> str:
    """One line for one pydantic error: key, what is wrong, the value found."""
    location = _without_tags(problem["loc"])
    key = ".".join(word(part) for part in location)
    if problem["type"] == "extra_forbidden":
        *parents, last = problem["loc"]
        of_kind = f" for kind {parents[-1]}" if _ends_in_tag(parents) else ""
        return f"{key}: unknown key{of_kind}; {_hint(last, _keys_at(parents), 'known keys')}"
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return _explain_kind(problem, key)
    if problem["type"] == "model_type" and (keys := _keys_at(problem["loc"])):
        value = short(problem["input"])
        return f"{key}: write it as a mapping, {{{keys[0]}: {value}}}; keys: {', '.join(keys)}"
    meant = SYNONYMS.get(str(problem["input"])) if problem["type"] == "literal_error" else None
    return mistake(key, problem) + (f"; did you mean {meant!r}?" if meant else "")


def _explain_kind(problem: Any, key: str) -> str:
    """Of a section that is one of several kinds."""
    kinds = [kind for o in _options(_annotation(problem["loc"])) for kind in _kinds(o)]
    given = problem["input"]
    if not isinstance(given, dict):
        return f"{key}: write it as a mapping with its kind, not {short(given)}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.kind: this key is required; kinds: {', '.join(kinds)}"
    kind = given["kind"]
    own = f"; your own class: {OWN!r}" if key == "objective" else ""
    return f"{key}.kind: unknown kind {short(kind)}; {_hint(kind, kinds, 'kinds')}{own}"


# What other trainers call things, and what they are called here.
SYNONYMS = {
    **{"lr": "learning_rate", "max_grad_norm": "grad_norm", "adam_weight_decay": "weight_decay"},
    **{"guidance_scale": "guidance", "cfg": "guidance", "num_steps": "steps"},
    **{"num_inference_steps": "steps", "resolution": "size", "noise_level": "eta"},
    **{"num_image_per_prompt": "group_size", "num_generations": "group_size"},
    **{"train_batch_size": "micro_batch", "batch_size": "micro_batch", "num_epochs": "iterations"},
    **{"max_steps": "iterations", "clip_range": "clip_high", "beta": "kl", "lora_rank": "rank"},
    **{"lora_alpha": "alpha", "target_modules": "targets", "pretrained": "path"},
    **{"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "half": "float16"},
}


def _hint(word: Any, known: Sequence[str], all_of_them: str) -> str:
    """The known word that is meant or near, or else all of them."""
    meant = SYNONYMS.get(str(word))
    near = [meant] if meant in known else difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{all_of_them}: {', '.join(known)}"


def _without_tags(location: Sequence[str | int]) -> list[str | int]:
    """The keys as the user wrote them: pydantic inserts the ``kind`` of a union after its key."""
    model: Any = TrainingSpec
    keys: list[str | int] = []
    for part in location:
        inner = _descend(model, part)
        if part != "[key]" and not _is_tag(model, part):
            keys.append(part)
        model = inner
    return keys


def _is_tag(annotation: Any, part: str | int) -> bool:
    kinds = (part in _kinds(option) for option in _options(annotation))
    return part == OWN or part in _tagged(annotation) or any(kinds)


def _tagged(annotation: Any) -> dict[str | int, Any]:
    """The members of a union by the tags that pydantic tells them by, if it does."""
    return {
        mark.tag: member.__origin__
        for member in typing.get_args(annotation)
        for mark in getattr(member, "__metadata__", ())
        if isinstance(mark, Tag)
    }


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union and of unions in it, or nothing."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return ()
    members = (
        member.__origin__ if typing.get_origin(member) is typing.Annotated else member
        for member in typing.get_args(annotation)
    )
    return tuple(option for member in members for option in _options(member) or (member,))


def _kinds(option: Any) -> tuple[Any, ...]:
    fields = getattr(option, "model_fields", {})
    return typing.get_args(fields["kind"].annotation) if "kind" in fields else ()


def _annotation(location: Sequence[str | int]) -> Any:
    """What the spec's model wants at a pydantic error location."""
    wanted: Any = TrainingSpec
    for part in location:
        wanted = _descend(wanted, part)
    return wanted


def _ends_in_tag(location: Sequence[str | int]) -> bool:
    return bool(location) and _is_tag(_annotation(location[:-1]), location[-1])


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The keys of the spec's model at a pydantic error location."""
    model = _annotation(location)
    models = [model, *_options(model)]
    return [key for m in models for key in getattr(m, "model_fields", {})]


def _descend(annotation: Any, part: str | int) -> Any:
    """What the spec's model wants below ``annotation``, which is what it wants there."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else None
    if (container := typing.get_origin(annotation)) in (dict, tuple):
        return typing.get_args(annotation)[container is dict]
    for option in _options(annotation):
        if part in _kinds(option):
            return option
        if part in getattr(option, "model_fields", {}):
            return option.model_fields[str(part)].annotation
    return _tagged(annotation).get(part)
