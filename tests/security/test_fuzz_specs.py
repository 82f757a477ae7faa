"""Specs, overrides and prompt files that nobody would write: a spec or a message, and soon."""

# ruff: noqa: PT017 - an error and a result are both right, and both are looked at
from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowgrpo_ray.common.errors import PromptError, SpecError
from flowgrpo_ray.spec.file import (
    MOST_BYTES,
    RECIPES,
    dump_spec,
    load_spec,
    parse_yaml,
    recipe_names,
    validate,
)
from flowgrpo_ray.spec.prompt_files import READERS, Prompt, load_prompts
from flowgrpo_ray.spec.prompts import prompts_digest
from flowgrpo_ray.spec.training import TrainingSpec

SECONDS = 2.0  # of this process, for one spec
LONGEST = 20_000  # characters of a message
TEXTS = {name: (RECIPES / f"{name}.yaml").read_text("utf-8") for name in recipe_names()}
QUICK = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextlib.contextmanager
def quick() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def key_paths(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of every key of a resolved spec, at every depth."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*place, key)
        yield from key_paths(inner, (*place, key))


RESOLVED = yaml.safe_load(dump_spec(load_spec("tiny-ocr")))
PATHS = list(key_paths(RESOLVED))
KEYS = {key for name in TEXTS for path in key_paths(yaml.safe_load(TEXTS[name])) for key in path}
KEYS |= {key for path in PATHS for key in path} | set(TrainingSpec.model_fields)


def names_a_key(message: str) -> bool:
    return bool(KEYS & set(re.findall(r"\w+", message)))


def load(path: Path, content: bytes) -> TrainingSpec | str:
    """A spec that reads back equal, or the message."""
    path.write_bytes(content)
    with quick():
        try:
            spec = load_spec(str(path))
        except SpecError as error:
            assert str(path) in str(error)
            assert len(str(error)) < LONGEST
            assert "\x1b" not in str(error)
            return str(error)
    path.write_text(dump_spec(spec), encoding="utf-8")
    assert load_spec(str(path)) == spec
    return spec


# --- bytes and YAML

HOSTILE = [
    *("&a [*a]", "*a", "&a b", "<<: *x", "!!python/object/apply:os.system [id]", "!!set {a}"),
    *("!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!binary '&&'", "!x y", "!!omap [a]"),
    *("0x_", "0b_", "0o17", "010", "1:30:30", "1:30.5", "9" * 5000, "0x" + "f" * 9000, "1e999999"),
    *(".nan", "-.inf", "1_000", "0_", "+", "-", ".", "=", "~", "? [a]\n: 1", "{a: {b: {c: 1}}}"),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\e[2J"',
        "\u2028",
        "\ufeff",
        "\u0085",
        "'",
        '"',
        "|",
        ">",
        "%YAML 9",
    ),
    *("[" * 3000, "{a: " * 500, "- " * 900, "---\n", "...\n", "\t", "name: ../../x", "name: 'a/b'"),
    *(
        '"\\e[2J": 1',
        "kind: [lora]",
        "kind: {a: 1}",
        "a" * 5000,
        "k: v\n" * 300,
        "[" + "1," * 9000 + "1]",
    ),
    *("reward: ':x'", "reward: '.a:b'", "reward: 'a..b:c'", "reward: 'subprocess:Popen'"),
    *("reward: 'os:path'", "path: builtin:../../../etc/passwd", "path: '~nobody-here/x'"),
]


@QUICK
@given(st.one_of(st.binary(max_size=400), st.text(max_size=400).map(str.encode)))
@example(b"")
@example(b"\xff\xfe")
def test_any_bytes(tmp_path: Path, content: bytes):
    assert isinstance(load(tmp_path / "spec.yaml", content), str)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "place", ["{}", "seed: {}", "- {}", "rewards: {{ocr: {{options: {{a: {}}}}}}}"]
)
def test_hostile_yaml(tmp_path: Path, text: str, place: str):
    """As the whole file, as a value, and inside of a spec that is otherwise right."""
    load(tmp_path / "spec.yaml", place.format(text).encode())
    whole = TEXTS["tiny-ocr"].replace("seed:", "unused:") + "\n" + place.format(text)
    load(tmp_path / "spec.yaml", whole.encode())


