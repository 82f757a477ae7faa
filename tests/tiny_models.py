"""A tiny model of every family, of its real classes with random weights, saved as its pipeline is.

``MODELS`` has one row per family: a test that is parametrised over it holds for all of them.
"""

from __future__ import annotations

import atexit
import json
import math
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tiny_bagel import build_bagel
from tiny_runs import (
    CPU,
    SIZE,
    UNTRAINED,
    Batch,
    gradients,
    in_shards,
    kept,
    small_spec,
    state_of,
    unit,
)

from flowgrpo_ray.algorithm.sampling import rollout
from flowgrpo_ray.common.types import (
    Condition,
    Images,
    LearnerState,
    Noising,
    Schedule,
    WeightsTicket,
)
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.spec.families import family_of
from flowgrpo_ray.spec.training import TrainingSpec

if TYPE_CHECKING:
    from flowgrpo_ray.algorithm.learner import Learner
    from flowgrpo_ray.policies.base import Policy

PROMPTS = ('red sign "407"', 'blue sign "129"', 'dark pink sign "550", of the size of a wall')
TOKENS = 40  # more than any of them has

# Of Qwen-Image's prompt template: each is a token, so that the template has its true length, 34.
TEMPLATE_WORDS = ["system", "Describe", "user", "assistant"]
TEMPLATE_WORDS += [
    f" {word}"
    for word in (
        *("the", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity"),
        *("text", "spatial", "relationships", "of", "objects", "and", "background"),
    )
]
# Of the templates of Qwen-Image-Edit as well, whose length is 64.
EDIT_WORDS = ["'s", "color", " (", "),"]
EDIT_WORDS += [
    f" {word}"
    for word in (
        *("key", "features", "input", "then", "explain", "how", "user", "instruction", "should"),
        *("alter", "or", "modify", "Generate", "a", "new", "that", "meets", "requirements"),
        *("while", "maintaining", "consistency", "with", "original", "where", "appropriate"),
    )
]
VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
CHAT = (  # of Qwen3, without a thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class TinyModel:
    """What tests need to know about a family.

    ``pipeline_images(pipe, prompts, noise, steps, guidance, size, output="pil")`` is what plain
    diffusers draws from ``noise [b, *D]``: uint8 images ``[b, H, W, 3]``, or the final latents
    ``[b, *D]`` with ``output="latent"``. It is ``None`` for a family without a diffusers pipeline.
    """

    build: Callable[[Path], Any]  # writes the model into a new folder
    overrides: tuple[str, ...]  # of the spec
    guidances: tuple[float, ...]  # none, and some
    pipeline_images: Callable[..., Any] | None
    sources: int = 0  # images that each prompt changes
    size: tuple[int, int] = SIZE

    def spec(self, folder: Path, *overrides: str) -> TrainingSpec:
        """A small spec on the model in ``folder``, float32, with ``a.b=c`` overrides."""
        places = (f"model.path={folder}", f"sampling.size={list(self.size)}")
        return small_spec(*self.overrides, *places, *overrides)


# --- the models


def build_sd3(folder: Path) -> None:
    """A copy of the embedded model."""
    source = small_spec().model.folder
    assert source is not None
    shutil.copytree(source, folder)


def build_flux(
    folder: Path, *, guidance_embeds: bool = True, pipeline: str = "FluxPipeline"
) -> None:
    """FLUX.1-dev, or without ``guidance_embeds`` FLUX.1-schnell; Kontext has the same parts."""
    import diffusers
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from flowgrpo_ray.tiny.parts import TOKENS as CLIP_TOKENS
    from flowgrpo_ray.tiny.parts import clip_tokenizer, t5_tokenizer

    torch.manual_seed(0)
    words, pieces = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(vocab_size=len(pieces), d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    network = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    _strengthen(network)
    getattr(diffusers, pipeline)(
        scheduler=_scheduler(
            use_dynamic_shifting=guidance_embeds,
            shift=3.0 if guidance_embeds else 1.0,
            max_image_seq_len=4096,
            max_shift=1.15,
        ),
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=pieces,
        transformer=network,
    ).save_pretrained(folder)


def build_qwen_image(folder: Path) -> None:
    from diffusers import QwenImagePipeline

    QwenImagePipeline(**_qwen_image_parts()).save_pretrained(folder)


def build_qwen_image_edit(folder: Path, *, plus: bool = False) -> None:
    """With ``plus`` as 2511, whose images to change are seen at noise level 0."""
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cls = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    pipe: Any = cls(**_qwen_image_parts(zero_cond_t=plus), processor=None)
    pipe.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _qwen_image_parts(**of_network: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    network = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        **of_network,
    )
    _strengthen(network)
    return {
        "scheduler": _scheduler(
            use_dynamic_shifting=True,
            shift=1.0,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        "vae": AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(_qwen_config(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": network,
    }


def build_flux2(folder: Path, *, is_distilled: bool = False) -> None:
    """FLUX.2-klein-base, or its distilled form. Its encoder gives hidden layers up to the 27th."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    qwen = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Flux2KleinPipeline(
        **_flux2_parts(guidance_embeds=False),
        text_encoder=Qwen3ForCausalLM(qwen),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    ).save_pretrained(folder)


def build_flux2_dev(folder: Path) -> None:
    """FLUX.2-dev, without its processor of images, which needs torchvision: a tokenizer alone, for
    which the pipeline's system message is one token."""
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import AddedToken
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([AddedToken(SYSTEM_MESSAGE, normalized=False)])
    tokenizer.chat_template = CHAT.replace("m.content", "m.content[0].text")
    layers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    text = {
        **layers,
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 31,
        "num_key_value_heads": 1,
    }
    vision = {**layers, "model_type": "pixtral", "num_hidden_layers": 1}
    config = Mistral3Config(text_config=text, vision_config=vision)
    Flux2Pipeline(
        **_flux2_parts(guidance_embeds=True),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def _flux2_parts(*, guidance_embeds: bool) -> dict[str, Any]:
    """Scheduler, autoencoder (of other channels, normalised by a batch norm) and network."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    assert vae.bn.running_mean is not None
    assert vae.bn.running_var is not None
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    _strengthen(network)
    scheduler = _scheduler(
        use_dynamic_shifting=True, shift=3.0, max_image_seq_len=4096, max_shift=1.15
    )
    return {"vae": vae, "transformer": network, "scheduler": scheduler}


def qwen_tokenizer() -> Any:
    """A byte is a token, and so is each word of the prompt template."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    symbols = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    tokenizer.add_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in TEMPLATE_WORDS])
    tokenizer.add_tokens([AddedToken(name, special=True) for name in VISION])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in EDIT_WORDS])
    return tokenizer


def _qwen_config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    layers = {"hidden_size": 32, "intermediate_size": 64}
    text = {
        **layers,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {**layers, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids([*VISION]), strict=True))
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def build_z_image(folder: Path) -> None:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    network = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1536, 512, 512],
    )
    _strengthen(network)
    for padding in (network.x_pad_token, network.cap_pad_token):  # zeros when made
        torch.nn.init.normal_(padding)
    ZImagePipeline(
        scheduler=_scheduler(shift=6.0),
        vae=_autoencoder(),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=network,
    ).save_pretrained(folder)


def build_qwen_image_2(folder: Path, *, sample_sigmas: list[float] | None = None) -> None:
    """Qwen-Image-2.1, of a processor without its parts for pictures, which need torchvision; with
    ``sample_sigmas`` distilled."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from tokenizers import AddedToken
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from flowgrpo_ray.policies.qwen_image_2_network import Words

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([AddedToken("<|image_pad|>", special=True)])
    tokenizer.chat_template = CHAT.replace("m.content", "m.content[0].text")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}
    )
    network = QwenImage21Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    _strengthen(network)
    shifting = {"shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9}
    shifting |= {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    QwenImage21Pipeline(
        scheduler=_scheduler(**({} if sample_sigmas else shifting)),
        vae=AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 2, 2, 2]
        ),
        text_encoder=Qwen3VLForConditionalGeneration(config),
        processor=Words(tokenizer),  # pyright: ignore[reportArgumentType]
        transformer=network,
        sample_sigmas=sample_sigmas,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen3VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def build_sana(folder: Path) -> None:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    torch.manual_seed(0)
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    symbols += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = GemmaTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", 2)]
    )
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
    )
    network = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
    )
    _strengthen(network)
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    SanaPipeline(tokenizer, Gemma2Model(text), vae, network, scheduler).save_pretrained(folder)


def _strengthen(network: torch.nn.Module) -> None:
    """Larger weights than the initial ones, so that prompts and guidance show in the velocity."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)


def _autoencoder() -> Any:
    """FLUX's: 16 channels, one latent value per 8 x 8 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def _scheduler(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(base_shift=0.5, **more)


# --- plain diffusers


def load_pipe(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline in ``folder``; its processor, if it has one, without videos, for which
    transformers needs torchvision."""
    from diffusers import DiffusionPipeline

    family = family_of(json.loads((folder / "model_index.json").read_text())["_class_name"])
    more: dict[str, Any] = {}
    if (folder / "processor").is_dir():
        policy: Any = load_policy(MODELS[family or ""].spec(folder), CPU, frozenset())
        more["processor"] = policy.load_processor()
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_images(
    pipe: Any,
    prompts: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    output: str = "pil",
) -> Any:
    """Of the pipelines of diffusers; see ``TinyModel``."""
    guided: dict[str, Any] = {"guidance_scale": guidance}
    if type(pipe).__name__.startswith("QwenImageEdit"):
        return _qwen_edited(pipe, prompts, noise, steps, guidance, size, output)
    if type(pipe).__name__ == "QwenImagePipeline":
        guided = {"true_cfg_scale": guidance}
        if guidance > 1:
            guided["negative_prompt"] = [" "] * len(prompts)
    if type(pipe).__name__ == "ZImagePipeline":  # whose scale begins at 0
        guided = {"guidance_scale": guidance - 1}
    if type(pipe).__name__.startswith("Flux2"):
        return flux2_images(pipe, prompts, noise, steps, guidance, size, output)
    if type(pipe).__name__ == "QwenImage21Pipeline":
        return _qwen_2_images(pipe, prompts, noise, steps, guidance, size, output)
    if type(pipe).__name__ == "SanaPipeline":
        guided["use_resolution_binning"] = False
        _euler(pipe)
    packs = hasattr(pipe, "_pack_latents")
    if type(pipe).__name__ == "FluxKontextPipeline":
        images = [image for p in prompts for image in image_for("flux_kontext", p, size)["image"]]
        guided |= {"image": images, "max_area": math.prod(size), "_auto_resize": False}
    made = pipe(
        prompt=list(prompts),
        latents=pipe._pack_latents(noise, *noise.shape) if packs else noise,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        max_sequence_length=TOKENS,
        output_type=output,
        **guided,
    ).images
    if output != "latent":
        return np.stack([np.asarray(image) for image in made])
    return pipe._unpack_latents(made, *size, 8).reshape(noise.shape) if packs else made


def image_for(family: str, prompt: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The argument of the pipeline's call that names the images which a prompt changes, if any."""
    model = MODELS[family]
    if not model.sources:
        return {}
    images = [Image.fromarray(i) for i in sources_of(prompt, model.sources, size or model.size)]
    return {"image": images[0] if family == "qwen_image_edit" else images}


def _qwen_edited(
    pipe: Any,
    prompts: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    output: str,
) -> Any:
    """As ``pipeline_images``, one by one, as the pipelines change one image at a time. They show
    their autoencoders a megapixel; here that is as much as is drawn."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

    family = family_of(type(pipe).__name__) or ""
    area = math.prod(size)
    made: list[Any] = []
    with (
        patch.object(edit_plus, "VAE_IMAGE_SIZE", area),
        patch.object(edit, "calculate_dimensions", lambda _, ratio: (*size[::-1], ratio)),
    ):
        for prompt, start in zip(prompts, noise.split(1), strict=True):
            (drawn,) = pipe(
                prompt=prompt,
                **image_for(family, prompt, size),
                latents=pipe._pack_latents(start, *start.shape),
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                true_cfg_scale=guidance,
                negative_prompt=" " if guidance > 1 else None,
                output_type=output,
            ).images
            made.append(drawn if output == "latent" else np.asarray(drawn))
    if output != "latent":
        return np.stack(made)
    return pipe._unpack_latents(torch.stack(made), *size, 8).reshape(noise.shape)


def flux2_images(
    pipe: Any,
    prompts: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    output: str,
    **more: Any,
) -> Any:
    """As ``pipeline_images``. What the pipelines return as latents is not what they drew: that is
    heard after the last step, as tokens."""
    latents = noise

    def hear(_: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = given["latents"].transpose(1, 2).reshape(noise.shape)
        return given

    made = pipe(
        prompt=list(prompts),
        latents=noise,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=TOKENS,
        output_type=output,
        callback_on_step_end=hear,
        **more,
    ).images
    return latents if output == "latent" else np.stack([np.asarray(image) for image in made])


def _qwen_2_images(
    pipe: Any,
    prompts: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    output: str,
) -> Any:
    """As ``pipeline_images``, each prompt alone: in a batch the pipeline moves an image by what its
    prompt is filled up with. Without its cache, whose last bits are others; on white."""
    kind = "latent" if output == "latent" else "pt"
    made = [
        pipe(
            [prompt],
            negative_prompt=[""] if guidance > 1 else None,
            true_cfg_scale=guidance,
            latents=pipe._pack_latents(start[None], 1, *start.shape),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            output_type=kind,
            use_kv_cache=False,
        ).images
        for prompt, start in zip(prompts, noise, strict=True)
    ]
    found = torch.cat(made)
    if output == "latent":
        return found.transpose(1, 2).reshape(noise.shape)
    colour, alpha = found[:, :3], found[:, 3:]
    on_white = (colour * alpha + (1 - alpha)).permute(0, 2, 3, 1)
    return (on_white.float() * 255).round().to(torch.uint8).numpy()


def _euler(pipe: Any) -> None:
    """The pipeline draws in Euler steps with its own shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if "flow_shift" in pipe.scheduler.config:
        shift = pipe.scheduler.config.flow_shift
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)


# --- the table


def _row(
    build: Callable[[Path], Any],
    family: str,
    *guidances: float,
    pipeline: bool = True,
    **more: Any,
) -> TinyModel:
    overrides = (f"model.family={family}", f"model.max_sequence_length={TOKENS}")
    return TinyModel(build, overrides, guidances, pipeline_images if pipeline else None, **more)


# FLUX.1 multiplies its guidance by 1000 in the network's dtype: 4 keeps its value in bfloat16.
MODELS = {
    "sd3": _row(build_sd3, "sd3", 1.0, 3.0),
    "flux": _row(build_flux, "flux", 1.0, 4.0),
    "flux_kontext": _row(
        partial(build_flux, pipeline="FluxKontextPipeline"), "flux_kontext", 1.0, 4.0, sources=1
    ),
    "qwen_image": _row(build_qwen_image, "qwen_image", 1.0, 4.0),
    "qwen_image_edit": _row(
        build_qwen_image_edit, "qwen_image_edit", 1.0, 4.0, sources=1, size=(64, 96)
    ),
    "qwen_image_edit_plus": _row(
        partial(build_qwen_image_edit, plus=True),
        "qwen_image_edit_plus",
        *(1.0, 4.0),
        sources=2,
        size=(64, 96),
    ),
    "qwen_image_2": _row(build_qwen_image_2, "qwen_image_2", 1.0, 4.0, size=(64, 96)),
    "z_image": _row(build_z_image, "z_image", 1.0, 3.0),
    "flux2": _row(build_flux2, "flux2", 1.0, 4.0),
    "flux2_dev": _row(build_flux2_dev, "flux2_dev", 1.0, 4.0),
    "sana": _row(build_sana, "sana", 1.0, 4.5, size=(64, 96)),
    "bagel": _row(build_bagel, "bagel", 1.0, 4.0, pipeline=False),
}
PIPELINES = [family for family, model in MODELS.items() if model.pipeline_images]
EDITING = [family for family, model in MODELS.items() if model.sources]


# --- small runs on them


@cache
def model_folder(family: str) -> Path:
    """The family's tiny model, built once per process and removed at its end."""
    root = tempfile.mkdtemp(prefix="fgm")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(root) / family
    MODELS[family].build(folder)
    return folder


def spec_of(family: str, *overrides: str) -> TrainingSpec:
    return MODELS[family].spec(model_folder(family), *overrides)


@cache
def conditions_of(family: str, *overrides: str) -> Mapping[int, Condition]:
    """Of the family's prompts, by index."""
    encoder = load_policy(spec_of(family, *overrides), CPU, frozenset({"encoder"}))
    return dict(enumerate(encoded(encoder, PROMPTS)))


def encoded(policy: Policy, prompts: Sequence[str]) -> list[Condition]:
    """Of prompts, each with the images that it changes if the family is one that edits."""
    model = MODELS[policy.model.family]
    if not model.sources:
        return policy.encode(prompts)
    return [policy.encode_edit(p, sources_of(p, model.sources, model.size)) for p in prompts]


def sources_of(prompt: str, count: int, size: tuple[int, int]) -> Images:
    """The images ``[count, H, W, 3]`` that a prompt changes here: of its own, and never alike."""
    random = np.random.default_rng(list(prompt.encode()))
    if not count:
        return np.empty((0, *size, 3), np.uint8)
    coarse = random.integers(0, 256, (count, 4, 6, 3), np.uint8)
    return np.stack([np.array(Image.fromarray(i).resize(size[::-1])) for i in coarse])


def schedule_of(policy: Policy, window: range, steps: int = 5) -> Schedule:
    """The policy's own noise levels; the steps in ``window`` are stochastic."""
    eta = tuple(0.8 if step in window else 0.0 for step in range(steps))
    return Schedule("flow_sde", policy.sigmas(steps, MODELS[policy.model.family].size), eta)


@dataclass(frozen=True)
class ModelBatch(Batch):
    """A scored micro-batch of any family, with the conditions that it was sampled under."""

    conditions: Mapping[int, Condition]

    def into(self, learner: Learner) -> Any:
        return learner.accumulate(
            self.unit, self.trajectory, self.conditions, self.advantages, self.keep
        )


def draw_batch_of(
    policy: Policy,
    conditions: Mapping[int, Condition],
    prompts: tuple[int, ...] = (0, 0, 2, 2),
    ticket: WeightsTicket = UNTRAINED,
    *,
    window: range = range(1, 3),
    index: int = 0,
    noising: Noising | None = None,
) -> ModelBatch:
    """Sample a micro-batch, stochastic in ``window`` or to be trained where ``noising`` says, and
    invent advantages for it."""
    samples = tuple(range(index * len(prompts), (index + 1) * len(prompts)))
    steps = schedule_of(policy, range(0) if noising else window)
    of = unit(steps, prompts, samples, index=index, noising=noising)
    size = MODELS[policy.model.family].size
    old = noising is not None
    trajectory, _ = rollout(policy, of, conditions, size, ticket, keep_old=old)
    advantages = np.random.default_rng(index).normal(size=of.batch).astype(np.float32)
    return ModelBatch(of, trajectory, advantages, np.ones(of.batch, bool), conditions)


# --- a learner of one rank or of two


def train_once(
    spec: TrainingSpec, mine: Sequence[Batch], of: Sequence[Batch]
) -> tuple[dict[str, Any], LearnerState]:
    """Gradient and new state of one update from this rank's ``mine`` of the micro-batches."""
    from flowgrpo_ray.algorithm.learner import Learner

    learner = Learner(spec, CPU, parallel=in_shards())
    for batch in mine:
        batch.into(learner)
    gradient = {name: g.numpy().copy() for name, g in gradients(learner).items()}
    learner.step(kept(of), len(of[0].unit.points))
    return gradient, state_of(learner)


def train_as_rank(rank: int, folder: Path, listener: socket.socket | None = None) -> dict[Any, Any]:
    """What that one of two ranks makes of each case in ``cases.pickle``, which names the address
    to meet at too."""
    import torch.distributed as dist

    from flowgrpo_ray.algorithm.parallel import join_group

    address, cases = pickle.loads((folder / "cases.pickle").read_bytes())
    join_group(rank, 2, listener or address, CPU)
    results = {
        name: train_once(spec, batches[rank::2], batches) for name, (spec, batches) in cases.items()
    }
    dist.destroy_process_group()
    return results


def train_as_second_rank(_: int, folder: Path) -> None:
    """The process of rank 1. Its imports take longer than its work, so it waits for that."""
    import flowgrpo_ray.algorithm.learner  # noqa: F401

    torch.set_num_threads(1)
    (folder / "ready").touch()
    while not (folder / "cases.pickle").exists():
        time.sleep(0.02)
    train_as_rank(1, folder)
