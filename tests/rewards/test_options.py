"""Options of rewards, against what their constructors declare, before anything starts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.rewards import BUILTIN, build, check_options, resolve
from flowgrpo_ray.rewards.judge_server import JudgeServer
from flowgrpo_ray.rewards.options import arguments_of, options_model
from flowgrpo_ray.serving.admin import read_config
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.service import app
from flowgrpo_ray.spec.file import load_spec

if TYPE_CHECKING:
    from nowhere import Unknown

UNBOUNDED = {"low", "high"}  # of vlm_judge: any scale will do
BOUNDS = {
    "minimum": lambda bound: bound - 1,
    "exclusiveMinimum": lambda bound: bound,
    "maximum": lambda bound: bound + 1,
}


def declared():
    """Every option of every built-in reward, and of a judge's server, with its JSON schema."""
    for cls in (*map(resolve, BUILTIN), JudgeServer):
        schema = options_model(cls).model_json_schema()
        yield from ((cls, name, of) for name, of in schema.get("properties", {}).items())


def kinds(schema):
    return [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]


def wrong_values(schema):
    """One of another type, and one beyond every bound."""
    (kind,) = kinds(schema)
    yield 7 if kind["type"] in ("string", "object", "array") else "7"
    yield from (past(kind[bound]) for bound, past in BOUNDS.items() if bound in kind)
    if "enum" in kind or "pattern" in kind:
        yield "no such thing"


@pytest.mark.parametrize(("cls", "name", "schema"), [*declared()])
def test_every_option_is_refused_that_is_of_another_type_or_out_of_range(cls, name, schema):
    (kind,) = kinds(schema)
    assert schema.get("description"), "the docs are made of it"
    assert kind.get("type"), "an option without a type takes anything"
    if kind["type"] in ("integer", "number") and name not in UNBOUNDED:
        assert BOUNDS.keys() & kind.keys()
    for value in wrong_values(schema):
        with pytest.raises(ValueError, match=rf"option {name}: .*, not {value!r}"):
            arguments_of(cls, {name: value})


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"rec_width": "320"}, "option rec_width: Input should be a valid integer, not '320'"),
        ({"threads": 0}, "option threads: Input should be greater than or equal to 1, not 0"),
        ({"detect": "no"}, "option detect: Input should be a valid boolean, not 'no'"),
        (
            {"engine": "tesseract"},
            "option engine: Input should be 'rapidocr' or 'paddleocr', not 'tesseract'",
        ),
    ],
)
def test_a_mistake_is_told_wherever_options_are_given(option, told, tmp_path: Path):
    """The four are in any other place what the first is here."""
    told = f"reward 'ocr': {told}"
    with pytest.raises(SpecError) as error:
        build("ocr", option)
    assert str(error.value) == told
    ((key, value),) = option.items()
    with pytest.raises(SpecError) as error:
        load_spec("tiny-ocr", [f"rewards.ocr.options.{key}={json.dumps(value)}"])
    assert str(error.value).endswith(f"tiny-ocr.yaml:\n  rewards.ocr: {told}")
    args = {"name": "ocr", "options": option}
    with pytest.raises(SpecError) as error:
        app(RewardServiceArgs.model_validate(args))
    assert str(error.value) == told
    file = tmp_path / "ocr.json"
    import_path = "flowgrpo_ray.serving.service:app"
    application = {"name": "reward-ocr", "import_path": import_path, "args": args}
    file.write_text(json.dumps({"applications": [application]}))
    with pytest.raises(SpecError) as error:
        read_config(file)
    assert str(error.value) == told


