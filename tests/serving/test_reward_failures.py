"""What a failing, slow, hung or lying replica does to the scores: nothing. Real Ray, real Serve."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from waiting import PATIENCE_S, wait_until

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.serving import deploy
from flowgrpo_ray.serving import router as router_module
from flowgrpo_ray.serving.args import RewardServiceArgs
from flowgrpo_ray.serving.client import Patience, RewardClient
from flowgrpo_ray.serving.router import RetryElsewhere
from flowgrpo_ray.serving.types import app_name

PROBE, RANKED = "reward_samples:Probe", "reward_samples:Ranked"


def _deploy(*args):
    deploy.start_rewards(args, http_port=None, deadline_s=PATIENCE_S)


@pytest.fixture(scope="module")
def twins(ray_cluster):
    """The pids of two replicas of a probe that answers calls one by one."""
    args = {"replicas": 2, "max_batch_images": 1, "batch_wait_ms": 0.0}
    _deploy(RewardServiceArgs(name="twins", reward=PROBE, **args))
    yield lambda: sorted(stats.pid for stats in _stats("twins"))
    serve.delete(app_name("twins"))


def _stats(name):
    """Of the replicas that run."""
    try:
        return serve.get_app_handle(app_name(name)).broadcast("stats").results(timeout_s=20)
    except DeploymentUnavailableError:
        return []


def _ask(name, calls, **patience):
    """Outcomes of several calls at once, each of one grey image with its metadata."""
    client = RewardClient({name: Patience(**({"backoff_s": 0.05} | patience))})
    image = np.full((1, 4, 4, 3), 51, np.uint8)

    async def all_at_once():
        return await asyncio.gather(*[client.score(image, ["grey"], [asked]) for asked in calls])

    outcomes = asyncio.run(all_at_once())
    return outcomes, client.take_stats()[name]


def test_a_retry_goes_to_another_replica(twins):
    bad, good = twins()
    outcomes, stats = _ask("twins", [{"fail on": bad, "pid": 1}] * 30, retries=1)
    assert not any(outcome.failures for outcome in outcomes)
    assert {outcome.rewards["twins"][0] for outcome in outcomes} == {good}
    assert 1 <= stats.failures <= 30
    assert stats.calls == 30


@pytest.mark.slow
def test_calls_at_once_are_spread_evenly(ray_cluster, tmp_path):
    """In one turn of three at least: a busy machine's replica that is slow to tell its queue length
    is passed over."""
    _deploy(RewardServiceArgs(name="four", reward=PROBE, replicas=4))
    spread = []
    for turn in range(3):
        gate, arrived = tmp_path / f"gate{turn}", tmp_path / f"arrived{turn}"
        arrived.mkdir()
        with ThreadPoolExecutor(1) as beside:  # none is answered before all have a replica
            calls = [{"sign in": str(arrived), "until": str(gate)}] * 16
            asked = beside.submit(_ask, "four", calls, retries=0)
            wait_until(lambda: len(list(arrived.iterdir())) == 16, "all have a replica")  # noqa: B023
            gate.touch()
            asked.result()
        pids = Counter(signature.suffix for signature in arrived.iterdir())
        spread.append(sorted(pids.values()))
    assert [4] * 4 in spread
    serve.delete(app_name("four"))


def test_a_queue_length_of_before_does_not_tip_the_balance():
    router = RetryElsewhere(
        deployment_id=DeploymentID("four"),
        handle_source=DeploymentHandleSource.UNKNOWN,
        use_replica_queue_len_cache=True,
    )
    replicas = [SimpleNamespace(replica_id=number) for number in range(4)]
    router.replica_queue_len_cache.update(0, 4)

    async def first_of(request):
        metadata = SimpleNamespace(internal_request_id=request)
        pending = SimpleNamespace(metadata=metadata, future=asyncio.Future(), kwargs={})
        return (await router.choose_replicas(replicas, pending))[0][0].replica_id

    async def chosen():
        return [await first_of(request) for request in range(16)]

    assert sorted(Counter(asyncio.run(chosen())).items()) == [(n, 4) for n in range(4)]


def test_a_call_without_room_waits_for_the_end_of_another(monkeypatch):
    """And not for a pause that grows, nor without any pause, which would keep all busy."""
    monkeypatch.setattr(router_module, "LOOK_AGAIN_S", PATIENCE_S)
    router = RetryElsewhere(
        deployment_id=DeploymentID("full"),
        handle_source=DeploymentHandleSource.UNKNOWN,
        use_replica_queue_len_cache=True,
    )
    replicas = [SimpleNamespace(replica_id=0)]

    async def asked_twice():
        metadata = SimpleNamespace(internal_request_id="late")
        request = SimpleNamespace(metadata=metadata, future=asyncio.Future(), kwargs={})
        assert await router.choose_replicas(replicas, request) == [replicas]
        again = asyncio.create_task(router.choose_replicas(replicas, request))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not again.done()
        router.on_request_completed(0, "early")
        return await again

    assert asyncio.run(asked_twice()) == [replicas]


def test_a_replica_computes_on_as_many_threads_as_it_has_cpus_and_gpus(ray_cluster):
    """By what torch reads when it is loaded; where two of them share a core, it takes fewer."""
    cpus = {"narrow": 0.25, "wide": 2}
    _deploy(*(RewardServiceArgs(name=name, reward=PROBE, cpus=n) for name, n in cpus.items()))
    asked = [{"variable": "OMP_NUM_THREADS"}, {"variable": "CUDA_VISIBLE_DEVICES"}]
    found = {name: [o.rewards[name].tolist() for o in _ask(name, asked)[0]] for name in cpus}
    assert found == {"narrow": [[1], [0]], "wide": [[2], [0]]}, "and none sees a GPU"
    for name in cpus:
        serve.delete(app_name(name))


def test_a_slow_replica_costs_its_deadline_and_no_score(twins):
    slow, fast = twins()
    outcomes, stats = _ask("twins", [{"slow on": slow, "pid": 1}] * 8, retries=1, deadline_s=1)
    assert {outcome.rewards["twins"][0] for outcome in outcomes} == {fast}
    assert stats.failures >= 1


def test_a_replica_killed_under_load_loses_no_call(twins, tmp_path):
    before = twins()
    calls = [{"seconds": 0.05}] * 40
    # Serve itself repeats a call that its replica has not yet accepted: this one dies later.
    calls[10] = {"seconds": 0.2, "die once": str(tmp_path / "died")}
    outcomes, stats = _ask("twins", calls, retries=4)
    assert all(outcome.rewards["twins"].tolist() == [np.float32(0.2)] for outcome in outcomes)
    assert (tmp_path / "died").exists()
    assert stats.failures >= 1
    wait_until(lambda: len(twins()) == 2, "another replica")
    assert len(set(before) & set(twins())) == 1, "the other one was left alone"


@pytest.mark.slow
def test_autoscaling_begins_at_its_least(ray_cluster):
    scale = {"min_replicas": 2, "max_replicas": 3}
    args = {"name": "elastic", "reward": PROBE, "autoscaling": scale}
    _deploy(RewardServiceArgs.model_validate(args))
    assert len(_stats("elastic")) == 2
    serve.delete(app_name("elastic"))


def test_infinity_is_no_score(twins):
    (outcome,), _ = _ask("twins", [{"infinite": 1}])
    assert np.isnan(outcome.rewards["twins"][0])
    assert not outcome.failures


def test_statistics_of_the_replicas_add_up(twins):
    before = {stats.pid: stats for stats in _stats("twins")}
    _ask("twins", [{}] * 10)
    _ask("twins", [{"fail": 1}], retries=0)
    after = {stats.pid: stats for stats in _stats("twins")}
    assert after.keys() == before.keys()

    def grown(field):
        return sum(getattr(after[pid], field) - getattr(before[pid], field) for pid in after)

    assert (grown("calls"), grown("images"), grown("failures")) == (10, 10, 1)
    assert any("asked to fail" in stats.last_error for stats in after.values())
    for stats in after.values():
        assert len(stats.latencies) == stats.calls
        assert 0 <= stats.busy_s <= stats.seconds
        assert stats.ongoing == 0


@pytest.mark.slow
def test_calls_in_flight_are_answered_by_a_replica_that_is_taken_away(ray_cluster):
    _deploy(RewardServiceArgs(name="leaving", reward=PROBE))
    threading.Timer(0.5, deploy.remove, [["leaving"]]).start()
    (outcome,), stats = _ask("leaving", [{"seconds": 2}], retries=0)
    assert outcome.rewards["leaving"].tolist() == [np.float32(0.2)]
    assert stats.failures == 0


# --- golden images


def test_a_reward_that_scores_nonsense_is_refused_at_start(ray_cluster):
    lying = RewardServiceArgs(name="lying", reward=RANKED, options={"sign": -1})
    with pytest.raises(RewardError, match="reward-lying: DEPLOY_FAILED") as caught:
        _deploy(lying)
    assert "loads but does not score as it must: golden image 1 of the prompt 'bright'" in str(
        caught.value
    )
    _deploy(lying.model_copy(update={"golden": []}))  # its user knows better
    serve.delete(app_name("lying"))


@pytest.mark.slow
def test_golden_images_of_a_deployment_replace_the_rewards_own(ray_cluster, tmp_path):
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "grey.png")
    golden = {"image": str(tmp_path / "grey.png"), "prompt": "grey", "low": -0.3, "high": -0.1}
    args = {"name": "own", "reward": RANKED, "options": {"sign": -1}}
    _deploy(RewardServiceArgs.model_validate(args | {"golden": [golden]}))
    serve.delete(app_name("own"))
    with pytest.raises(RewardError, match=r"scores -0.2, not within \[0.1, 0.3\]"):
        _deploy(
            RewardServiceArgs.model_validate(
                args | {"golden": [golden | {"low": 0.1, "high": 0.3}]}
            )
        )


@pytest.mark.slow
def test_a_reward_that_turns_to_nonsense_is_replaced(ray_cluster):
    _deploy(RewardServiceArgs(name="drifting", reward=RANKED, golden_every_s=0.5))
    (before,) = _stats("drifting")
    _ask("drifting", [{"forget": 1}])

    def replaced():
        return before.pid not in {stats.pid for stats in _stats("drifting")}

    wait_until(replaced, "another replica")
    deploy.wait(["drifting"], deadline_s=PATIENCE_S)
    (outcome,), _ = _ask("drifting", [{}], retries=4)
    assert outcome.rewards["drifting"].tolist() == [np.float32(0.2)]
    serve.delete(app_name("drifting"))


@pytest.mark.slow
def test_a_hung_replica_is_replaced(ray_cluster):
    _deploy(RewardServiceArgs(name="hanging", reward=PROBE, hang_s=1.0, drain_s=0.5))
    (before,) = _stats("hanging")
    (outcome,), stats = _ask("hanging", [{"hang on": before.pid}], retries=6, deadline_s=2.5)
    assert outcome.rewards["hanging"].tolist() == [np.float32(0.2)]
    assert stats.failures >= 1
    serve.delete(app_name("hanging"))
