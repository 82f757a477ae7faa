"""The GenEval reward's models: tiny random ones against straight computations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_rewards_geneval_rules import ONE, RED, TWO, restated, wanted
from test_rewards_pickscore import check_deployment, letters, one_thread, pixels, tiny_clip

from flowgrpo_ray.common.errors import ModelError, RewardError, SpecError
from flowgrpo_ray.rewards import build, resolve
from flowgrpo_ray.rewards.geneval import (
    ColourClassifier,
    GenevalReward,
    class_names,
    objects_of,
)
from flowgrpo_ray.rewards.geneval_rules import (
    CLASSES,
    COLOURS,
    RELATIONS,
    TAGS,
    Found,
    Task,
    Wanted,
    keep,
    task_of,
)
from flowgrpo_ray.rewards.golden import check_golden, golden_of, score_golden

__all__ = ["one_thread"]  # a fixture that every test here runs under


# --- the detector's names


SOURCE = ("detector", "some/where", None)


def test_detectors_spell_classes_differently():
    others = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
    assert class_names({i: others.get(n, n) for i, n in enumerate(CLASSES)}, SOURCE) == dict(
        enumerate(CLASSES)
    )
    others |= {"tv": "tvmonitor", "couch": "sofa", "airplane": "aeroplane", "donut": "doughnut"}
    others |= {"motorcycle": "motorbike", "potted plant": "pottedplant", "dog": "Dog"}
    others |= {"dining table": "Dining_Table", "hair drier": "hair dryer"}
    backwards = {79 - i: others.get(name, name) for i, name in enumerate(CLASSES)}
    stuff = {80: "sky", 81: "mouse pad"}
    names = class_names(backwards | stuff, SOURCE)
    assert names == {79 - i: name for i, name in enumerate(CLASSES)}


def test_a_detector_without_a_class_is_refused():
    labels = {i: name for i, name in enumerate(CLASSES) if name not in ("dog", "tv")}
    with pytest.raises(ModelError, match=r"detector = 'some/where'.*lack 2 of the 80.*: dog, tv. "):
        class_names(labels, SOURCE)
    with pytest.raises(ModelError, match="lack 80 of"):
        class_names({0: "LABEL_0", 1: "LABEL_1"}, SOURCE)


# --- the models


def tiny_detector(folder, labels=CLASSES):
    """Random Mask2Former that is sure of its classes, as `from_pretrained` finds it."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    torch.manual_seed(3)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=12,
        id2label=dict(enumerate(labels)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "relative_position" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1:].numel() ** -0.5)
    with torch.no_grad():
        model.class_predictor.weight *= 4
        model.class_predictor.bias[6:-1] = -30  # few classes, so that many objects are of one
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def models(clip, tmp_path_factory):
    pytest.importorskip("scipy", reason="transformers builds no Mask2Former without scipy")
    return {"detector": tiny_detector(tmp_path_factory.mktemp("detector")), "clip": clip}


def build_on_cpu(models, **options):
    return GenevalReward(**models, device="cpu", **options)


@pytest.fixture(scope="module")
def images():
    """Coloured rectangles on noise, 96 wide and 72 high."""
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (10, 72, 96, 3), dtype=np.uint8)
    for picture in pictures:
        for _ in range(4):
            top, left = rng.integers(0, 48), rng.integers(0, 64)
            picture[top : top + 24, left : left + 32] = rng.integers(0, 256, 3)
    pictures.flags.writeable = False
    return pictures


def post_processed(model, processor, images, threshold):
    """Objects as transformers itself makes them, with boxes from masks; per image, sorted."""
    inputs = processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    sizes = [image.shape[:2] for image in images]
    results = processor.post_process_instance_segmentation(
        out, threshold=threshold, target_sizes=sizes, return_binary_maps=True
    )
    found = []
    for result in results:
        things = []
        for info, mask in zip(result["segments_info"], result["segmentation"], strict=False):
            rows, columns = (mask.numpy() > 0).nonzero()
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            name = CLASSES[info["label_id"]]
            things.append(Found(name, info["score"], box, mask=mask.numpy() > 0))
        found.append(sorted(things, key=lambda one: -one.score))
    return found


