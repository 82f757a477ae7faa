"""The judge's server: supervision with a process that starts at once, and once for real."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_judge import tiny_judge
from waiting import wait_until

from flowgrpo_ray.common.errors import RewardError, SpecError
from flowgrpo_ray.rewards import build, judge_server
from flowgrpo_ray.rewards.judge_server import JudgeServer, Launch, sglang_command
from flowgrpo_ray.rewards.unified_reward import UnifiedReward

TESTS = Path(__file__).parents[1]
FAKE = str(TESTS / "fake_judge.py")
# Owns a judge. On each line of its input stands the brightness of images; it answers with their
# scores, or if there are none, with the scores of the golden pictures.
OWNER = """
import json, sys
import numpy as np
from flowgrpo_ray.rewards import judge_server
from flowgrpo_ray.rewards.golden import check_golden, score_golden
from flowgrpo_ray.rewards.unified_reward import UnifiedReward
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/rewards"]
import test_judge_server
judge_server.COMMANDS["fake"] = test_judge_server.fake_command
reward = UnifiedReward(launch=json.loads(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    levels = json.loads(line)
    images = np.stack([np.full((48, 64, 3), x, np.uint8) for x in levels or [0]])
    if levels:
        scores = reward(images, [f"a cat {x}" for x in levels], [{}] * len(levels))
    else:
        scores = score_golden(reward, reward.golden())
        check_golden(reward.golden(), scores)
    print(json.dumps(scores.tolist()), flush=True)
"""


def fake_command(launch):
    return [launch.python, FAKE, str(launch.port), launch.api_key]


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    """A server called `fake`; logs go into a folder that is removed."""
    monkeypatch.setitem(judge_server.COMMANDS, "fake", fake_command)
    monkeypatch.setattr(judge_server.tempfile, "tempdir", str(tmp_path))


def start(**options):
    options = {"model": "m", "server": "fake", "python": sys.executable} | options
    return JudgeServer(**{"health_timeout_s": 0.5, "start_timeout_s": 30} | options)


def family(pid):
    """The process `pid` and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def the_server(processes, word=FAKE):
    """The server itself: other than its two supervisors, its Python is not an isolated one."""
    (found,) = [p for p in processes if word in p.cmdline() and "-I" not in p.cmdline()]
    return found


def family_of(server):
    """The four processes of a fake judge: two supervisors, the server, its child."""
    wait_until(lambda: len(family(server._process.pid)) >= 4, "the four")
    found = family(server._process.pid)
    assert len(found) == 4
    return found


def alive(processes):
    """Those that still run; whether a dead one was already waited for is not ours to tell."""
    running = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except psutil.NoSuchProcess:
            pass
    return running


def assert_gone(processes):
    wait_until(lambda: not alive(processes), "their end")


def kill(server):
    """Returns when its supervisor has noticed."""
    processes = family_of(server)
    the_server(processes).kill()
    assert_gone(processes)


def test_the_command_line_of_sglang():
    launch = Launch("/env/bin/python", "org/judge-7b", 1234, "key", "chatml-llava")
    line = (
        "/env/bin/python -m sglang.launch_server --model-path org/judge-7b --host 127.0.0.1 "
        "--port 1234 --api-key key --chat-template chatml-llava --enable-p2p-check "
        "--mem-fraction-static 0.85 --log-level-http warning"
    )
    assert sglang_command(launch) == line.split()
    plain = sglang_command(Launch("/env/bin/python", "org/judge-7b", 1234, "key", None))
    assert plain == line.replace("--chat-template chatml-llava ", "").split()


def test_a_server_is_well_and_ends_with_all_it_started(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/another/environment")
    server = start(arguments=["--more", "yes"])
    processes = family_of(server)
    found = the_server(processes)
    assert found.cmdline()[-2:] == ["--more", "yes"]
    assert "PYTHONPATH" not in found.environ()
    url = server.url
    server.ensure_running()
    assert (server.url, server._process.pid) == (url, processes[0].pid), "no restart without need"
    server.close()
    assert_gone(processes)
    with pytest.raises(RewardError, match="closed"):
        server.ensure_running()


@pytest.mark.parametrize("whom", ["server", "supervisor", "hung"])
def test_a_server_that_is_down_is_restarted_so_many_times(whom):
    server = start(max_restarts=2)
    for _ in range(2):
        before = family_of(server)
        judge = the_server(before)
        if whom == "hung":
            judge.suspend()
        else:
            killed = before[0] if whom == "supervisor" else judge
            killed.kill()
            assert_gone([killed, judge])
        url = server.url
        server.ensure_running()
        assert server.url != url
        assert_gone(before)
        server.ensure_running()
    kill(server)
    with pytest.raises(
        RewardError,
        match=r"restarted 2 times within 3600 s .*\.log ends: .*fake judge listens \| "
        r"the server ended with status -9$",
    ):
        server.ensure_running()
    server._restarts[0] -= 3600  # the window has moved on
    server.ensure_running()
    server.close()


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        (
            "import sys; print('no GPU'); sys.exit(3)",
            {},
            r"for 'm' did not start: ended; .*ends: no GPU \| the server ended with status 3$",
        ),
        (
            "import time; print('loading', flush=True); time.sleep(1000)",
            {"start_timeout_s": 1.0},
            r"did not start: not well after 1 s; .*ends: ",
        ),
    ],
)
def test_a_server_that_does_not_start(monkeypatch, code, options, message):
    monkeypatch.setitem(judge_server.COMMANDS, "fake", lambda launch: [launch.python, "-c", code])
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RewardError, match=message):
        start(**options)
    assert_gone(set(psutil.Process().children(recursive=True)) - before)


