"""The Grafana dashboard of the repository, and its queries as Grafana would send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "cluster_configs" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "flowgrpo-run.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries(run: str) -> Iterator[tuple[str, str]]:
    """Title and query of every target, with Grafana's variables filled in."""
    for panel in PANELS:
        for target in panel["targets"]:
            query = target["expr"].replace("$run", run).replace("$__rate_interval", "1m")
            yield f"{panel['title']} {target['refId']}", query.replace("$__range", "15m")
