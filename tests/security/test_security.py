"""Rules that the source keeps, what a run listens on, and what a stranger's files cannot do."""

from __future__ import annotations

import ast
import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ports import own_port
from rich.console import Console
from safetensors.torch import load_file
from test_fuzz_files import Payload
from waiting import PATIENCE_S
from whole_runs import alone

import flowgrpo_ray
from flowgrpo_ray.common.errors import ModelError, SpecError
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.lora_file import read_lora
from flowgrpo_ray.rewards import build, resolve
from flowgrpo_ray.rewards.judge_server import JudgeServer
from flowgrpo_ray.run.model_card import _fenced, _inline
from flowgrpo_ray.spec.file import load_spec
from flowgrpo_ray.spec.sections import ModelSpec
from flowgrpo_ray.view.console import RunDisplay, printable

PACKAGE = Path(flowgrpo_ray.__file__).parent
TINY = PACKAGE / "tiny" / "assets" / "tiny-sd3"

# --- the source

SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8"))
    for path in PACKAGE.rglob("*.py")
}
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("xml", "zipfile", "tarfile", "telnetlib", "ftplib", "pty", "code", "codeop", "imp"),
}
FORBIDDEN_CALLS = re.compile(
    r"(eval|exec|compile|__import__|input|breakpoint)|os\.(system|popen|exec\w*|spawn\w*)"
    r"|tempfile\.mktemp|runpy\..*|yaml\.(full_|unsafe_)?load_all|yaml\.(full|unsafe)_load"
    r"|(np|numpy)\.(load|save|savez|fromfile)|.*\.read_pickle|.*\.to_pickle|torch\.hub\..*"
    r"|shutil\.unpack_archive|subprocess\.(getoutput|getstatusoutput)"
)
# Where a name becomes a module. The first is the one that takes its name from a spec.
IMPORTERS = {
    "__init__.py": 1,  # of its own names
    "common/own_classes.py": 1,  # a user's class
    "policies/__init__.py": 1,  # of families.FAMILIES
    "policies/pipeline.py": 1,  # the module of a class of diffusers
    "rewards/paddle_reader.py": 1,  # 'paddleocr'
    "run/trackers/base.py": 1,  # of the services built in
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


def faults(name: str, tree: ast.AST) -> Iterator[str]:
    """What a file does that none may do."""
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            allowed = node.module == "pickle" and [a.name for a in node.names] == [
                "UnpicklingError"
            ]
            if allowed:  # the name of an error
                modules = []
        yield from (m for m in modules if m.partition(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield "trust_remote_code"
    for called, call in calls(tree):
        words = keywords(call)
        if FORBIDDEN_CALLS.fullmatch(called):
            yield called
        if called.endswith("torch.load") and words.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if called == "yaml.load" and words.get("Loader") != "_Loader":
            yield "yaml.load without the loader of specs"
        for word in ("shell", "allow_pickle", "trust_remote_code", "custom_pipeline"):
            if words.get(word, "False") != "False":
                yield f"{called}({word}=...)"
        if words.get("verify") == "False":
            yield "TLS without verification"


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_does_what_none_may(name: str):
    assert not list(faults(name, SOURCES[name]))


@pytest.mark.parametrize(
    "code",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "from dill import x",
            "import joblib.y as z",
        ),
        *("eval('1')", "exec(x)", "os.system('x')", "np.load(f)", "torch.load(f)", "yaml.load(x)"),
        *("torch.load(f, weights_only=False)", "subprocess.run('x', shell=True)", "os.execv(a, b)"),
        *("yaml.load(x, Loader=yaml.Loader)", "A.from_pretrained(x, trust_remote_code=True)"),
        *("httpx.get(x, verify=False)", "{'trust_remote_code': 1}", "tempfile.mktemp()"),
        *("yaml.unsafe_load(x)", "yaml.full_load(x)", "__import__(x)", "numpy.load(f)"),
        "shutil.unpack_archive(x)",
    ],
)
def test_the_rules_see_what_they_forbid(code: str):
    assert list(faults("x.py", ast.parse(code)))


def counted(what: str) -> dict[str, int]:
    found = {
        name: sum(called == what for called, _ in calls(tree)) for name, tree in SOURCES.items()
    }
    return {name: count for name, count in found.items() if count}


def test_one_place_imports_by_a_name_from_a_spec():
    assert counted("importlib.import_module") == IMPORTERS


def test_one_place_reads_json():
    """Python's own reader takes what is none, and fails with other errors at deep nesting."""
    assert counted("json.JSONDecoder") == {"common/strict_json.py": 1}
    assert counted("json.loads") == {"cluster/telemetry.py": 1}, "which reads Ray's own"
    assert not counted("json.load")


def test_images_of_others_are_opened_by_named_readers():
    opened = [keywords(call) for _, tree in SOURCES.items() for called, call in calls(tree)
              if called == "Image.open"]  # fmt: skip
    assert opened
    assert all("formats" in words for words in opened)


def test_tokens_are_compared_in_constant_time():
    for name in ("view/guard.py", "serving/http.py"):
        called = [name for name, _ in calls(SOURCES[name])]
        assert called.count("secrets.compare_digest") == 1
        text = (PACKAGE / name).read_text("utf-8")
        assert not re.search(r"token\s*[!=]=\s*(?!None)", text)


# --- code is loaded in one place


@pytest.mark.parametrize("path", [":x", ".a:b", "a..b:c", "a:b:c", "a b:c", "a:", "a\0:b", "a/b:c"])
def test_an_import_path_is_dotted_words(path: str):
    with pytest.raises(SpecError, match="^" + re.escape(f"unknown reward {path!r}")):
        resolve(path)


@pytest.mark.parametrize("path", ["subprocess:Popen", "os:_wrap_close", "pathlib:Path"])
def test_a_class_that_scores_nothing_is_not_made(path: str):
    with pytest.raises(SpecError, match="a reward is a class with __call__"):
        build(path, {})


def test_a_judge_is_started_by_an_environments_python_alone(tmp_path: Path):
    mark = tmp_path / "mark"
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    with pytest.raises(ValueError, match="not of an environment"):
        JudgeServer("m", python=str(program))
    launch = {"model": "m", "python": sys.executable, "arguments": ["--trust-remote-code"]}
    with pytest.raises(SpecError, match="code that a model brings"):
        build("unified_reward", {"launch": launch})
    assert not mark.exists()


def tiny_model(folder: Path) -> Path:
    """The embedded model, linked, so that single files can be replaced."""
    for file in TINY.rglob("*"):
        target = folder / file.relative_to(TINY)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            target.symlink_to(file)
    return folder


def load(folder: Path, *parts: str) -> Any:
    spec = load_spec("tiny-ocr", [f"model.path={folder}"])
    return load_policy(spec, torch.device("cpu"), frozenset(parts))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_pickled_file_of_a_base_model_is_not_read(tmp_path: Path, part: str):
    """Not even where there is no other: diffusers would fall back to it."""
    folder = tiny_model(tmp_path / "model")
    for file in (folder / part).glob("*.safetensors*"):
        file.unlink()
    payload: Any = Payload(tmp_path / "mark")
    sound = {
        name: tensor
        for file in (TINY / part).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert sound
    for weights in (payload, {"x": payload}, sound):
        torch.save(weights, folder / part / "diffusion_pytorch_model.bin")
        with pytest.raises(ModelError, match=r"model\.path"):
            load(folder, "network" if part == "transformer" else "decoder")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "part",
    [
        ["evil", "Evil"],  # text_encoder/evil.py
        ["subprocess", "Popen"],
        ["flowgrpo_ray.rewards.environments", "Manifest"],
        ["transformers", "AutoModel"],
        ["diffusers.utils", "x"],
    ],
)
def test_code_that_comes_with_a_base_model_is_not_run(tmp_path: Path, part: list[str]):
    folder, mark = tiny_model(tmp_path / "model"), tmp_path / "mark"
    index = folder / "model_index.json"
    known = json.loads(index.read_text())
    index.unlink()
    index.write_text(json.dumps({**known, "text_encoder": part}))
    code = f"import os; os.mkdir({str(mark)!r})\nclass Evil: pass\n"
    (folder / "text_encoder" / "evil.py").write_text(code)
    with pytest.raises(ModelError, match="no code that a model brings is run"):
        load(folder, "encoder")
    assert not mark.exists()


@pytest.mark.parametrize("pipeline", ["", "StableDiffusion3Pipeline"])
@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.safetensors"])
def test_a_pickled_lora_is_not_read(tmp_path: Path, pipeline: str, name: str):
    payload: Any = Payload(tmp_path / "mark")
    (tmp_path / name).write_bytes(pickle.dumps(payload))
    (tmp_path / "adapter_config.json").write_text("{}")
    for place in (tmp_path, tmp_path / name):
        model = ModelSpec(family="sd3", path="x/y", lora=str(place))
        with pytest.raises(ModelError, match=r"model\.lora"):
            read_lora(model, torch.nn.Linear(1, 1), pipeline, {})
    assert not (tmp_path / "mark").exists()


def test_a_pickled_file_of_a_rewards_model_runs_no_code(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel

    from flowgrpo_ray.rewards.loading import load_model

    CLIPConfig().save_pretrained(tmp_path)
    payload: Any = Payload(tmp_path / "mark")
    for weights in (payload, {"logit_scale": payload}):
        torch.save(weights, tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="path = "):
            load_model(CLIPModel, ("path", str(tmp_path), None))
    assert not (tmp_path / "mark").exists()


# --- what a screen and a model card show


def test_no_text_moves_the_cursor(capsys: pytest.CaptureFixture[str]):
    assert printable("a\x1b[2Jb\rc\x07\u202e\ud800\n\té 漢") == (
        "a\\x1b[2Jb\\rc\\x07\\u202e\\ud800\n\té 漢"
    )
    RunDisplay(load_spec("tiny-ocr"), Console()).note("prompt '\x1b]0;owned\x07[red]'")
    assert capsys.readouterr().out == "prompt '\\x1b]0;owned\\x07[red]'\n"


def test_an_error_cannot_forge_the_screen(command_line: Any, tmp_path: Path):
    (tmp_path / "spec.yaml").write_text('"\\e[2J\\e[31mfine": 1\n')
    named = tmp_path / "\x1b[2J.yaml"
    named.touch()
    for arguments in ([tmp_path / "spec.yaml"], [named], ["tiny-ocr", "--set", "seed=\x1b[2J"]):
        status, out, err = command_line("plan", *arguments)
        assert status == 2
        assert "\x1b" not in out + err


def test_a_model_card_stays_a_model_card():
    assert _fenced("a\n```\n<script>\n````\n", "yaml").splitlines()[0] == "`````yaml"
    assert _fenced("a: 1\n", "yaml") == "```yaml\na: 1\n```\n"
    assert _inline("x`\n\n# head `y") == "`x' # head 'y`"


# --- what a run listens on


def listening(pids: set[int]) -> dict[tuple[str, int], int]:
    """Address and port of every TCP socket that these processes listen on, and whose it is."""
    found = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids:
            host, port = connection.laddr or ("", 0)
            found[host, port] = connection.pid
    return found


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


STRANGER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="critical",
             _node_ip_address="127.0.0.1")
except Exception as error:
    print("refused", type(error).__name__, error)
else:
    print("let in", ray.cluster_resources())
"""


def ask_as(address: str, **environment: str) -> str:
    """What the cluster at ``address`` says to another process of this machine."""
    variables = {**alone(), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, address],
        capture_output=True, text=True, env=variables, timeout=120, check=False,
    )  # fmt: skip
    return run.stdout + run.stderr


@pytest.mark.slow
def test_a_run_listens_on_loopback_lets_in_no_stranger_and_tells_no_token(tmp_path: Path):
    """A whole run on this machine, while it trains, with the dashboard and rewards over HTTP."""
    port = own_port()
    token = "0123456789abcdef" * 4
    settings = ("iterations=500", "checkpoint.every=500", "evaluation.prompts=8", "name=run")
    settings += ("cluster.dashboard=true", f"cluster.reward_http_port={port}")
    command = [sys.executable, "-m", "flowgrpo_ray", "train", "tiny-ocr", "--runs", str(tmp_path)]
    command += [word for setting in settings for word in ("--set", setting)]
    log = tmp_path / "log"
    with log.open("w") as out:
        driver = subprocess.Popen(
            command, stdout=out, stderr=out, env={**alone(), "RAY_AUTH_TOKEN": token}
        )
    try:
        rows = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE_S
        while not (rows.exists() and '"train"' in rows.read_text()):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        processes = family(driver.pid)
        sockets = listening({process.pid for process in processes})
        assert ("127.0.0.1", port) in sockets
        assert len(sockets) > 5, "Ray alone has more"
        elsewhere = {
            (*address, " ".join(psutil.Process(pid).cmdline())[:80])
            for address, pid in sockets.items()
            if address[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        }
        assert not elsewhere
        live = json.loads((tmp_path / "run" / "live.json").read_text())
        address = live["ray"]["address"]
        assert "refused" in ask_as(address, RAY_AUTH_MODE="disabled")
        assert "refused" in ask_as(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)
        assert "let in" in ask_as(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        assert not [p.cmdline() for p in processes if p.is_running() and token in str(p.cmdline())]
        (folder,) = {
            Path("/", *Path(word).parts[1:3])
            for process in processes
            for word in re.findall(r"/tmp/flowgrpo-\w+", " ".join(process.cmdline()))
        }
        assert folder.stat().st_mode & 0o077 == 0, "others of this machine can look into it"
    finally:
        driver.send_signal(signal.SIGINT)
        driver.wait(timeout=120)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in kept if "logs" in path.parts]
    assert not [path for path in kept if token.encode() in path.read_bytes()]
