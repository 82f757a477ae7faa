"""Where actors sit: planned here, and placed on real Ray nodes that claim to have GPUs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import clusters
import pytest
from waiting import wait_until
from whole_runs import SLOW_IN_TURNS

from flowgrpo_ray.cluster import placement
from flowgrpo_ray.common.errors import ClusterError
from flowgrpo_ray.spec.bundles import plan_bundles
from flowgrpo_ray.spec.file import load_spec

SEPARATE = "cluster.layout=separate"
PAIRS = (
    SEPARATE,
    "cluster.rollout={count: 16, cpus: 0.5, gpus: 0.4}",
    "cluster.learner={count: 16, cpus: 0.5, gpus: 0.6}",
)


def test_what_shares_a_gpu_shares_a_bundle():
    """Ray would add the fractions up node by node, and part the pairs."""
    bundles = plan_bundles(load_spec("sd35-ocr", PAIRS))
    assert [bundle.seats for bundle in bundles] == [
        [("learner", n), ("rollout", n)] for n in range(16)
    ]
    assert [bundle.resources for bundle in bundles] == [{"CPU": 1, "GPU": 1}] * 16
    more = load_spec("sd35-ocr", [*PAIRS, "cluster.rollout.gpus=0.41"])
    assert len(plan_bundles(more)) == 24, "two rollout workers on each of the further GPUs"
    spec = load_spec("sd35-pickscore-1gpu", [SEPARATE])
    (bundle,) = plan_bundles(spec)
    assert bundle.seats == [("learner", 0), ("rollout", 0)]
    assert bundle.resources == {"CPU": 2, "GPU": 0.6}  # rewards take the rest of the GPU


def test_two_ranks_never_share_a_gpu_and_machines_that_differ_nothing():
    small = "cluster.rollout={count: 4, gpus: 0.25}"
    few = [SEPARATE, small, "cluster.learner={count: 2, gpus: 0.51}"]
    seats = [bundle.seats for bundle in plan_bundles(load_spec("sd35-ocr-4gpu", few))]
    assert seats == [
        [("learner", 0), ("rollout", 0)],
        [("learner", 1), ("rollout", 1)],
        [("rollout", 2), ("rollout", 3)],
    ]
    elsewhere = "cluster.rollout.resources={sampler: 0.1}"
    spec = load_spec("sd35-ocr-4gpu", [*few, elsewhere])
    assert [len(bundle.seats) for bundle in plan_bundles(spec)] == [1, 1, 4]


def test_actors_without_a_gpu_have_bundles_of_their_own():
    bundles = plan_bundles(load_spec("tiny-ocr"))
    assert [bundle.seats for bundle in bundles] == [
        [("learner", 0)],
        [("rollout", 0)],
        [("rollout", 1)],
    ]
    assert [bundle.resources for bundle in bundles] == [{"CPU": 0.5}] * 3
    (nothing, *_) = plan_bundles(load_spec("tiny-ocr", ["cluster.learner.cpus=0"]))
    assert nothing.resources == {"CPU": 0.001}


def test_no_room_is_told_in_seconds_and_holds_nothing(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """The cluster has four CPUs, some of which other tests may hold; this is to need five."""
    import ray

    free = ray.available_resources().get("CPU", 0.0)
    monkeypatch.setattr(placement, "PLACE_S", 1.0)
    spec = load_spec("tiny-ocr", ["cluster.rollout.cpus=2", "cluster.learner.cpus=1"])
    began = time.monotonic()
    with pytest.raises(ClusterError) as told:
        asyncio.run(placement.place(spec))
    assert time.monotonic() - began < 20
    for part in ("1 x (CPU 1), 2 x (CPU 2)", "free are CPU ", "(node by node)", "ray status"):
        assert part in str(told.value)
    wait_until(lambda: ray.available_resources().get("CPU", 0.0) >= free, "what was held")


SEATS = """
import asyncio, sys
import ray
from flowgrpo_ray.cluster.actors import launch
from flowgrpo_ray.cluster.placement import place
from flowgrpo_ray.spec.bundles import plan_bundles
from flowgrpo_ray.spec.file import load_spec

class Seat:
    def where(self):
        return ray.get_runtime_context().get_node_id(), int(ray.get_gpu_ids()[0])

async def seats(spec):
    held = await place(spec)
    actors = {
        (section, n): await launch(Seat, kind, held, held.bundles[section][n], f"{section}-{n}")
        for section, kind in spec.actors.items() for n in range(kind.count)
    }
    calls = [actor.where.remote() for actor in actors.values()]
    for (section, n), (node, gpu) in zip(actors, await asyncio.gather(*calls)):
        print(section, n, node, gpu)

ray.init(log_to_driver=False, namespace="seats")
asyncio.run(seats(load_spec(sys.argv[1], sys.argv[2:])))
"""


@pytest.mark.slow
class TestOnNodes:
    """Nodes with eight made-up GPUs each."""

    pytestmark = SLOW_IN_TURNS

    def test_ranks_are_in_order_of_node_and_gpu(self, tmp_path: Path):
        (tmp_path / "seats.py").write_text(SEATS)
        node = {"CPU": 16.0, "GPU": 8.0}

        def placed(spec: str, *overrides: str) -> dict[tuple[str, int], tuple[str, int]]:
            out = running.shell("python", tmp_path / "seats.py", spec, *overrides)
            rows = [line.split() for line in out.splitlines() if line.count(" ") == 3]
            return {(kind, int(n)): (name, int(gpu)) for kind, n, name, gpu in rows}

        def in_order(nodes: int, count: int) -> None:
            wait_until(lambda: len(alive()) == nodes, f"{nodes} nodes", pause=1.0)
            of_each = f"cluster.workers={{count: {count}, cpus: 0.5, gpus: 1}}"
            seats = placed("sd35-ocr", "cluster.layout=colocated", of_each)
            where = [seats["workers", number] for number in range(count)]
            order = list(dict.fromkeys(name for name, _ in where))
            assert len(order) == -(-count // 8)
            expected = [(name, gpu) for name in order for gpu in range(8)]
            assert where == expected[:count]

        def alive() -> list[str]:
            code = "import ray; ray.init(log_to_driver=False, logging_level='error'); "
            code += "print([n['NodeID'] for n in ray.nodes() if n['Alive']])"
            return running.shell("python", "-c", code).split(",")

        with clusters.cluster(node, several=True) as running:
            running.wait_until_it_answers()
            in_order(1, 1)
            in_order(1, 8)
            running.add_node(node)
            in_order(2, 16)
            pairs = placed("sd35-ocr", *PAIRS)
            learners = [pairs["learner", n] for n in range(16)]
            assert learners == [pairs["rollout", n] for n in range(16)]
            assert len(set(learners)) == 16
            running.add_node(node)
            running.add_node(node)
            in_order(4, 32)
