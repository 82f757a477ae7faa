"""The README.md of an exported model: a model card as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from flowgrpo_ray.run.checkpoint import Progress
from flowgrpo_ray.spec.file import dump_spec
from flowgrpo_ray.spec.training import TrainingSpec

SOURCE = """

def fitted(file):
    image = Image.open(file).convert("RGB")
    return ImageOps.fit(image, ({width}, {height}), Image.Resampling.LANCZOS)


source = {files}
"""
IMAGE = """image = pipe(
    prompt="your prompt",
    height={height},
    width={width},
    num_inference_steps={steps},
    {arguments},
).images[0]
image.save("image.png")
"""

PEFT = """from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

weights = load_file("pytorch_lora_weights.safetensors")
weights = {{name.removeprefix("transformer."): tensor for name, tensor in weights.items()}}
layers = [name.partition(".lora_A")[0] for name in weights if ".lora_A" in name]
config = LoraConfig(r={rank}, lora_alpha={rank}, target_modules=layers)
inject_adapter_in_model(config, pipe.transformer)
set_peft_model_state_dict(pipe.transformer, weights)
"""
PEFT_FOLDER = """from peft import PeftModel

model = PeftModel.from_pretrained(model, ".")  # a module with the published layer names
"""
OTHER_PROGRAMS = {
    "ComfyUI": """Copy `pytorch_lora_weights.safetensors` into `models/loras` under a name of your
choice, and put a LoraLoaderModelOnly behind the node that loads the base model, here number 1:

```json
{
  "class_type": "LoraLoaderModelOnly",
  "inputs": {
    "model": ["1", 0],
    "lora_name": "pytorch_lora_weights.safetensors",
    "strength_model": 1.0
  }
}
```
""",
    "Forge": """Copy `pytorch_lora_weights.safetensors` into `models/Lora` under a name of your
choice, and name it in the prompt:

```text
<lora:NAME:1>
```
""",
}
NEGATIVE = "negative_prompt="


@dataclass(frozen=True)
class Exported:
    """What was written: ``what`` is lora or pipeline, ``weights`` ema or last.

    ``arguments`` are those of a call of the model's diffusers pipeline, beside prompt, size and
    steps (``{guidance}`` stands for its value, ``{beyond_one}`` for one less, ``{height}`` and
    ``{width}`` for the size); empty for a model without a pipeline.
    """

    what: str
    weights: str
    arguments: tuple[str, ...]
    progress: Progress  # of its checkpoint
    versions: Mapping[str, str]  # of packages, by name
    takes_length: bool = True  # the call, as max_sequence_length
    scheduler: str = ""  # to draw with, of a {shift}, if not the pipeline's own
    sources: int = 0  # how many images each prompt of the run changes
    read_by: tuple[str, ...] = ("ComfyUI",)  # programs beside diffusers and peft


def model_card(spec: TrainingSpec, exported: Exported) -> str:
    """Front matter, how to load the folder, what it holds, scores and the resolved spec."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(spec, exported), sort_keys=False)}---\n",
        f"# {spec.name}\n",
        _description(spec, exported),
        f"## Use\n\n{_use(spec, exported)}",
        f"## Rewards\n\n{_rewards(spec, exported.progress)}",
        f"## Training spec\n\n{_fenced(dump_spec(spec), 'yaml')}",
    ]
    return "\n".join(parts)


def _fenced(text: str, language: str) -> str:
    """A block of code that no text inside it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"


def _inline(text: str) -> str:
    """A name of the spec as code within a line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _front_matter(spec: TrainingSpec, exported: Exported) -> dict[str, object]:
    """The hub takes no local path for ``base_model``; the licence is the base model's to tell."""
    matter: dict[str, object] = {}
    if spec.model.folder is None:
        matter["base_model"] = spec.model.path
    if exported.arguments:
        matter["library_name"] = "diffusers"
    elif exported.what == "lora":
        matter["library_name"] = "peft"
    task = "image-to-image" if exported.sources else "text-to-image"
    tags = [task, "flow-grpo"]
    return {
        **matter,
        "pipeline_tag": task,
        "tags": [*tags, "lora"] if exported.what == "lora" else tags,
    }


def _description(spec: TrainingSpec, exported: Exported) -> str:
    averaged = exported.weights == "ema" and spec.ema is not None
    weights = "averaged (EMA) weights" if averaged else "weights of the last update"
    kind = "LoRA of" if exported.what == "lora" else "Whole model, trained from"
    start = f" and the LoRA {_inline(spec.model.lora)}" if spec.model.lora else ""
    versions = ", ".join(f"{name} {version}" for name, version in exported.versions.items())
    return (
        f"{kind} {_inline(spec.model.path)}{start}, trained by reinforcement learning "
        f"({spec.objective.kind}) with flowgrpo_ray: the {weights} after iteration "
        f"{exported.progress.iteration} ({exported.progress.images:,} images). The license of the "
        f"base model applies.\n\nWritten with {versions}.\n"
    )


