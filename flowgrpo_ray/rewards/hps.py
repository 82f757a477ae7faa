"""The HPS reward, v2.1: how much would people prefer this image for its prompt?

    reward = cosine(image, text)

HPS v2 (Wu et al. 2023, arXiv 2306.09341) is a CLIP-H tuned on choices between images; v2.1 is the
authors' later training. Their checkpoint has the names of open_clip; here CLIP is that of
transformers, filled with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from flowgrpo_ray.rewards.clip import CLIP_H, ClipEncoder, PromptMatch
from flowgrpo_ray.rewards.loading import (
    Batch,
    CosineDtype,
    Device,
    Revision,
    Source,
    fill_places,
    load,
    pick_device,
    read_weights,
)
from flowgrpo_ray.rewards.pixels import longest_side

if TYPE_CHECKING:
    import torch

OPEN_CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    **{
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    **{"self_attn.q_proj.": "attn.in_proj_", "self_attn.out_proj": "attn.out_proj"},
}
"""What open_clip calls parts of transformers' CLIP. Queries, keys and values are one there."""


class HpsReward(PromptMatch):
    """Scores each image against its own prompt by the cosine, without the logit scale.

    Images are prepared as by the authors' code: the whole image, its longer side 224 pixels, black
    beside it.
    """

    SIZE = CLIP_H

    def __init__(
        self,
        path: Annotated[
            str,
            Field(
                description="the authors' checkpoint, a .pt or .safetensors file, or a folder or "
                "hub id that holds `file`"
            ),
        ] = "xswu/HPSv2",
        file: Annotated[
            str, Field(description="its name there; `HPS_v2_compressed.pt` is v2.0")
        ] = "HPS_v2.1_compressed.pt",
        processor: Annotated[
            str,
            Field(description="folder or hub id of the configuration and tokenizer of its CLIP"),
        ] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: Revision = None,
        device: Device = None,
        dtype: CosineDtype = "float32",
        batch: Batch = 32,
    ) -> None:
        from transformers import CLIPConfig

        place = pick_device(device)
        source: Source = ("path", path, revision)
        its_clip: Source = ("processor", processor, None)
        weights = read_weights(source, file, inside="state_dict")
        clip = clip_from(weights, load(CLIPConfig, its_clip), source)
        pixels = longest_side(clip.config.vision_config.image_size)
        self._clip = ClipEncoder(
            clip, source, its_clip, pixels, device=place, dtype=dtype, batch=batch
        )

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3]; NaN: the model gave no numbers."""
        return self._clip.cosines(images, prompts)


def clip_from(weights: Mapping[str, torch.Tensor], config: Any, source: Source) -> Any:
    """A CLIP of transformers, float32, filled with the `weights` of one of open_clip.

    ModelError names a weight that is missing or too many.
    """
    from transformers import CLIPModel

    model = CLIPModel(config).eval().requires_grad_(False)
    state = model.state_dict()
    places: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        published = name
        for own, theirs in OPEN_CLIP_NAMES.items():
            published = published.replace(own, theirs)
        if published.endswith(("visual.proj", "text_projection")):
            places[published] = [tensor.T]  # open_clip multiplies from the other side
        elif ".attn.in_proj_" in published:
            places[published] = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
        elif "self_attn.k_proj" not in name and "self_attn.v_proj" not in name:
            places[published] = [tensor]
    fill_places(places, weights, source)
    return model
