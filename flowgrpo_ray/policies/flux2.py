"""FLUX.2: klein, base models with classifier-free guidance and distilled ones without, and dev."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from flowgrpo_ray.common.errors import ModelError, SpecError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.common.types import Condition, Images
from flowgrpo_ray.policies.arrays import as_array
from flowgrpo_ray.policies.base import Configs
from flowgrpo_ray.policies.editing import SOURCES, EditingPolicy
from flowgrpo_ray.policies.flux import ATTENTION, double, single
from flowgrpo_ray.policies.hub import model_file
from flowgrpo_ray.policies.loading import INDEX
from flowgrpo_ray.policies.lora_names import Native
from flowgrpo_ray.policies.pipeline import JOINT_ATTENTION, TwoPassPolicy, as_images

TOKEN = 16  # pixels along its side
LARGEST_SOURCE = 2**20  # pixels that the pipelines show the autoencoder of an image to change


class Flux2Policy(EditingPolicy, TwoPassPolicy):
    """``Flux2KleinPipeline``'s parts. Latents are ``[b, 128, H / 16, W / 16]``: a token at each
    place, normalised as the autoencoder's batch norm has it.

    A condition holds three hidden layers of the encoder, of ``max_sequence_length`` tokens with
    those that fill up: the network sees them all, without a mask.
    """

    pipeline = "Flux2KleinPipeline"
    sources = range(5)  # as many as its makers say that it takes; the pipeline has no bound
    thinks: ClassVar[bool | None] = False
    transformer = "Flux2Transformer2DModel"
    autoencoder = "AutoencoderKLFlux2"
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    lora_targets = (
        *JOINT_ATTENTION,
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "attn.to_qkv_mlp_proj",
    )
    native_layers: ClassVar[Native] = {
        **ATTENTION,
        "double_blocks.{}.img_mlp.0": double("ff.linear_in"),
        "double_blocks.{}.img_mlp.2": double("ff.linear_out"),
        "double_blocks.{}.txt_mlp.0": double("ff_context.linear_in"),
        "double_blocks.{}.txt_mlp.2": double("ff_context.linear_out"),
        "single_blocks.{}.linear1": single("attn.to_qkv_mlp_proj"),
        "single_blocks.{}.linear2": single("attn.to_out"),
    }

    @property
    def index(self) -> dict[str, Any]:
        """What the model says of its parts."""
        return parse(model_file(self.model, INDEX).read_bytes())

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        if self.passes(self.guidance) > 1 and self.index.get("is_distilled"):
            raise SpecError(
                f"sampling.guidance = {self.guidance}: {self.model.path} was distilled to draw "
                f"without guidance (is_distilled of its {INDEX} is true); set it to 1"
            )
        return super().load_network(dtype)

    def encode_batch(self, prompts: Sequence[str]) -> list[Condition]:
        embeds, _ = self.encoder.encode_prompt(
            list(prompts), max_sequence_length=self.model.max_sequence_length
        )
        return [{"embeds": as_array(own)} for own in embeds]

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        token = 2 * self.factor
        self.check_size(size, token)
        network: Any = self.network.config
        return (network.in_channels, size[0] // token, size[1] // token)

    def mu(self, tokens: int, steps: int, config: Any) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def pack(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens[:, : x[0, 0].numel()].transpose(1, 2).reshape(x.shape)

    def source_pixels(self, image: Image.Image, processor: Any) -> Tensor:
        try:
            processor.check_image_input(image)
        except ValueError as error:
            raise SpecError(
                f"sampling.size = {[image.height, image.width]} does not fit images to change, "
                f"which have that size in {self.model.path}: {error}"
            ) from error
        height, width = self.source_size((image.height, image.width))
        image = processor._resize_if_exceeds_area(image, LARGEST_SOURCE)
        return processor.preprocess(image, height, width, resize_mode="crop")

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """At most ``LARGEST_SOURCE`` pixels, cut to whole tokens."""
        scale = min(1, math.sqrt(LARGEST_SOURCE / math.prod(size)))
        height, width = (int(side * scale) // TOKEN * TOKEN for side in size)
        return height, width

    def _predict(
        self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor], of: str
    ) -> Tensor:
        """One pass of the network: the velocity as tokens ``[b, h w, C]``, and more behind them."""
        from diffusers import Flux2KleinPipeline as Pipeline

        network: Any = self.network
        ids = [Pipeline._prepare_latent_ids(x[:1])]  # one row for all
        if SOURCES in condition:
            ids.append(Pipeline._prepare_image_ids([*condition[SOURCES][:1].unbind(1)]))
        embeds, guidance = condition[of], None
        if network.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=x.device)
        with self.autocast():
            return network(
                hidden_states=self.tokens(x, condition),
                timestep=self.timestep(x, sigma),
                guidance=guidance,
                encoder_hidden_states=embeds.to(self.dtype),
                txt_ids=Pipeline._prepare_text_ids(embeds[:1]).to(x.device),
                img_ids=torch.cat(ids, dim=1).to(x.device),
                return_dict=False,
            )[0]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Images:
        from diffusers import Flux2KleinPipeline

        z, norm = x.to(self.decoder_dtype), self.vae.bn
        std = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        z = z * std[:, None, None] + norm.running_mean[:, None, None]
        z = Flux2KleinPipeline._unpatchify_latents(z)
        return as_images(self.vae.decode(z, return_dict=False)[0])

    def example_condition(self, batch: int, configs: Configs) -> dict[str, Tensor]:
        network: Any = self.network.config
        shape = (batch, self.model.max_sequence_length, network.joint_attention_dim)
        names = ("embeds", "negative_embeds")[: self.passes(self.guidance)]
        return {name: torch.empty(shape, dtype=self.encoder_dtype) for name in names}


class Flux2DevPolicy(Flux2Policy):
    """``Flux2Pipeline``'s parts: the same with an encoder of Mistral's, and guidance as an input of
    the network, so that one pass is enough."""

    pipeline = "Flux2Pipeline"
    sources = range(7)
    thinks = None

    @classmethod
    def passes(cls, guidance: float) -> int:
        return 1

    def load_encoder(self) -> None:
        if "PixtralProcessor" in self.index.get("tokenizer", ()) and not find_spec("torchvision"):
            raise ModelError(
                f"model.path = {self.model.path!r}: its tokenizer is transformers' "
                "PixtralProcessor, which needs torchvision. Install that where prompts are "
                f"encoded, in the version that belongs to torch {torch.__version__}"
            )
        super().load_encoder()
