"""Runs a command that ends with its owner: `python -I with_owner.py COMMAND ...`.

It must have been started as leader of a new session, so that its process group is it, the command
and all that the command starts. Standard input is a pipe whose other end the owner holds open. When
the owner ends, even by SIGKILL, the kernel closes that end, and the group is killed.

A parent-death signal alone would do less: it reaches one process, and comes when the thread that
started it ends. The pipe is watched by a process of its own because Ray kills the children of a
worker that ends: this process, but not its children.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    if os.fork() == 0:
        sys.stdin.buffer.read()
    else:
        command = sys.argv[1:]
        status = subprocess.call(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        print(f"the server ended with status {status}", flush=True)
    os.killpg(0, signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
