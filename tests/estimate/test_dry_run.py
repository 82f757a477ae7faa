"""Networks on shapes alone: repeated blocks, the GPU's autocast, and no use beyond the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flowgrpo_ray.estimate.dry_run import Cost, give_shapes, measure, scaled, without_data


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_blocks_tell_what_many_cost(checkpointing: bool):
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network: Any = SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=9,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1, 2, 3),
        ).train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    runs: list[Cost] = []
    names = list(network.state_dict())
    with without_data(gpu=True):
        give_shapes(network)
        inputs = [torch.empty(s) for s in ((2, 4, 16, 16), (2, 7, 32), (2, 16), (2,))]

        def run() -> Cost:
            predict = lambda: network(*inputs, return_dict=False)[0]  # noqa: E731
            runs.append(measure(predict, network, inputs, backward=True))
            return runs[-1]

        assert scaled(run, network, (type(network.transformer_blocks[0]),)) == run()
    assert len(runs) == 4, "two blocks of each row, one more of either row, and all"
    assert runs[0] < runs[-1]
    assert list(network.state_dict()) == names


def test_a_gpus_autocast_keeps_norms_in_float32():
    for gpu, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        with without_data(gpu=gpu):
            x = torch.empty(2, 8, dtype=torch.bfloat16)
            assert nn.functional.layer_norm(x, (8,)).dtype == torch.bfloat16, "no autocast here"
            with torch.autocast("cpu", torch.bfloat16):
                assert nn.functional.layer_norm(x, (8,)).dtype == dtype
                assert nn.functional.linear(x, x.float()).dtype == torch.bfloat16


def test_tensors_of_one_block_are_refused_in_another():
    """There their views would count as copies."""
    with without_data(gpu=False):
        x = torch.empty(2, 8)
    with without_data(gpu=False), pytest.raises(AssertionError, match="fake modes"):
        _ = x + x
