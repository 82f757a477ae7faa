"""`flowgrpo-ray configs`: the files that bring up rewards and clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowgrpo_ray.common.configs import FOLDERS, write_configs


def configs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="to write them to, as . for this one")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files")] = False,
) -> None:
    """Write deployments/ (Serve configs of rewards) and cluster_configs/ (launcher, Kubernetes,
    images, dashboards), to change them."""
    written = write_configs(folder, overwrite=overwrite)
    told = f"{len(written)} files written: {' and '.join(str(folder / name) for name in FOLDERS)}"
    Console(markup=False, highlight=False).print(told, soft_wrap=True)
