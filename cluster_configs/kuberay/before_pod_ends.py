"""preStop hook of pods that may hold a part of a training run: let the run save before they end.

`stop` asks the cluster's training jobs to stop, if a part of one is in this pod; `wait` leaves that
to somebody else. Both return when no part of a run is left here. The pod's grace period limits it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ray.job_submission import JobSubmissionClient

JOB = "flowgrpo-ray train"  # in the command of a job that trains, which runs on the head
ACTORS = ("LearnerRank", "RolloutWorker")  # in the titles that Ray gives to their processes


def part_of_a_run(processes: Path = Path("/proc")) -> bool:
    """Whether a driver, a learner rank or a rollout worker lives in this pod."""
    for file in processes.glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if JOB in command or (command.startswith("ray::") and any(a in command for a in ACTORS)):
            return True
    return False


def stop_runs(client: JobSubmissionClient) -> None:
    """Ask every training job of the cluster to save and end."""
    for job in client.list_jobs():
        if job.submission_id and JOB in job.entrypoint and not job.status.is_terminal():
            print(f"stopping {job.submission_id}", flush=True)
            client.stop_job(job.submission_id)


if __name__ == "__main__":
    if sys.argv[1:] == ["stop"] and part_of_a_run():
        try:
            stop_runs(JobSubmissionClient())  # of the cluster that RAY_ADDRESS names
        except (ConnectionError, RuntimeError) as error:  # the head is going too, and stops them
            print(f"cannot ask the cluster: {error}", flush=True)
    while part_of_a_run():
        time.sleep(1)
