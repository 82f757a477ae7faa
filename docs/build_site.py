"""Builds the documentation site: ``make docs``, or ``python docs/build_site.py [FOLDER]``.

The pages are those that GitHub shows, at the same paths. What they link to beside them becomes a
page too: a source file as its text, a folder as the list of its files. The API reference is made
from docstrings, by the names in ``API``. Nothing is fetched, and a warning is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path(__file__).with_name("site.toml")

# Pages of the reference, and the objects on each.
API = {
    "runs": [
        *("cluster.api.train", "run.opened.Run", "run.opened.Samples"),
        *("spec.file.load_spec", "spec.training.TrainingSpec"),
    ],
    "rewards": [
        *("rewards.Reward", "rewards.build", "rewards.check_options", "rewards.weighted_total"),
    ],
    "objectives": [
        *(f"algorithm.objectives.base.{name}" for name in ("Objective", "Term", "Statistic")),
        "algorithm.objectives.steps.StepObjective",
        "algorithm.objectives.steps.Step",
        "algorithm.objectives.noised.NoisedObjective",
        "algorithm.objectives.noised.Noised",
    ],
    "trackers": [
        *(f"run.trackers.base.{name}" for name in ("Tracker", "TrackedRun", "Picture")),
    ],
    "policies": ["policies.base.Policy"],
    "errors": ["common.errors"],
}
LINK = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?(\))")
CODE = re.compile(r"^(?:```.*?^```$)|`[^`\n]*`", re.M | re.S)
NOTE = re.compile(r"^(```\w+) .*")  # of a block, for the tests of the pages
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".env": "bash"}
SHOWN_AS_THEY_ARE = (".png", ".ipynb")


def page_of(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    if path.endswith((".md", *SHOWN_AS_THEY_ARE)):
        return re.sub(r"README\.md$", "index.md", path)
    return f"source/{path}.md"


def prepare(path: str, pages: Path) -> None:
    """Write a page of the site below ``pages``, and those that it links to."""
    source, target = ROOT / path, pages / page_of(path)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()  # pages link to each other
    if path.endswith(SHOWN_AS_THEY_ARE):
        shutil.copyfile(source, target)
    elif path.endswith(".md"):
        text, linked = rewritten(path)
        target.write_text(text, "utf-8")
        for other in linked:
            prepare(other, pages)
    elif source.is_dir():
        names = sorted(p.name for p in source.iterdir() if p.is_file())
        target.write_text(f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names), "utf-8")
    else:
        language = LANGUAGES.get(source.suffix, "text")
        text = source.read_text("utf-8").rstrip("\n")
        target.write_text(f"# {path}\n\n````{language}\n{text}\n````\n", "utf-8")


def rewritten(path: str) -> tuple[str, list[str]]:
    """A Markdown page with links to pages of the site, and what it links to."""
    linked: list[str] = []
    here = Path(path).parent

    def follow(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups(default="")
        if not target or "://" in target:
            return match[0]
        found = os.path.normpath(here / target)
        linked.append(found)
        relative = os.path.relpath(page_of(found), Path(page_of(path)).parent)
        return f"{before}{relative}{anchor}{after}"

    text, parts, at = (ROOT / path).read_text("utf-8"), [], 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(follow, text[at : code.start()]), NOTE.sub(r"\1", code[0])]
        at = code.end()
    return "".join([*parts, LINK.sub(follow, text[at:])]), linked


def reference() -> Iterator[tuple[str, str]]:
    """The pages of the API reference."""
    for name, objects in API.items():
        body = "\n\n".join(f"::: flowgrpo_ray.{place}" for place in objects)
        yield f"api/{name}.md", f"# {name.capitalize()}\n\n{body}\n"


def main(out: Path = ROOT / "build" / "docs") -> None:
    shutil.rmtree(out, ignore_errors=True)
    pages = out / "pages"
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        prepare(page.relative_to(ROOT).as_posix(), pages)
    (pages / "api").mkdir()
    for name, text in reference():
        (pages / name).write_text(text, "utf-8")
    shutil.copyfile(CONFIG, out / "zensical.toml")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=out, check=False).returncode:
        sys.exit("the documentation site was not built")
    print(f"read it:  {sys.executable} -m http.server --directory {out / 'site'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
