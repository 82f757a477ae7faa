"""What a base model must offer: a velocity, and the few things around it.

A policy is one file per model. ``velocity`` is the ONLY way in which sampling, training, the KL
reference and evaluation reach the network; guidance, casts, timestep scaling and packing happen
there and nowhere else.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowgrpo_ray.common.types import NEGATIVE, Condition, Images
from flowgrpo_ray.policies.arrays import as_tensor
from flowgrpo_ray.policies.kernels import cast_by_autocast, prepare_compiler, use_kernels
from flowgrpo_ray.policies.lengths import Reading, batches
from flowgrpo_ray.policies.linear import use_onednn
from flowgrpo_ray.policies.lora import add_lora, merge_file, start_lora, switch
from flowgrpo_ray.policies.lora_file import read_lora
from flowgrpo_ray.policies.lora_names import Native

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec, Tuning

Configs = Mapping[str, Any]  # parsed config files of a model, by their path in its folder
ENCODED_AT_ONCE = 16  # prompts; shorter batches are filled up, so that all have this size
DECODED_PIXELS = 2**20  # decoded at once: 4 images of 512 x 512; more makes no GPU faster
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Policy(ABC):
    """A flow-matching text-to-image model as GRPO sees it. Shapes: ``b`` samples, ``*D`` latents.

    ``parts`` says what to load: ``"network"`` (the trainable denoiser), ``"decoder"`` (latents to
    images) and ``"encoder"`` (prompts to conditions); a learner needs only the first, ``on_host``
    (on the CPU) where shards of it shall come to ``device``. Who never trains needs no ``masters``:
    then what autocast would cast for every product is held in half precision.
    """

    PARTS: ClassVar[frozenset[str]] = frozenset({"network", "decoder", "encoder"})
    lora_targets: ClassVar[tuple[str, ...]]
    pipeline: ClassVar[str] = ""  # the model's class in diffusers, if it has one
    native_layers: ClassVar[Native] = {}
    # Programs beside diffusers and peft that read a LoRA of it, by these layer names or their own.
    read_by: ClassVar[tuple[str, ...]] = ("ComfyUI",)
    call_arguments: ClassVar[tuple[str, ...]] = ()  # of that pipeline's call, for the model card
    call_takes_length: ClassVar[bool] = True  # as max_sequence_length
    call_scheduler: ClassVar[str] = ""  # to draw with, if not the pipeline's own
    ways_in: ClassVar[tuple[str, ...]] = ()  # methods of the network that compute, beside forward
    encoded_at_once: ClassVar[int] = ENCODED_AT_ONCE
    negative_prompt: ClassVar[str | None] = ""  # what guidance leads away from; None: no prompt
    sources: ClassVar[range] = range(1)  # how many images to change a prompt may name
    config_files: ClassVar[tuple[str, ...]]  # that say what the parts are made of

    network: nn.Module
    onednn = False  # whether oneDNN computes the tuned network's linear layers

    def __init__(
        self,
        model: ModelSpec,
        tuning: Tuning,
        guidance: float,
        device: torch.device,
        parts: frozenset[str] = PARTS,
        *,
        on_host: bool = False,
        masters: bool = True,
    ) -> None:
        self.model, self.tuning, self.guidance, self.device = model, tuning, guidance, device
        self.dtype = DTYPES[model.dtype]
        self.encoder_dtype = DTYPES[model.encoder_dtype or model.dtype]
        self.decoder_dtype = DTYPES[model.decoder_dtype or model.dtype]
        use_kernels(model)
        self.with_reference = False
        self.reference_network: nn.Module | None = None
        if "network" in parts:
            master = torch.float32 if tuning.kind == "full" else self.dtype
            home = torch.device("cpu") if on_host else device
            network = self.load_network(master)
            if not masters:
                for name, dtype in self.halved(network).items():
                    weight = network.get_parameter(name)
                    weight.data = weight.data.to(dtype)
            self.network = network.to(home).eval()
        if "encoder" in parts:
            self.load_encoder()
        if "decoder" in parts:
            self.load_decoder()

    # --- what each model defines

    @abstractmethod
    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser, on the CPU, in ``dtype``; ``ModelError`` if it cannot be loaded.

        ``dtype`` is float32 for full tuning, whose masters these weights are. It must offer
        ``enable_gradient_checkpointing()``, as diffusers' and transformers' models do.
        """

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
    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        """One condition per prompt of a batch that ``tokens_of`` gives one length.

        Arrays come from ``as_array``; their lengths may differ between batches if ``collate`` pads.
        """

    @abstractmethod
    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        """``steps + 1`` noise levels from 1 to 0 with the model's own shift."""

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """``*D`` of one image of ``size`` (height, width) pixels; ``SpecError`` if impossible."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The guided velocity ``noise - data`` at ``x [b, *D]``, through ``self.network``.

        ``sigma`` is one noise level for all samples, or ``[b]``.
        """

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

    @abstractmethod
    def skeleton(self, configs: Configs, dtype: torch.dtype) -> None:
        """Make the network (in ``dtype``, as ``load_network`` does) and the decoder from the
        contents of the files that ``config_files`` names, without weights: for estimates."""

    @abstractmethod
    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        """What ``collate`` gives for ``batch`` prompts of the greatest length, without values."""

    def example_edit(
        self, batch: int, configs: Configs, sources: int, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The same of prompts that each name so many images, which are of ``size``."""
        raise NotImplementedError(f"{self.model.family} draws from text alone")

    @classmethod
    def passes(cls, guidance: float) -> int:
        """Network evaluations of one ``velocity``: two where guidance compares two prompts."""
        return 2 if guidance > 1 else 1

    # --- what all models share

    @staticmethod
    def levels(sigma: float | Tensor, x: Tensor) -> Tensor:
        """A noise level for each of ``x [b, ...]``: ``[b]`` float32."""
        if isinstance(sigma, Tensor):
            return sigma
        return torch.full((len(x),), sigma, device=x.device)

    def reading(self) -> Reading | None:
        """How prompts become tokens, to tell which are too long, if that can be told."""
        return None

    def tokens_of(self, prompt: str) -> int:
        """How long a prompt is for the encoder, where batches are not padded to one length."""
        return 0

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        """One condition per prompt, in batches of ``encoded_at_once`` prompts of equal length.

        All batches of a length have one shape, whoever is in them, so that a prompt's bits do not
        depend on its neighbours. The prompt that guidance leads away from is ``negative_*``.
        """
        return [{**condition, **self._negative} for condition in self._encoded(prompts)]

    @property
    def compared(self) -> str | None:
        """The prompt that guidance leads away from, where it compares two."""
        if self.passes(self.guidance) == 1:
            return None
        given = self.model.negative_prompt
        return self.negative_prompt if given is None else given

    @cached_property
    def _negative(self) -> Condition:
        if (text := self.compared) is None:
            return {}
        (found,) = self._encoded([text])
        return {f"{NEGATIVE}{name}": array for name, array in found.items()}

    def _encoded(self, prompts: Sequence[str]) -> list[Condition]:
        found: dict[int, Condition] = {}
        for places, texts in batches(prompts, self.tokens_of, self.encoded_at_once):
            found |= zip(places, self.encode_batch(texts), strict=False)
        return [found[index] for index in range(len(prompts))]

    def encode_edit(self, prompt: str, sources: Images) -> Condition:
        """The condition of a prompt and the images ``[n, H, W, 3]`` that it changes, which have the
        size of those to be drawn; with the ``negative_*`` of these images where guidance compares.

        All arrays have the same shapes for the same ``n`` and size, or ``collate`` pads them.
        """
        raise NotImplementedError(f"{self.model.family} draws from text alone")

    def collate(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """``velocity``'s condition from those of single prompts, on the CPU: ``{name: [b, ...]}``.

        Stacks arrays of equal shapes; models whose prompts differ in length pad here.
        """
        return {
            name: torch.stack([as_tensor(condition[name]) for condition in conditions])
            for name in conditions[0]
        }

    @staticmethod
    def decoded_at_once(images: int, size: tuple[int, int]) -> int:
        """How many of ``images`` of (height, width) pixels ``images`` decodes in one slice."""
        return min(images, max(1, DECODED_PIXELS // math.prod(size)))

    def images(self, x: Tensor, size: tuple[int, int]) -> Images:
        """What ``decode`` makes of latents ``[b, *D]``, slice by slice, so that the memory which it
        takes does not grow with ``b``; an image depends on its place in a slice in last bits only.
        """
        slices = x.split(self.decoded_at_once(len(x), size))
        return np.concatenate([self.decode(part) for part in slices])

    def full_parameters(self) -> Iterator[nn.Parameter]:
        """What full tuning trains: all of the network."""
        return self.network.parameters()

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

        Trainable parameters are float32 masters. The LoRA that ``model.lora`` names becomes part of
        the network first, or the start of its adapters. ``with_reference`` keeps what ``reference``
        needs: a frozen copy of the network, or with adapters a copy of those that it started from.
        With ``model.compile`` each block is compiled on its first forward, as sampling and training
        both run it, so that they keep the same bits; for each size of a batch anew, so that an
        evaluation does not change the program that training uses.
        """
        self._tune(seed, with_reference)
        networks = [n for n in (self.network, self.reference_network) if n is not None]
        if self.onednn:
            for network in networks:
                use_onednn(network)
        if self.model.compile:
            prepare_compiler()
            for network in networks:
                for block in self.blocks_of(network):
                    block.compile(dynamic=False)

    def _tune(self, seed: int, with_reference: bool) -> None:
        self.with_reference = with_reference
        self.network.requires_grad_(False)
        start = None
        if self.model.lora is not None:
            start = read_lora(self.model, self.network, self.pipeline, self.native_layers)
        if self.tuning.kind == "lora":
            add_lora(self.network, self.tuning, self.lora_targets, seed)
            if start is not None:
                start_lora(self.network, self.tuning, start, keep=with_reference)
            return
        if start is not None:
            merge_file(self.network, self.full_parameters(), start)
        trained = list(self.full_parameters())
        if with_reference:  # which shares what is never trained
            ids = {id(parameter) for parameter in trained}
            memo: Any = {id(p): p for p in self.network.parameters() if id(p) not in ids}
            self.reference_network = copy.deepcopy(self.network, memo)
        for parameter in trained:
            parameter.requires_grad_(True)

    def halved(self, network: nn.Module) -> dict[str, torch.dtype]:
        """Weights of full tuning that sampling needs in half precision only, and that dtype."""
        if self.tuning.kind != "full" or self.dtype == torch.float32:
            return {}
        cast = cast_by_autocast(network)
        return {name: self.dtype for name, p in network.named_parameters() if id(p) in cast}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, ``velocity`` is that of the model that training started from."""
        if self.reference_network is not None:
            trained, self.network = self.network, self.reference_network
            try:
                yield
            finally:
                self.network = trained
        else:
            switch(self.network, trained=False)
            try:
                yield
            finally:
                switch(self.network, trained=True)

    def blocks_of(self, network: nn.Module) -> list[nn.Module]:
        """The repeated blocks of ``network`` or of its copy, in order."""
        return [module for module in network.modules() if isinstance(module, self.block_classes())]

    def checkpoint_activations(self) -> None:
        """Recompute each block's activations in the backward pass."""
        network: Any = self.network
        network.enable_gradient_checkpointing()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in the network's own order."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}
