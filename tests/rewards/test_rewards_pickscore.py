import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file

from flowgrpo_ray.common.errors import ModelError, RewardError, SpecError
from flowgrpo_ray.rewards import build, check_options, resolve
from flowgrpo_ray.rewards.golden import check_golden, score_golden
from flowgrpo_ray.rewards.pickscore import PickScoreReward

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
PIXELS = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz-"
VOCABULARY = [
    *LETTERS,
    *[f"{letter}</w>" for letter in LETTERS],
    "<|startoftext|>",
    "<|endoftext|>",
]
START, END = len(VOCABULARY) - 2, len(VOCABULARY) - 1


def tiny_clip(folder):
    """Random CLIP with a tokenizer of letters, as `from_pretrained` finds it, in `folder`."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tower |= {"num_hidden_layers": 2}
    text = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 77}
    text |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | text,
            vision_config=tower | {"image_size": PIXELS, "patch_size": 8},
            projection_dim=12,
            logit_scale_init_value=math.log(100),
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as made, all images look much the same to it
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    CLIPTokenizer(vocab=ids, merges=[]).save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return str(folder)


def letters(text):
    """What the tokenizer makes of small letters: words and hyphens apart."""
    ids = [START]
    for word in re.findall("[a-z]+|-", text):
        ids += [LETTERS.index(letter) for letter in word[:-1]]
        ids.append(len(LETTERS) + LETTERS.index(word[-1]))
    return [*ids[:76], END]


def pixels(image, rounds=math.floor):
    """CLIP's preparation by hand: short side to PIXELS, bicubic; centre; normalised.

    rounds: half a row; torchvision's crop as Python does.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(PIXELS * width / short), int(PIXELS * height / short))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (rounds((side - PIXELS) / 2) for side in resized.shape[:2])
    centre = resized[top : top + PIXELS, left : left + PIXELS] / 255
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((centre - mean) / std, dtype=torch.float32).permute(2, 0, 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for their threads, for long where a machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reward(clip):
    return PickScoreReward(clip, clip, device="cpu")


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 44, 3), dtype=np.uint8)
    images.flags.writeable = False
    prompts = ["a cat", "two red dogs", "a cat", "x", "", "a very long prompt " * 9, "green tea"]
    return images, prompts, [{}] * 7


def test_score_is_the_models_logit_over_26(clip, reward, batch):
    from transformers import CLIPModel

    images, prompts, metadata = batch
    model = CLIPModel.from_pretrained(clip).eval()
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([letters(prompt)]), pixel_values=pixels(image)[None])
        expected.append(out.logits_per_image.item() / 26)
    scores = reward(images, prompts, metadata)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.ptp(scores) > 0.5, "the images must differ for this to say anything"


def test_each_image_meets_its_own_prompt(reward, batch):
    images, prompts, metadata = batch
    scores = reward(images, prompts, metadata)
    order = [3, 0, 6, 5, 1, 4, 2]
    moved = reward(images[order], [prompts[i] for i in order], metadata)
    np.testing.assert_allclose(moved, scores[order], atol=1e-5)
    other = reward(images, [*prompts[1:], prompts[0]], metadata)
    assert np.abs(other - scores).max() > 0.1


def test_no_image_moves_the_score_of_another(clip, reward, batch):
    """Up to the rounding of float32 sums, whose order may depend on the size of a batch."""
    images, prompts, metadata = batch
    together = reward(images, prompts, metadata)
    alone = [reward(images[i : i + 1], prompts[i : i + 1], [{}])[0] for i in range(7)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    in_threes = PickScoreReward(clip, clip, device="cpu", batch=3)
    np.testing.assert_allclose(in_threes(images, prompts, metadata), together, atol=1e-5)


def test_a_prompt_is_cut_to_what_the_text_model_takes(reward, batch):
    image = batch[0][:1]
    long, cut, shorter = "ab " * 60, "ab " * 37 + "a", "ab " * 36

    def score(text):
        return reward(image, [text], [{}])[0]

    assert len(letters(long)) == 77
    assert score(long) == score("ab " * 50)
    assert score(long) != score(shorter)
    assert abs(score(long) - score(cut)) > 1e-4  # "a" of "ab" is no whole word


def test_no_images_no_scores_and_uneven_lists_are_refused(reward, batch):
    images, prompts, metadata = batch
    assert reward(images[:0], [], []).shape == (0,)
    with pytest.raises(ValueError, match="7 images, 6 prompts"):
        reward(images, prompts[1:], metadata)


def test_without_numbers_the_score_is_nan_and_never_zero(clip, batch):
    broken = PickScoreReward(clip, clip, device="cpu")
    broken._clip._model.visual_projection.weight.zero_()
    assert np.isnan(broken(*batch)).all()


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.3), ("float16", 0.03)])
def test_half_precision_is_near_and_its_scale_exact(clip, reward, batch, dtype, near):
    half = PickScoreReward(clip, clip, device="cpu", dtype=dtype)
    assert half._clip._model.visual_projection.weight.dtype == getattr(torch, dtype)
    # exp of log(100) rounded to bfloat16 would be 98.9
    assert half._clip.scale == pytest.approx(100, rel=1e-5)
    scores = half(*batch)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, reward(*batch), atol=near)
    assert np.abs(scores - reward(*batch)).max() > 0


