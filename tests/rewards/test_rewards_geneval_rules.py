"""The rules of GenEval on objects laid out by hand, and on the public prompt set."""

import json
import math
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from flowgrpo_ray.rewards.geneval import GenevalReward
from flowgrpo_ray.rewards.geneval_rules import (
    CLASSES,
    COLOURS,
    RELATIONS,
    TAGS,
    Found,
    Task,
    Wanted,
    judge,
    keep,
    overlap,
    relations,
    task_of,
)

SMALL = (10, 10)


def thing(name, score=0.9, left=0, top=0, size=SMALL, colour=None):
    return Found(name, score, (left, top, left + size[0], top + size[1]), colour)


def seen(*things):
    return keep(things, most=16)


# --- the rules


def wanted(name, count=1, **more):
    return {"class": name, "count": count, **more}


ONE = {"tag": "single_object", "include": [wanted("dog")]}
TWO = {"tag": "two_object", "include": [wanted("dog"), wanted("cat")]}
THREE = {"tag": "counting", "include": [wanted("dog", 3)], "exclude": [wanted("dog", 4)]}
RED = {"tag": "colors", "include": [wanted("dog", color="red")]}
LEFT = {"tag": "position", "include": [wanted("dog"), wanted("cat", position=["left of", 0])]}
BOTH = {"tag": "color_attr", "include": [wanted("dog", color="red"), wanted("cat", color="pink")]}
REDS = {"tag": "colors", "include": [wanted("dog", 2, color="red")]}
PAIRS = {"tag": "position", "include": [wanted("dog", 2), wanted("cat", 2, position=["above", 0])]}
NO_CAT = {"tag": "single_object", "include": [wanted("dog")], "exclude": [wanted("cat", 2)]}

DOG, CAT = thing("dog"), thing("cat", left=50)
WEST = thing("cat", left=-50)
RED_DOG, BLUE_DOG = thing("dog", colour="red"), thing("dog", colour="blue")
PINK_CAT, BLACK_CAT = thing("cat", colour="pink"), thing("cat", colour="black")


@pytest.mark.parametrize(
    ("metadata", "things", "graded", "strict", "benchmark"),
    [
        (ONE, [], 0, False, False),
        (ONE, [CAT], 0, False, False),
        (ONE, [DOG], 1, True, True),
        (ONE, [DOG, CAT, CAT], 1, True, True),
        (ONE, [DOG, DOG], 0, False, True),
        (ONE, [DOG] * 16, -14, False, True),
        (ONE, [DOG] * 17, -14, False, True),  # 16 count
        (TWO, [], 0, False, False),
        (TWO, [DOG], 1 / 2, False, False),
        (TWO, [CAT], 1 / 2, False, False),
        (TWO, [DOG, CAT], 1, True, True),
        (TWO, [DOG, CAT, CAT], 1 / 2, False, True),
        (THREE, [], 0, False, False),
        (THREE, [DOG], 1 / 3, False, False),
        (THREE, [DOG] * 2, 2 / 3, False, False),
        (THREE, [DOG] * 3, 1, True, True),
        (THREE, [DOG] * 4, 2 / 3, False, False),
        (THREE, [DOG] * 7, -1 / 3, False, False),
        (RED, [], 0, False, False),
        (RED, [RED_DOG], 1, True, True),
        (RED, [BLUE_DOG], 1 / 2, False, False),
        (RED, [RED_DOG, BLUE_DOG], 0, False, True),
        (RED, [BLUE_DOG, RED_DOG], 0, False, False),  # only the most certain is looked at
        (REDS, [RED_DOG, BLUE_DOG], 3 / 4, False, False),
        (REDS, [RED_DOG, RED_DOG], 1, True, True),
        (REDS, [BLUE_DOG, BLUE_DOG], 1 / 2, False, False),
        (REDS, [RED_DOG], 1 / 4, False, False),
        (REDS, [RED_DOG, RED_DOG, BLUE_DOG], 1 / 4, False, True),
        (BOTH, [RED_DOG, PINK_CAT], 1, True, True),
        (BOTH, [BLUE_DOG, PINK_CAT], 3 / 4, False, False),
        (BOTH, [RED_DOG, BLACK_CAT], 3 / 4, False, False),
        (BOTH, [BLUE_DOG, BLACK_CAT], 1 / 2, False, False),
        (BOTH, [RED_DOG], 1 / 2, False, False),
        (BOTH, [RED_DOG, PINK_CAT, PINK_CAT], 1 / 2, False, True),
        (BOTH, [], 0, False, False),
        (LEFT, [DOG, WEST], 1, True, True),
        (LEFT, [DOG, CAT], 2 / 3, False, False),
        (LEFT, [DOG], 1 / 3, False, False),
        (LEFT, [WEST], 1 / 3, False, False),
        (LEFT, [], 0, False, False),
        (LEFT, [DOG, DOG, WEST], 1 / 3, False, True),
        (LEFT, [DOG, WEST, CAT], 1 / 3, False, True),
        (LEFT, [DOG, CAT, WEST], 1 / 3, False, False),
        (PAIRS, [thing("dog", top=90)] * 2 + [CAT] * 2, 1, True, True),
        (PAIRS, [thing("dog", top=90), DOG, CAT, CAT], 2 / 3, False, False),  # every pair counts
        (PAIRS, [thing("dog", top=90)] * 2 + [CAT], 1 / 2, False, False),
        (NO_CAT, [DOG, CAT], 1, True, True),
        (NO_CAT, [DOG, CAT, CAT], 1, False, False),
        (NO_CAT, [DOG, CAT, CAT, CAT], 1, False, False),
    ],
)
def test_verdicts_by_hand(metadata, things, graded, strict, benchmark):
    verdict = judge(task_of("p", metadata), seen(*things))
    assert verdict.graded == pytest.approx(graded)
    assert (verdict.strict, verdict.benchmark) == (strict, benchmark)


