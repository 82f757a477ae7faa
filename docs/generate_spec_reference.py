"""Writes the key tables of docs/spec.md from the JSON schema of a training spec, and the tables of
options in docs/reward-catalogue.md from what the constructors of rewards declare.

With ``--check`` it writes nothing and exits with status 1 if tables are stale.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo_ray.rewards import resolve
from flowgrpo_ray.rewards.judge_server import JudgeServer
from flowgrpo_ray.rewards.options import options_model
from flowgrpo_ray.spec.training import TrainingSpec

PAGE = Path(__file__).with_name("spec.md")
BEGIN, END = "<!-- spec-reference: begin -->", "<!-- spec-reference: end -->"
CATALOGUE = Path(__file__).with_name("reward-catalogue.md")
OPTIONS = re.compile(r"(<!-- options of (\w+): begin -->\n).*?(<!-- options: end -->)", re.S)

# Keys whose schema has no description yet. One that gets it there must go from here.
MEANINGS = {
    "seed": "decides prompts, windows, noise and adapter weights",
    "iterations": "how long to train; a run that ended goes on under a larger number",
    "ema": "`null`: no averaging",
    "tuning.rank": "of every adapter",
    "tuning.alpha": "adapters are scaled by alpha / rank",
    "sampling.kernel": "what a stochastic step is: [kernels](how-it-works.md#one-step)",
    "rewards.NAME.replicas": "processes that score",
    "advantages.clamp": "advantages are clamped to ± this",
    "objective.clip_low": "the ratio is clipped at 1 - clip_low",
    "objective.clip_high": "the ratio is clipped at 1 + clip_high",
    "objective.kl": "`null`: no KL term",
    "objective.kl.beta": "weight of the KL in the loss",
    "optimizer.learning_rate": "constant",
    "optimizer.betas": "of AdamW",
    "optimizer.weight_decay": "of AdamW",
    "optimizer.eps": "of AdamW",
    "ema.decay": "largest; `(1 + n) / (10 + n)` is used while it is smaller, after n updates",
    "evaluation.micro_batch": "images per forward",
}

Schema = Mapping[str, Any]


def render() -> str:
    """All tables, top level first."""
    schema = TrainingSpec.model_json_schema()
    used: set[str] = set()
    text = "\n".join(_section("", schema, schema["$defs"], used))
    if unused := MEANINGS.keys() - used:
        raise SystemExit(f"MEANINGS no longer needed, the schema says it: {sorted(unused)}")
    return text


def _section(path: str, schema: Schema, known: Schema, used: set[str]) -> Iterator[str]:
    """The table of one section, and those of the sections below it."""
    variants = _variants(schema, known)
    below: list[tuple[str, Schema]] = []
    if path:
        yield f"### `{path}`\n"
    for variant in variants:
        says = variant.get("description")
        if path and says:
            kind = variant["properties"].get("kind", {}).get("const", "module:Class")
            yield (f"`kind: {kind}`: {says}\n" if len(variants) > 1 else f"{says}\n")
        yield "| key | values | default | meaning |\n| --- | --- | --- | --- |"
        kind_first = sorted(variant["properties"].items(), key=lambda item: item[0] != "kind")
        for key, value in kind_first:
            place = f"{path}.{key}" if path else key
            target = _object(value, known)
            name = f"{place}.NAME" if _is_map(value) else f"{place}.N" if _items(value) else place
            if target and (name, target) not in below:
                below.append((name, target))
            default = _default(key, value, variant, _variants(target, known) if target else [])
            meaning = _meaning(place, name if target else None, value, used)
            yield f"| `{key}` | {_values(value)} | {default} | {meaning} |"
        yield ""
    for name, target in below:
        yield from _section(name, target, known, used)


def _variants(schema: Schema, known: Schema) -> list[Schema]:
    """The kinds of a section; with one kind, that one."""
    if "oneOf" not in schema:
        return [schema]
    # Nothing but its kind says which of several tables holds, so none is the default.
    return [
        {**kind, "required": ["kind", *kind.get("required", [])]}
        for kind in (_resolve(option, known) for option in schema["oneOf"])
    ]


def _resolve(schema: Schema, known: Schema) -> Schema:
    return known[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _is_map(value: Schema) -> bool:
    """Whether a value is a mapping of free names to sections, as `rewards` is."""
    return "$ref" in _map_values(value)


def _map_values(value: Schema) -> Schema:
    """The schema of a mapping's values, whose keys are free or follow one pattern."""
    more = value.get("additionalProperties")
    by_pattern = value.get("patternProperties", {})
    return more if isinstance(more, dict) else next(iter(by_pattern.values()), {})


