"""The `flowgrpo-ray` command: `commands` trains and looks at runs, `rewards` is about rewards."""

from flowgrpo_ray.cli.commands import app, main

__all__ = ["app", "main"]