REDDER = [wanted("dog"), wanted("cat", color="red", position=["left of", 0])]
RED_WEST = thing("cat", left=-50, colour="red")


@pytest.mark.parametrize(
    ("include", "things", "graded"),
    [
        (LEFT["include"], [DOG, WEST], 1),  # 1, 1, 1
        (LEFT["include"], [DOG, CAT], 3 / 4),  # 1, 1, 0 and 1
        (LEFT["include"], [DOG], 1 / 3),  # 1, 0, 0
        (LEFT["include"], [WEST], 1 / 3),  # 0, 1, 0: there is nothing to be left of
        (REDDER, [DOG, RED_WEST], 1),  # 1, 1, 1, 1
        (REDDER, [DOG, WEST], 2 / 3),  # 1, 1, 0: the position is not asked
        (REDDER, [DOG], 1 / 3),  # 1, 0 and one 0 for colour and position
        (BOTH["include"], [BLUE_DOG, PINK_CAT], 3 / 4),  # as ever without a position
    ],
)
def test_published_verdicts_by_hand(include, things, graded):
    task = task_of("p", {"tag": "position", "include": include})
    published, own = judge(task, seen(*things), as_published=True), judge(task, seen(*things))
    assert published.graded == pytest.approx(graded)
    assert published == replace(own, graded=published.graded)


