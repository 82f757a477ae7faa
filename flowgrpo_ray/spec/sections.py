"""The sections of a training spec, each checked by itself: keys are strict, values have bounds.

``sampling`` and ``cluster``, which have arithmetic of their own, are files beside this one, and
``objective`` is a class of ``algorithm.objectives``. What concerns several sections is checked by
``TrainingSpec``, in ``flowgrpo_ray.spec.training``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flowgrpo_ray.common.paths import local_path
from flowgrpo_ray.common.strict import Strict
from flowgrpo_ray.rewards.bounds import check_device
from flowgrpo_ray.spec.cluster import Resources
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.sampling import Solver

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["native", "flash", "efficient", "cudnn", "math"]


class ModelSpec(Strict):
    """The base model."""

    family: str = Field(
        description="which adapter drives it", json_schema_extra={"enum": [*FAMILIES]}
    )
    path: str = Field(min_length=1, description="hub id, local folder, or builtin:tiny-sd3")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Dtype = Field(
        default="bfloat16",
        description="of every forward; latents, log-probabilities and masters are float32",
    )
    encoder_dtype: Dtype | None = Field(default=None, description="of encoders; default: dtype")
    decoder_dtype: Dtype | None = Field(default=None, description="of the decoder; default: dtype")
    max_sequence_length: int = Field(default=256, ge=1, description="tokens of a prompt")
    shift: float | None = Field(default=None, gt=0, description="of noise levels; default: its own")
    compile: bool = Field(
        default=False,
        description="torch.compile each block: faster forwards, after a minute or more at the "
        "first start; needs a C++ compiler on every machine",
    )
    attention: Attention = Field(
        default="native",
        description="the kernel of every attention, in sampling and training alike: native is what "
        "torch takes for the shape, but never cuDNN's, which may differ with and without "
        "gradients; flash, efficient, cudnn and math are that one, and math where it cannot",
    )
    deterministic: bool = Field(
        default=False,
        description="torch's deterministic kernels alone: gradients repeat to the last bit, slower",
    )
    lora: str | None = Field(
        default=None,
        description="LoRA to start from: hub id, folder or file, of diffusers or peft; LoRA tuning "
        "goes on with it, full tuning merges it into the weights",
    )

    @field_validator("family")
    @classmethod
    def _known(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"{family!r} is no family of base models: {', '.join(FAMILIES)}")
        return family

    @property
    def folder(self) -> Path | None:
        """The local folder, or ``None`` for a hub id."""
        return local_path(self.path)

    @property
    def source(self) -> str:
        """What ``from_pretrained`` takes: the local folder, or the hub id."""
        return self.path if self.folder is None else str(self.folder)


class FullTuning(Strict):
    """Train every parameter of the network (of Bagel: its generation expert), in float32."""

    kind: Literal["full"]


class LoraTuning(Strict):
    """Train low-rank adapters on a frozen network."""

    kind: Literal["lora"]
    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=64, ge=1)
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="endings of layer names, or one regular expression; default: the model's",
    )


Tuning = Annotated[FullTuning | LoraTuning, Field(discriminator="kind")]


class PromptsSpec(Strict):
    """Prompt sets: one prompt per line (.txt), or {"prompt": …, …} per line (.jsonl)."""

    train: str = Field(description="file to train on; builtin:prompts/… for those of the package")
    evaluate: str = Field(description="held-out file for the evaluations")
    encode_ahead: int = Field(
        default=2048,
        ge=1,
        description="prompts that are encoded before an iteration needs them; of a larger set the "
        "next ones follow when these are used up",
    )


class RewardSpec(Strict):
    """One reward, served by its own deployment."""

    weight: float = Field(default=1.0, description="in the trained total; 0 only watches it")
    reward: str | None = Field(
        default=None,
        description="name of a built-in reward, or package.module:Class; default: the key",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the class")
    environment: str | None = Field(
        default=None, description="that it runs in: flowgrpo-ray rewards env build NAME"
    )
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=0.25, ge=0, description="per replica")
    gpus: float = Field(default=0, ge=0, description="per replica")
    resources: Resources = Field(default_factory=dict)
    golden: bool = Field(
        default=True, description="refuse it unless it ranks its own golden images rightly"
    )
    deadline_s: float = Field(default=60, gt=0, description="of one attempt to score a call")
    retries: int = Field(default=2, ge=0, description="more attempts, on other replicas if any")

    @model_validator(mode="after")
    def _device(self) -> Self:
        check_device(self.options, self.gpus)
        return self


RewardName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class AdvantagesSpec(Strict):
    """How the rewards of a group become advantages."""

    std: Literal["group", "global"] = Field(
        default="group", description="divide by that of the group, or of the whole iteration"
    )
    per_reward: bool = Field(
        default=False, description="normalise each reward, then weight and sum (several rewards)"
    )
    clamp: float = Field(default=5.0, gt=0)
    refill: int = Field(
        default=0, ge=0, description="tries to replace groups without spread by other prompts"
    )


class WatchSpec(Strict):
    """Over-optimization: a watched reward (weight 0) falls while the trained total rises."""

    window: int = Field(default=10, ge=1, description="iterations that are averaged")
    fall: float = Field(
        default=1.0,
        gt=0,
        description="from its best window, in standard deviations of that reward over images",
    )
    action: Literal["report", "stop"] = Field(
        default="report", description="stop ends the run; the checkpoint from before is kept"
    )


class OptimizerSpec(Strict):
    """AdamW on float32 master weights."""

    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")


class EmaSpec(Strict):
    """Exponential moving average of the trained weights: what is evaluated and exported."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    every: int = Field(default=8, ge=1, description="updates between two averagings")


class EvaluationSpec(Strict):
    """Held-out prompts with fixed noise, deterministic sampling."""

    every: int = Field(ge=1, description="iterations between evaluations")
    steps: int = Field(ge=1, description="denoising steps")
    solver: Solver = "euler"
    prompts: int = Field(default=64, ge=1, description="the first N of the held-out file")
    micro_batch: int = Field(default=16, ge=1)
    grid: int = Field(default=32, ge=1, description="images kept as a sample grid")


class CheckpointSpec(Strict):
    """When the run is saved."""

    every: int = Field(default=10, ge=1, description="iterations between checkpoints")
    keep: int = Field(default=2, ge=1, description="older ones are deleted")


class TrackingSpec(Strict):
    """Where metrics go beside ``metrics.jsonl``."""

    tensorboard: bool = True
    wandb: str | None = Field(default=None, description="Weights & Biases project")
