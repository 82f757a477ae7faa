import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_rewards_clip_family import LAYERS
from test_rewards_pickscore import check_deployment, one_thread, pixels

from flowgrpo_ray.common.errors import ModelError, RewardError
from flowgrpo_ray.rewards import resolve
from flowgrpo_ray.rewards.golden import check_golden, score_golden
from flowgrpo_ray.rewards.imagereward import ImageRewardReward

__all__ = ["one_thread"]  # a fixture that every test here runs under
PATCH, PATCHES = 8, 16  # of a picture of 32 x 32
VISION, VISION_INNER, VISION_HEADS = 192, 256, 3
TEXT, TEXT_INNER, TEXT_HEADS = 128, 160, 2
HEAD = (TEXT, 1024, 128, 64, 16, 1)
DEPTH, LONGEST = 2, 40
SMALL = 0.003  # what the towers start from, so that the epsilon of a norm shows
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "##s", "two"]
CLS, SEP = WORDS.index("[CLS]"), WORDS.index("[SEP]")
DEC = len(WORDS)  # [ENC] is the next, and the last


def checkpoint():
    """Random weights of a tiny ImageReward under the names of the public `ImageReward.pt`."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{vision}.cls_token": (1, 1, VISION),
        f"{vision}.pos_embed": (1, PATCHES + 1, VISION),
        f"{vision}.patch_embed.proj": (VISION, 3, PATCH, PATCH),
        f"{vision}.norm": (VISION,),
        f"{text}.embeddings.word_embeddings.weight": (len(WORDS) + 2, TEXT),
        f"{text}.embeddings.position_embeddings.weight": (LONGEST, TEXT),
        f"{text}.embeddings.LayerNorm": (TEXT,),
        # of BLIP's training alone
        "blip.vision_proj": (256, VISION),
        "blip.text_proj": (256, TEXT),
    }
    for i in range(DEPTH):
        shapes |= {
            f"{vision}.blocks.{i}.norm1": (VISION,),
            f"{vision}.blocks.{i}.attn.qkv": (3 * VISION, VISION),
            f"{vision}.blocks.{i}.attn.proj": (VISION, VISION),
            f"{vision}.blocks.{i}.norm2": (VISION,),
            f"{vision}.blocks.{i}.mlp.fc1": (VISION_INNER, VISION),
            f"{vision}.blocks.{i}.mlp.fc2": (VISION, VISION_INNER),
        }
        layer = f"{text}.encoder.layer.{i}"
        for part, width in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= {
                f"{layer}.{part}.self.query": (TEXT, TEXT),
                f"{layer}.{part}.self.key": (TEXT, width),
                f"{layer}.{part}.self.value": (TEXT, width),
                f"{layer}.{part}.output.dense": (TEXT, TEXT),
                f"{layer}.{part}.output.LayerNorm": (TEXT,),
            }
        shapes |= {
            f"{layer}.intermediate.dense": (TEXT_INNER, TEXT),
            f"{layer}.output.dense": (TEXT, TEXT_INNER),
            f"{layer}.output.LayerNorm": (TEXT,),
        }
    for number, taken, given in zip(LAYERS, HEAD, HEAD[1:], strict=False):
        shapes[f"mlp.layers.{number}"] = (given, taken)
    generator = torch.Generator().manual_seed(0)
    weights = {f"{text}.embeddings.position_ids": torch.arange(LONGEST)[None]}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith((".weight", "cls_token", "pos_embed")):
            weights[name] = values * SMALL
        elif len(shape) == 1:  # a norm
            weights[f"{name}.weight"] = 1 + values / 4
            weights[f"{name}.bias"] = torch.randn(shape, generator=generator)
        else:
            # Of nearly equal queries and keys, lest attention see one word or patch alone.
            gain = 0.5 if name.endswith(("query", "key")) else 1.5
            gain = SMALL if name.endswith("patch_embed.proj") else gain
            weights[f"{name}.weight"] = values * gain / values[0].numel() ** 0.5
            weights[f"{name}.bias"] = torch.randn(shape[:1], generator=generator)
    weights[f"{vision}.patch_embed.proj.bias"] *= SMALL
    return weights


class Blip:
    """The model written down once more: float64, one image at a time, no padding, no masks."""

    def __init__(self):
        self.weights = {name: value.double() for name, value in checkpoint().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].flatten(1).T + self.weights[f"{name}.bias"]

    def norm(self, name, x, eps):
        centred = x - x.mean(dim=-1, keepdim=True)
        unit = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, query, key, value, heads):
        parts = []
        for q, k, v in zip(
            query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True
        ):
            parts.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return torch.cat(parts, dim=-1)

    def gelu(self, x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def patches(self, image):
        name = "blip.visual_encoder"
        squares = pixels(image, round).double().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        squares = squares.permute(1, 2, 0, 3, 4).reshape(PATCHES, -1)
        x = self.linear(f"{name}.patch_embed.proj", squares)
        x = torch.cat([self.weights[f"{name}.cls_token"][0], x])
        x = x + self.weights[f"{name}.pos_embed"][0]
        for i in range(DEPTH):
            block = f"{name}.blocks.{i}"
            normal = self.norm(f"{block}.norm1", x, 1e-6)
            q, k, v = self.linear(f"{block}.attn.qkv", normal).chunk(3, dim=-1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v, VISION_HEADS))
            inner = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", self.gelu(inner))
        return self.norm(f"{name}.norm", x, 1e-6)

    def score(self, image, ids):
        seen, name = self.patches(image), "blip.text_encoder"
        x = self.weights[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = x + self.weights[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for i in range(DEPTH):
            layer = f"{name}.encoder.layer.{i}"
            for part in ("attention", "crossattention"):
                to = x if part == "attention" else seen
                q, k, v = (
                    self.linear(f"{layer}.{part}.self.{role}", source)
                    for role, source in (("query", x), ("key", to), ("value", to))
                )
                out = self.linear(f"{layer}.{part}.output.dense", self.attend(q, k, v, TEXT_HEADS))
                x = self.norm(f"{layer}.{part}.output.LayerNorm", x + out, 1e-12)
            inner = self.gelu(self.linear(f"{layer}.intermediate.dense", x))
            out = self.linear(f"{layer}.output.dense", inner)
            x = self.norm(f"{layer}.output.LayerNorm", x + out, 1e-12)
        value = x[0]
        for number in LAYERS:
            value = self.linear(f"mlp.layers.{number}", value)
        return (value.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the checkpoint, and one with the tokenizer."""
    from transformers import BertTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tokenizer")
    torch.save(checkpoint(), folder / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tokenizer)
    return folder, str(tokenizer)


