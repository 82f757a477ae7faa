"""The families of base models, a line for each: its adapter, and how its folder is recognised.

Nothing heavy is imported: specs are checked against this, and the driver reads it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    adapter: str  # module:class, imported when a model is loaded
    pipelines: tuple[str, ...] = ()  # classes of diffusers that model_index.json may name
    index: str = "model_index.json"  # a file that the folder of every such model has
    sources: range = range(1)  # how many images to change a prompt may name


FAMILIES = {
    "sd3": Family("flowgrpo_ray.policies.sd3:SD3Policy", ("StableDiffusion3Pipeline",)),
    "flux": Family("flowgrpo_ray.policies.flux:FluxPolicy", ("FluxPipeline",)),
    "flux_kontext": Family(
        "flowgrpo_ray.policies.flux_kontext:FluxKontextPolicy",
        ("FluxKontextPipeline",),
        sources=range(1, 2),
    ),
    "qwen_image": Family(
        "flowgrpo_ray.policies.qwen_image:QwenImagePolicy", ("QwenImagePipeline",)
    ),
    "qwen_image_edit": Family(
        "flowgrpo_ray.policies.qwen_image_edit:QwenImageEditPolicy",
        ("QwenImageEditPipeline",),
        sources=range(1, 2),
    ),
    "qwen_image_edit_plus": Family(
        "flowgrpo_ray.policies.qwen_image_edit:QwenImageEditPlusPolicy",
        ("QwenImageEditPlusPipeline",),
        sources=range(1, 4),
    ),
    "qwen_image_2": Family(
        "flowgrpo_ray.policies.qwen_image_2:QwenImage2Policy", ("QwenImage21Pipeline",)
    ),
    "z_image": Family("flowgrpo_ray.policies.z_image:ZImagePolicy", ("ZImagePipeline",)),
    "flux2": Family(
        "flowgrpo_ray.policies.flux2:Flux2Policy", ("Flux2KleinPipeline",), sources=range(5)
    ),
    "flux2_dev": Family(
        "flowgrpo_ray.policies.flux2:Flux2DevPolicy", ("Flux2Pipeline",), sources=range(7)
    ),
    "sana": Family("flowgrpo_ray.policies.sana:SanaPolicy", ("SanaPipeline",)),
    "bagel": Family("flowgrpo_ray.policies.bagel:BagelPolicy", index="llm_config.json"),
}


def family_of(pipeline: object) -> str | None:
    """The family that drives a pipeline class of diffusers, if one does."""
    return next((name for name, one in FAMILIES.items() if pipeline in one.pipelines), None)
