"""A server process for a vision-language judge: started, watched, and ended with its owner.

It listens on a port of the loopback interface and answers the OpenAI chat API. The process is
another one than the reward's because sglang needs an environment of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import Field

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.common.ports import reserve_port
from flowgrpo_ray.rewards import with_owner
from flowgrpo_ray.rewards.environments import environments_folder, python_of

LOG_LINES, LOG_BYTES = 5, 8192  # that an error shows
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """What a command line depends on."""

    python: str
    model: str
    port: int
    api_key: str
    chat_template: str | None


def sglang_command(launch: Launch) -> list[str]:
    """sglang, on the GPUs that this process sees."""
    template = ["--chat-template", launch.chat_template] if launch.chat_template else []
    return [
        *(launch.python, "-m", "sglang.launch_server", "--model-path", launch.model),
        *("--host", "127.0.0.1", "--port", str(launch.port), "--api-key", launch.api_key),
        *template,
        *("--enable-p2p-check", "--mem-fraction-static", "0.85", "--log-level-http", "warning"),
    ]


def transformers_command(launch: Launch) -> list[str]:
    """The server of transformers, on a CPU: knows neither keys nor chat templates by name."""
    return [
        *(launch.python, "-m", "transformers.cli.transformers", "serve", launch.model),
        *("--host", "127.0.0.1", "--port", str(launch.port)),
        *("--device", "cpu", "--dtype", "float32"),
    ]


COMMANDS: dict[str, Callable[[Launch], list[str]]] = {
    "sglang": sglang_command,
    "transformers": transformers_command,
}


class JudgeServer:
    """A running server, at `url`; its requests carry `api_key` and name `model`."""

    def __init__(
        self,
        model: Annotated[str, Field(description="the weights: a folder or a hub id")],
        server: Annotated[
            Literal["sglang", "transformers"],
            Field(
                description="`transformers` is `transformers serve` on a CPU, slow, to try things "
                "out; it needs the package `openai`"
            ),
        ] = "sglang",
        python: Annotated[
            str | None,
            Field(
                description="of the environment that has the server; by default of `sglang`, or "
                "the replica's own for `transformers`"
            ),
        ] = None,
        chat_template: Annotated[
            str | None,
            Field(description="of sglang; by default `chatml-llava` for `unified_reward` 1.5"),
        ] = None,
        arguments: Annotated[
            Sequence[str],
            Field(
                description='more of the command line, as `["--mem-fraction-static", "0.7"]`; of '
                "an option given twice the last one counts"
            ),
        ] = (),
        log: Annotated[
            str | None, Field(description="its output is appended; by default a new temporary file")
        ] = None,
        start_timeout_s: Annotated[
            float, Field(gt=0, description="within which it must be well")
        ] = 900.0,
        health_timeout_s: Annotated[
            float,
            Field(gt=0, description="until it must say so; sglang gives up after 20 s"),
        ] = 30.0,
        max_restarts: Annotated[
            int, Field(ge=0, description="within `window_s`; then calls fail, with the log's end")
        ] = 3,
        window_s: Annotated[float, Field(gt=0, description="in which restarts count")] = 3600.0,
    ) -> None:
        self.model, self.api_key = model, secrets.token_urlsafe(32)
        self._command, self._arguments = COMMANDS[server], list(arguments)
        self._python = _checked(python or _python_for(server))
        self._chat_template = chat_template
        self._log = Path(log or _new_log())
        self._start_timeout_s = start_timeout_s
        self._max_restarts, self._window_s = max_restarts, window_s
        self._restarts: list[float] = []
        # Proxies of the environment are not for loopback.
        self._client = httpx.Client(timeout=health_timeout_s, trust_env=False)
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """ValueError for an argument by which code of the model would run."""
        if any(argument.startswith("--trust") for argument in options["arguments"]):
            raise ValueError("arguments: --trust-remote-code would run code that a model brings")

    def ensure_running(self) -> None:
        """Restarts the server if it has ended or does not answer; RewardError if it cannot.

        The address changes with a restart. sglang takes a second to say that it is well, so this
        is to be called after a failure, not before every request.
        """
        with self._lock:
            if self._closed:
                raise RewardError("the judge server is closed")
            if self._process is not None and not _ended(self._process) and self._healthy():
                return
            now = time.monotonic()
            self._restarts = [t for t in self._restarts if now - t < self._window_s]
            if len(self._restarts) >= self._max_restarts:
                raise RewardError(
                    f"the judge server was restarted {self._max_restarts} times within "
                    f"{self._window_s:g} s and is down again; {self._last_words()}"
                )
            self._restarts.append(now)
            logger.warning("the judge server at %s is down: it is restarted", self.url)
            self._stop()
            self._start()

    def close(self) -> None:
        """Ends the server and all that it started."""
        self._closed = True
        with self._lock:
            self._stop()
        self._client.close()

    def _start(self) -> None:
        with reserve_port() as reserved:  # until the server listens there itself
            self._start_at(reserved.getsockname()[1])

    def _start_at(self, port: int) -> None:
        """Starts the process and waits until it is healthy."""
        self.url = f"http://127.0.0.1:{port}"
        launch = Launch(self._python, self.model, port, self.api_key, self._chat_template)
        command = [*self._command(launch), *self._arguments]
        # The paths of this environment would mix its packages into the server's.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", with_owner.__file__, *command],
                stdin=subprocess.PIPE,  # held open until the server is to end
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        weakref.finalize(self, self._process.stdin.close)  # a Popen that is forgotten keeps it open
        deadline = time.monotonic() + self._start_timeout_s
        while not self._healthy():
            late = time.monotonic() > deadline
            if late or self._closed or _ended(self._process):
                self._stop()
                why = f"not well after {self._start_timeout_s:g} s" if late else "ended"
                raise RewardError(
                    f"the judge server for {self.model!r} did not start: {why}; "
                    f"{self._last_words()}"
                )
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            return self._client.get(f"{self.url}/health").is_success
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        """Kills the process group. Its leader is not yet waited for, so the number is still its."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _last_words(self) -> str:
        """The end of the log, on one line: of an error's cause only the first line is passed on."""
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        last = [line.strip() for line in lines if line.strip()][-LOG_LINES:]
        return f"{self._log} ends: {' | '.join(last) or '(nothing)'}"


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended. It is left unreaped, so that its group can still be killed safely."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _checked(python: str) -> str:
    """ValueError for a program that is none of this package's environments."""
    here = Path(python).is_relative_to(environments_folder())
    if python != sys.executable and (not here or ".." in Path(python).parts):
        raise ValueError(
            f"python = {python!r}: not of an environment in {environments_folder()}; "
            "build one with flowgrpo-ray rewards env build NAME"
        )
    return python


def _new_log() -> str:
    descriptor, log = tempfile.mkstemp(prefix="judge-", suffix=".log")
    os.close(descriptor)
    return log


def _python_for(server: str) -> str:
    if server == "transformers":
        return sys.executable
    return python_of(server)