@pytest.fixture(scope="module")
def reward(files):
    return ImageRewardReward(str(files[0] / "ImageReward.pt"), tokenizer=files[1], device="cpu")


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 44, 3), dtype=np.uint8)
    images[:3] //= 4
    images[1] += 190
    images.flags.writeable = False
    prompts = ["a red cat", "A RED CAT", "two dogs", "", "a zebra [ENC]", "cat " * 40]
    return images, prompts, [{}] * 6


def ids_of(prompt):
    """The tokens of the prompts above, by hand."""
    ids = {"dogs": [WORDS.index("dog"), WORDS.index("##s")], "zebra": [1], "[enc]": [DEC + 1]}
    words = [i for word in prompt.lower().split() for i in ids.get(word) or [WORDS.index(word)]]
    return [CLS, *words[:33], SEP]


def test_score_is_what_the_model_written_down_once_more_gives(reward, batch):
    images, prompts, metadata = batch
    model = Blip()
    expected = [model.score(image, ids_of(p)) for image, p in zip(images, prompts, strict=True)]
    scores = reward(images, prompts, metadata)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(expected) > 1, "the images must differ for this to say anything"
    others = [model.score(image, ids_of("cat")) for image in images[:2]]
    assert np.abs(np.subtract(others, expected[:2])).min() > 0.01, "and so must the prompts"


