"""Low-rank adapters on a frozen network: made by peft, switched, merged and written by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowgrpo_ray.errors import SpecError

if TYPE_CHECKING:
    from peft import LoraConfig

    from flowgrpo_ray.spec import LoraTuning

ADAPTER = "default"


def lora_config(tuning: LoraTuning, default_targets: tuple[str, ...]) -> LoraConfig:
    """peft's description of the spec's adapters; one target alone is a regular expression."""
    from peft import LoraConfig

    targets = list(tuning.targets or default_targets)
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        init_lora_weights="gaussian",
        target_modules=targets if len(targets) > 1 else targets[0],
    )


def add_lora(
    network: nn.Module, tuning: LoraTuning, default_targets: tuple[str, ...], seed: int
) -> None:
    """Inject peft adapters (float32, drawn from ``seed``) into the frozen ``network``."""
    from peft import inject_adapter_in_model

    config = lora_config(tuning, default_targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        except ValueError as error:
            raise SpecError(f"tuning.targets = {tuning.targets} fits no layer: {error}") from error
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def set_adapters(network: nn.Module, *, enabled: bool) -> None:
    """Switch every adapter of ``network`` on or off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """Adapter weights under the names that diffusers and peft save: without the adapter's own."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in network.named_parameters()
        if f".{ADAPTER}." in name
    }


def merge_lora(network: nn.Module) -> None:
    """Fold the adapters into the layers they adapt, and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, layer.get_base_layer())
