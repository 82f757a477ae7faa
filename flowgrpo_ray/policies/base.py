"""What a base model must offer: a velocity, and the few things around it.

A policy is one file per model over diffusers' classes. ``velocity`` is the ONLY way in which
sampling, training, the KL reference and evaluation reach the network; guidance, casts and timestep
scaling happen there and nowhere else.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from flowgrpo_ray.errors import SpecError
from flowgrpo_ray.types import Condition, Images

if TYPE_CHECKING:
    from peft import LoraConfig

    from flowgrpo_ray.spec import LoraTuning, ModelSpec, Tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER = "default"


class Policy(ABC):
    """A flow-matching text-to-image model as GRPO sees it. Shapes: ``b`` samples, ``*D`` latents.

    ``parts`` says what to load: ``"network"`` (the trainable denoiser), ``"decoder"`` (latents to
    images) and ``"encoder"`` (prompts to conditions); a learner needs only the first.
    """

    PARTS: ClassVar[frozenset[str]] = frozenset({"network", "decoder", "encoder"})
    lora_targets: ClassVar[tuple[str, ...]]

    network: nn.Module

    def __init__(
        self,
        model: ModelSpec,
        tuning: Tuning,
        guidance: float,
        device: torch.device,
        parts: frozenset[str] = PARTS,
    ) -> None:
        self.model, self.tuning, self.guidance, self.device = model, tuning, guidance, device
        self.dtype = DTYPES[model.dtype]
        self.with_reference = False
        self.reference_network: nn.Module | None = None
        if "network" in parts:
            master = torch.float32 if tuning.kind == "full" else self.dtype
            self.network = self.load_network(master).to(device).eval()
        if "encoder" in parts:
            self.load_encoder()
        if "decoder" in parts:
            self.load_decoder()

    # --- what each model defines

    @abstractmethod
    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser, on the CPU, in ``dtype``; ``ModelError`` if it cannot be loaded."""

    @abstractmethod
    def load_encoder(self) -> None:
        """What ``encode`` needs, on ``self.device``."""

    @abstractmethod
    def drop_encoder(self) -> None:
        """Free what ``load_encoder`` loaded."""

    @abstractmethod
    def load_decoder(self) -> None:
        """What ``decode`` needs, on ``self.device``."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        """One condition per prompt, each encoded alone: the result depends on that prompt only."""

    @abstractmethod
    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        """``steps + 1`` noise levels from 1 to 0 with the model's own shift."""

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """``*D`` of one image of ``size`` (height, width) pixels; ``SpecError`` if impossible."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: float, condition: dict[str, Tensor]) -> Tensor:
        """The guided velocity ``noise - data`` at ``x [b, *D]``, through ``self.network``."""

    @abstractmethod
    def decode(self, x: Tensor) -> Images:
        """Final latents ``[b, *D]`` to uint8 images ``[b, H, W, 3]``."""

    @abstractmethod
    def block_classes(self) -> tuple[type[nn.Module], ...]:
        """The network's repeated blocks: what FSDP shards one by one."""

    @abstractmethod
    def save_lora(self, folder: Path) -> None:
        """Write the adapters so that the pipeline's ``load_lora_weights`` takes them."""

    @abstractmethod
    def save_pipeline(self, folder: Path) -> None:
        """Write the whole pipeline, adapters merged, so that its ``from_pretrained`` takes it."""

    # --- what all models share

    @property
    def dtype_name(self) -> str:
        return self.model.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of every forward, in sampling and training alike."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def tune(self, seed: int, *, with_reference: bool) -> None:
        """Make the network trainable: all of it, or low-rank adapters on a frozen base.

        Trainable parameters are float32 masters. ``with_reference`` keeps what ``reference`` needs
        (with adapters nothing more, else a frozen copy of the network).
        """
        self.with_reference = with_reference
        self.network.requires_grad_(False)
        if self.tuning.kind == "lora":
            add_lora(self.network, self.tuning, self.lora_targets, seed)
            return
        if with_reference:
            self.reference_network = copy.deepcopy(self.network)
        self.network.requires_grad_(True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, ``velocity`` is the untrained model's: adapters off, or the frozen copy."""
        if self.reference_network is not None:
            trained, self.network = self.network, self.reference_network
            try:
                yield
            finally:
                self.network = trained
        else:
            set_adapters(self.network, enabled=False)
            try:
                yield
            finally:
                set_adapters(self.network, enabled=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in the network's own order."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}


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