def restated(task, found, threshold=0.1):
    """The rules once more, per entry: graded, strict, GenEval's own."""

    def beside(a, b, relation):
        axis, sign = {
            **{"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)},
        }[relation]
        middle = [[(box[k] + box[k + 2]) / 2 for k in (0, 1)] for box in (a.box, b.box)]
        offset = [middle[0][k] - middle[1][k] for k in (0, 1)]
        room = (a.box[axis + 2] - a.box[axis] + b.box[axis + 2] - b.box[axis]) * threshold
        ahead = sign * offset[axis] - room
        return ahead >= 1e-3 and ahead > 0.5 * math.dist(offset, (0, 0))

    def entry(want, have, others):
        number = 1 - abs(len(have) - want.count) / want.count
        colours = [have_one.colour for have_one in have].count(want.colour) / want.count
        stands = others is not None and all(
            beside(a, b, want.relation) for a in have for b in others
        )
        parts = [number]
        if want.colour:
            parts.append(colours if number == 1 else 0)
        if want.relation:
            parts.append(1 if stands and set(parts) == {1} else 0)
        return parts

    results = []
    for most in (99, None):
        parts, groups = [], []
        for want in task.include:
            have = found.get(want.name, [])[: most or want.count]
            others = groups[want.target] if want.relation else None
            met = entry(want, have, others)
            groups.append(have if set(met) == {1} else None)
            parts += met
        results.append(parts)
    clean = not any(len(found.get(no.name, [])) >= no.count for no in task.exclude)
    mean = sum(results[0]) / len(results[0])
    return mean, clean and set(results[0]) == {1}, clean and set(results[1]) == {1}


def random_case(rng):
    """A task of any shape, also none that GenEval has, and objects that often come near it."""
    names = ["dog", "cat", "cow"]
    include = []
    for i in range(rng.randint(1, 3)):
        colour = rng.choice([None, None, "red", "blue"])
        relation = rng.choice([None, *RELATIONS]) if i else None
        target = rng.randrange(i) if relation else 0
        include.append(
            Wanted(rng.choice(names), rng.choice([1, 1, 2, 3]), colour, relation, target)
        )
    exclude = [Wanted(rng.choice(names), rng.randint(1, 4)) for _ in range(rng.choice([0, 0, 1]))]
    things = [
        thing(
            want.name,
            rng.random(),
            *(rng.randrange(0, 60, 5), rng.randrange(0, 60, 5)),
            (rng.randrange(5, 30, 5), rng.randrange(5, 30, 5)),
            rng.choice([want.colour or "red"] * 3 + ["blue"]),
        )
        for want in include
        for _ in range(max(0, want.count + rng.choice([0, 0, 0, 0, -1, 1])))
    ]
    return Task("colors", tuple(include), tuple(exclude)), seen(*things)


def test_verdicts_of_random_cases_against_the_rules_restated():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(5000):
        task, found = random_case(rng)
        verdict = judge(task, found)
        graded, strict, benchmark = restated(task, found)
        assert verdict.graded == pytest.approx(graded), (task, found)
        assert (verdict.strict, verdict.benchmark) == (strict, benchmark), (task, found)
        outcomes.add((strict, benchmark, any(want.relation for want in task.include)))
    # strict is the stronger rule; every other combination came up, with and without positions
    assert outcomes == {(s, b, r) for s in (0, 1) for b in (0, 1) for r in (0, 1) if s <= b}


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),  # 28/42.4 > 1/2 on both axes
        (-30, -30, {"left of", "above"}),
        (30, 12, {"right of"}),  # 10/32.3 < 1/2
        (0, 0, set()),
        (2, 2, set()),  # 0.1 of the sizes, 20, is 2
        (2.1, 0, set()),  # beyond, but 0.1/2.1 < 1/2
        (4.1, 0, {"right of"}),  # 2.1/4.1 > 1/2
        *((4, 0, set()), (-4, 0, set()), (0, 4, set()), (0, -4, set())),  # 2/4 is not above 1/2
        *((4.01, 0, {"right of"}), (-4.01, 0, {"left of"})),
        *((0, 4.01, {"below"}), (0, -4.01, {"above"})),
    ],
)
def test_relations_by_hand(left, top, expected):
    assert relations((left, top, left + 10, top + 10), (0, 0, 10, 10)) == expected


def test_relations_allow_for_the_size_of_both():
    a, b = (30, 0, 130, 10), (0, 0, 10, 10)  # centres 75 apart, sizes 110: 64/75
    assert relations(a, b) == {"right of"}
    assert relations(b, a) == {"left of"}
    assert relations(a, b, position_threshold=0.5) == set()  # 20/75


@pytest.mark.parametrize(("apart", "expected"), [(1e-3, {"right of"}), (0.999e-3, set())])
def test_centres_that_all_but_meet_have_no_relation(apart, expected):
    b = (0, 0, 0, 0)
    assert relations((apart, 0, apart, 0), b, position_threshold=0) == expected


def test_the_most_certain_are_kept_in_order():
    things = [thing("dog", score) for score in (0.4, 0.9, 0.6, 0.5)]
    kept = keep([things[0], thing("cat", 0.1), *things[1:]], most=3)
    assert [one.score for one in kept["dog"]] == [0.9, 0.6, 0.5]
    assert [one.score for one in kept["cat"]] == [0.1]
    assert keep([], most=3) == {}


def test_an_overlap_of_exactly_the_limit_is_too_much():
    one, other = thing("dog", size=(3, 1)), thing("dog", 0.8, left=1, size=(3, 1))
    assert overlap(one.box, other.box) == 2 / 4
    assert keep([one, other], 16, 0.5) == {"dog": [one]}
    assert keep([one, other], 16, math.nextafter(0.5, 1)) == {"dog": [one, other]}


def test_overlapping_objects_of_a_class_are_dropped_only_where_asked():
    sure, near, far = thing("dog", 0.9), thing("dog", 0.8, left=2), thing("dog", 0.7, left=9)
    other = thing("cat", 0.5, left=2)
    assert overlap(sure.box, near.box) == pytest.approx(80 / 120)
    assert overlap(sure.box, thing("dog", left=10).box) == 0
    assert keep([sure, near, far, other], 16)["dog"] == [sure, near, far]
    assert keep([sure, near, far, other], 16, 0.5) == {"dog": [sure, far], "cat": [other]}


