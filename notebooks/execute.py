"""Run the notebooks, each in a fresh kernel, and keep their outputs.

    python notebooks/execute.py                # all of them
    python notebooks/execute.py one_iteration

They run in one temporary folder, so that compare_runs finds the run of quickstart.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).parent
NOTEBOOKS = ("quickstart", "own_reward", "one_iteration", "compare_runs")


def execute(notebook: NotebookNode, folder: Path, environment: Mapping[str, str]) -> None:
    """Run every cell in ``folder``; ``CellExecutionError`` at the first that fails."""
    with tempfile.TemporaryDirectory(prefix="fgn", dir="/tmp") as private:
        # Sockets in a private folder instead of open ports; no profile in the home folder.
        kernel = {"transport": "ipc", "connection_file": f"{private}/kernel.json"}
        client = NotebookClient(
            notebook,
            config=Config(KernelManager=kernel),
            kernel_name="python3",  # the one of this Python
            timeout=900,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute(env={**environment, "IPYTHONDIR": f"{private}/ipython"})


def shrink(notebook: NotebookNode) -> None:
    """Store every picture with 256 colours: a third of the bytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                small = io.BytesIO()
                picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and keep their outputs.")
    parser.add_argument("names", nargs="*", default=NOTEBOOKS, metavar="NAME")
    with tempfile.TemporaryDirectory() as folder:
        for name in parser.parse_args().names:
            file = HERE / f"{name}.ipynb"
            notebook = nbformat.read(file, as_version=4)
            execute(notebook, Path(folder), os.environ)
            shrink(notebook)
            nbformat.write(notebook, file)
            print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