def _use(spec: TrainingSpec, exported: Exported) -> str:
    if exported.what == "lora":
        return _use_lora(spec, exported)
    if exported.arguments:
        return _fenced(_code(spec, exported), "python")
    return (
        "The files of the published model, with trained weights: give this folder to its own "
        "code, or to flowgrpo_ray as `model.path`.\n"
    )


def _use_lora(spec: TrainingSpec, exported: Exported) -> str:
    """A snippet for each program."""
    assert spec.tuning.kind == "lora"
    rank, alpha = spec.tuning.rank, spec.tuning.alpha
    parts = [
        f"Strength 1 gives the trained model, in every program: the file holds adapters of rank "
        f"{rank} whose strength in training, alpha / rank = {alpha} / {rank}, is part of the "
        f"tensors. So alpha is {rank}, as where no alpha is given.\n"
    ]
    if exported.arguments:
        parts += [
            f"### diffusers\n\n{_fenced(_code(spec, exported), 'python')}",
            "### peft\n\nIn place of `pipe.load_lora_weights(place)`:\n\n"
            f"{_fenced(PEFT.format(rank=rank), 'python')}",
        ]
        parts += [f"### {name}\n\n{OTHER_PROGRAMS[name]}" for name in exported.read_by]
    else:
        parts.append(f"### peft\n\n{_fenced(PEFT_FOLDER, 'python')}")
    model = _inline(f"model.path: {spec.model.path}")
    parts.append(f"### flowgrpo_ray\n\nSet {model} and `model.lora` to this folder.\n")
    return "\n".join(parts)


def _code(spec: TrainingSpec, exported: Exported) -> str:
    """Draws one image as ``evaluation`` did, from this folder as the working directory."""
    model = spec.model
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    if exported.sources:
        lines.append("from PIL import Image, ImageOps")
    lines.append("")
    lines.append('place = "."  # this folder, or its id on the hub')
    if exported.what == "lora":
        revision = f", revision={model.revision!r}" if model.revision else ""
        source = f"{model.source!r}{revision}"
    else:
        source = "place"
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({source}, dtype=torch.{model.dtype})")
    if exported.what == "lora":
        lines.append("pipe.load_lora_weights(place)")
    if exported.scheduler:
        shift = model.shift or "pipe.scheduler.config.flow_shift"
        name = exported.scheduler.partition("(")[0]
        lines[1] = f"from diffusers import DiffusionPipeline, {name}"
        lines.append(f"pipe.scheduler = {exported.scheduler.format(shift=shift)}")
    elif model.shift is not None:
        lines.append("pipe.scheduler = pipe.scheduler.from_config(")
        lines.append(f"    pipe.scheduler.config, shift={model.shift}, use_dynamic_shifting=False")
        lines.append(")")
    length = (f"max_sequence_length={model.max_sequence_length}",) if exported.takes_length else ()
    images = ("image=source",) if exported.sources else ()
    guidance = spec.sampling.guidance
    size = {"height": spec.sampling.size[0], "width": spec.sampling.size[1]}
    given = {**size, "guidance": guidance, "beyond_one": guidance - 1}
    own = [argument.format(**given) for argument in exported.arguments]
    if model.negative_prompt is not None:
        own = [argument for argument in own if not argument.startswith(NEGATIVE)]
        own.append(f"{NEGATIVE}{model.negative_prompt!r}")
    arguments = ",\n    ".join((*length, *own, *images))
    image = IMAGE.format(**size, steps=spec.evaluation.steps, arguments=arguments)
    if exported.sources:
        image = SOURCE.format(**size, files=_files(exported.sources)) + image
    return "\n".join(lines) + "\n" + image


def _files(count: int) -> str:
    """Of the images to change: one, or a list."""
    if count == 1:
        return 'fitted("source.png")'
    each = (f'fitted("source-{i + 1}.png")' for i in range(count))
    return f"[{', '.join(each)}]"


def _rewards(spec: TrainingSpec, progress: Progress) -> str:
    rows = [
        f"| {name} | {reward.weight:g} | {_score(progress.eval_before, name)} | "
        f"{_score(progress.eval_last, name)} |"
        for name, reward in spec.rewards.items()
    ]
    return (
        "Means over held-out prompts, before training and in the last evaluation up to this "
        "checkpoint. Rewards of weight 0 were only watched.\n\n"
        "| reward | weight | before | after |\n| --- | --- | --- | --- |\n"
    ) + "".join(f"{row}\n" for row in rows)


def _score(means: Mapping[str, float | None], name: str) -> str:
    value = means.get(name)
    return "not measured" if value is None else f"{value:.4f}"
