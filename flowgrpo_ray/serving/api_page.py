"""The page at /docs: what the OpenAPI schema says, with nothing that is loaded from elsewhere.

FastAPI's own page loads its program from a public server, which a cluster may not reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
    "td,th{text-align:left;vertical-align:top;padding:.2em 1em .2em 0}"
)


def api_page(schema: Mapping[str, Any]) -> str:
    """A page of HTML for an OpenAPI schema."""
    info = schema["info"]
    title = escape(f"{info['title']} {info['version']}")
    operations = [
        part
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
        for part in _operation(schema, method, path, operation)
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{escape(info.get('description', ''))} "
        f'For programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(operations)}</html>'
    )


def _operation(
    schema: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        body = _resolved(schema, content["schema"])
        required = body.get("required", [])
        rows = [
            (
                f"<code>{escape(name)}</code>",
                "required" if name in required else "optional",
                escape(field.get("description", "")),
            )
            for name, field in body["properties"].items()
        ]
        yield f"<h3>Fields, as <code>{escape(kind)}</code></h3>{_table(rows)}"
    answers = []
    for status, answer in operation["responses"].items():
        content = answer.get("content", {}).get("application/json", {})
        keys = _resolved(schema, content.get("schema", {})).get("properties", {})
        shown = ", ".join(f"<code>{escape(key)}</code>" for key in keys)
        answers.append((escape(status), escape(answer["description"]), shown))
    yield f"<h3>Answers, as JSON with these keys</h3>{_table(answers)}"


def _resolved(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of the schema, or what it refers to."""
    if "$ref" not in part:
        return part
    return schema["components"]["schemas"][part["$ref"].rpartition("/")[2]]


def _table(rows: list[tuple[str, ...]]) -> str:
    """Cells of HTML as a table."""
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