def _items(value: Schema) -> Schema | None:
    """The schema of a list's items, where a value may be a list of sections."""
    for option in value.get("oneOf", []):
        if "$ref" in option.get("items", {}):
            return option["items"]
    return None


def _object(value: Schema, known: Schema) -> Schema | None:
    """The section that a value opens, if it is one."""
    if _is_map(value):
        return _resolve(_map_values(value), known)
    if items := _items(value):
        return _resolve(items, known)
    for option in (value, *value.get("anyOf", [])):
        if "oneOf" in option:
            return option
        if "$ref" in option:
            return _resolve(option, known)
    return None


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"object": "a mapping", "string": "text", "null": "`null`"}


def _values(value: Schema) -> str:
    """What may stand at a key."""
    if "anyOf" in value or _items(value):
        return " or ".join(map(_values, value.get("anyOf") or value["oneOf"]))
    if "pattern" in value:
        return "`module:Class`" if value["pattern"] == ":" else "text"
    if "const" in value or "enum" in value:
        return " ".join(f"`{item}`" for item in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        if "$ref" in value.get("items", {}):
            return "[a mapping, …]"
        fixed = value.get("prefixItems")
        inner = ", ".join(map(_values, fixed or [value["items"]]))
        return f"[{inner}]" if fixed else f"[{inner}, …]"
    kind = str(value.get("type", "object"))
    bounds = [f"{sign} {_number(value[key])}" for key, sign in BOUNDS.items() if key in value]
    return " ".join([TYPES.get(kind, kind), ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    """Large powers of two as such: schemas bound integers by them."""
    power = int(value).bit_length() - 1
    return f"2^{power}" if power > 30 and value == 2**power else f"{value:g}"


def _default(key: str, value: Schema, parent: Schema, section: Sequence[Schema]) -> str:
    """Of a key; ``section`` are the kinds of what it opens, if that is a section."""
    if key in parent.get("required", []):
        return "**required**"
    default = value.get("default")
    if len(section) > 1 and default is not None:
        return f"its defaults, `kind: {default['kind']}`"
    own = {k: v.get("default") for of in section for k, v in of["properties"].items()}
    if section and default == own:
        return "its defaults"
    return "`{}`" if "default" not in value else f"`{json.dumps(default)}`"


def _meaning(place: str, section: str | None, value: Schema, used: set[str]) -> str:
    """From the schema, else from MEANINGS; a section names its table."""
    said = value.get("description")
    if said is None and place in MEANINGS:
        used.add(place)
        said = MEANINGS[place]
    if section:
        anchor = "".join(c for c in section.lower() if c.isalnum() or c in "-_")
        return f"{f'{said}; ' if said else ''}see [`{section}`](#{anchor})"
    if said is None and "const" in value:
        return "says which table holds"
    if said is None:
        raise SystemExit(f"{place} has no meaning: describe it in flowgrpo_ray/spec")
    return said.replace("|", "\\|")


def options_of(reward: str) -> str:
    """The table of a reward's options; ``launch`` are those of a judge's server."""
    cls = JudgeServer if reward == "launch" else resolve(reward)
    schema = options_model(cls).model_json_schema()
    rows = [
        f"| `{name}` | {_values(value)} | {_default(name, value, schema, [])} "
        f"| {_meaning(f'{reward}.{name}', None, value, set())} |"
        for name, value in schema["properties"].items()
    ]
    head = "\n| option | values | default | meaning |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows)


def pages() -> Iterator[tuple[Path, str, str]]:
    """Each page with generated parts, as it is and as it should be."""
    page = PAGE.read_text("utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    yield PAGE, page, f"{head}{BEGIN}\n\n{render()}\n{END}{tail}"
    page = CATALOGUE.read_text("utf-8")
    yield CATALOGUE, page, OPTIONS.sub(lambda m: f"{m[1]}{options_of(m[2])}\n\n{m[3]}", page)


def main() -> None:
    for path, page, fresh in pages():
        if fresh == page:
            continue
        if "--check" in sys.argv[1:]:
            sys.exit(f"{path.name} is stale: run python docs/generate_spec_reference.py")
        path.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
