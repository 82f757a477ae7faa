"""A killed driver's processes are ended, whenever the janitor looked. Real processes."""

import subprocess
import sys
from pathlib import Path

import psutil

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