@pytest.mark.parametrize(
    "command",
    [
        "plan tiny-ocr --set rewards.ocr.options.threads=0",
        "train tiny-ocr --set rewards.ocr.options.threads=0",
        "rewards check tiny-ocr --set rewards.ocr.options.threads=0",
        "rewards check ocr --option threads=0",
        "rewards score . . --reward ocr --option ocr.threads=0",
    ],
)
def test_commands_end_with_it_and_have_written_nothing(
    command, command_line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, _, stderr = command_line(*command.split())
    assert status == 2
    told = "option threads: Input should be greater than or equal to 1, not 0"
    assert told in " ".join(stderr.split())
    assert not any(tmp_path.iterdir())


class Own:
    """A class of the user's."""

    def __init__(
        self,
        untyped=1,
        size: tuple[int, int] = (1, 1),
        words: Sequence[str] = (),
        folder: Path = Path(),
        mode: Literal["a", "b"] | None = None,
        share: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        foreign: "np.dtype[Any] | None" = None,
        hidden: "Unknown | None" = None,
        json: bool = False,
    ):
        self.given = {name: value for name, value in locals().items() if name != "self"}

    def __call__(self, images, prompts, metadata):
        return np.zeros(len(images), np.float32)

    @staticmethod
    def check_options(options):
        if options["json"] and options["share"] == 0.5:
            raise ValueError("json wants a share")


class TakesAny(Own):
    def __init__(self, size: int, *parts: int, **more: Any):
        pass

    @staticmethod
    def check_options(options):
        if options.get("bad"):
            raise ValueError(f"bad is {options['bad']}")


@pytest.mark.parametrize(
    ("given", "gets"),
    [
        ({"untyped": {"a": [1, None]}}, {"untyped": {"a": [1, None]}}),
        ({"size": [2, 3]}, {"size": (2, 3)}),
        ({"words": ["x"], "mode": None}, {"words": ["x"], "mode": None}),
        ({"folder": "/tmp"}, {"folder": Path("/tmp")}),
        ({"foreign": "int8", "hidden": [1]}, {"foreign": "int8", "hidden": [1]}),
        ({"json": True, "share": 0.25}, {"json": True, "share": 0.25}),
    ],
)
def test_a_class_of_ones_own_gets_what_it_declares(given, gets):
    found = build("test_options:Own", given).given
    assert found == Own().given | gets
    assert type(found["share"]) is float


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": [2]}, r"option size.1: "),
        ({"size": [2, "3"]}, r"option size.1: .*valid integer, not '3'"),
        ({"mode": "c"}, r"option mode: .*'a' or 'b', not 'c'"),
        ({"share": 1}, r"option share: .*less than 1, not 1"),
        ({"share": float("nan")}, r"option share: .*finite number, not nan"),
        ({"share": True}, r"option share: .*valid number, not True"),
        ({"shar": 1}, r"Own': no option 'shar', did you mean 'share'\?; options: untyped, size,"),
        ({"json": True}, r"Own': json wants a share"),
        ({"share": 2, "mode": 1}, r"option mode: .*not 1; option share: .*not 2"),
        ({"words": [0] * 30}, r"and 10 more mistakes$"),
    ],
)
def test_a_class_of_ones_own_is_checked_as_declared(given, told):
    with pytest.raises(SpecError, match=f"^reward 'test_options:.*{told}"):
        build("test_options:Own", given)


def test_a_class_that_takes_any_key_is_checked_in_those_that_it_declares():
    given = {"size": 1, "anything": [1, {"a": "b"}]}
    assert arguments_of(TakesAny, given) == given
    for wrong, told in (
        ({"anything": 1}, "option.size: this key is required"),
        (
            {"size": "1", "anything": 1},
            "option.size: Input should be a valid integer, not '1'",
        ),
        ({"size": 1, "bad": 3}, "bad is 3"),
    ):
        with pytest.raises(ValueError, match=f"^{told}$"):
            arguments_of(TakesAny, wrong)


def test_arguments_of_a_class_within_are_its_own():
    launch = {"model": "m", "arguments": ["--tp", "2"], "window_s": 3}
    assert check_options("unified_reward", {"launch": launch}) == {"launch": launch}
