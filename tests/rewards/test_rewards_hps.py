import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_rewards_pickscore import (
    END,
    PIXELS,
    START,
    VOCABULARY,
    check_deployment,
    letters,
    one_thread,
)

from flowgrpo_ray.common.errors import ModelError, RewardError
from flowgrpo_ray.rewards import resolve
from flowgrpo_ray.rewards.golden import check_golden, score_golden
from flowgrpo_ray.rewards.hps import HpsReward

__all__ = ["one_thread"]  # a fixture that every test here runs under
FILE = "HPS_v2.1_compressed.pt"
PATCH, DEPTH, SHARED = 8, 2, 12
WIDTHS, HEADS = {"visual.": 16, "": 24}, {"visual.": 2, "": 3}  # of both towers, by their prefix
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def checkpoint():
    """Random weights of a tiny CLIP under the names of open_clip."""
    vision, text = WIDTHS.values()
    shapes = {
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((PIXELS // PATCH) ** 2 + 1, vision),
        "visual.conv1.weight": (vision, 3, PATCH, PATCH),
        "visual.proj": (vision, SHARED),
        "positional_embedding": (77, text),
        "token_embedding.weight": (len(VOCABULARY), text),
        "text_projection": (text, SHARED),
        "logit_scale": (),
    }
    norms = [("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)]
    for tower, width in WIDTHS.items():
        for block in (f"{tower}transformer.resblocks.{i}" for i in range(DEPTH)):
            norms += [(f"{block}.ln_1", width), (f"{block}.ln_2", width)]
            shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
            layers = {"attn.out_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
            for layer, (out, into) in layers.items():
                shapes[f"{block}.{layer}.weight"] = (out * width, into * width)
                shapes[f"{block}.{layer}.bias"] = (out * width,)
    for name, width in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


class OpenClip:
    """The model written down once more: float64, one image and one text at a time."""

    def __init__(self):
        self.weights = {name: value.double() for name, value in checkpoint().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def blocks(self, tower, x, hidden):
        """`hidden`: added to what each word sees of each."""
        for block in (f"{tower}transformer.resblocks.{i}" for i in range(DEPTH)):
            normal = self.norm(f"{block}.ln_1", x)
            both = normal @ self.weights[f"{block}.attn.in_proj_weight"].T
            both = both + self.weights[f"{block}.attn.in_proj_bias"]
            heads = []
            parts = (part.chunk(HEADS[tower], -1) for part in both.chunk(3, -1))
            for q, k, v in zip(*parts, strict=True):
                heads.append((q @ k.T / q.shape[-1] ** 0.5 + hidden).softmax(-1) @ v)
            x = x + self.linear(f"{block}.attn.out_proj", torch.cat(heads, dim=-1))
            inner = self.linear(f"{block}.mlp.c_fc", self.norm(f"{block}.ln_2", x))
            gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
            x = x + self.linear(f"{block}.mlp.c_proj", gelu)
        return x

    def image(self, pixels):
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)
        x = patches.flatten(2).flatten(0, 1) @ self.weights["visual.conv1.weight"].flatten(1).T
        x = torch.cat([self.weights["visual.class_embedding"][None], x])
        x = self.norm("visual.ln_pre", x + self.weights["visual.positional_embedding"])
        x = self.blocks("visual.", x, 0.0)
        return self.norm("visual.ln_post", x[0]) @ self.weights["visual.proj"]

    def text(self, ids):
        x = self.weights["token_embedding.weight"][ids]
        x = x + self.weights["positional_embedding"][: len(ids)]
        x = self.blocks("", x, torch.full((len(ids), len(ids)), -torch.inf).triu(1))
        return self.norm("ln_final", x[-1]) @ self.weights["text_projection"]

    def cosine(self, image, prompt):
        seen, read = self.image(pixels(image)), self.text(letters(prompt))
        return (seen @ read / (seen.norm() * read.norm())).item()


def pixels(image):
    """By hand: the longer side to PIXELS, the rest black; Pillow resizes a colour in floats."""
    height, width = image.shape[:2]
    rows, columns = (round(n * PIXELS / max(height, width)) for n in (height, width))
    black = np.zeros((3, PIXELS, PIXELS))
    top, left = (PIXELS - rows) // 2, (PIXELS - columns) // 2
    for plane, colour in zip(black, image.astype(np.float32).transpose(2, 0, 1) / 255, strict=True):
        resized = Image.fromarray(colour).resize((columns, rows), Image.Resampling.BICUBIC)
        plane[top : top + rows, left : left + columns] = resized
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    return torch.from_numpy((black - mean) / std)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hps(tmp_path_factory.mktemp("hps"))


def tiny_hps(folder):
    """The checkpoint, and configuration and tokenizer of its CLIP, in `folder`."""
    from transformers import CLIPConfig, CLIPTokenizer

    vision, text = (
        {"hidden_size": WIDTHS[tower], "intermediate_size": 4 * WIDTHS[tower], "hidden_act": "gelu"}
        | {"num_attention_heads": HEADS[tower], "num_hidden_layers": DEPTH}
        for tower in WIDTHS
    )
    text |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 77}
    text |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    vision |= {"image_size": PIXELS, "patch_size": PATCH}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED)
    config.save_pretrained(folder)
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    CLIPTokenizer(vocab=ids, merges=[]).save_pretrained(folder)
    torch.save({"epoch": 3, "state_dict": checkpoint()}, folder / FILE)
    return str(folder)


@pytest.mark.parametrize("shape", [(40, 56), (57, 31), (PIXELS, PIXELS), (90, 7)])
def test_the_score_is_the_cosine_of_the_whole_image_and_its_text(folder, shape):
    images = np.random.default_rng(0).integers(0, 256, (4, *shape, 3), dtype=np.uint8)
    images[1] //= 8
    prompts = ["a cat", "two red dogs", "", "a very long prompt " * 9]
    reward = HpsReward(folder, processor=folder, device="cpu", batch=3)
    scores = reward(images, prompts, [{}] * 4)
    by_hand = OpenClip()
    expected = [by_hand.cosine(*pair) for pair in zip(images, prompts, strict=True)]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.ptp(expected) > 0.03, "they must differ for this to say anything"


def test_the_checkpoint_is_found_in_any_of_its_places(folder, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)

    def scores(path, **options):
        reward = HpsReward(str(path), processor=folder, device="cpu", **options)
        return reward(images, ["a cat", "dogs"], [{}] * 2)

    expected = scores(folder)
    half = {name: value.half() for name, value in checkpoint().items()}
    torch.save(checkpoint(), tmp_path / "plain.pt")
    save_file(checkpoint(), tmp_path / "mine.safetensors")
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    np.testing.assert_array_equal(scores(f"{folder}/{FILE}"), expected)
    np.testing.assert_array_equal(scores(tmp_path / "plain.pt"), expected)
    np.testing.assert_array_equal(scores(tmp_path / "mine.safetensors"), expected)
    np.testing.assert_array_equal(scores(tmp_path, file="plain.pt"), expected)
    np.testing.assert_allclose(scores(tmp_path / "half.pt"), expected, atol=5e-3)
    assert HpsReward(folder, processor=folder)(images[:0], [], []).shape == (0,)


IN_PROJ = "transformer.resblocks.1.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"visual.{IN_PROJ}"), rf"lacks 1, such as visual\.{IN_PROJ}$"),
        (lambda w: w.update({"visual.head": torch.ones(2)}), "also has 1, such as visual.head"),
        (
            lambda w: w.update({IN_PROJ: w[IN_PROJ][:24]}),
            rf"another shape 1, such as {IN_PROJ} \(24, 24\), not \(72, 24\)$",
        ),
        (
            lambda w: w.update({"visual.proj": w["visual.proj"].T.contiguous()}),
            r"another shape 1, such as visual\.proj \(12, 16\), not \(16, 12\)$",
        ),
        (lambda w: w.update({"epoch": 3}), "no table of weights by name"),
    ],
)
def test_a_checkpoint_that_is_none_is_named(folder, tmp_path, change, message):
    weights = checkpoint()
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / FILE)
    with pytest.raises(ModelError, match=rf"^path = '{tmp_path}': .*{message}"):
        HpsReward(str(tmp_path), processor=folder, device="cpu")


def test_an_untrained_one_is_refused_and_one_without_numbers_has_no_score(folder):
    reward = HpsReward(folder, processor=folder, device="cpu")
    with pytest.raises(RewardError, match="not below"):
        check_golden(reward.golden(), score_golden(reward, reward.golden()))
    reward._clip._model.visual_projection.weight.zero_()
    assert np.isnan(reward(np.zeros((1, 8, 8, 3), np.uint8), ["a"], [{}])).all()


def test_config_file():
    assert resolve("hps") is HpsReward
    check_deployment("hps")
