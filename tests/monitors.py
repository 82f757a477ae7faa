"""The monitor as a user starts it, and runs for it to show."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from sample_runs import make_run, write_live

RUN = "tiny-ocr"


class Served:
    """``flowgrpo-ray monitor`` in a process of its own."""

    def __init__(self, folder: Path, *more: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flowgrpo_ray", "monitor", str(folder), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout
        self.said = self.process.stdout.readline()
        found = re.search(r"(http://\S+/)\?token=(\S+)", self.said)
        assert found, self.said + self.process.communicate()[0]
        self.address, self.token = found.groups()
        self.entrance = found.group()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> str:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=30)[0]

    def client(self) -> httpx.Client:
        """One that has been let in."""
        client = httpx.Client(base_url=self.address, trust_env=False)
        assert client.get("/", params={"token": self.token}).status_code == 200
        return client


def make_runs(outside: Path) -> Path:
    """Runs in several states, one in a folder further down, and what must not be reached."""
    make_run(outside / "secret", iterations=2, prompts=2)
    root = outside / "runs"
    make_run(root / RUN)
    failed = make_run(root / "more" / "failed", iterations=3, prompts=2, finished=False)
    write_live(failed, "failed", message="no GPU")
    lost = make_run(root / "lost", iterations=3, prompts=2, finished=False)
    write_live(lost, "running", updated=time.time() - 100)
    starting = root / "starting"
    starting.mkdir()
    (starting / ".lock").touch()
    (root / "not-a-run").mkdir()
    (root / "linked").symlink_to(outside / "secret")
    picture = failed / "samples" / "iteration-000000.png"
    picture.unlink()
    picture.symlink_to(outside / "secret" / "samples" / "iteration-000000.png")
    (failed / "summary.json").symlink_to(outside / "secret" / "summary.json")
    return root
