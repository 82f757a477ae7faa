"""`--option KEY=VALUE`, as the commands about rewards take it."""

from __future__ import annotations

from typing import Any

from flowgrpo_ray.errors import SpecError
from flowgrpo_ray.spec_file import parse_yaml
from flowgrpo_ray.strict_json import parse


def parse_option(text: str, example: str = "batch=4") -> tuple[str, Any]:
    """Key and value of `key=value`; the value is JSON or YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"--option {text!r}: write it as key=value, for example --option {example}")
    try:
        return key, parse(value)
    except ValueError:
        return key, parse_yaml(value, f"--option {text!r}")
