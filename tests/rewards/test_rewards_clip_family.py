import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_rewards_pickscore import (
    END,
    check_deployment,
    letters,
    one_thread,
    pixels,
    tiny_clip,
)

from flowgrpo_ray.common.errors import ModelError, RewardError, SpecError
from flowgrpo_ray.rewards import build, resolve
from flowgrpo_ray.rewards.aesthetic import HEAD_FILE, AestheticReward
from flowgrpo_ray.rewards.clip_iqa import ClipIqaReward
from flowgrpo_ray.rewards.clipscore import ClipScoreReward
from flowgrpo_ray.rewards.golden import check_golden, score_golden

__all__ = ["one_thread"]  # a fixture that every test here runs under
WIDTH = 12  # of the tiny CLIP's vectors
SIZES = (WIDTH, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)  # their numbers in the published head


def head_weights():
    """A head that spreads its scores over several points around 5."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer, taken, given in zip(LAYERS, SIZES, SIZES[1:], strict=False):
        weights[f"layers.{layer}.weight"] = torch.randn(given, taken, generator=generator)
        weights[f"layers.{layer}.weight"] *= 1.5 / taken**0.5
        weights[f"layers.{layer}.bias"] = torch.randn(given, generator=generator)
    weights["layers.7.bias"] += 5
    return weights


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / HEAD_FILE
    torch.save(head_weights(), path)
    return path


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 44, 3), dtype=np.uint8)
    images[1] = 255 - images[1] // 8
    images.flags.writeable = False
    return images, ["a cat", "two red dogs", "", "a very long prompt " * 9], [{}] * 4


# --- CLIPScore


def bilinear_pixels(image):
    """By hand: Pillow resizes a colour in floats, 40 x 44 to 32 x 35; of 3 columns 2 go left."""
    planes = [
        np.asarray(Image.fromarray(colour).resize((35, 32), Image.Resampling.BILINEAR))[:, 2:34]
        for colour in image.astype(np.float32).transpose(2, 0, 1) / 255
    ]
    mean = np.array((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    std = np.array((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    return torch.tensor((np.stack(planes) - mean) / std, dtype=torch.float32)


def test_clipscore_is_the_models_logit_over_30_with_texts_padded_to_the_full_length(clip, batch):
    """Flow-GRPO's code pads so, masks the padding and takes logits_per_image."""
    from transformers import CLIPModel

    images, prompts, metadata = batch
    model = CLIPModel.from_pretrained(clip).eval()
    ids = [letters(prompt) for prompt in prompts]
    padded = torch.tensor([row + [END] * (77 - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (77 - len(row)) for row in ids])
    with torch.no_grad():
        logits = model(
            input_ids=padded,
            attention_mask=mask,
            pixel_values=torch.stack([bilinear_pixels(image) for image in images]),
        ).logits_per_image.diagonal()
    scores = ClipScoreReward(clip, device="cpu", batch=3)(images, prompts, metadata)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, logits.numpy() / 30, atol=2e-5)
    assert np.ptp(scores) > 0.5, "the images must differ for this to say anything"


def test_clipscore_refuses_what_cannot_work(clip, batch):
    reward = ClipScoreReward(clip, device="cpu")
    images, prompts, metadata = batch
    assert reward(images[:0], [], []).shape == (0,)
    with pytest.raises(ValueError, match="4 images, 3 prompts"):
        reward(images, prompts[1:], metadata)
    with pytest.raises(ModelError, match=r"^path = '/none': there is no such folder"):
        ClipScoreReward("/none", device="cpu")


def test_a_clip_without_training_is_refused_by_its_golden_images(clip):
    reward = ClipScoreReward(clip, device="cpu")
    with pytest.raises(RewardError, match="not below"):
        check_golden(reward.golden(), score_golden(reward, reward.golden()))


# --- CLIP-IQA


@pytest.mark.parametrize("texts", [{}, {"good": "sharp", "bad": "a blurry photo"}])
def test_clip_iqa_weighs_a_good_photo_against_a_bad_one(clip, batch, texts):
    from transformers import CLIPModel

    images, prompts, metadata = batch
    model = CLIPModel.from_pretrained(clip).eval()
    model.logit_scale.data.fill_(np.log(3))  # at 100 one text would be all there is
    good, bad = texts.values() or ("good photo", "bad photo")

    def vector(text):
        return model.get_text_features(torch.tensor([letters(text)])).pooler_output[0]

    with torch.no_grad():
        seen = model.get_image_features(torch.stack([pixels(image) for image in images]))
        towards, away = (
            3 * torch.cosine_similarity(seen.pooler_output.double(), vector(text).double(), dim=-1)
            for text in (good, bad)
        )
    reward = ClipIqaReward(**texts, path=clip, device="cpu", batch=3)
    assert reward._clip.scale == pytest.approx(100, rel=1e-5)
    reward._clip.scale = 3.0
    scores = reward(images, prompts, metadata)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 1 / (1 + torch.exp(away - towards)), atol=1e-6)
    assert np.ptp(scores) > 0.05, "the images must differ for this to say anything"
    np.testing.assert_array_equal(reward(images, ["other"] * 4, metadata), scores)
    assert reward(images[:0], [], []).shape == (0,)