# --- metadata


def test_task_of_a_line_of_the_public_file():
    line = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "tv remote", "count": 2, "position": ["left of", 0]},
        ],
        "exclude": [{"class": "dog", "count": 2}],
    }
    assert task_of("p", line) == Task(
        "position",
        (Wanted("dog", 1, "red"), Wanted("tv remote", 2, None, "left of", 0)),
        (Wanted("dog", 2),),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": None}, "tag is None; known: single_object, two_object"),
        ({"tag": "count"}, "tag is 'count'"),
        ({"include": None}, "include is None, not a list"),
        ({"include": []}, "include is \\[\\], not a list"),
        ({"include": {"class": "dog"}}, "include is {"),
        ({"include": ["dog"]}, r"include\[0\] is 'dog', not an object"),
        ({"include": [wanted("hound")]}, r"include\[0\].class is 'hound'; known: person"),
        ({"include": [wanted(["dog"])]}, r"include\[0\].class is \['dog'\]"),
        ({"include": [{"count": 1}]}, r"include\[0\].class is None"),
        ({"include": [wanted("mouse")]}, "class is 'mouse'"),  # computer mouse
        ({"include": [wanted("dog"), {"class": "dog"}]}, r"include\[1\].count is None"),
        ({"include": [wanted("dog", 0)]}, r"include\[0\].count is 0, not a whole"),
        ({"include": [wanted("dog", 1.0)]}, "count is 1.0"),
        ({"include": [wanted("dog", True)]}, "count is True"),
        ({"include": [wanted("dog", color="grey")]}, r"color is 'grey'; known: red, orange"),
        ({"include": [wanted("dog"), wanted("cat", position="left of")]}, "position is 'left of'"),
        (
            {"include": [wanted("dog"), wanted("cat", position=["near", 0])]},
            r"include\[1\].position\[0\] is 'near'; known: left of",
        ),
        (
            {"include": [wanted("dog"), wanted("cat", position=["above", 1])]},
            r"include\[1\].position\[1\] is 1, not the index of an earlier",
        ),
        ({"include": [wanted("cat", position=["above", -1])]}, "is -1, not the index"),
        ({"exclude": {"class": "dog"}}, "exclude is {"),
        ({"exclude": [wanted("cat", color="red")]}, r"exclude\[0\] has a color or position"),
        (
            {"include": [wanted("dog", colour="red")]},
            r"include\[0\] has an unknown key 'colour', did you mean 'color'",
        ),
        ({"exclude": [wanted("wolf")]}, r"exclude\[0\].class is 'wolf'"),
    ],
)
def test_metadata_that_says_nothing_is_refused(change, message):
    GenevalReward.check_prompt("a dog", ONE)
    with pytest.raises(ValueError, match=f"^metadata .*{message}.*, for the prompt 'a dog'$"):
        GenevalReward.check_prompt("a dog", ONE | change)
    with pytest.raises(ValueError, match=r"^metadata tag is None"):
        GenevalReward.check_prompt("a dog", {})


@pytest.mark.skipif("FLOWGRPO_TEST_DATA" not in os.environ, reason="needs FLOWGRPO_TEST_DATA")
def test_the_public_prompt_set():
    path = Path(os.environ["FLOWGRPO_TEST_DATA"], "geneval_test.jsonl")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    tasks = [task_of(row["prompt"], row) for row in rows]
    # 553 prompts, each four times
    counts = dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    assert Counter(task.tag for task in tasks) == {tag: 4 * n for tag, n in counts.items()}
    assert {task.tag for task in tasks if task.exclude} == {"counting"}
    assert {name for task in tasks for name in task.names} == set(CLASSES)
    asked = [want for task in tasks for want in task.include]
    assert {want.colour for want in asked} == {None, *COLOURS}
    assert {want.relation for want in asked} == {None, *RELATIONS}
    # Objects laid out just as asked get full marks from every rule.
    direction = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for task in tasks:
        found = []
        for want in task.include:
            x, y = direction[want.relation] if want.relation else (0, 0)
            spot = thing(want.name, 0.9, 99 * x, 99 * y, colour=want.colour)
            found += [replace(spot) for _ in range(want.count)]
        verdict = judge(task, seen(*found))
        assert (verdict.graded, verdict.strict, verdict.benchmark) == (1, True, True), task
        assert judge(task, {}).graded == 0


def test_eighty_classes_in_the_order_of_coco():
    assert len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "couch", "tv remote", "toothbrush")] == [
        *(0, 57, 65, 79)
    ]
