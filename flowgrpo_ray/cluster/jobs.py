"""Training runs as Ray jobs: submitted over the cluster's job interface, followed, and found."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from flowgrpo_ray.common.addresses import jobs_address
from flowgrpo_ray.common.errors import ClusterError, token_refused

RUN = "flowgrpo_run"  # in a job's metadata: the run that it trains
READY_S = 30.0  # within which a head that answers also takes jobs


def connect(address: str | None) -> JobSubmissionClient:
    """The job interface at ``address``, as http://head:8265; by default where Ray's own variables
    say (RAY_API_SERVER_ADDRESS, RAY_ADDRESS), else the cluster that runs here."""
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to its own argument
    where = jobs_address() or "this machine"
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise token_refused(where, error) from error
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster takes jobs at {where or 'this machine'}: give the address of its "
            f"dashboard, --address http://HEAD:8265. Cause: {error}"
        ) from error


def submit(
    client: JobSubmissionClient, name: str, folder: Path, arguments: list[str], stop_wait_s: int
) -> str:
    """Have the cluster run ``flowgrpo-ray ARGUMENTS`` for the run ``name`` in a copy of
    ``folder``; the job's id. When it is stopped it has ``stop_wait_s`` to save."""
    for job in client.list_jobs():
        if (job.metadata or {}).get(RUN) == name and not job.status.is_terminal():
            raise ClusterError(
                f"job {job.submission_id} is training the run {name!r} already: wait for it, stop "
                f"it (ray job stop {job.submission_id}), or choose another name (--set name=...)"
            )
    end = time.monotonic() + READY_S
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["flowgrpo-ray", *arguments]),
                submission_id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
                metadata={RUN: name},
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s)},
                },
            )
        except RuntimeError as error:  # what Ray makes of any answer but 200
            if "No available agent" not in str(error) or time.monotonic() > end:
                raise ClusterError(f"the Ray cluster does not take the job: {error}") from error
            time.sleep(1)  # it has just been started


def follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Print what the job prints until it ends; how it ended."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(tail())
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)  # its output ends a moment before it does
    return status