def test_a_billion_laughs_are_not_written_out(tmp_path: Path):
    text = "l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n"
    for i in range(1, 10):
        text += f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n"
    for content in (text, TEXTS["tiny-ocr"] + text):
        assert "anchors (&) and aliases (*) are not read" in str(
            load(tmp_path / "spec.yaml", content.encode())
        )


def mangled(rng: random.Random) -> str:
    """A recipe that is wrong in one to five places."""
    lines = TEXTS[rng.choice(list(TEXTS))].split("\n")
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(lines))
        line, other = lines[at], rng.choice(TEXTS[rng.choice(list(TEXTS))].split("\n"))
        cut = rng.randint(0, len(line))
        lines[at] = rng.choice(
            [
                line[:cut] + chr(rng.randrange(1, 0x3000)) + line[cut + 1 :],
                line[:cut] + rng.choice(HOSTILE) + line[cut:],
                line.partition(":")[0] + ": " + rng.choice(HOSTILE),
                line + "\n" + other,
                "  " + line,
                line[1:],
                "",
                re.sub(r"\d+", lambda _: str(rng.choice([-1, 0, 10**9, 10**25, 1e300])), line),
            ]
        )
    return "\n".join(lines)


def test_five_hundred_mangled_recipes(tmp_path: Path):
    rng = random.Random(11)
    outcomes = []
    for _ in range(500):
        outcomes.append(load(tmp_path / "spec.yaml", mangled(rng).encode("utf-8", "replace")))
    wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert 300 < len(wrong) < 500, "most must be wrong, and not all"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "spec.yaml"
    with path.open("wb") as file:
        file.truncate(2**36)  # without taking room on the disk
    with quick(), pytest.raises(SpecError, match=f"larger than {MOST_BYTES:,} bytes"):
        load_spec(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n" * 2 + "x" * (MOST_BYTES - 100),
        "".join(f"k{i}: {i}\n" for i in range(MOST_BYTES // 14)),
        "seed: [" + "1," * (MOST_BYTES // 2 - 10) + "1]",
        "seed: " + "[1]," * 20_000,
        "".join(f"{'n' * (i % 30 + 1)}{i}: {{}}\n" for i in range(4000)),
    ],
    ids=["one word", "keys", "numbers", "flow", "near keys"],
)
def test_the_largest_file_is_read_in_seconds(tmp_path: Path, text: str):
    path = tmp_path / "spec.yaml"
    path.write_text(text[:MOST_BYTES])
    began = time.process_time()
    with pytest.raises(SpecError) as caught:
        load_spec(str(path))
    assert time.process_time() - began < 4 * SECONDS
    assert len(str(caught.value)) < LONGEST


# --- values


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=10**30),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["\ud800", "\x1b[2J", "a:b", "..", "/", "", "lora", "flow_grpo", "all"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(sorted(KEYS)), st.text(max_size=8)), inner),
    ),
    max_leaves=8,
)


