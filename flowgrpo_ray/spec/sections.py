"""The sections of a training spec, each checked by itself: keys are strict, values have bounds.

``sampling`` and ``cluster``, which have arithmetic of their own, are files beside this one, and
``objective`` is a class of ``algorithm.objectives``. What concerns several sections is checked by
``TrainingSpec``, in ``flowgrpo_ray.spec.training``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from flowgrpo_ray.common.paths import local_path
from flowgrpo_ray.common.strict import Strict
from flowgrpo_ray.rewards import is_over_group
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
    path: str = Field(
        min_length=1,
        description="hub id, local folder, builtin:tiny-sd3 or builtin:tiny-kontext",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    dtype: Dtype = Field(
        default="bfloat16",
        description="of every forward; latents, log-probabilities and masters are float32",
    )
    encoder_dtype: Dtype | None = Field(default=None, description="of encoders; default: dtype")
    decoder_dtype: Dtype | None = Field(default=None, description="of the decoder; default: dtype")
    max_sequence_length: int = Field(default=256, ge=1, description="tokens of a prompt")
    negative_prompt: str | None = Field(
        default=None,
        description="what guidance leads away from, where a family compares two prompts; default: "
        "its pipeline's own",
    )
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

    @field_validator("targets")
    @classmethod
    def _can_be_matched(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is None:
            return None
        if not targets or "" in targets:
            raise ValueError(f"{list(targets)} names no layers: leave it out for the model's own")
        if len(targets) == 1:
            try:
                re.compile(targets[0])
            except re.error as error:
                raise ValueError(f"{targets[0]!r} is no regular expression: {error}") from error
        return targets


Tuning = Annotated[FullTuning | LoraTuning, Field(discriminator="kind")]


RewardName = SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]


class PromptSet(Strict):
    """One of several prompt sets."""

    name: SetName = Field(description="by which rewards and evaluations name it")
    file: str = Field(description="to train on; builtin:prompts/… for those of the package")
    evaluate: str = Field(description="held-out file for the evaluations")
    weight: float = Field(
        default=1.0, gt=0, description="share of an iteration's groups, beside those of the others"
    )


def _one_or_several(train: object) -> str:
    return "file" if isinstance(train, str) else "sets"


class PromptsSpec(Strict):
    """Prompt sets: one prompt per line (.txt), or {"prompt": …, …} per line (.jsonl)."""

    train: Annotated[
        Annotated[str, Tag("file")] | Annotated[tuple[PromptSet, ...], Tag("sets")],
        Discriminator(_one_or_several),
    ] = Field(
        description="file to train on; builtin:prompts/… for those of the package. Or a list of "
        "sets that are trained on together",
    )
    evaluate: str | None = Field(
        default=None, description="held-out file for the evaluations; several sets have their own"
    )
    encode_ahead: int = Field(
        default=2048,
        ge=1,
        description="prompts that are encoded before an iteration needs them; of a larger set the "
        "next ones follow when these are used up",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if isinstance(self.train, str):
            if self.evaluate is None:
                raise ValueError("evaluate is required beside one training file")
            return self
        names = [one.name for one in self.train]
        if not names:
            raise ValueError("train = []: name a file, or at least one set")
        if self.evaluate is not None:
            raise ValueError(
                f"evaluate = {self.evaluate!r} is for one training file: give each set of train "
                "its own"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sets of train are called {twice[0]!r}: rename one")
        return self

    @property
    def sets(self) -> Mapping[str, PromptSet]:
        """By spec key; a single one has the name ""."""
        if isinstance(self.train, str):
            assert self.evaluate is not None
            single = PromptSet.model_construct(
                name="", file=self.train, evaluate=self.evaluate, weight=1.0
            )
            return {"prompts.train": single}
        return {f"prompts.train.{place}": one for place, one in enumerate(self.train)}

    def with_files(self, changed: Callable[[str], str]) -> PromptsSpec:
        """These sets, with each file's path ``changed``."""
        if isinstance(self.train, str):
            assert self.evaluate is not None
            found: dict[str, Any] = {"train": changed(self.train)}
            return self.model_copy(update=found | {"evaluate": changed(self.evaluate)})
        sets = [
            one.model_copy(update={"file": changed(one.file), "evaluate": changed(one.evaluate)})
            for one in self.train
        ]
        return self.model_copy(update={"train": tuple(sets)})


class RewardSpec(Strict):
    """One reward, served by its own deployment."""

    weight: float = Field(default=1.0, description="in the trained total; 0 only watches it")
    reward: str | None = Field(
        default=None,
        description="name of a built-in reward, or package.module:Class; default: the key",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the class")
    sets: tuple[SetName, ...] | None = Field(
        default=None, description="of prompts.train that it scores; default: all"
    )
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

    def scores(self, prompt_set: str) -> bool:
        """Whether it scores images of this set; those of no set by name it does."""
        return not (self.sets and prompt_set) or prompt_set in self.sets


def over_groups(rewards: Mapping[str, RewardSpec]) -> frozenset[str]:
    """The names of those that compare the images of a group."""
    return frozenset(name for name, of in rewards.items() if is_over_group(of.reward or name))


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
    """Over-optimization: a watched reward (weight 0) falls on the held-out prompts while the
    trained total does not."""

    window: int = Field(default=2, ge=1, description="evaluations that are averaged, by prompt")
    significance: float = Field(
        default=5.0,
        gt=0,
        description="least fall from the best window, in standard errors of the mean difference "
        "over prompts",
    )
    fall: float = Field(
        default=0.2,
        ge=0,
        description="least fall as well, in standard deviations of that reward over images",
    )
    action: Literal["report", "stop"] = Field(
        default="report", description="stop ends the run; the checkpoint from before is kept"
    )


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSpec(Strict):
    """AdamW on float32 master weights."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
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
    steps: int = Field(ge=1, le=1000, description="denoising steps")
    solver: Solver = "euler"
    prompts: int = Field(default=64, ge=1, description="the first N of the held-out file")
    micro_batch: int = Field(default=16, ge=1)
    grid: int = Field(default=32, ge=1, description="images kept as a sample grid")


class TrackingSpec(Strict):
    """Who is told rows and evaluation pictures, which the run folder holds in any case."""

    tensorboard: bool = Field(default=True, description="event files in the run folder")
    wandb: str | None = Field(default=None, min_length=1, description="Weights & Biases project")
    mlflow: str | None = Field(
        default=None, min_length=1, description="MLflow experiment, at `MLFLOW_TRACKING_URI`"
    )
    trackio: str | None = Field(default=None, min_length=1, description="Trackio project")
    kind: str | None = Field(
        default=None, pattern=":", description="a tracker of your own, by its import path"
    )
    options: dict[str, Any] = Field(
        default={}, description="arguments of the class that `kind` names"
    )
    group: str | None = Field(
        default=None, min_length=1, description="runs that belong together, such as several seeds"
    )
    tags: tuple[str, ...] = Field(default=(), description="to find the run by")
    notes: str | None = Field(default=None, description="what the run is for")
    pictures: int = Field(
        default=16, ge=0, description="of each evaluation, at most evaluation.grid"
    )

    @model_validator(mode="after")
    def _options_of_a_kind(self) -> Self:
        if self.options and not self.kind:
            raise ValueError(
                f"options = {self.options!r} are those of a tracker of your own: name its class "
                "in kind"
            )
        return self
