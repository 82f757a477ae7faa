"""Random command lines, and what they are tried against: a folder with a small finished run."""

from __future__ import annotations

import io
import random
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sample_runs
import typer
import yaml
from tiny_runs import CPU, alone, draw_batches, one_thread, small_spec, state_of, update

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.cli import app, main
from flowgrpo_ray.common.errors import ClusterError
from flowgrpo_ray.run.checkpoint import Progress, save_checkpoint
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.spec.file import dump_spec, recipe_names

LONG = "n" * 300
# As a shell hands them over: the last one is no UTF-8.
ODD = ["", " ", "-", "--", "..", "/", "\n", "\x1b[2J", "[/b]", "é", "印", "\udcff", LONG]
ODD += ["-1", "0", "1e999", "nan", "inf", "9" * 30, "0x10", "null", "true", "{}", "[", "*", "%s"]
NUMBERS = ["0", "1", "2", "3", "7", "-1", "1.5", "1e3", "99999999999999999999", "x", "nan", "inf"]
PLACES = ["run", "torn", "odd", "begun", "started", "full", "empty", "file.txt", "file.txt/in"]
PLACES += ["nowhere", "nowhere/in", "link", "loop", "/proc/self", "/proc/none", "/dev/null", LONG]
PLACES += ["pictures", "pictures/a.png", "pictures/bad.png", "~", "~nobody/x", "odd.yaml", "."]
FILES = ["file.txt", "two.jsonl", "bad.jsonl", "latin.txt", "void.txt", "spec.yaml", "odd.yaml"]
FILES += ["serve.yaml", "builtin:prompts/tiny-signs-heldout.txt", "builtin:../x", "owner/name"]
OUTPUTS = ["out.png", "out.csv", "out.jsonl", "out", "a/b/out.png", "file.txt/out.png", LONG]
OUTPUTS += [f"{LONG}.png", f"{LONG}.csv", "/proc/out.png", "loop/out.png", "out.gif", "run", "link"]
REWARDS = [
    "sign_colour",
    "jpeg_compressibility",
    "wrong:Raises",
    "wrong:Text",
    "wrong:NoArguments",
    "wrong:Short",
]
REWARDS += [
    "wrong:None",
    "nowhere:X",
    "geneval",
    "clip",
    "ocr=0",
    "jpeg_compressibility=x",
    "jpeg_compressibility=nan",
    "wrong:",
]
REWARDS += ["wrong:Exits", "wrong:NeedsMore", "sign_colour=0.5", "broken:X", "aesthetic"]
ADDRESSES = ["127.0.0.1:1", "http://127.0.0.1:1", "ray://127.0.0.1:1", "local", "auto", "", "x:y"]
ADDRESSES += ["http://", "[::1", "127.0.0.1:99999", "file:///etc/passwd", "no.such.host.invalid:1"]
VALUES = [*NUMBERS, *ODD, "[0.9, 1.0]", "[]", "['[']", "['(x']", "full", "lora", "sd3", "flux"]
VALUES += ["0.04", "float16", "fp16", "{kind: lora}", "{kind: lora, targets: ['(']}", "global"]
VALUES += ["builtin:tiny-sd3", "owner/name", "wrong:Raises", "file.txt", "{count: 3}", "[8, 8]"]

WRONG = """
import numpy as np
class Raises:
    def __call__(self, images, prompts, metadata): raise KeyError("gone")
class Text(Raises):
    def __call__(self, images, prompts, metadata): return ["good"] * len(images)
class NoArguments(Raises):
    def __call__(self): return 1
class Short(Raises):
    def __call__(self, images, prompts, metadata): return np.zeros(1, np.float32)
class None_(Raises):
    def __call__(self, images, prompts, metadata): return None
class Exits(Raises):
    def __init__(self): raise OSError("no such file: weights")
class NeedsMore(Raises):
    def __init__(self, weights): pass
"""


