"""Clears up after a driver that was killed: its private cluster's processes, and their folder.

A driver that ends by itself, whatever the reason, clears up itself. One that gets SIGKILL cannot,
so it has this small process beside it, which waits for its end. It runs as a script and needs the
standard library alone.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RAY = "ray"  # in a run's folder for temporary files, which no other user can enter
MARK = "FLOWGRPO_FOLDER"  # of a run, in the environment of all that it starts
LOOK_S = 5.0  # between two looks at what processes there are
Process = tuple[int, int]  # a process id, and when it began: ids are used again


@contextmanager
def janitor(folder: Path, logs: Path) -> Iterator[None]:
    """Within it, ``folder`` and all processes below this one go when this one is killed.

    What Ray logged in ``folder`` is kept in ``logs``.
    """
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(folder), str(logs)]
    # Its own session, so that Ctrl-C in a terminal does not end it before the driver.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
    )
    try:
        yield
    finally:
        process.communicate()  # closes its input: it finds nothing to do, and ends


def keep_logs(folder: Path, logs: Path) -> None:
    """Copy the logs of every Ray session in ``folder``; tell it on stderr if they do not fit."""
    for session in folder.glob(f"{RAY}/session_2*/logs"):
        try:
            shutil.copytree(session, logs / session.parent.name, dirs_exist_ok=True, symlinks=True)
        except (OSError, shutil.Error) as error:
            print(f"Ray's logs are not all kept in {logs}: {error}", file=sys.stderr)


def processes() -> dict[Process, int]:
    """All of this machine, with the id of the one that started each."""
    found: dict[Process, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(folder.name), int(fields[19])] = int(fields[1])
    return found


def below(roots: set[int], parents: dict[Process, int]) -> set[Process]:
    """The processes that these started, and those that they did."""
    found: set[Process] = set()
    while new := {p for p, parent in parents.items() if parent in roots} - found:
        found |= new
        roots = {pid for pid, _ in new}
    return found


def marked(folder: Path, parents: dict[Process, int]) -> set[Process]:
    """The processes of the run, by their environment: also one whose parent died before anybody had
    looked."""
    mark = f"{MARK}={folder}".encode()
    found: set[Process] = set()
    for process in parents:
        with suppress(OSError):  # ended meanwhile, or another user's
            if mark in Path(f"/proc/{process[0]}/environ").read_bytes().split(b"\0"):
                found.add(process)
    return found


def family(driver: int, known: set[Process], folder: Path) -> set[Process]:
    """What is alive of the processes below ``driver``: those ``known``, whoever is their parent now
    that theirs may have died, those of the run in ``folder``, and all that were started since."""
    now = processes()
    alive = (known & now.keys()) | marked(folder, now)
    return alive | below({driver, *(pid for pid, _ in alive)}, now)


def end(driver: int, known: set[Process], folder: Path) -> None:
    """Kill what is left of the family, all at once: one that goes on while another is killed may
    start a third, whose parent nobody would know."""
    deadline = time.monotonic() + LOOK_S
    still: set[Process] = set()
    while time.monotonic() < deadline:
        known = {p for p in family(driver, known, folder) if p[0] != os.getpid()}
        if not known - still:
            break
        for pid, _ in known - still:
            _signal(pid, signal.SIGSTOP)
        still |= known
    for pid, _ in known:
        _signal(pid, signal.SIGKILL)
    deadline = time.monotonic() + LOOK_S
    while known & processes().keys() and time.monotonic() < deadline:
        time.sleep(0.05)


def remove(folder: Path) -> None:
    """Delete it, whatever the last breath of a process still put there."""
    deadline = time.monotonic() + LOOK_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def main(driver: int, folder: Path, logs: Path) -> None:
    known: set[Process] = set()
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        known = family(driver, known, folder)
    if not folder.exists():
        return
    end(driver, known, folder)
    keep_logs(folder, logs)
    remove(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
