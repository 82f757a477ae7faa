"""`flowgrpo-ray submit`: a training run as a job of a Ray cluster."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from flowgrpo_ray.cluster.upload import SPEC, pack
from flowgrpo_ray.common.addresses import jobs_address, probe_cluster, probe_jobs
from flowgrpo_ray.common.errors import SpecError
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.spec.training import TrainingSpec


def submit_run(
    spec: TrainingSpec,
    address: str | None,
    runs: Path | None,
    stop_wait: int,
    wait: bool,
    console: Console,
) -> int:
    """Check ``spec`` here, upload what it needs, submit it, and follow it if asked to; the exit
    status."""
    if runs is not None and not runs.is_absolute():
        raise SpecError(f"--runs {runs}: give an absolute path of the cluster's machines")
    check_run(spec, elsewhere=True)
    probe_jobs(address)
    with tempfile.TemporaryDirectory(prefix="flowgrpo-submit-") as name:
        folder = Path(name)
        files = pack(spec, folder)
        from flowgrpo_ray.cluster import jobs
        from flowgrpo_ray.serving.ray_private import cluster_here

        if (address or jobs_address() or "auto") == "auto":
            probe_cluster(cluster_here("auto"), "RAY_ADDRESS")
        arguments = ["train", SPEC, "--resume", *(["--runs", str(runs)] if runs else [])]
        with console.status("submitting to the Ray cluster"):
            client = jobs.connect(address)
            job = jobs.submit(client, spec.name, folder, arguments, stop_wait)
    at = f"--address {client.get_address()}"
    lines = (
        f"job {job} is submitted, with {', '.join(files)}",
        f"  follow  ray job logs {at} --follow {job}",
        f"  stop    ray job stop {at} {job}",
        f"  state   ray job status {at} {job}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    if not wait:
        return 0
    try:
        status = jobs.follow(client, job)
    except KeyboardInterrupt:
        console.print(f"job {job} goes on; it ends with: ray job stop {at} {job}", soft_wrap=True)
        return 130
    console.print(f"job {job}: {status.value}", highlight=False)
    return 0 if status == jobs.JobStatus.SUCCEEDED else 1
