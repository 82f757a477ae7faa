"""A Ray cluster in processes of its own, as `ray start` makes it, and the shell of its user."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from ports import own_port
from waiting import wait_until

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


class Cluster:
    """A head and further nodes, all on this machine.

    A head alone listens on loopback. Ray lets no node join such a one, so with ``several`` nodes
    they listen on the machine's own address; the token keeps others out.
    """

    def __init__(
        self,
        folder: str,
        head: Mapping[str, float],
        several: bool,
        variables: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.port, self.dashboard_port, client, self.http_port = (own_port() for _ in range(4))
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.variables = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(HERE)}
        self.variables["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # as if activated
        self.variables |= variables
        if several:
            del self.variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
        self._folder = folder
        self._where = [] if several else ["--node-ip-address=127.0.0.1"]
        self.environment = self.variables | {
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_DASHBOARD_ADDRESS": self.dashboard,
            "COLUMNS": "200",
        }
        options = [f"--port={self.port}", f"--dashboard-port={self.dashboard_port}"]
        options += [f"--ray-client-server-port={client}"]
        self._start(["--head", *options], head)

    def add_node(self, resources: Mapping[str, float]) -> subprocess.Popen[bytes]:
        """One more node; for ``end_node``."""
        return self._start([f"--address=127.0.0.1:{self.port}"], resources)

    def _start(
        self, options: Sequence[str], resources: Mapping[str, float]
    ) -> subprocess.Popen[bytes]:
        custom = {name: n for name, n in resources.items() if name not in ("CPU", "GPU")}
        agent, metrics = own_port(), own_port()
        # Nodes that share a folder would delete each other's working folders of jobs.
        folder = f"{self._folder}/{agent}"
        command = [BIN / "ray", "start", "--block", *options, *self._where]
        command += [f"--num-cpus={resources['CPU']:g}", f"--num-gpus={resources.get('GPU', 0):g}"]
        command += [f"--resources={json.dumps(custom)}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += [f"--temp-dir={folder}"]
        node = subprocess.Popen(
            command, env=self.variables, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self._nodes.append(node)
        return node

    def wait_until_it_answers(self) -> None:
        """`ray start --block` returns only at the end: ask until the dashboard answers."""

        def answers() -> bool:
            assert self._nodes[0].poll() is None, "the head has ended"
            with socket.socket() as knock:
                return knock.connect_ex(("127.0.0.1", self.dashboard_port)) == 0

        wait_until(answers, "the cluster's start", pause=0.2)

    def shell(self, *command: object, status: int = 0, folder: Path | None = None) -> str:
        """What a command prints; with its errors, where it fails."""
        name, *arguments = map(str, command)
        run = subprocess.run(
            [BIN / name, *arguments],
            env=self.environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert run.returncode == status, run.stdout + run.stderr
        return run.stdout + (run.stderr if status else "")

    def ask(self, path: str) -> str:
        """What the dashboard answers, asked with the token."""
        token = self.variables["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(
            self.dashboard + path, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def rewards(self, *command: object, status: int = 0) -> str:
        return self.shell("flowgrpo-ray", "rewards", *command, status=status)

    def status(self) -> dict[str, dict[str, Any]]:
        """`rewards status`, by reward."""
        return {row["name"]: row for row in json.loads(self.rewards("status", "--json"))}

    def end_node(self, node: subprocess.Popen[bytes]) -> None:
        """A node is gone from one moment to the next, with every process on it."""
        self._nodes.remove(node)
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
            processes = psutil.Process(node.pid).children(recursive=True)
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        node.kill()
        node.wait()

    def end(self) -> None:
        """All nodes at once: asked to leave, Ray's processes take half a minute."""
        for node in reversed(self._nodes.copy()):
            self.end_node(node)


@contextlib.contextmanager
def cluster(
    head: Mapping[str, float], *, several: bool = False, **variables: str
) -> Iterator[Cluster]:
    """A cluster whose head has the resources ``head``; ``variables`` are set on its nodes."""
    folder = tempfile.mkdtemp(prefix="fgr", dir="/tmp")  # short: socket paths have a limit
    running = Cluster(folder, head, several, variables)
    try:
        yield running
    finally:
        running.end()
        shutil.rmtree(folder, ignore_errors=True)
