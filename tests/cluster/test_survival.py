"""What gets killed changes the wall clock only: real signals, in the worst moments, one run each.

All is real but the network: the actors of `chained.py` answer with digests of what they are given.
test_end_to_end.py does the same with networks, in fewer moments. A moment is the method that an
actor is in, which Ray writes into the name of its process. After each loss the run must get further
than ever before the next one comes, and in the end its weights and its metrics file must be those
of a run that nobody disturbed.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chained import BULK
from whole_runs import ITERATIONS, ONE_WORKER, SLOW_IN_TURNS, Chained, final_digests

from flowgrpo_ray.run.checkpoint import list_checkpoints
from flowgrpo_ray.run.tracking import read_rows

pytestmark = SLOW_IN_TURNS
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
LONG = 60  # iterations: enough for all losses of a run to come before its end
RUN: dict[str, Any] = {
    "iterations": str(LONG),
    "evaluation": "{every: 20, steps: 2, prompts: 4, micro_batch: 4, grid: 4}",
    "checkpoint": "{every: 1, keep: 2}",
    "cluster.hang_timeout_s": "8",
    "tracking.tensorboard": "false",
}
REWARD = "reward-ocr"
# The weight of the KL follows the reward, and actors are told it: it counts in their digests.
ADAPTING = {"objective.kl": "{beta: 0.1, adapt: {reward: ocr, fall: 0.05}}"}
TWO_REPLICAS = {"rewards.ocr.deadline_s": "8", "rewards.ocr.replicas": "2"}


@pytest.fixture(scope="module")
def undisturbed(hardly_disturbed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = Chained(tmp_path_factory.mktemp("undisturbed"), **RUN)
    command.finish()
    return command.run


def assert_same(run: Path, undisturbed: Path, iterations: int = LONG, but: str = "") -> None:
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    found, expected = (final_digests(path, iterations) for path in (run, undisturbed))
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {but}


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(
            [
                ("ray::RolloutWorker.sample", KILL),
                ("ray::RolloutWorker.load", KILL),
                (REWARD, KILL),
                ("ray::RolloutWorker", STOP),
                (REWARD, STOP),
            ],
            id="rollout workers and rewards",
        ),
        pytest.param(
            [
                ("ray::LearnerRank.accumulate", KILL),
                ("ray::LearnerRank.step", KILL),
                ("ray::LearnerRank.share", KILL),  # while it is saved
                ("ray::LearnerRank", STOP),
            ],
            id="the learner",
        ),
    ],
)
def test_the_same_weights_whatever_dies_or_hangs(
    undisturbed: Path, tmp_path: Path, losses: list[tuple[str, int]]
) -> None:
    command = Chained(tmp_path, **RUN, **TWO_REPLICAS)
    furthest = 0
    for moment, number in losses:
        command.wait_for(furthest + 2)
        furthest = command.trained()
        assert furthest < LONG, f"over before {moment}"
        command.lose(moment, number)
    output = command.finish()
    assert_same(command.run, undisturbed)
    told = sum(line.count("was lost and is replaced") for line in output.splitlines())
    assert told >= sum("ray::" in moment for moment, _ in losses)


def assert_adapted(run: Path) -> None:
    weights = [row["tie"]["weight"] for row in read_rows(run / "metrics.jsonl") if "tie" in row]
    assert weights[0] == 0.1
    assert len(set(weights)) == len(weights) > 5, "it moves"


def test_workers_that_sample_and_train_are_replaced_together(tmp_path: Path) -> None:
    """Whatever dies in whichever role, the run goes back to its checkpoint; so it does after Ctrl-C
    and --resume, and its rows of time still add up."""
    colocated = {**RUN, "cluster.layout": "colocated", "cluster.learner.parallel": "replicate"}
    colocated |= ADAPTING
    folders = [tmp_path / name for name in ("alone", "disturbed")]
    alone = Chained(folders[0], **colocated)
    alone.finish()
    disturbed, furthest = Chained(folders[1], **colocated), 0
    for method, number in (
        ("sample", KILL),
        ("accumulate", KILL),
        ("step", KILL),
        ("share", KILL),
        ("", STOP),
    ):
        disturbed.wait_for(furthest + 2)
        furthest = disturbed.trained()
        assert furthest < LONG, f"over before {method}"
        disturbed.lose(f"ray::ColocatedWorker.{method}".rstrip("."), number)
    disturbed.wait_for(furthest + 2)
    disturbed.signal_group(signal.SIGINT)
    told = disturbed.finish().count("was lost and is replaced: ")
    assert told == 5
    resumed = Chained(folders[1], resume=True, **colocated)
    resumed.finish()
    assert_same(resumed.run, alone.run)
    assert_adapted(resumed.run)
    rows = [row for row in read_rows(resumed.run / "timings.jsonl") if row["kind"] == "train"]
    assert len(rows) == LONG
    for row in rows:
        spent = sum(sum(of.values()) for of in row["ledger"]["workers"].values())
        assert spent == pytest.approx(row["seconds"], rel=0.02)


def test_the_same_weights_however_a_run_is_interrupted(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("alone", "disturbed")]
    undisturbed = Chained(folders[0], **ADAPTING)
    undisturbed.finish()
    killed = Chained(folders[1], **ADAPTING, iterations="5")
    killed.wait_for(4)
    killed.process.send_signal(KILL)  # the driver alone, as the kernel's OOM killer does
    killed.process.wait()
    assert not killed.left_behind(), "what is beside the driver clears up after it"
    assert list((killed.run / "logs").rglob("gcs_server*")), "Ray's logs are kept"

    asked_for_more = Chained(folders[1], resume=True, **ADAPTING, iterations="5")
    asked_for_more.finish()  # off the rhythm of evaluations and checkpoints, and then longer:

    interrupted = Chained(folders[1], resume=True, **ADAPTING)
    interrupted.wait_for(6)
    interrupted.signal_group(signal.SIGINT)
    assert "continue with" in interrupted.finish()
    done = interrupted.trained()
    assert list_checkpoints(interrupted.run / "checkpoints")[-1].name.endswith(str(done))

    last = Chained(folders[1], resume=True, **ADAPTING, **ONE_WORKER)
    last.finish()
    assert_same(last.run, undisturbed.run, ITERATIONS)
    assert_adapted(last.run)


LAG: dict[str, Any] = {**RUN, "iterations": "12", "sampling.max_lag": "1"}


def test_a_lag_of_one_is_the_same_run_whatever_dies(tmp_path: Path) -> None:
    """Samples are one iteration old, all of them but the first, with one worker or two."""
    folders = [tmp_path / name for name in ("alone", "disturbed")]
    alone = Chained(folders[0], **LAG, **ONE_WORKER)
    alone.finish()
    rows = [row for row in read_rows(alone.run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["staleness"] for row in rows] == [0] + [1] * 11
    assert [row["weights"]["version"] for row in rows] == [1, *range(1, 12)]
    gates = [row["log_ratio"]["gate"] for row in rows]
    assert gates[0] == 0
    assert min(gates[1:]) > 0, "off-policy by the updates in between"

    killed = Chained(folders[1], **LAG)
    killed.wait_for(3)
    killed.lose("ray::RolloutWorker.sample", KILL)
    killed.wait_for(5)
    killed.process.send_signal(KILL)
    killed.process.wait()
    assert not killed.left_behind()
    stopped = Chained(folders[1], resume=True, **LAG)
    stopped.wait_for(8)
    stopped.signal_group(signal.SIGINT)
    stopped.finish()
    last = Chained(folders[1], resume=True, **LAG)
    last.finish()
    assert_same(last.run, alone.run, 12)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system in memory, mounted at ``folder``."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_during_a_checkpoint(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two checkpoints of 27 MB, and for a part of the third."""
    monkeypatch.setenv(BULK, str(27 * 10**6))
    runs = tmp_path / "runs"
    with small_disk(runs, "75m"):
        full = Chained(tmp_path, **RUN)
        output = " ".join(full.finish(status=2).split())
        assert "could not be written" in output
        assert "No space left on device" in output
        kept = [path.name for path in (full.run / "checkpoints").iterdir()]
        assert sorted(kept) == ["iteration-000001", "iteration-000002"], "no torn one"
        subprocess.run(["mount", "-o", "remount,size=500m", str(runs)], check=True)
        resumed = Chained(tmp_path, resume=True, **RUN)
        assert f"resuming {resumed.run} after iteration 2" in " ".join(resumed.finish().split())
        assert_same(resumed.run, undisturbed, but="exp_avg.safetensors")  # what fills the disk
