"""From the command to the first iteration of ``tiny-ocr``, by phase.

Runs ``flowgrpo-ray train`` as a user does, in a folder that is removed, and reads the phases that
the run writes to ``timings.jsonl``.

    .venv/bin/python benchmarks/startup.py [--runs 3]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from flowgrpo_ray.run.tracking import read_rows


def start_once() -> dict[str, Any]:
    """The ``start`` row of one run of a single iteration, and the whole command's seconds."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "flowgrpo_ray", "train", "tiny-ocr", "--runs", root]
        began = time.perf_counter()
        subprocess.run([*command, "--set", "iterations=1"], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - began
        rows = read_rows(Path(root) / "tiny-ocr" / "timings.jsonl")
    (row,) = [row for row in rows if row["kind"] == "start"]
    return {**row["phases"], "command to first iteration": row["seconds"], "whole command": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    rows = [start_once() for _ in range(parser.parse_args().runs)]
    whole = median(row["command to first iteration"] for row in rows)
    print(f"{len(rows)} runs, medians in seconds, and the share of the start")
    for phase in rows[0]:
        seconds = median(row[phase] for row in rows)
        share = "" if phase == "whole command" else f"  {seconds / whole:4.0%}"
        print(f"  {phase:26} {seconds:6.1f}{share}")


if __name__ == "__main__":
    main()
