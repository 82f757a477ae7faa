"""Every family through the real trainer, on a tiny model, on Ray and Serve."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from editing import write_image
from tiny_models import MODELS, PROMPTS, spec_of
from tiny_runs import TUNINGS

from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.run.tracking import RunRecorder, StartClock, read_rows
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.prompts import load_prompt_sets
from flowgrpo_ray.spec.training import TrainingSpec


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in MODELS if f != "sd3"])  # whose runs are elsewhere
def test_a_run_on_ray_trains(ray_cluster, family, tmp_path):
    """Two iterations of the real trainer: rollout worker, learner and served rewards; of edits with
    their sources."""
    edits = FAMILIES[family].sources.start  # images that each prompt must name
    write_image(tmp_path / "a.png", (200, 30, 60), (50, 40))
    rows = [{"prompt": text, "images": ["a.png"] * edits} for text in PROMPTS[:2]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = ["jpeg_incompressibility", *(["preservation"] if edits else [])]
    spec = spec_of(
        family,
        f"sampling.guidance={MODELS[family].guidances[-1]}",
        TUNINGS["lora"],
        f"prompts={{train: {tmp_path}/p.jsonl, evaluate: {tmp_path}/p.jsonl}}",
        "name=run",
        "iterations=2",
        "model.dtype=bfloat16",
        f"rewards={json.dumps({name: {'weight': 1} for name in rewards})}",
        "sampling.groups=2",
        "evaluation={every: 2, steps: 4, prompts: 2, micro_batch: 2}",
        "cluster={rollout: {count: 1, cpus: 0.5}, learner: {count: 1, cpus: 0.5}}",
    )
    run = train_on_ray(spec, tmp_path / "runs")
    rows = read_rows(run / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["iteration"] for row in trained] == [1, 2]
    assert {row["log_ratio"]["gate"] for row in trained} == {0.0}
    assert len({row["weights"]["digest"] for row in trained}) == 2
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [row["iteration"] for row in evaluated] == [0, 2]
    for row in evaluated:
        assert row["rewards"].keys() == set(rewards)
        assert all(-1 <= row["rewards"][n]["mean"] <= 1 for n in rewards[1:])
    assert (run / "samples" / "sources.png").exists() == bool(edits)


def train_on_ray(spec: TrainingSpec, root: Path) -> Path:
    """Train on the cluster of the tests and leave nothing on it; the run's folder."""
    import ray
    from ray import serve
    from ray.util.placement_group import remove_placement_group

    from flowgrpo_ray.cluster.driver import Trainer

    folder = RunFolder.claim(root, spec, resume=False)
    recorder = RunRecorder(folder.path)
    clock = StartClock(time.perf_counter())
    trainer = Trainer(spec, *load_prompt_sets(spec), folder, recorder, Mock(), clock)
    asyncio.run(asyncio.wait_for(trainer.train(), 240))
    crew = trainer.crew
    workers = [worker.actor for worker in crew.rollouts.up.values()]
    for actor in (*workers, *crew.learners.ranks):
        ray.kill(actor)
    remove_placement_group(crew.placement.group)
    serve.shutdown()
    while ray.util.list_named_actors():
        time.sleep(0.02)
    return folder.path