def test_its_port_is_its_own_before_it_listens(monkeypatch):
    def contested(launch):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", launch.port))
        return fake_command(launch)

    monkeypatch.setitem(judge_server.COMMANDS, "fake", contested)
    server = start()
    kill(server)
    server.ensure_running()
    server.close()


def test_a_server_that_is_forgotten_ends():
    server = start()
    processes = family_of(server)
    del server
    assert_gone(processes)


def test_one_restart_serves_all_requests_in_flight():
    launch = {"model": "m", "server": "fake", "python": sys.executable, "max_restarts": 1}
    reward = UnifiedReward(launch=launch)
    server = reward._judge._server
    batch = np.zeros((12, 2, 2, 3), np.uint8), ["x"] * 12, [{}] * 12
    np.testing.assert_array_equal(reward(*batch), np.float32([0.6] * 12))
    kill(server)
    np.testing.assert_array_equal(reward(*batch), np.float32([0.6] * 12))
    kill(server)
    with pytest.raises(RewardError, match=r"restarted 1 times within"):
        reward(*batch)
    reward.close()


class Owner:
    """A process of its own with a judge, that is asked through pipes."""

    def __init__(self, launch):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(TESTS), json.dumps(launch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, levels):
        print(json.dumps(levels), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.mark.parametrize("end", ["killed", "killed after its children", "finished"])
def test_a_server_ends_with_its_owner(end, tmp_path):
    log = str(tmp_path / "log")
    owner = Owner({"model": "m", "server": "fake", "python": sys.executable, "log": log})
    assert owner.ask([1, 2]) == pytest.approx([0.6, 0.6])
    processes = family(owner.process.pid)
    assert len(processes) == 5
    if end == "finished":
        owner.process.stdin.close()
    else:
        if end == "killed after its children":  # as Ray does
            for child in processes[0].children():
                child.kill()
        owner.process.kill()
    assert owner.process.wait(20) == (0 if end == "finished" else -9)
    assert_gone(processes)


@pytest.mark.slow
def test_a_real_server_scores_restarts_and_ends_with_its_owner(pytestconfig, tmp_path):
    folder = tiny_judge(pytestconfig.cache.mkdir("judges"))
    launch = {"model": folder, "server": "transformers", "log": str(tmp_path / "log")}
    owner = Owner(launch)
    bright, dark = pytest.approx(4.5 / 5), pytest.approx(1.5 / 5)
    levels = [250, 20, 100, 230] * 5
    assert owner.ask(levels) == [bright, dark, dark, bright] * 5
    assert owner.ask([]) == [bright, dark]
    killed = the_server(family(owner.process.pid), folder)
    killed.kill()
    assert_gone([killed])
    assert owner.ask([20, 250]) == [dark, bright]
    processes = family(owner.process.pid)
    assert len(processes) >= 4
    owner.process.kill()
    owner.process.wait()
    assert_gone(processes)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"model": "m", "server": "vllm"}, "launch: option server: .*'transformers', not 'vllm'"),
        ({"server": "transformers"}, "launch: option model: this key is required"),
        ({"model": "m", "port": 1}, "launch: no option 'port'; options: model, server, "),
        ({"model": "m", "window_s": 0}, "launch: option window_s: .*greater than 0, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(launch, message):
    with pytest.raises(SpecError, match=message):
        build("unified_reward", {"launch": launch})
