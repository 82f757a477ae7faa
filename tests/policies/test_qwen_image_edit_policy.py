"""What is Qwen-Image-Edit's own; ``test_policy_contract.py`` holds it against its pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import (
    MODELS,
    PROMPTS,
    conditions_of,
    load_pipe,
    model_folder,
    pipeline_images,
    sources_of,
    spec_of,
)
from tiny_runs import CPU, LORA, UNTRAINED, one_thread, perturb, unit

from flowgrpo_ray.algorithm.sampling import INITIAL, batch_condition, draw_noise, replay, rollout
from flowgrpo_ray.common.types import Schedule
from flowgrpo_ray.policies import load_policy

FAMILIES = ("qwen_image_edit", "qwen_image_edit_plus")
ENCODER = frozenset({"encoder"})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_changed_as_by_the_pipeline_and_replayed(family):
    """With prompts of any lengths, in a batch that needs a mask; log-ratio 0 in bfloat16 too."""
    size, count = MODELS[family].size, MODELS[family].sources
    prompts = ("", "a sign of many words " * 9)
    for dtype in ("float32", "bfloat16"):
        spec = spec_of(family, "sampling.guidance=4.0", LORA, f"model.dtype={dtype}")
        policy: Any = load_policy(spec, CPU)
        policy.tune(spec.seed, with_reference=False)
        conditions = {
            i: policy.encode_edit(p, sources_of(p, count, size)) for i, p in enumerate(prompts)
        }
        lengths = [len(condition["embeds"]) for condition in conditions.values()]
        assert lengths[1] - lengths[0] == len(policy.encoder.tokenizer(prompts[1]).input_ids)
        levels = policy.sigmas(3, size)
        if dtype == "float32":
            of = unit(Schedule("flow_sde", levels, (0.0,) * 3), (0, 1), (0, 1))
            _, x = rollout(policy, of, conditions, size, UNTRAINED)
            start = draw_noise(of, INITIAL, tuple(x.shape[1:]))
            pipe = load_pipe(model_folder(family))
            drawn = pipeline_images(pipe, prompts, start, 3, 4.0, size, "latent")
            assert (x - drawn).abs().max() < 2e-5
        perturb(policy)
        of = unit(Schedule("flow_sde", levels, (0.0, 0.8, 0.0)), (0, 1), (0, 1))
        trajectory, _ = rollout(policy, of, conditions, size, UNTRAINED)
        condition = batch_condition(policy, conditions, (0, 1))
        assert condition["embeds_mask"].sum(1).tolist() == lengths
        (step,) = replay(policy, trajectory, of.schedule, condition)
        assert torch.equal(step.log_ratio, torch.zeros(2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1024, 1024), (832, 1248), (1504, 704)])
def test_at_the_pipelines_own_sizes_it_sees_what_they_see(family, size, monkeypatch):
    """There the rule in terms of the size drawn is theirs in terms of a megapixel."""
    policy: Any = load_policy(spec_of(family), CPU, ENCODER)
    pipe = load_pipe(model_folder(family))
    image = Image.fromarray(sources_of(PROMPTS[0], 1, size)[0])
    seen: dict[str, Any] = {}

    def read(image: Any, **_: Any) -> tuple[torch.Tensor, None]:
        seen["read"] = image[0] if isinstance(image, list) else image
        return torch.zeros(1, 1, 32), None

    def encoded(images: Any, *_: Any) -> None:
        seen["encoded"] = images[0] if isinstance(images, list) else images
        raise InterruptedError

    monkeypatch.setattr(pipe, "encode_prompt", read)
    monkeypatch.setattr(pipe, "prepare_latents", encoded)
    with pytest.raises(InterruptedError):
        pipe(prompt=PROMPTS[0], image=image)
    assert policy.seen(image).tobytes() == seen["read"].tobytes()
    assert torch.equal(policy.source_pixels(image, policy.encoder.image_processor), seen["encoded"])
    assert policy.seen_size(size) == seen["read"].size[::-1]
    area = seen["read"].size[0] * seen["read"].size[1]
    around = 384**2 if family == "qwen_image_edit_plus" else 1024**2
    assert 0.9 < area / around < 1.1


def test_the_language_model_reads_patches_of_the_image_as_tokens():
    """64 x 96 pixels are 2 x 3 patches of 28 pixels; 64 tokens of the template do not count."""
    spec = spec_of("qwen_image_edit")
    policy: Any = load_policy(spec, CPU, ENCODER)
    processor, template = policy.encoder.processor, policy.encoder.prompt_template_encode
    before, _, behind = template.partition("{}")
    assert len(processor.tokenizer(before.partition("<|vision_start|>")[0]).input_ids) == 64
    image = sources_of("red", 1, (64, 96))
    found = policy.encode_edit("red", image)
    text = len(processor.tokenizer("red" + behind).input_ids)
    assert len(found["embeds"]) == 1 + 2 * 3 + 1 + text
    other = policy.encode_edit("red", 255 - image)
    assert abs(found["embeds"][-text:] - other["embeds"][-text:]).max() > 1e-3, "it is seen"
    assert policy.reading() is None, "prompts are not cut"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_velocity_is_that_of_the_latents_and_follows_each_source(family):
    policy = load_policy(spec_of(family), CPU, frozenset({"network", "decoder"}))
    condition = batch_condition(policy, conditions_of(family), (0, 1))
    x = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    calls: list[dict[str, Any]] = []
    policy.network.register_forward_pre_hook(
        lambda _, __, given: calls.append(given), with_kwargs=True
    )
    count = MODELS[family].sources
    with torch.no_grad():
        found = policy.velocity(x, 0.5, condition)
        for place in range(count):
            sources = condition["sources"].clone()
            sources[:, place] *= -1
            other = policy.velocity(x, 0.5, {**condition, "sources": sources})
            assert (found - other).abs().max() > 0.02
    assert found.shape == x.shape
    assert calls[0]["hidden_states"].shape == (2, 24 * (1 + count), 64)
    assert calls[0]["img_shapes"] == [[(1, 4, 6)] * (1 + count)] * 2
