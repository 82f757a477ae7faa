"""A killed driver's processes are ended, whenever the janitor looked. Real processes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
from waiting import wait_until

from flowgrpo_ray.cluster import janitor

# Tells at each look who the parent of a process is.
TELLING = """
import sys
sys.path.insert(0, sys.argv[1])
import janitor
from pathlib import Path

look = janitor.processes

def processes():
    found = look()
    parents = {pid: parent for (pid, _), parent in found.items()}
    print(parents.get(int(sys.argv[3])), flush=True)
    return found

janitor.processes, janitor.LOOK_S = processes, 0.2
janitor.main(int(sys.argv[2]), Path(sys.argv[4]), Path(sys.argv[5]))
"""


def test_orphans_seen_before_the_driver_is_missed_are_ended(tmp_path: Path):
    """The driver's pipe, whose end tells of its death, is this test's and outlives it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    starts_one = ["sh", "-c", "sleep 600 & echo $!; wait"]
    with subprocess.Popen(starts_one, stdout=subprocess.PIPE) as driver:
        assert driver.stdout
        orphan = psutil.Process(int(driver.stdout.readline()))
        where = Path(janitor.__file__).parent
        rest = [where, driver.pid, orphan.pid, folder, tmp_path / "logs"]
        command = [sys.executable, "-c", TELLING, *map(str, rest)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watching:
            assert watching.stdout
            assert int(watching.stdout.readline()) == driver.pid
            driver.kill()
            while int(watching.stdout.readline()) == driver.pid:
                pass
            watching.communicate(timeout=30)
    orphan.wait(timeout=60)
    assert not folder.exists()


def test_an_orphan_that_nobody_has_seen_is_ended(tmp_path: Path):
    """Its parent died between two looks: it is known by the mark in its environment alone."""
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = os.environ | {janitor.MARK: str(folder)}
    begun = ["sh", "-c", "sleep 600 > /dev/null 2>&1 & echo $!"]
    printed = subprocess.run(begun, env=environment, capture_output=True, text=True, check=True)
    orphan, other = psutil.Process(int(printed.stdout)), subprocess.Popen(["sleep", "600"])
    janitor.end(2**22 + 1, set(), folder)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert other.poll() is None
    other.kill()
    other.wait()


BREEDING = "import subprocess, time\nwhile True:\n    subprocess.Popen(['sleep', '{mark}'])\n"


def test_a_process_that_goes_on_starting_others_leaves_none_behind(tmp_path: Path):
    mark = f"600.{random.getrandbits(40)}"

    def bred() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]

    code = BREEDING.format(mark=mark)
    with subprocess.Popen(["sh", "-c", f'{sys.executable} -c "{code}"; true']) as driver:
        wait_until(bred, "it has started some")
        janitor.end(driver.pid, set(), tmp_path)
        assert bred() == []
        driver.kill()
