"""Writes the table of docs/models.md that says what of each family a test runs.

    python docs/generate_family_table.py

A cell is filled where the suite has a test of that family: `yes` in `make test`, `slow` in
`make test-slow`. With `--check` it writes nothing, and exits with status 1 if the table is stale.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flowgrpo_ray.spec.families import FAMILIES

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- what is tested: begin -->\n", "<!-- what is tested: end -->\n"
FILES = (
    "tests/policies/test_policy_contract.py",
    "tests/policies/test_bagel_policy.py",
    "tests/run/test_export_models.py",
    "tests/cluster/test_policy_on_ray.py",
)
REPLAYED = "test_a_replayed_trajectory_has_a_log_ratio_of_exactly_zero"
COLUMNS = {  # tests by name and, if it matters, by how they are tuned
    "samples as its pipeline": ("test_ode_sampling_is_the_pipelines", ""),
    "SDE, LoRA": (REPLAYED, "lora"),
    "SDE, full": (REPLAYED, "full"),
    "NFT": ("test_a_finished_image_is_trained_with_the_velocities_it_was_sampled_with", ""),
    "two ranks": ("test_two_ranks_train_as_one_process", ""),
    "exported LoRA": ("test_plain_diffusers_draws_an_exported_lora", ""),
    "exported pipeline": ("test_plain_diffusers_draws_an_exported_pipeline", ""),
    "run on Ray": ("test_a_run_on_ray_trains", ""),
}
ELSEWHERE = {  # tests of one family alone
    ("sd3", "run on Ray"): "tests/cluster/test_end_to_end.py",
    ("bagel", "samples as its pipeline"): "",
}


def collected(*options: str) -> set[tuple[str, str]]:
    """Names of tests with what stands in their brackets."""
    plain = ("--collect-only", "-q", "-o", "addopts=--strict-markers")
    command = [sys.executable, "-m", "pytest", *plain, *options, *FILES]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"::(\w+)\[(.+)\]$", printed, re.MULTILINE))


def cell(family: str, column: str, quick: set[tuple[str, str]], every: set[tuple[str, str]]) -> str:
    if (family, column) in ELSEWHERE:
        return "yes" if ELSEWHERE[family, column] else ""
    name, tuning = COLUMNS[column]

    def there(tests: set[tuple[str, str]]) -> bool:
        parts = [case.split("-") for test, case in tests if test == name]
        return any(family in case and (not tuning or tuning in case) for case in parts)

    return "yes" if there(quick) else "slow" if there(every) else ""


def table() -> Iterator[str]:
    every, quick = collected(), collected("-m", "not slow")
    yield f"| family | {' | '.join(COLUMNS)} | images to change |\n"
    yield "| --- " * (len(COLUMNS) + 2) + "|\n"
    for name, family in FAMILIES.items():
        cells = [cell(name, column, quick, every) for column in COLUMNS]
        edits = family.sources
        images = str(edits.start) if len(edits) == 1 else f"{edits.start} to {edits.stop - 1}"
        yield f"| `{name}` | {' | '.join(cells)} | {images if edits.stop > 1 else ''} |\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{''.join(table())}\n{END}{after}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text("utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