def make_world(folder: Path) -> None:
    """What command lines name: runs whole, torn and odd, prompt files, pictures, specs."""
    spec = small_spec("name=run", "rewards={sign_colour: {}, jpeg_compressibility: {weight: 0}}")
    run = RunFolder(folder / "run")
    run.path.mkdir()
    sample_runs.make_run(run.path, iterations=2, every=1, prompts=4)
    run.write_spec(spec)
    with alone(), one_thread():
        learner, batches = Learner(spec, CPU), draw_batches(spec, 1)
        for iteration in (1, 2):
            update(learner, batches)
            progress = Progress(iteration, 4, 1.0, 0, spec.identity(), "")
            save_checkpoint(run.checkpoints, [state_of(learner)], progress, keep=2)
    for name in ("torn", "odd", "begun", "started", "full", "empty", "pictures"):
        (folder / name).mkdir()
    for name in ("torn", "begun", "started"):
        (folder / name / "spec.yaml").write_text(dump_spec(spec))
    torn = folder / "torn" / "checkpoints" / "iteration-000001"
    torn.mkdir(parents=True)
    (torn / "manifest.json").write_text("{")
    for name, text in {
        "torn/metrics.jsonl": '{"kind": "train"',
        "torn/timings.jsonl": "[]\n",
        "torn/summary.json": "[1]",
        "torn/live.json": "3",
        "odd/spec.yaml": "name: [",
        "odd/metrics.jsonl": '{"kind": "train", "iteration": "x"}\n[]\n\xff',
        "full/there": "",
        "started/metrics.jsonl": '{"kind": "eval", "iteration": 0, "rewards": {}}\n',
        "file.txt": 'red sign "407"\n\nblue sign "129"\n',
        "two.jsonl": '{"prompt": "a"}\n{"prompt": "b", "include": 3}\n',
        "bad.jsonl": '{"prompt": "a"}\n[1]\n',
        "one.txt": 'red sign "407"\n',
        "void.txt": "\n\n",
        "spec.yaml": dump_spec(spec),
        "odd.yaml": "a: &x [*x]",
        "serve.yaml": "applications: [{name: reward-x, import_path: a:b, args: {}}]",
        "wrong.py": WRONG,
        "broken.py": "def (",
        "pictures/bad.png": "no picture",
    }.items():
        (folder / name).write_text(text)
    shutil.copy(Path(__file__).parents[1] / "deployments" / "ocr.yaml", folder)
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "pictures" / "a.png").write_bytes(_picture())
    (folder / "link").symlink_to(folder / "gone")
    (folder / "loop").symlink_to(folder / "loop")


def _picture() -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.new("RGB", (48, 32), "red").save(file, "png")
        return file.getvalue()