@pytest.fixture(scope="module")
def hf(models):
    """The detector and its processor, from transformers alone."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    return (
        Mask2FormerForUniversalSegmentation.from_pretrained(models["detector"]).eval(),
        Mask2FormerImageProcessorPil.from_pretrained(models["detector"]),
    )


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_objects_are_those_of_transformers(models, hf, images, threshold):
    expected = post_processed(*hf, images, threshold)
    reward = build_on_cpu(models)
    got = reward._detector(images, [set(CLASSES)] * 10, [threshold] * 10)
    assert sum(map(len, expected)) > 20
    for found, theirs in zip(got, expected, strict=True):
        mine = sorted(found, key=lambda one: -one.score)
        assert [one.name for one in mine] == [one.name for one in theirs]
        assert [one.box for one in mine] == [one.box for one in theirs]
        np.testing.assert_allclose(
            [one.score for one in mine], [one.score for one in theirs], atol=2e-6
        )
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a.mask, b.mask)


def test_half_precision_finds_nearly_the_same(models, images):
    found = [
        build_on_cpu(models, dtype=dtype)._detector(images, [set(CLASSES)] * 10, [0.3] * 10)
        for dtype in ("float32", "bfloat16")
    ]
    exact, rounded = ([{one.name for one in ones} for ones in each] for each in found)
    assert sum(map(len, exact)) > 20
    assert sum(len(a & b) for a, b in zip(exact, rounded, strict=True)) > 0.9 * sum(map(len, exact))
    assert [one.score for one in found[0][0]] != [one.score for one in found[1][0]]


def test_only_classes_that_are_asked_for_are_returned(models, images):
    detector = build_on_cpu(models)._detector

    def things(names, thresholds):
        found = detector(images, names, thresholds)
        return [[(one.name, one.box, round(one.score, 4)) for one in ones] for ones in found]

    every = things([set(CLASSES)] * 10, [0.05] * 10)
    names = {name for ones in every for name, *_ in ones}
    assert len(names) > 1
    for name in names:
        alone = things([{name}] * 10, [0.05] * 10)
        assert alone == [[one for one in ones if one[0] == name] for ones in every]
    raised = things([set(CLASSES)] * 10, [0.3] * 5 + [0.05] * 5)
    assert raised == [[o for o in ones if o[2] > 0.3] for ones in every[:5]] + every[5:]


def test_a_query_counts_once_per_class_that_is_certain_enough():
    """By hand: two queries, two classes and none; masks over the left and the whole."""
    big = 20.0
    odds = torch.log(torch.tensor([[0.5, 0.4, 0.1], [0.05, 0.15, 0.8]]))
    masks = torch.full((2, 4, 4), big)
    masks[0, :, 2:] = -big
    found = objects_of(odds, masks, {0: "cat", 1: "dog"}, 0.3, (8, 12))
    assert [one.name for one in found] == ["cat", "dog"]  # both of the first query
    assert [one.score for one in found] == pytest.approx([0.5, 0.4], abs=0.02)
    assert {one.box for one in found} == {(0, 0, 6, 8)}
    assert objects_of(odds, -masks.abs(), {0: "cat", 1: "dog"}, 0.3, (8, 12)) == []  # no pixel
    assert objects_of(odds, masks, {}, 0.3, (8, 12)) == []


def test_an_object_of_exactly_the_threshold_does_not_count(models, hf, images):
    """Each threshold at the certainty of the least certain object, and one step of float below."""
    detector = build_on_cpu(models)._detector
    (found,) = detector(images[:1], [set(CLASSES)], [0.3])
    name = found[0].name
    scores = [one.score for one in found if one.name == name]
    at, just_below = min(scores), math.nextafter(min(scores), 0)
    asked = wanted(name, len(scores))
    for tag, option in (("single_object", "threshold"), ("counting", "counting_threshold")):
        task = {"tag": tag, "include": [asked]}
        for level, score in ((at, 0), (just_below, 1)):
            reward = build_on_cpu(models, graded=False, **{option: level})
            assert reward(images[:1], ["p"], [task]) == score, (tag, level)


class StraightColours:
    """Colours after the description: grey around an object, cropped, three templates."""

    def __init__(self, folder):
        from transformers import CLIPModel

        self.model = CLIPModel.from_pretrained(folder).eval()
        self.known = {}

    def texts(self, name):
        """Per colour the direction of the mean of three unit vectors."""
        if name not in self.known:
            rows = []
            for colour in COLOURS:
                texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}"]
                texts.append(f"a photo of a {colour} object")
                rows.append(sum(self.unit("text", torch.tensor([letters(t)])) for t in texts))
            self.known[name] = [row / row.norm() for row in rows]
        return self.known[name]

    def unit(self, kind, value):
        with torch.no_grad():
            vector = getattr(self.model, f"get_{kind}_features")(value).pooler_output[0]
        return vector / vector.norm()

    def __call__(self, image, one):
        grey = Image.new("RGB", (image.shape[1], image.shape[0]), "#999999")
        alone = Image.composite(Image.fromarray(image), grey, Image.fromarray(one.mask))
        crop = np.asarray(alone.crop(tuple(int(edge) for edge in one.box)))
        picture = self.unit("image", pixels(crop, round)[None])
        return COLOURS[int(np.argmax([text @ picture for text in self.texts(one.name)]))]


@pytest.fixture(scope="module")
def straight_colour(clip):
    return StraightColours(clip)


def test_colours_are_those_of_a_straight_computation(clip, images, straight_colour):
    classifier = ColourClassifier(("clip", clip, None), torch.device("cpu"), "float32", batch=3)
    rng = np.random.default_rng(2)
    found, expected = [], []
    boxes = [(0, 0, 96, 72), (10, 20, 60, 70), (5, 5, 40, 8), (90, 0, 91, 30), (3, 3, 4, 4)]
    for image in images:
        things = []
        for k, (left, top, right, bottom) in enumerate(boxes):
            mask = np.zeros((72, 96), bool)
            mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.8
            mask[top, left] = mask[bottom - 1, right - 1] = True
            name = "dog" if k % 2 else "cat"
            things.append(Found(name, 1 - k / 10, (left, top, right, bottom), mask=mask))
        found.append(keep(things, 16))
        expected.append(
            {
                "cat": [straight_colour(image, one) for one in things[::2]],
                "dog": [straight_colour(image, one) for one in things[1::2]],
            }
        )
    task = Task("colors", (Wanted("cat", 3, "red"), Wanted("dog", 2, "blue")))
    classifier.fill_in(images, [task] * 10, found)
    colours = [{n: [one.colour for one in group] for n, group in f.items()} for f in found]
    assert colours == expected
    assert len({c for row in expected for group in row.values() for c in group}) > 3


def test_colours_are_asked_only_where_they_matter(clip, images, monkeypatch):
    classifier = ColourClassifier(("clip", clip, None), torch.device("cpu"), "float32", batch=8)
    cut = []
    encode = classifier._clip.images
    monkeypatch.setattr(
        classifier._clip, "images", lambda crops: (cut.append(len(crops)), encode(crops))[1]
    )
    mask = np.ones((72, 96), bool)
    dogs = [Found("dog", 0.9, (0, 0, 96, 72), mask=mask) for _ in range(4)]
    cats = [Found("cat", 0.9, (0, 0, 96, 72), mask=mask)]
    tasks = [
        Task("colors", (Wanted("dog", 2, "red"), Wanted("cat", 1))),  # two dogs
        Task("colors", (Wanted("dog", 5, "red"),)),  # too few: none
        Task("colors", (Wanted("dog", 3, "red"), Wanted("dog", 1, "red"))),  # three
        Task("colors", (Wanted("dog", 1, "red"),)),  # the detector failed
    ]
    found = [*({"dog": list(dogs), "cat": list(cats)} for _ in range(3)), None]
    classifier.fill_in(images[:4], tasks, found)
    assert cut == [5]
    known = [[one.colour is not None for one in f["dog"]] for f in found[:3]]
    assert known == [[1, 1, 0, 0], [0] * 4, [1, 1, 1, 0]]
    assert found[0]["cat"] == cats
    assert found[3] is None
    classifier.fill_in(images[:1], [Task("two_object", (Wanted("dog", 1),))], [{"dog": dogs}])
    assert cut == [5]


def cases(hf, images):
    """Tasks that the tiny detector's finds now meet and now miss."""
    found = post_processed(*hf, images, 0.3)
    tasks = []
    for i, things in enumerate(found):
        counts = {}
        for one in things:
            counts[one.name] = counts.get(one.name, 0) + 1
        (name, count), *rest = [*counts.items(), ("dog", 1)]
        other, more = rest[0]
        tag = TAGS[i % len(TAGS)]
        first = wanted(name, count + (i % 4 == 3))
        if tag in ("colors", "color_attr"):
            first["color"] = COLOURS[i]
        second = [] if tag in ("single_object", "counting", "colors") else [wanted(other, more)]
        if tag == "position":
            second[0]["position"] = [RELATIONS[i % 4], 0]
        excluded = {"exclude": [wanted(name, count + 1)]} if tag == "counting" else {}
        tasks.append({"tag": tag, "include": [first, *second], **excluded})
    return tasks


