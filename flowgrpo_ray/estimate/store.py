"""What an iteration keeps in Ray's object store, and whether this machine's shared memory holds it.

Ray keeps its objects in /dev/shm. Where that is too small (Docker gives 64 MB) it takes a folder on
disk instead, which works and crawls.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from flowgrpo_ray.spec.training import TrainingSpec

SHM = Path("/dev/shm")
RAYS_SHARE = 0.3  # of a machine's memory: the size that Ray gives its store by itself
LARGEST = 0.7  # of it, that this program asks for
ROOM = 1.5  # times an iteration's bytes: objects of the one before are there a little longer


def iteration_bytes(spec: TrainingSpec) -> int:
    """Images as uint8, and where they are trained elsewhere than they are sampled the float32
    trajectories, with latents of 16 channels at an eighth of an image's sides: 1 byte per pixel."""
    sampling, objective = spec.sampling, spec.objective
    pixels = sampling.size[0] * sampling.size[1]
    kept = 3
    if spec.cluster.layout == "separate":
        points = objective.points(sampling.trained_steps)
        kept += points + 1 if objective.stochastic else 1
        kept += points * (objective.keeps_old + objective.compares_reference)
    return sampling.images * pixels * kept * (1 + sampling.max_lag)


def store_size(spec: TrainingSpec) -> int | None:
    """Bytes of a private cluster's store; ``None`` where what Ray takes by itself is enough."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = int(ROOM * iteration_bytes(spec))
    return min(wanted, int(LARGEST * memory)) if wanted > RAYS_SHARE * memory else None


def told(spec: TrainingSpec) -> str | None:
    """What to say of a machine whose shared memory is too small for an iteration."""
    if not SHM.is_dir():
        return None
    wanted, there = ROOM * iteration_bytes(spec), shutil.disk_usage(SHM).total
    if wanted <= there:
        return None
    return (
        f"{SHM} of this machine has {there / 1e9:.2g} GB, and an iteration keeps up to "
        f"{wanted / 1e9:.2g} GB there: Ray will use the disk instead, which is slow. In Docker "
        f"give --shm-size={math.ceil(wanted / 1e9)}g, in Kubernetes a volume of medium: Memory at "
        f"{SHM}"
    )