def keep_inside(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What would start Ray, listen, build or leave this machine ends in the error of a user whose
    machine can do none of it; a run gets as far as Ray."""
    import httpx
    import ray

    from flowgrpo_ray.cluster import jobs, run
    from flowgrpo_ray.rewards import environment_build
    from flowgrpo_ray.view.monitor import Monitor

    def no_ray(*_: object, **__: object) -> Any:
        raise ClusterError("from here on it is not tried")

    def nobody(*_: object, **__: object) -> Any:
        raise ConnectionError("nobody answers")

    def no_network(*_: object, **__: object) -> Any:
        raise httpx.ConnectError("no network")

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(run, "ray_session", no_ray)
    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.setattr(jobs, "JobSubmissionClient", nobody)
    monkeypatch.setattr(Monitor, "run", lambda _: None)
    monkeypatch.setattr(environment_build, "_uv", no_ray)
    monkeypatch.setattr(httpx, "stream", no_network)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "FLOWGRPO_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLOWGRPO_ENVIRONMENTS", str(folder / "environments"))


def leaves(
    command: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    command = command or typer.main.get_command(app)
    inner: Mapping[str, Any] = getattr(command, "commands", {})
    if not inner or command.invoke_without_command:
        yield path, command
    for name, of in inner.items():
        yield from leaves(of, (*path, name))


COMMANDS = list(leaves())


def _keys(value: Any, place: tuple[str, ...] = ()) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield ".".join((*place, key))
        yield from _keys(inner, (*place, key))


KEYS = [*_keys(yaml.safe_load(dump_spec(small_spec("tuning={kind: lora, rank: 4}"))))]
KEYS += ["", "nothing", "optimizer.lr", "rewards.x.reward", "model"]
KEYS += ["rewards.sign_colour.options.x"]


def word(rng: random.Random, parameter: Any) -> str:
    """For an argument or an option: mostly what it could be meant to take."""
    if rng.random() < 0.12:
        return rng.choice([*ODD, *PLACES, *NUMBERS])
    what = f"{parameter.metavar or ''} {parameter.name}".lower()
    kind = repr(parameter.type_descriptor.annotation)
    if choices := re.findall(r"'(\w+)'", kind):
        return rng.choice([*choices, "x"])
    if "int" in kind or "float" in kind or "gpu" in what:
        return rng.choice([*NUMBERS, "h100", "4090"])
    for words, meant in (
        (("address",), ADDRESSES),
        (("source",), ["http://127.0.0.1:1", "http://[", "file.txt", ""]),
        (("set...",), ["ocr", "geneval", "pickscore", "odd"]),
        (("override", "option"), [f"{rng.choice(KEYS)}={rng.choice(VALUES)}"]),
        (("reward",), [*REWARDS, "tiny-ocr", "spec.yaml"]),
        (("out", "file", "folder"), [*OUTPUTS, *FILES]),
        (("spec", "recipe"), ["run", "spec.yaml", "tiny-ocr", *PLACES, *recipe_names()]),
        (("run", "images"), PLACES),
        (("prompts file", "prompts.", "requirements"), FILES),
        (("prompt",), ['red sign "407"', "a", *ODD, *FILES]),
    ):
        if any(part in what for part in words):
            return rng.choice(meant)
    return rng.choice([*recipe_names(), *PLACES, *FILES, *ODD])


# Calls that work; `{}` is a new name.
SOUND = [
    "train spec.yaml --runs {} --set iterations=1 --set seed=2",
    "train spec.yaml --runs . --set name=begun --resume",
    "train tiny-ocr --runs {} --validate 3",
    "plan spec.yaml --gpu 24 --measured run --gpu-hour 2 --json",
    "plan tiny-ocr --set cluster.rollout.gpus=1",
    "sample run prompt --out {}.png --steps 2 --seed 3 --weights last --iteration 1 --columns 2",
    "sample spec.yaml prompt another --out {}.png --steps 1 --overwrite",
    "evaluate run --prompts file.txt --limit 1 --steps 1 --weights ema --iteration 2",
    "export run --out {} --format pipeline --weights last --iteration 1",
    "report run",
    "monitor run --host 127.0.0.1 --port 0",
    "recipes copy tiny-ocr {} --overwrite",
    "recipes show tiny-ocr",
    "rewards check wrong:Raises --size 32 48",
    "rewards check sign_colour --size 32 48 --json",
    "rewards check spec.yaml --size 32 48 --set seed=1",
    "rewards score pictures/a.png one.txt --reward sign_colour --reward jpeg_compressibility=0.5 "
    "--option jpeg_compressibility.quality=50 --out {}.csv --batch 2 --background red",
    "rewards score pictures/a.png one.txt --reward wrong:Text --out {}.jsonl --overwrite",
    "rewards env build {} --requirement x==1 --standalone --rebuild",
    "rewards env build {} --requirements file.txt",
    "rewards env remove full",
    "rewards env list",
    "rewards deploy ocr.yaml --address 127.0.0.1:1 --deadline 1",
    "rewards status --json",
    "rewards scale ocr 2 --beyond --address 127.0.0.1:1",
    "rewards remove ocr",
    "runs prune --runs empty --checkpoints --delete",
    "prompts fetch ocr --folder {} --source http://127.0.0.1:1 --overwrite",
    "submit spec.yaml --address http://127.0.0.1:1 --runs /runs --stop-wait 5 --wait",
]


def mutated(rng: random.Random) -> list[str]:
    """A call that works, but for one to three of its words."""
    words = rng.choice(SOUND).replace("{}", f"new{rng.getrandbits(40)}").split()
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        at = rng.randrange(1, len(words)) if len(words) > 1 else 0
        option, _, value = words[at].partition("=")
        anything = rng.choice([*ODD, *PLACES, *NUMBERS, *FILES, *REWARDS, *ADDRESSES, *VALUES])
        change = rng.choice(["replace", "replace", "value", "set", "drop", "twice"])
        if change == "replace" or (change == "value" and not value):
            words[at] = anything
        elif change == "value":
            words[at] = f"{option}={anything}"
        elif change == "set":
            key = rng.choice(KEYS)
            words += ["--set", f"{key}={rng.choice(VALUES)}"]
        elif change == "drop":
            del words[at]
        else:
            words.insert(at, words[at])
    return words


def command_line(rng: random.Random) -> list[str]:
    """The words after the program's name: half of them mistake little, half of them much."""
    if rng.random() < 0.5:
        return mutated(rng)
    path, command = rng.choice(COMMANDS)
    words = list(path)
    for parameter in command.params:
        if parameter.name == "help":
            continue
        argument = parameter.param_type_name == "argument"
        if not argument and rng.random() > (0.9 if parameter.required else 0.25):
            continue
        if argument and rng.random() < (0.02 if parameter.required else 0.5):
            continue
        times = rng.randint(1, 3) if parameter.multiple or parameter.nargs == -1 else 1
        for _ in range(times):
            if not argument:
                words.append(rng.choice([*parameter.opts, *parameter.secondary_opts]))
            if argument or not parameter.is_flag:
                words += [word(rng, parameter) for _ in range(max(1, parameter.nargs))]
    if rng.random() < 0.05:
        words.insert(rng.randint(0, len(words)), rng.choice([*ODD, "--help", "--nothing"]))
    return [*words[:40]]


def call(words: list[str], monkeypatch: pytest.MonkeyPatch, encoding: str) -> tuple[int, str]:
    """Status and output of a command line in this process, on a terminal of this encoding; what it
    raises is 99 and a traceback."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    error = io.TextIOWrapper(
        io.BytesIO(), encoding=encoding, errors="backslashreplace", write_through=True
    )
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["flowgrpo-ray", *words])
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", error)
        try:
            with one_thread():
                main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 98
        except BaseException:  # noqa: BLE001 - what a person would see as a traceback
            return 99, traceback.format_exc()
    text = b"".join(stream.buffer.getvalue() for stream in (out, error))  # type: ignore[attr-defined]
    return status, text.decode(encoding, "replace")
