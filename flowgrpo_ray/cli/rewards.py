"""`flowgrpo-ray rewards …`: one file for each group of commands."""

from __future__ import annotations

import typer

from flowgrpo_ray.cli import rewards_check, rewards_env, rewards_score, rewards_serve

rewards_app = typer.Typer(no_args_is_help=True, help="Check, score with and serve rewards.")
rewards_app.command()(rewards_check.check)
rewards_app.command()(rewards_score.score)
rewards_app.add_typer(rewards_env.env_app, name="env")
for command in (
    rewards_serve.deploy,
    rewards_serve.status,
    rewards_serve.scale,
    rewards_serve.remove,
):
    rewards_app.command()(command)
