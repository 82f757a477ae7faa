"""The Grafana dashboard and the page about it, against the table of metrics and PromQL's grammar.

That its queries find data in a real Prometheus is tested in test_telemetry.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana import DASHBOARD, PANELS, queries

from flowgrpo_ray.serving.metric_table import FROM_ROWS, OF_DRIVER, OF_REPLICAS, Metric

PAGE = (Path(__file__).parents[2] / "docs" / "dashboard.md").read_text("utf-8")
OF_RUNS = [*(metric for metrics in FROM_ROWS.values() for metric in metrics), *OF_DRIVER]
TABLE = [*OF_RUNS, *OF_REPLICAS]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def tags_of(metric: Metric) -> set[str]:
    who = {"reward", "replica"} if metric in OF_REPLICAS else {"run"}
    return who | set(metric.tags)


def series_of(metric: Metric) -> Iterator[str]:
    """The names of its series in Prometheus."""
    ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
    yield from (metric.exported + end for end in ends)


SERIES = {name: metric for metric in TABLE for name in series_of(metric)}


def selectors(query: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each selector of a query: the metric's name, and its matchers."""
    found: list[tuple[str, list[tuple[str, str]]]] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, [(m.name, m.value) for m in node.matchers.matchers]))
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


@pytest.mark.parametrize(("title", "query"), queries("run"), ids=lambda v: v[:40])
def test_a_query_asks_for_metrics_and_tags_that_exist(title: str, query: str):
    found = selectors(query)
    assert found
    for name, matchers in found:
        assert name in SERIES, f"{title}: {name}"
        tags = tags_of(SERIES[name])
        assert {tag for tag, _ in matchers} <= tags
        assert dict(matchers).get("run") == ("run" if "run" in tags else None)
        grouped = re.findall(r"by \(([^)]*)\)", query)
        assert {tag for group in grouped for tag in group.split(", ")} <= tags | {"le"}


def test_a_wrong_query_is_found():
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("max(ray_flowgrpo_kl")
    assert selectors('1 - rate(a{b="c"}[1m]) / d') == [("a", [("b", "c")]), ("d", [])]


def test_no_mean_is_taken_from_the_sum_of_a_histogram():
    assert not [query for _, query in queries("run") if re.search(r"latency_seconds_sum", query)]


def test_every_metric_but_the_derived_ones_has_a_panel():
    shown = {name for _, query in queries("run") for name, _ in selectors(query)}
    missing = {m.name for m in TABLE if not shown & set(series_of(m))}
    assert missing == {
        *("eval_iteration", "eval_reward_std", "eval_unscored_images", "eval_seconds"),
        *("updates", "loss_scale", "overflows", "groups_sampled", "images"),
        *("checkpoint_iteration", "reward_images", "replica_calls", "replica_images"),
        *("replica_failures", "replica_seconds", "replica_latency_seconds"),
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: prometheus)")
def test_promtool_takes_every_query(tmp_path: Path):
    rules = [{"record": f"q{i}", "expr": query} for i, (_, query) in enumerate(queries("run"))]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run = subprocess.run(
        ["promtool", "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert f"{len(rules)} rules found" in run.stdout


# --- the dashboard as Grafana reads it


def test_panels_are_told_apart_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    for key in ("id", "title"):
        values = [panel[key] for panel in panels]
        assert len(set(values)) == len(values), key
    places = [panel["gridPos"] for panel in panels]
    assert all(p["x"] >= 0 and p["x"] + p["w"] <= 24 for p in places)
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]):
    assert panel["type"] in ("stat", "timeseries")
    assert panel["datasource"] == DATASOURCE
    assert len(panel["description"]) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    if panel["type"] == "timeseries":
        assert all(target["legendFormat"] for target in panel["targets"])


def test_data_source_and_run_are_chosen_at_the_top():
    datasource, run = DASHBOARD["templating"]["list"]
    assert (datasource["name"], datasource["type"]) == ("datasource", "datasource")
    assert (run["name"], run["datasource"]) == ("run", DATASOURCE)
    assert run["query"]["query"] == "label_values(ray_flowgrpo_iterations, run)"
    assert "ray_flowgrpo_iterations" in SERIES


# --- the page


def rows(first_column: str) -> list[list[str]]:
    """The cells of the page's table whose first column is called so."""
    body = PAGE.partition(f"\n| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in body]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_has_every_metric_with_its_type_and_tags():
    shown = {}
    for line in re.findall(r"^\| `ray_.*$", PAGE, re.M):
        name, kind, tags, unit, *_ = [cell.strip() for cell in line.split("|")[1:]]
        shown[name.strip("`")] = (kind, tuple(named(tags)))
        assert "`" not in unit
    assert shown == {metric.exported: (metric.kind, metric.tags) for metric in TABLE}


def test_the_page_has_every_panel():
    shown = [title for first, *_ in rows("panel") for title in named(first)]
    assert sorted(shown) == sorted(panel["title"] for panel in PANELS)
