"""Which stage holds an iteration up, and what would remove it, by hand."""

import pytest

from flowgrpo_ray.cluster.stages import StageReader
from flowgrpo_ray.run.bottleneck import (
    BOTH,
    Adviser,
    Bottleneck,
    Planner,
    Room,
    Stage,
    find_bottleneck,
)
from flowgrpo_ray.run.ledger import Account
from flowgrpo_ray.serving.client import RewardStats
from flowgrpo_ray.spec.file import load_spec

AMPLE = Room({"CPU": 64, "GPU": 8}, cores=640)


def spec_of(*more, gpus=0, of_rollout=None, learners=1, workers=4, updates=1, **rollout):
    """32 micro-batches in an iteration: of 4 images, two for a group."""
    of_rollout = gpus if of_rollout is None else of_rollout
    settings = [
        *("sampling.group_size=8", "sampling.groups=16", "sampling.micro_batch=4"),
        f"objective.updates={updates}",
        f"cluster.learner={{count: {learners}, cpus: 1, gpus: {gpus}}}",
        f"cluster.rollout={{count: {workers}, cpus: 1, gpus: {of_rollout}}}",
        "rewards={ocr: {weight: 1, cpus: 2}, sign_colour: {weight: 0}}",
        *[f"cluster.rollout.{key}={value}" for key, value in rollout.items()],
        *more,
    ]
    return load_spec("tiny-ocr", settings)


def stages_of(sampling=12.0, training=2.0, ocr=1.0, *, workers=4, ranks=1, replicas=2, calls=32):
    """Work of all actors together."""
    return {
        "sampling": Stage(sampling, workers),
        "training": Stage(training, ranks),
        "ocr": Stage(ocr, replicas, calls),
        "sign_colour": Stage(0.1, 1, calls),
    }


def advice(spec, stages, seconds=12.0, room=AMPLE):
    return Planner(spec, room).advise(find_bottleneck(stages), stages, seconds)


@pytest.mark.parametrize(
    ("ocr", "expected"),
    [
        (Stage(21, 2), Bottleneck("ocr", 10.5, "sampling", 3)),
        (Stage(5, 2), Bottleneck("sampling", 3, "ocr", 2.5)),
        (Stage(0, 0), Bottleneck("sampling", 3, "training", 2)),  # it never answered
        (Stage(2, 2, fixed_s=2.5), Bottleneck("ocr", 3.5, "sampling", 3)),
    ],
)
def test_the_stage_with_the_most_work_for_each_actor(ocr, expected):
    others = {"sampling": Stage(12, 4), "training": Stage(2, 1), "watched": Stage(1, 1)}
    assert find_bottleneck({**others, "ocr": ocr}) == expected


# --- what would remove it


@pytest.mark.parametrize(
    ("ocr", "calls", "replicas", "then", "effect"),
    [
        (21, 9, 7, 12 - 7.5, "remove it"),
        (20, 9, 7, 12 - 7, "remove it"),  # 20 / 6 is more than 3
        (20, 4, 4, 12 - 5, "bring it to 5.0 s"),  # no more calls to share out
    ],
)
def test_replicas_for_a_reward(ocr, calls, replicas, then, effect):
    found = advice(spec_of(), stages_of(ocr=ocr, calls=calls))
    assert found.change == {"rewards.ocr.replicas": replicas}
    assert found.seconds == pytest.approx(then)
    assert found.says == (
        f"+{replicas - 2} replicas (flowgrpo-ray rewards scale ocr {replicas}, or "
        f"rewards.ocr.replicas 2 -> {replicas}) would {effect}: about {then:.1f} s an iteration "
        "instead of 12.0, by estimate."
    )


def test_one_replica_is_one_replica():
    assert "+1 replica (flowgrpo" in advice(spec_of(), stages_of(ocr=8)).says


def test_a_reward_whose_calls_have_a_replica_each():
    found = advice(spec_of(), stages_of(ocr=20, calls=2))
    assert found.change == {}
    assert found.seconds is None
    assert "nothing to do: every call has a replica" in found.says


def test_the_slower_of_two_rewards_is_brought_to_the_other():
    stages = stages_of(ocr=40) | {"sign_colour": Stage(8, 1, 32)}
    assert advice(spec_of(), stages, 20).change == {"rewards.ocr.replicas": 5}


def test_more_rollout_workers():
    found = advice(spec_of(), stages_of(sampling=24), seconds=8)
    assert found.change == {"cluster.rollout.count": 12}  # of 2 seconds, as the learner
    assert found.seconds == pytest.approx(8 - 4)
    assert found.says == (
        "cluster.rollout.count 4 -> 12 would remove it: about 4.0 s an iteration instead of 8.0, "
        "by estimate."
    )