def test_no_image_moves_the_score_of_another(files, reward, batch):
    images, prompts, metadata = batch
    in_twos = ImageRewardReward(str(files[0]), tokenizer=files[1], device="cpu", batch=2)
    together = reward(images, prompts, metadata)
    np.testing.assert_allclose(in_twos(images, prompts, metadata), together, atol=1e-4)
    assert reward(images[:0], [], []).shape == (0,)
    with pytest.raises(ValueError, match="6 images, 5 prompts"):
        reward(images, prompts[1:], metadata)


def test_a_safetensors_file_without_what_is_not_needed_scores_the_same(
    files, reward, batch, tmp_path
):
    training = ("_proj.weight", "_proj.bias", "position_ids")
    needed = {name: v for name, v in checkpoint().items() if not name.endswith(training)}
    assert len(needed) == len(checkpoint()) - 5
    save_file(needed, tmp_path / "mine.safetensors")
    mine = ImageRewardReward(str(tmp_path / "mine.safetensors"), tokenizer=files[1], device="cpu")
    np.testing.assert_array_equal(mine(*batch), reward(*batch))


def test_half_precision_is_near_and_the_head_stays_exact(files, reward, batch):
    half = ImageRewardReward(str(files[0]), tokenizer=files[1], device="cpu", dtype="bfloat16")
    assert half._text.dtype == half._vision.dtype == torch.bfloat16
    assert half._head["layers"][0].weight.dtype == torch.float32
    np.testing.assert_allclose(half(*batch), reward(*batch), atol=0.5)


def test_without_numbers_the_score_is_nan(files, batch):
    broken = ImageRewardReward(str(files[0]), tokenizer=files[1], device="cpu")
    broken._vision.post_layernorm.weight.fill_(float("nan"))
    assert np.isnan(broken(*batch)).all()


@pytest.mark.parametrize("name", sorted(checkpoint()))
def test_every_weight_is_needed_but_those_of_the_training(name):
    """Each key of the public file in turn is left out; nothing is built for it in vain."""
    from flowgrpo_ray.rewards.imagereward import UNUSED, blip_from

    weights = checkpoint()
    del weights[name]
    if name in UNUSED:
        blip_from(weights, ("path", "here", None))
    else:
        with pytest.raises(ModelError, match=rf"^path = 'here': .*lacks .*{name}"):
            blip_from(weights, ("path", "here", None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.itm_head.weight": torch.ones(2, 3)}, "also has 1, such as blip.itm_head.weight"),
        (
            {"blip.visual_encoder.blocks.1.norm2.bias": torch.ones(7)},
            r"another shape 1, such as blip.visual_encoder.blocks.1.norm2.bias \(7,\), not \(192,",
        ),
    ],
)
def test_a_checkpoint_with_other_weights_is_refused(files, tmp_path, change, message):
    torch.save(checkpoint() | change, tmp_path / "ImageReward.pt")
    with pytest.raises(ModelError, match=rf"^path = '{tmp_path}': .*{message}"):
        ImageRewardReward(str(tmp_path), tokenizer=files[1], device="cpu")


def test_tokenizers_that_do_not_belong_to_it_are_refused(files, tmp_path):
    from transformers import BertTokenizer

    model = str(files[0])
    with pytest.raises(ModelError, match=rf"^tokenizer = '{tmp_path}': no tokenizer files"):
        ImageRewardReward(model, tokenizer=str(tmp_path), device="cpu")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "more"])}
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"knows 12 tokens.* only 11"):
        ImageRewardReward(model, tokenizer=str(tmp_path), device="cpu")


def test_a_model_without_training_is_refused_by_its_golden_images(reward):
    with pytest.raises(RewardError, match="not below"):
        check_golden(reward.golden(), score_golden(reward, reward.golden()))


def test_config_file():
    assert resolve("imagereward") is ImageRewardReward
    check_deployment("imagereward")