@pytest.mark.gpu
def test_the_same_on_a_gpu(clip, reward, batch):
    cuda = PickScoreReward(clip, clip)
    assert cuda._clip._device.type == "cuda"
    np.testing.assert_allclose(cuda(*batch), reward(*batch), atol=2e-3)


class Eye:
    """In the place of CLIP: how near a picture's mean colour is to that of the colour's name."""

    def __init__(self, sees=1.0, reads=1.0):
        self.sees, self.reads = sees, reads

    def logits(self, images, prompts):
        names = [re.fullmatch("a plain (.*) background", prompt)[1] for prompt in prompts]
        named = np.array([ImageColor.getrgb(name) for name in names], dtype=np.float32)
        mean = images.mean(axis=(1, 2), dtype=np.float32)
        return -np.abs(self.sees * mean - self.reads * named).mean(axis=1)


def golden_passes(reward):
    rankings = reward.golden()
    check_golden(rankings, score_golden(reward, rankings))


def test_golden_images_tell_who_sees_and_reads(clip):
    reward = PickScoreReward(clip, clip, device="cpu")
    shown = [[picture.image.tobytes() for picture in ranking] for ranking in reward.golden()]
    assert len(shown) == 8
    # A model that only likes one picture more than another fails one of two.
    assert all([other, own] in shown for own, other in shown)
    with pytest.raises(RewardError, match="not below"):
        golden_passes(reward)  # random weights
    reward._clip = Eye()
    golden_passes(reward)
    for blind in (Eye(sees=0), Eye(reads=0), Eye(sees=-1)):
        reward._clip = blind
        with pytest.raises(RewardError, match="not below"):
            golden_passes(reward)


def altered(clip, folder, change):
    shutil.copytree(clip, folder, dirs_exist_ok=True)
    change(folder)
    return str(folder)


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def tear(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 10}))


def lose_the_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def spoil_the_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def more_tokens(folder):
    from transformers import CLIPTokenizer

    ids = {token: i for i, token in enumerate([*VOCABULARY, "1", "2"])}
    CLIPTokenizer(vocab=ids, merges=[]).save_pretrained(folder)


@pytest.mark.parametrize(
    ("option", "change", "message"),
    [
        ("path", lose_a_weight, r"lacks 1 of its weights, such as 'text_projection.weight'"),
        ("path", tear, "cannot be loaded as CLIPModel.*hf download"),
        ("path", another_shape, "cannot be loaded as CLIPModel"),
        ("path", shutil.rmtree, "no such folder"),
        ("processor", lose_the_tokenizer, "no tokenizer files"),
        ("processor", spoil_the_tokenizer, "cannot be loaded as CLIPTokenizer"),
        ("processor", more_tokens, "knows 58 tokens.* only 56"),
        (
            "processor",
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "cannot be loaded as CLIPImageProcessorPil",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(clip, tmp_path, option, change, message):
    spoilt = altered(clip, tmp_path / "spoilt", change)
    options = {"path": clip, "processor": clip, option: spoilt}
    with pytest.raises(ModelError, match=rf"(?s)^{option} = '{spoilt}': .*{message}"):
        build("pickscore", options)


@pytest.mark.parametrize("option", ["path", "processor"])
def test_a_hub_that_cannot_be_reached(clip, option, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"path": clip, "processor": clip, option: "nobody/nothing"}
    with pytest.raises(ModelError, match=f"^{option} = 'nobody/nothing': .*can reach"):
        build("pickscore", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype: .*'bfloat16' or 'float16', not 'float8'"),
        ({"batch": 0}, "batch: .*greater than or equal to 1"),
        ({"device": "tpu9"}, "device: .*cpu.cuda.*not 'tpu9'"),
        ({"device": "cuda:99"}, "device 'cuda:99', but this process sees"),
        ({"model": "x"}, "no option 'model'"),
    ],
)
def test_options_that_cannot_work_are_refused(clip, options, message):
    with pytest.raises(SpecError, match=message):
        build("pickscore", {"path": clip, "processor": clip, **options})


def check_deployment(name):
    """Its config differs from the OCR reward's in name, resources and options alone."""
    config, ocr = (
        yaml.safe_load((DEPLOYMENTS / f"{file}.yaml").read_text()) for file in (name, "ocr")
    )
    (mine,), (theirs,) = config.pop("applications"), ocr.pop("applications")
    assert config == ocr
    args, others = mine.pop("args"), theirs.pop("args")
    assert mine.pop("deployments") == [{"name": name, "num_replicas": 1}]
    del theirs["deployments"]
    assert mine == theirs | {"name": f"reward-{name}", "route_prefix": f"/{name}"}
    assert args["name"] == name
    assert set(args) <= {*others, "gpus", "hang_s"}
    check_options(name, args["options"])


def test_config_file():
    assert resolve("pickscore") is PickScoreReward
    check_deployment("pickscore")