@QUICK
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
def test_any_value_at_any_key(changes: list[tuple[tuple[str, ...], Any]]):
    data = yaml.safe_load(dump_spec(load_spec("tiny-ocr")))
    for path, value in changes:
        place = data
        for key in path[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[path[-1]] = value
    with quick():
        try:
            spec = validate(data, "here")
        except SpecError as error:
            message = str(error)
            assert names_a_key(message) or "half of a character" in message
            assert "\x1b" not in message
            assert len(message) < LONGEST
        else:
            assert spec.name == data["name"]
            assert repr(parse_yaml(dump_spec(spec), "")) == repr(spec.model_dump(mode="json"))


@QUICK
@given(
    key=st.one_of(st.sampled_from([".".join(path) for path in PATHS]), st.text(max_size=30)),
    value=st.one_of(st.text(max_size=40), st.sampled_from(HOSTILE)),
)
@example(key=".".join("a" * 5000), value="1")
@example(key="rewards.ocr.options." + ".".join("a" * 40), value="1")
@example(key="", value="")
def test_any_override(key: str, value: str):
    with quick(), contextlib.suppress(SpecError):
        load_spec("tiny-ocr", [f"{key}={value}"])


@pytest.mark.parametrize("source", ["a" * 5000, "\0", "", "/", "/dev/zero", "/dev/stdin", "~x/y"])
def test_a_name_that_no_spec_can_have(source: str):
    with pytest.raises(SpecError, match="neither a file nor a recipe"):
        load_spec(source)


# --- prompts


def prompts_of(path: Path, content: bytes) -> list[Prompt]:
    path.write_bytes(content)
    with quick():
        try:
            found = load_prompts(str(path), "prompts.train")
        except PromptError as error:
            assert str(path) in str(error)
            assert "prompts.train" in str(error)
            return []
    assert found
    for prompt in found:
        assert prompt.text.encode()  # fit for tokenizers, files and screens
        assert isinstance(prompt.metadata, dict)
    prompts_digest(found)
    return found


@QUICK
@given(content=st.binary(max_size=300), suffix=st.sampled_from([*READERS]))
def test_any_prompt_file(tmp_path: Path, content: bytes, suffix: str):
    prompts_of(tmp_path / f"p{suffix}", content)


LINES = [
    *('{"prompt": "a", "n": 1e999}', '{"prompt": "a", "n": NaN}', '{"prompt": "\\ud800"}'),
    *('{"prompt": "a", "b": "\\udfff"}', '{"prompt": "a", "n": ' + "9" * 5000 + "}", "[" * 100_000),
    *('{"a": ' * 3000, '{"prompt": "a", "b": ' + "[" * 500 + "]" * 500 + "}", '{"prompt": null}'),
    *('{"prompt": "' + "a" * 100_000 + '"}', '{"prompt": ["a"]}', "null", '"a"', '{"prompt": ""'),
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_hostile_prompt_lines(tmp_path: Path, line: str):
    good = '{"prompt": "red"}\n'
    assert prompts_of(tmp_path / "p.jsonl", (good + line).encode()) == []
    path = tmp_path / "p.jsonl"
    with pytest.raises(PromptError, match="line 2 holds no prompt"):
        load_prompts(str(path), "k")


def test_prompts_keep_what_json_can_say(tmp_path: Path):
    """The test of the tests above: escapes, depth and numbers as such are no mistakes."""
    line = '{"prompt": "caf\\u00e9 \\ud83d\\ude00", "a": [[[[{"b": 1e300}]]]], "tag": "x"}'
    (found,) = prompts_of(tmp_path / "p.jsonl", line.encode())
    assert found.text == "café 😀"
    assert found.metadata == {"a": [[[[{"b": 1e300}]]]], "tag": "x"}


@pytest.mark.parametrize("path", ["a" * 5000, "\0", "/dev/zero", "/", "~nobody-here/x", "."])
def test_a_name_that_no_prompt_file_can_have(path: str):
    with pytest.raises(PromptError, match="there is no such file"):
        load_prompts(path, "prompts.train")


def test_a_prompt_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgrpo_ray.spec.prompt_files.MOST_BYTES", 2**20)
    path = tmp_path / "p.txt"
    with path.open("wb") as file:
        file.truncate(2**36)
    with quick(), pytest.raises(PromptError, match="larger than 1 MiB"):
        load_prompts(str(path), "k")
    path.write_text("a" * 100_000)
    with pytest.raises(PromptError, match="line 1 holds no prompt: 100,000 characters"):
        load_prompts(str(path), "k")


@pytest.mark.parametrize("name", ["../spec.py", "/etc/passwd", "prompts/../../errors.py"])
def test_builtin_names_files_of_the_package_alone(name: str):
    with pytest.raises(SpecError, match="leads out"):
        load_prompts(f"builtin:{name}", "k")
    with pytest.raises(SpecError, match="leads out"):
        _ = load_spec("tiny-ocr", [f"model.path=builtin:{name}"]).model.folder
