"""How ComfyUI and Forge use a LoRA file, worked out again from the rules that both publish.

They hold the published model, whose layers are fused (q, k and v are rows of one matrix), and look
up each name that they know in the file. The change of a weight is ``alpha / rank * B @ A`` with
the tensor ``NAME.alpha``, and ``B @ A`` where there is none; the file's header is not read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Rows = tuple[str, int]  # a layer of the published model, and which of its parts, from the top

# By family: kinds of blocks (ours, theirs), and in each the layers (ours, theirs and the part).
SD3_BLOCK: dict[str, Rows] = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", 0),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn.to_add_out": ("context_block.attn.proj", 0),
    "ff.net.0.proj": ("x_block.mlp.fc1", 0),
    "ff.net.2": ("x_block.mlp.fc2", 0),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", 0),
    "ff_context.net.2": ("context_block.mlp.fc2", 0),
}
FLUX_DOUBLE: dict[str, Rows] = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", 0),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_add_out": ("txt_attn.proj", 0),
    "norm1.linear": ("img_mod.lin", 0),
    "norm1_context.linear": ("txt_mod.lin", 0),
    "ff.net.0.proj": ("img_mlp.0", 0),
    "ff.net.2": ("img_mlp.2", 0),
    "ff_context.net.0.proj": ("txt_mlp.0", 0),
    "ff_context.net.2": ("txt_mlp.2", 0),
}
FLUX_SINGLE: dict[str, Rows] = {
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", 0),
    "norm.linear": ("modulation.lin", 0),
}
FLUX2_DOUBLE: dict[str, Rows] = {
    **{ours: rows for ours, rows in FLUX_DOUBLE.items() if ours.startswith("attn.")},
    "ff.linear_in": ("img_mlp.0", 0),
    "ff.linear_out": ("img_mlp.2", 0),
    "ff_context.linear_in": ("txt_mlp.0", 0),
    "ff_context.linear_out": ("txt_mlp.2", 0),
}
FLUX2_SINGLE: dict[str, Rows] = {
    "attn.to_qkv_mlp_proj": ("linear1", 0),
    "attn.to_out": ("linear2", 0),
}
Z_IMAGE_BLOCK: dict[str, Rows] = {
    "attention.to_q": ("attention.qkv", 0),
    "attention.to_k": ("attention.qkv", 1),
    "attention.to_v": ("attention.qkv", 2),
    "attention.to_out.0": ("attention.out", 0),
}
QWEN_2_BLOCK: dict[str, Rows] = {
    "img_mlp.gate_layer": ("img_mlp.gate_up", 0),
    "img_mlp.proj": ("img_mlp.gate_up", 1),
}
BLOCKS = {
    "sd3": {"transformer_blocks": ("joint_blocks", SD3_BLOCK)},
    "flux": {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    },
    "qwen_image": {},  # the published names are ours
    "qwen_image_2": {"transformer_blocks": ("transformer_blocks", QWEN_2_BLOCK)},
    "z_image": {
        kind: (kind, Z_IMAGE_BLOCK) for kind in ("layers", "noise_refiner", "context_refiner")
    },
    "flux2": {
        "transformer_blocks": ("double_blocks", FLUX2_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX2_SINGLE),
    },
}
BLOCKS |= {
    "flux_kontext": BLOCKS["flux"],
    "flux2_dev": BLOCKS["flux2"],
    "qwen_image_edit": BLOCKS["qwen_image"],
    "qwen_image_edit_plus": BLOCKS["qwen_image"],
}


class Published:
    """The published model's matrices, made of those of a transformer of diffusers."""

    def __init__(self, family: str, weights: Mapping[str, Tensor]) -> None:
        self.blocks = BLOCKS[family]
        matrices = {n: w for n, w in weights.items() if n.endswith(".weight") and w.ndim == 2}
        self.rows: dict[str, tuple[str, int, int]] = {}  # of our layers: matrix, first, how many
        parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
        for name, weight in matrices.items():
            layer = name.removesuffix(".weight")
            theirs, part = self._theirs(layer)
            parts.setdefault(theirs, {})[part] = (layer, weight)
        self.weights: dict[str, Tensor] = {}
        for theirs, found in parts.items():
            first = 0
            for part in range(len(found)):
                layer, weight = found[part]
                self.rows[layer] = (theirs, first, len(weight))
                first += len(weight)
            self.weights[theirs] = torch.cat([found[part][1] for part in range(len(found))])

    def _theirs(self, layer: str) -> Rows:
        kind, _, rest = layer.partition(".")
        number, _, inner = rest.partition(".")
        theirs, layers = self.blocks.get(kind, ("", {}))
        if inner not in layers:
            return layer, 0
        name, part = layers[inner]
        return f"{theirs}.{number}.{name}", part

    def names(self) -> dict[str, tuple[str, int, int]]:
        """What a file may call a layer, and the rows of the matrix that it changes."""
        whole = {name: (name, 0, len(weight)) for name, weight in self.weights.items()}
        return {
            **{f"transformer.{layer}": rows for layer, rows in self.rows.items()},
            **{f"diffusion_model.{name}": rows for name, rows in whole.items()},
            **{f"lora_unet_{name.replace('.', '_')}": rows for name, rows in whole.items()},
        }

    def with_lora(self, file: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The matrices with the file at strength 1; ``AssertionError`` if a tensor is not used."""
        merged = {name: weight.clone() for name, weight in self.weights.items()}
        used: set[str] = set()
        for name, (matrix, first, rows) in self.names().items():
            for up, down in (("lora_B", "lora_A"), ("lora_up", "lora_down")):
                keys = (f"{name}.{up}.weight", f"{name}.{down}.weight")
                if keys[0] not in file:
                    continue
                b, a = (file[key].clone() for key in keys)
                alpha = file.get(f"{name}.alpha")
                scale = 1.0 if alpha is None else alpha.item() / len(a)
                merged[matrix][first : first + rows] += scale * (b @ a)
                used |= {*keys, f"{name}.alpha"}
        assert not file.keys() - used
        return merged
