"""``python -m flowgrpo_ray`` is the ``flowgrpo-ray`` command."""

from flowgrpo_ray.cli import main

main()
