"""The documentation site: its pages are all there, it is built without a warning, search finds."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_browser
from scripts import load_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "build_site.py"
CONFIG = tomllib.loads((ROOT / "docs" / "site.toml").read_text("utf-8"))["project"]


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation():
    listed = list(pages_of(CONFIG["nav"]))
    assert len(set(listed)) == len(listed)
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    pages |= {f"api/{name}.md" for name in load_script(SCRIPT).API}
    other = {"index.md", "notebooks/index.md", "docs/decisions/index.md"}
    assert set(listed) == pages | other | {"CONTRIBUTING.md", "CHANGELOG.md"}


def test_the_reference_is_of_objects_that_say_what_they_are():
    for places in load_script(SCRIPT).API.values():
        for place in places:
            module, _, name = f"flowgrpo_ray.{place}".rpartition(".")
            found = getattr(importlib.import_module(module), name)
            assert inspect.getdoc(found), place


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("docs") / "out"
    command = [sys.executable, SCRIPT, out]
    pipe = subprocess.PIPE
    built = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False)
    assert built.returncode == 0, built.stdout
    assert "No issues found" in built.stdout
    return out / "site"


@pytest.mark.slow
def test_the_site_is_whole(site: Path):
    for page in pages_of(CONFIG["nav"]):
        html = (site / page).with_suffix(".html").read_text("utf-8")
        assert not re.findall(r'(?:<script[^>]* src|<link[^>]* href)="(?:https?:)?//[^"]*', html)
    for name, places in load_script(SCRIPT).API.items():
        html = (site / "api" / f"{name}.html").read_text("utf-8")
        assert all(f'id="flowgrpo_ray.{place}"' in html for place in places)
    shown = (site / "source/flowgrpo_ray/policies/base.py.html").read_text("utf-8")
    assert "velocity" in shown, "what pages link to beside them is there"


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SOUGHT = {
    "offload_optimizer": ["docs/spec.html", "docs/troubleshooting.html"],
    "CheckpointError": ["api/errors.html"],
}
SEARCH = "document.querySelector('.md-search__button')"
FOUND = (
    "[...document.querySelectorAll('*')].filter(e => e.shadowRoot)"
    ".flatMap(e => [...e.shadowRoot.querySelectorAll('a[role=option]')]).map(a => a.href)"
)


@pytest.mark.slow
@needs_browser
def test_search_finds_keys_and_messages_without_the_network(address: str):
    with Browser() as browser:
        for words, pages in SOUGHT.items():
            browser.open(f"{address}/index.html", SEARCH)
            browser.look(f"{SEARCH}.click()")
            browser.wait("document.activeElement.shadowRoot.activeElement.role == 'combobox'")
            browser.call("Input.insertText", text=words)
            browser.wait(f"{json.dumps(pages)}.every(p => {FOUND}.some(a => a.includes(p)))")
        assert not [url for url in browser.requests if not url.startswith((address, "data:"))]
        assert not browser.troubles
