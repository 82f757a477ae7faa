"""What full tuning costs beside the training: publications, checkpoints and memory, on real actors.

The embedded pipeline with a transformer of random weights that is large enough for a learner's
state (weights, average and both moments, float32) of ``--megabytes``; one learner rank, one rollout
worker. Timed are publications, from the call until the worker holds the weights, and until the
driver has their ticket alone; and checkpoints, until the loop may go on, and until they are
written, which is what the loop would wait for if it did not go on beside. With ``model.dtype:
float32`` weights travel whole, in half precision halved. The processor computes half precision
slowly or not at all, so iterations are not compared. Of every process the largest resident memory
is told, pages of Ray's object store among it.

    .venv/bin/python benchmarks/full_tuning.py [--megabytes 1000] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import harness
import psutil

from flowgrpo_ray.common.paths import builtin_path

HEADS, HEAD = 16, 32
WIDTH = HEADS * HEAD
OF_LAYER = 36 * WIDTH**2  # parameters, but for biases
STATE_BYTES = 16  # of a parameter: itself, its average, two moments
SMALL = (
    "tuning={kind: full}",
    "sampling.steps=3",
    "sampling.window={kind: all}",
    "sampling.group_size=2",
    "sampling.groups=2",
    "sampling.micro_batch=4",
    "objective={kind: flow_grpo, updates: 1, clip_low: 0.1, clip_high: 0.1}",
    "ema={decay: 0.9, every: 1}",
    "rewards={sign_colour: {weight: 1, cpus: 0}}",
    "cluster.rollout={count: 1, cpus: 1}",
    "cluster.learner={count: 1, cpus: 1}",
)


@contextmanager
def grown(megabytes: int) -> Iterator[Path]:
    """A folder with the embedded pipeline, its transformer larger and random."""
    harness.quiet()
    from diffusers.models import SD3Transformer2DModel

    embedded = builtin_path("builtin:tiny-sd3")
    assert embedded is not None
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        shutil.copytree(embedded, folder)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        config |= {"num_attention_heads": HEADS, "attention_head_dim": HEAD}
        config |= {"caption_projection_dim": WIDTH}
        config["num_layers"] = max(1, round(megabytes * 1e6 / STATE_BYTES / OF_LAYER))
        made: Any = SD3Transformer2DModel.from_config(config)
        shutil.rmtree(folder / "transformer")
        made.save_pretrained(folder / "transformer")
        yield folder


async def publication(trainer: Any, version: int) -> dict[str, float]:
    """Seconds until the driver has the ticket, and until the worker has the weights."""
    crew, began = trainer.crew, time.perf_counter()
    ticket, arrays = await crew.learners.publish(version)
    told = time.perf_counter() - began
    (worker,) = crew.rollouts.up.values()
    found, _ = await worker.actor.load.remote(ticket, arrays)
    assert found == ticket.digest
    return {"published_s": told, "loaded_s": time.perf_counter() - began}


async def checkpoint(trainer: Any) -> dict[str, float]:
    """Seconds until the loop may go on, and until all is written."""
    began = time.perf_counter()
    await trainer.save()
    waited = time.perf_counter() - began
    await trainer._written()
    return {"waited_s": waited, "written_s": time.perf_counter() - began}


async def measure(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    settings = [*SMALL, f"model.path={folder}", f"model.dtype={dtype}"]
    async with harness.trainer(settings) as trainer:
        await trainer.iterate(1)  # with it come moments
        started = peaks()
        timed = [
            await publication(trainer, 100 + number) | await checkpoint(trainer)
            for number in range(rounds)
        ]
        newest = max(trainer.folder.checkpoints.iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
        return {
            "dtype": dtype,
            "checkpoint_bytes": size,
            **{key: [of[key] for of in timed] for key in timed[0]},
            "peak_bytes": {"after an iteration": started, "at the end": peaks()},
        }


def peaks() -> dict[str, int]:
    """Largest resident memory of this process and of each kind below it, in bytes."""
    found: dict[str, int] = {}
    this = psutil.Process()
    for each in [this, *this.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            status = Path(f"/proc/{each.pid}/status").read_text()
            name = "driver" if each == this else each.cmdline()[0].partition(".")[0]
            peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
            name = Path(name).name
            found[name] = max(found.get(name, 0), peak)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of the learner's state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with grown(arguments.megabytes) as folder:
        rows = [
            asyncio.run(measure(folder, dtype, arguments.rounds))
            for dtype in ("float32", "bfloat16")
        ]
    keys = ("published_s", "loaded_s", "waited_s", "written_s")
    harness.table(
        ("dtype", "published s", "loaded s", "checkpoint waited s", "written s", "MB"),
        [
            (
                r["dtype"],
                *(harness.spread(r[k]) for k in keys),
                f"{r['checkpoint_bytes'] / 1e6:.0f}",
            )
            for r in rows
        ],
    )
    for row in rows:
        end = row["peak_bytes"]["at the end"].items()
        largest = sorted(end, key=lambda kind: -kind[1])[:6]
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest)
        print(f"{row['dtype']}, peak GB: {told}")
    harness.save(arguments.json, {"full_tuning": rows})


if __name__ == "__main__":
    main()
