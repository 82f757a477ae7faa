"""The families of base models, a line for each: its adapter, and how its folder is recognised.

Nothing heavy is imported: specs are checked against this, and the driver reads it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    adapter: str  # module:class, imported when a model is loaded
    index: str = "model_index.json"  # a file that the folder of every such model has


FAMILIES = {
    "sd3": Family("flowgrpo_ray.policies.sd3:SD3Policy"),
    "flux": Family("flowgrpo_ray.policies.flux:FluxPolicy"),
    "qwen_image": Family("flowgrpo_ray.policies.qwen_image:QwenImagePolicy"),
    "z_image": Family("flowgrpo_ray.policies.z_image:ZImagePolicy"),
    "flux2": Family("flowgrpo_ray.policies.flux2:Flux2Policy"),
    "flux2_dev": Family("flowgrpo_ray.policies.flux2:Flux2DevPolicy"),
    "bagel": Family("flowgrpo_ray.policies.bagel:BagelPolicy", index="llm_config.json"),
}