# --- aesthetic


def ratings(clip, images):
    """By hand: CLIP's image vectors, then the head in float64, layer by layer."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        embedded = model.vision_model(torch.stack([pixels(image, round) for image in images]))
        vectors = model.visual_projection(embedded.pooler_output).double()
    values = vectors / vectors.square().sum(dim=1, keepdim=True).sqrt()
    weights = {name: value.double() for name, value in head_weights().items()}
    for layer in LAYERS:
        values = values @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    return values.squeeze(1).numpy()


def test_aesthetic_is_the_linear_head_of_the_unit_vector(clip, head, batch):
    images, prompts, metadata = batch
    expected = ratings(clip, images)
    scores = AestheticReward(str(head), clip=clip, device="cpu", batch=3)(images, prompts, metadata)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(expected) > 0.5, "the images must differ for this to say anything"


def test_the_head_is_found_in_any_of_its_places(clip, head, batch, tmp_path):
    images, prompts, metadata = batch
    save_file(head_weights(), tmp_path / "mine.safetensors")
    expected = AestheticReward(str(head), clip=clip, device="cpu")(images, prompts, metadata)
    for options in (
        {"head": str(head.parent)},
        {"head": str(tmp_path / "mine.safetensors")},
        {"head": str(tmp_path), "head_file": "mine.safetensors"},
    ):
        reward = AestheticReward(**options, clip=clip, device="cpu")
        np.testing.assert_array_equal(reward(images, ["other"] * 4, metadata), expected)
    assert AestheticReward(str(head), clip=clip, device="cpu")(images[:0], [], []).shape == (0,)


def test_a_picture_without_numbers_has_no_rating(clip, head, batch):
    reward = AestheticReward(str(head), clip=clip, device="cpu")
    reward._clip._model.visual_projection.weight.zero_()
    assert np.isnan(reward(*batch)).all()


class RunsWhenLoaded:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def without(key):
    return {name: value for name, value in head_weights().items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("layers.6.bias"), r"the file lacks 1, such as layers\.6\.bias"),
        (head_weights() | {"layers.8.bias": torch.ones(1)}, r"also has 1, such as layers\.8\.bias"),
        (
            head_weights() | {"layers.0.weight": torch.ones(1024, 768)},
            r"another shape 1, such as layers\.0\.weight \(1024, 768\), not \(1024, 12\)",
        ),
        ({"layers.0.weight": [1.0]}, "no table of weights by name"),
        ({0: torch.ones(3)}, "no table of weights by name"),
        (torch.ones(3), "no table of weights by name"),
        (b"<!DOCTYPE html><html>", "no file of weights alone"),
        (b"", "no weights can be read"),
        (None, "there is no such file or folder"),
    ],
)
def test_a_head_that_is_none_is_named(clip, tmp_path, content, message):
    path = tmp_path / "head.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=rf"^head = '{path}': .*{message}"):
        AestheticReward(str(path), clip=clip, device="cpu")


def test_code_in_a_head_is_not_run(clip, tmp_path):
    """The file would open another one for writing if it were unpickled."""
    torch.save({"layers.0.weight": RunsWhenLoaded(str(tmp_path / "ran"))}, tmp_path / "head.pth")
    with pytest.raises(ModelError, match="no file of weights alone"):
        AestheticReward(str(tmp_path / "head.pth"), clip=clip, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_head_on_a_hub_that_cannot_be_reached_or_in_no_place_at_all(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = re.escape(HEAD_FILE)
    for place in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(ModelError, match=rf"(?s)^head = '{place}': .*that holds '{name}'"):
            AestheticReward(place, clip=clip, device="cpu")
    with pytest.raises(SpecError, match="head: this key is required"):
        build("aesthetic", {})


@pytest.mark.parametrize(("bias", "sound"), [(5, True), (1.5, True), (0.5, False), (10.5, False)])
def test_golden_ratings_lie_on_the_scale_of_the_ratings(clip, tmp_path, bias, sound):
    constant = {name: torch.zeros_like(value) for name, value in head_weights().items()}
    torch.save(constant | {"layers.7.bias": torch.tensor([float(bias)])}, tmp_path / "head.pth")
    reward = AestheticReward(str(tmp_path / "head.pth"), clip=clip, device="cpu")
    scores = score_golden(reward, reward.golden())
    if sound:
        check_golden(reward.golden(), scores)
    else:
        with pytest.raises(RewardError, match=r"not within \[1, 10\]"):
            check_golden(reward.golden(), scores)


def test_config_files():
    assert resolve("clipscore") is ClipScoreReward
    assert resolve("aesthetic") is AestheticReward
    assert resolve("clip_iqa") is ClipIqaReward
    check_deployment("clipscore")
    check_deployment("clip_iqa")
    check_deployment("aesthetic")
