"""What a run is: the training spec as pydantic models, its YAML, its prompts, an iteration's plan.

Everything here is pure: it reads files, checks, plans, and starts nothing. Pydantic, PyYAML and
NumPy are all that it loads, so that a spec can be checked anywhere.
"""

from flowgrpo_ray.spec.file import dump_spec, load_spec, recipe_names
from flowgrpo_ray.spec.plan import plan_evaluation, plan_iteration
from flowgrpo_ray.spec.prompts import load_prompt_sets
from flowgrpo_ray.spec.training import TrainingSpec

__all__ = [
    "TrainingSpec",
    "dump_spec",
    "load_prompt_sets",
    "load_spec",
    "plan_evaluation",
    "plan_iteration",
    "recipe_names",
]
