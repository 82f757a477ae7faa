"""`flowgrpo-ray rewards …`: one file for each group of commands."""

from __future__ import annotations

import typer

from flowgrpo_ray.cli import rewards_check

rewards_app = typer.Typer(no_args_is_help=True, help="Check, score with and serve rewards.")
rewards_app.command()(rewards_check.check)
