"""The mathematics and the update: one step as a Gaussian, the objective, sampling, the learner.

Torch and NumPy alone: tensors in, tensors out; no Ray, no files of a run, no reward. ``flow`` and
``objective`` are the formulas, ``sampling`` draws and replays with them, ``learner`` updates the
weights, ``optimizer`` and ``weights`` are its parts.
"""

from flowgrpo_ray.algorithm.flow import Gaussian, cps, dance_sde, flow_sde
from flowgrpo_ray.algorithm.objective import clipped_loss, group_advantages, guard_log_ratio

__all__ = [
    "Gaussian",
    "clipped_loss",
    "cps",
    "dance_sde",
    "flow_sde",
    "group_advantages",
    "guard_log_ratio",
]