def test_stages_that_take_turns_want_the_other_layout():
    """More actors of the slower one would shorten its turn, and wait as long."""
    together, stages = "advantages={std: global}", stages_of(sampling=24, ranks=2)
    found = advice(spec_of(together, gpus=1, learners=2), stages)
    assert found.change == {"cluster.layout": "colocated"}
    assert "take turns (advantages.std: global)" in found.says
    for others in ((), (together, "sampling.max_lag=1")):
        assert advice(spec_of(*others, gpus=1, learners=2), stages).change != found.change
    few = Room({"CPU": 8}, cores=2)
    assert "No count of actors" in advice(spec_of(together), stages, room=few).says


def test_workers_that_sample_and_train_are_as_many_as_share_an_update_evenly():
    spec = spec_of("cluster.layout=colocated", "cluster.workers={count: 2, gpus: 1}")
    stages = {BOTH: Stage(24, 2), "ocr": Stage(5, 2, 32)}
    assert advice(spec, stages).change == {"cluster.workers.count": 8}  # and no GPU is left
    found = advice(spec, {BOTH: Stage(640, 32), "ocr": Stage(5, 2, 32)})
    assert "an update has 32 micro-batches" in found.says


def test_workers_that_may_join_have_another_key():
    found = advice(spec_of(max_count=6), stages_of(sampling=24, workers=6))
    assert found.change == {"cluster.rollout.max_count": 12}


def test_no_more_workers_than_micro_batches():
    assert advice(spec_of(), stages_of(sampling=640)).change == {"cluster.rollout.count": 32}
    found = advice(spec_of(workers=32), stages_of(sampling=640, workers=32))
    assert found.change == {}
    assert "an iteration has 32 micro-batches (sampling.micro_batch)" in found.says


def test_loading_weights_is_not_shared_out():
    stages = stages_of() | {"sampling": Stage(8, 4, fixed_s=1)}
    assert advice(spec_of(), stages, 4).change == {"cluster.rollout.count": 8}
    stages |= {"sampling": Stage(8, 4, fixed_s=3)}
    found = advice(spec_of(), stages, 6)
    assert found.change == {"cluster.rollout.count": 32}
    assert "bring it to 3.2 s" in found.says


@pytest.mark.parametrize(
    ("updates", "here", "training", "ranks"),
    [(1, 1, 9, 4), (1, 1, 12, 4), (1, 1, 13, 8), (2, 2, 13, 8), (16, 1, 13, 2), (16, 2, 13, None)],
)
def test_learner_ranks_divide_the_micro_batches_of_an_update(updates, here, training, ranks):
    found = advice(spec_of(updates=updates), stages_of(training=training, ranks=here), 15)
    assert found.change == ({"cluster.learner.count": ranks} if ranks else {})
    if ranks is None:
        assert "an update has 2 micro-batches" in found.says
    else:
        largest = max(3, training / ranks)
        assert found.seconds == pytest.approx(15 - (training / here - largest))


NONE = Room({"CPU": 64}, cores=640)


def test_gpus_move_from_the_learner_to_the_rollout_workers():
    spec = spec_of(gpus=1, learners=4, workers=4)
    stages = stages_of(sampling=24, training=4, ranks=4)
    found = advice(spec, stages, 8, NONE)
    assert found.change == {"cluster.learner.count": 2, "cluster.rollout.count": 6}
    assert found.seconds == pytest.approx(8 - 2)
    assert found.says == (
        "Moving 2 GPUs from learner to rollout (cluster.learner.count 4 -> 2, "
        "cluster.rollout.count 4 -> 6) would bring it to 4.0 s: about 6.0 s an iteration instead "
        "of 8.0, by estimate."
    )


def test_gpus_move_from_the_rollout_workers_to_the_learner():
    spec = spec_of(gpus=1, learners=1, workers=3)
    found = advice(spec, stages_of(sampling=3, training=8, workers=3), 9, NONE)
    assert found.change == {"cluster.rollout.count": 2, "cluster.learner.count": 2}
    assert "Moving 1 GPU from rollout to learner" in found.says
    assert found.seconds == pytest.approx(9 - 4)


def test_a_free_gpu_is_taken_before_one_moves():
    spec = spec_of(gpus=1, learners=4, workers=4)
    stages = stages_of(sampling=24, training=4, ranks=4)
    found = advice(spec, stages, 8, Room({"CPU": 64, "GPU": 1}, 640))
    assert found.change == {"cluster.rollout.count": 5}


def test_nothing_moves_where_it_would_not_help():
    spec = spec_of(gpus=1, learners=1, workers=1)
    found = advice(spec, stages_of(sampling=10, training=8, workers=1), 10, NONE)
    assert found.change == {}
    two_each = stages_of(sampling=10, training=8, workers=2, ranks=2)
    assert advice(spec_of(gpus=1, learners=2, workers=2), two_each, 6, NONE).change == {}
    assert found.says == (
        "cluster.rollout.count 1 -> 2 would help, but the cluster has no room for it: it needs "
        "1 GPU (0 free)."
    )
    assert found.seconds is None


