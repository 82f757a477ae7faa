"""The page that shows runs: one set of files, served by the monitor or put into a report.

A report holds its data and asks the network for nothing. The monitor's page fetches the same data
piece by piece. No text of a run ever becomes markup, and a content security policy allows no code
but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

STYLE = "page.css"
SCRIPTS = (
    *("dom.js", "numbers.js", "scale.js", "chart.js", "pictures.js"),
    *("run.js", "stages.js", "runs.js", "compare.js", "main.js"),
)
TYPES = {".css": "text/css", ".js": "text/javascript"}

POLICY_SERVED = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def asset(name: str) -> str:
    """The text of one file of the page."""
    return resources.files("flowgrpo_ray.view").joinpath(f"assets/{name}").read_text("utf-8")


@cache
def served_page() -> str:
    """What the monitor answers: style and scripts by address, no data."""
    style = f'<link rel="stylesheet" href="/assets/{STYLE}">'
    scripts = [f'<script src="/assets/{name}"></script>' for name in SCRIPTS]
    return _filled(title="Flow-GRPO runs", head=style, scripts="\n".join(scripts))


def whole_page(data: Mapping[str, Any], title: str) -> str:
    """One file with everything inside. `<` is escaped, so no text of a run can end a script."""
    style, code = asset(STYLE), "\n".join(asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(code)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    document = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return _filled(
        title=html.escape(title),
        head=f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<style>{style}</style>",
        scripts=f'<script type="application/json" id="run-data">{document}</script>\n'
        f"<script>{code}</script>",
    )


def _filled(title: str, head: str, scripts: str) -> str:
    before, _, rest = asset("page.html").partition("{{title}}")
    middle, _, rest = rest.partition("{{head}}")
    body, _, after = rest.partition("{{scripts}}")
    return "".join((before, title, middle, head, body, scripts, after))


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