RULES = {"graded": {}, "strict": {"graded": False}, "benchmark": {"graded": False, "strict": False}}


@pytest.mark.parametrize(("place", "rule"), enumerate(RULES))
def test_scores_are_those_of_a_straight_computation(
    models, hf, images, straight_colour, place, rule
):
    metadata = cases(hf, images)
    scores = build_on_cpu(models, batch=4, **RULES[rule])(images, ["p"] * 10, metadata)
    assert scores.dtype == np.float32
    expected = []
    for image, data in zip(images, metadata, strict=True):
        task = task_of("p", data)
        threshold = 0.9 if task.tag == "counting" else 0.3
        (things,) = post_processed(*hf, [image], threshold)
        asked = {want.name for want in task.include if want.colour}
        things = [
            replace(t, colour=straight_colour(image, t)) if t.name in asked else t for t in things
        ]
        expected.append(float(restated(task, keep(things, 16))[place]))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert len(set(expected)) > 1, "all alike says nothing"


def test_no_image_moves_the_score_of_another(models, hf, images):
    """Exactly: scores come from counts, and no rounding here is near a threshold."""
    metadata = cases(hf, images)
    reward = build_on_cpu(models)
    together = reward(images, ["p"] * 10, metadata)
    alone = [reward(images[i : i + 1], ["p"], metadata[i : i + 1])[0] for i in range(10)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(reward(images[::-1], ["p"] * 10, metadata[::-1]), together[::-1])
    assert reward(images[:0], [], []).shape == (0,)


def test_counting_has_a_threshold_of_its_own(models, hf, images):
    (things,) = post_processed(*hf, images[:1], 0.3)
    name = things[0].name
    scores = [one.score for one in things if one.name == name]
    count = len(scores)
    plain = {"tag": "single_object", "include": [wanted(name, count)]}
    counting = plain | {"tag": "counting"}
    level = (scores[0] + scores[1]) / 2 if count > 1 else scores[0] + 1e-3
    options = {"counting_threshold": level, "graded": False}
    reward = build_on_cpu(models, **options)
    both = reward(images[[0, 0]], ["p"] * 2, [plain, counting])
    assert both.tolist() == [1, 0]
    fewer = build_on_cpu(models, max_objects=1, graded=True)(images[:1], ["p"], [plain])
    assert fewer[0] == pytest.approx(1 / count)


def test_an_image_that_cannot_be_scored_is_nan(models, hf, images):
    metadata = [ONE, RED, TWO]
    reward = build_on_cpu(models)
    with torch.no_grad():
        reward._detector._model.class_predictor.bias[70] = math.nan
    assert np.isnan(reward(images[:3], ["p"] * 3, metadata)).all()
    reward = build_on_cpu(models)
    reward._colours._clip._model.visual_projection.weight.zero_()
    (things,) = post_processed(*hf, images[:1], 0.3)
    name = things[0].name
    plain = {"tag": "single_object", "include": [wanted(name)]}
    coloured = {"tag": "colors", "include": [wanted(name, color="red")]}
    scores = reward(images[[0, 0]], ["p"] * 2, [plain, coloured])
    assert np.isnan(scores).tolist() == [False, True]


@pytest.mark.gpu
def test_the_same_on_a_gpu(models, hf, images):
    metadata = cases(hf, images)
    cuda, cpu = GenevalReward(**models), build_on_cpu(models)
    assert cuda._detector._device.type == "cuda"
    np.testing.assert_array_equal(*(r(images, ["p"] * 10, metadata) for r in (cuda, cpu)))


# --- construction


@pytest.mark.parametrize("options", RULES.values(), ids=list(RULES))
def test_the_golden_image_is_worth_nothing(models, options):
    """The tiny detector finds no dog; one that always finds a dog is found out."""
    reward = build_on_cpu(models, max_objects=1, **options)
    rankings = golden_of(reward)
    scores = score_golden(reward, rankings)
    assert scores.tolist() == [0]
    check_golden(rankings, scores)
    with torch.no_grad():
        reward._detector._model.class_predictor.bias[CLASSES.index("dog")] = 30
    with pytest.raises(RewardError, match=r"'a photo of a dog' scores 1, not within \[0, 0\]"):
        check_golden(rankings, score_golden(reward, rankings))


def test_a_detector_of_other_classes_is_refused_when_built(models, tmp_path):
    other = tiny_detector(tmp_path, labels=[*CLASSES[:79], "LABEL_79"])
    with pytest.raises(ModelError, match=f"detector = '{other}'.*lack 1 .*: toothbrush"):
        build("geneval", models | {"detector": other})


def test_models_of_another_kind_are_refused(models):
    with pytest.raises(ModelError, match=r"detector = .*is not one of a Mask2Former"):
        build("geneval", models | {"detector": models["clip"]})
    with pytest.raises(ModelError, match="clip = '/nowhere': there is no such folder"):
        build("geneval", models | {"clip": "/nowhere"})


def test_without_scipy_the_error_says_so(clip, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(
        "transformers.models.mask2former.modeling_mask2former.requires_backends", deny
    )
    with pytest.raises(ModelError, match=r"(?s)^detector = .*scipy"):
        build("geneval", {"detector": str(tmp_path), "clip": clip})


def deny(thing, backends):
    raise ImportError(f"{type(thing).__name__} requires {backends}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": False}, "needs graded: false"),
        ({"graded": False, "as_published": True}, "as_published: true is for graded: true"),
        ({"threshold": 1.5}, "threshold: .*less than or equal to 1, not 1.5"),
        ({"max_objects": 0}, "max_objects: .*greater than or equal to 1"),
        ({"batch": 0}, "batch: .*greater than or equal to 1"),
        ({"device": "tpu9"}, "device: .*cpu.cuda.*not 'tpu9'"),
        ({"treshold": 0.2}, "did you mean 'threshold'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        build("geneval", options)


def test_config_file():
    assert resolve("geneval") is GenevalReward
    check_deployment("geneval")
