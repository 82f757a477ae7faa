"""Low-rank adapters on a frozen network: made by peft, started from a file, switched, merged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgrpo_ray.common.errors import ModelError, SpecError
from flowgrpo_ray.policies.lora_file import LoraFile

if TYPE_CHECKING:
    from peft import LoraConfig

    from flowgrpo_ray.spec.sections import LoraTuning

ADAPTER = "default"  # the trained ones
START = "start"  # what they started from, frozen: the KL reference of a run that starts from a LoRA


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            _inject(network, lora_config(tuning, default_targets), ADAPTER)
        except ValueError as error:
            raise SpecError(f"tuning.targets = {tuning.targets} fits no layer: {error}") from error


def start_lora(network: nn.Module, tuning: LoraTuning, file: LoraFile, *, keep: bool) -> None:
    """Give the adapters of ``add_lora`` the values of ``file``; ``keep`` a frozen copy of them.

    They change the weights as the file does, whatever its alpha: B is scaled to that of ``tuning``.
    """
    _check_start(network, tuning, file)
    file = file.at(tuning.alpha)
    _fill(network, ADAPTER, file)
    if keep:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are meant
            _inject(network, _config_of(file), START)
        _fill(network, START, file)
        switch(network, trained=True)


def merge_file(network: nn.Module, trained: Iterable[nn.Parameter], file: LoraFile) -> None:
    """Fold the adapters of ``file`` into the ``trained`` weights of ``network``."""
    ids = {id(parameter) for parameter in trained}
    of_trained = (name for name, parameter in network.named_parameters() if id(parameter) in ids)
    _check_layers({name.rpartition(".")[0] for name in of_trained}, file)
    _inject(network, _config_of(file), ADAPTER)
    _fill(network, ADAPTER, file)
    merge_lora(network)


def _inject(network: nn.Module, config: LoraConfig, adapter: str) -> None:
    """New adapters, float32 and in use."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, network, adapter_name=adapter)
    for parameter in _parameters(network, adapter).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _config_of(file: LoraFile) -> LoraConfig:
    """peft's description of the file's adapters, on exactly its layers."""
    from peft import LoraConfig

    layers = "|".join(re.escape(layer) for layer in file.layers)
    return LoraConfig(r=file.rank, lora_alpha=file.alpha, target_modules=layers)  # pyright: ignore[reportArgumentType]


def _parameters(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Adapter weights under the names that diffusers and peft save: without the adapter's own."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }


@torch.no_grad()
def _fill(network: nn.Module, adapter: str, file: LoraFile) -> None:
    for name, parameter in _parameters(network, adapter).items():
        values = file.weights[name]
        if values.shape != parameter.shape:
            raise ModelError(
                f"model.lora = {file.place!r} was made for another model: {name} is "
                f"{tuple(values.shape)} there and {tuple(parameter.shape)} here"
            )
        parameter.copy_(values)


def _check_layers(known: Collection[str], file: LoraFile) -> None:
    """``ModelError`` for adapters of other layers than those ``known``."""
    missing = [layer for layer in file.layers if layer not in known]
    if missing:
        raise ModelError(
            f"model.lora = {file.place!r} was made for another model: it adapts {len(missing)} "
            f"layers that this one does not have or never trains, as {missing[0]!r}"
        )


def _check_start(network: nn.Module, tuning: LoraTuning, file: LoraFile) -> None:
    """``SpecError`` unless the file's adapters are those that ``tuning`` describes."""
    _check_layers({name for name, _ in network.named_modules()}, file)
    of_file = f"the adapters of model.lora = {file.place!r}"
    if tuning.rank != file.rank:
        raise SpecError(
            f"tuning.rank = {tuning.rank} does not fit {of_file}, which have rank {file.rank}. "
            f"Set tuning.rank: {file.rank}"
        )
    ours = {name.partition(".lora_")[0] for name in _parameters(network, ADAPTER)}
    if ours != set(file.layers):
        odd = sorted(ours ^ set(file.layers))[0]
        raise SpecError(
            f"tuning.targets = {list(tuning.targets) if tuning.targets else None} chooses "
            f"{len(ours)} layers and does not fit {of_file}, which are on {len(file.layers)}; "
            f"{odd!r} is only {'here' if odd in ours else 'there'}. Set tuning.targets: "
            f"[{', '.join(file.endings)}]"
        )


def switch(network: nn.Module, *, trained: bool) -> None:
    """Use the trained adapters, or what they started from: the frozen copy, or none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    configs: Any = network.peft_config
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            if START in configs:
                module.set_adapter(ADAPTER if trained else START, inference_mode=not trained)
            else:
                module.enable_adapters(trained)


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The trained adapters' weights, on the CPU, under the names that diffusers and peft save."""
    trained = _parameters(network, ADAPTER)
    return {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}


def portable_lora(
    network: nn.Module, tuning: LoraTuning, default_targets: tuple[str, ...]
) -> tuple[Mapping[str, Tensor], LoraConfig]:
    """The trained adapters with their strength inside B, and peft's description of these.

    alpha is the rank then, which every program takes it for that finds no alpha.
    """
    file = LoraFile("", lora_state(network), tuning.rank, tuning.alpha).at(tuning.rank)
    folded = tuning.model_copy(update={"alpha": tuning.rank})
    return file.weights, lora_config(folded, default_targets)


def merge_lora(network: nn.Module) -> None:
    """Fold the adapters into the layers they adapt, and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, layer.get_base_layer())