def test_shares_of_gpus_move_only_between_equals():
    room = Room({"CPU": 0.5}, 640)
    for gpus, of_rollout in ((0, 0), (1, 0.5)):
        spec = spec_of(gpus=gpus, learners=4, of_rollout=of_rollout)
        found = advice(spec, stages_of(sampling=24, ranks=4), 8, room)
        assert found.change == {}
        assert "needs 1 CPU (0.5 free)" in found.says


def test_only_as_many_as_there_is_room_for():
    found = advice(spec_of(), stages_of(ocr=20), 12, Room({"CPU": 5}, 640))
    assert found.change == {"rewards.ocr.replicas": 4}  # two cores each
    assert "bring it to 5.0 s" in found.says


def test_an_even_split():
    found = advice(spec_of(), stages_of(sampling=8.7, training=2))
    assert found.change == {}
    assert "even: training would need more actors as well" in found.says


def test_cores_that_all_work():
    """One process of everything on two cores: 3.5 seconds of work in 2 x 1.9."""
    spec = spec_of(workers=1)
    stages = stages_of(sampling=1.6, training=1.3, ocr=0.5, workers=1, replicas=1)
    found = advice(spec, stages, 1.9, Room({"CPU": 64}, cores=2))
    assert found.change == {}
    assert found.says == (
        "No count of actors helps here: the processes work for 3.5 s in all, and 2 cores have 3.8. "
        "More cores would."
    )
    assert advice(spec, stages, 2.0, Room({"CPU": 64}, cores=2)).change
    on_gpus = spec_of(gpus=1, workers=1)
    room = Room({"CPU": 64, "GPU": 8}, cores=2)
    assert advice(on_gpus, stages, 1.9, room).change
    # Nor do rewards that keep the cores busy stand in the way of GPUs, or the other way round.
    assert advice(on_gpus, stages_of(sampling=20, ocr=9), 5, room).change
    assert advice(on_gpus, stages_of(ocr=7, replicas=1), 8, room).change


# --- when it is told


def test_advice_comes_once_for_each_stage_after_three_iterations_in_a_row():
    adviser = Adviser()

    def said(*stages):
        return [adviser.see(stage, f"more {stage}") for stage in stages]

    assert said("ocr", "ocr", "sampling", "ocr", "ocr") == [None] * 5
    assert said("ocr", "ocr") == ["more ocr", None]
    assert said("sampling", "sampling", "sampling") == [None, None, "more sampling"]
    assert said("ocr", "ocr", "ocr", "ocr") == [None] * 4


REWARDS = {
    "ocr": RewardStats(calls=32, images=128, busy_s=18.0, replicas={"a", "b"}),
    "sign_colour": RewardStats(),
}


def accounts(workers=4.0):
    return {
        "rollout": Account(workers, {"busy": {"sample": 2.5}, "loading": {"load": 0.5}}),
        "learner": Account(1.0, {"busy": {"accumulate": 1.0, "step": 0.5}}),
        "reward-ocr": Account(2.0, {"busy": {"score": 9.0}, "waiting": {"images": 3.0}}),
        "reward-sign_colour": Account(1.0, {"waiting": {"images": 12.0}}),
    }


def test_iterations_that_lost_an_actor_give_no_advice():
    reader = StageReader(spec_of(), lambda: AMPLE)
    workers = [4.0, 4.0, 3.2, 4.0, 4.0]
    told = [reader.read(accounts(count), 12.0, REWARDS)[1] for count in workers]
    assert [text is not None for text in told] == [False, False, False, True, False]


def test_what_the_driver_writes_and_says():
    reader, rows = StageReader(spec_of(), lambda: AMPLE), accounts()
    row, first = reader.read(rows, 12.0, REWARDS)
    _, second = reader.read(rows, 12.0, REWARDS)
    again, third = reader.read(rows, 12.0, REWARDS)
    assert third is not None
    assert row == again
    assert row["ledger"] == {kind: account.seconds for kind, account in rows.items()}
    assert row["processes"] == {
        "rollout": 4,
        "learner": 1,
        "reward-ocr": 2,
        "reward-sign_colour": 1,
    }
    assert row["busy"]["learner"] == pytest.approx(1.5 / 12)
    assert row["rewards"]["ocr"]["replicas"] == 2
    assert row["bottleneck"] == {
        "stage": "ocr",
        "seconds": 9.0,
        "advice": third.partition("sampling. ")[2],
        "change": {"rewards.ocr.replicas": 6},
        "then": pytest.approx(6.0),
    }
    assert (first, second) == (None, None)
    assert third == (
        "reward-ocr is the bottleneck: 9.0 s of work for each of 2 replicas, 3.0 s for sampling. "
        "+4 replicas (flowgrpo-ray rewards scale ocr 6, or rewards.ocr.replicas 2 -> 6) would "
        "remove it: about 6.0 s an iteration instead of 12.0, by estimate."
    )
