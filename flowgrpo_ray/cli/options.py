"""`--option KEY=VALUE`, as the commands about rewards take it."""

from __future__ import annotations

import json
from typing import Any

import yaml

from flowgrpo_ray.errors import SpecError


def parse_option(text: str, example: str = "batch=4") -> tuple[str, Any]:
    """Key and value of `key=value`; the value is JSON or YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"--option {text!r}: write it as key=value, for example --option {example}")
    try:
        return key, json.loads(value)  # reads 1e-4 as a number, which YAML 1.1 does not
    except json.JSONDecodeError:
        pass
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--option {text!r}: not YAML: {error}") from error
