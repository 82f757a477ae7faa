"""Every mistake in a spec is one clear message that names key and value, before anything starts."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowgrpo_ray.algorithm.objectives import FlowDppo, FlowGrpo, GrpoGuard
from flowgrpo_ray.cluster import session
from flowgrpo_ray.common.errors import (
    ClusterError,
    FlowGrpoError,
    ModelError,
    PromptError,
    RunFolderError,
    SpecError,
)
from flowgrpo_ray.estimate.footprint import count_work
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.run.folder import RunFolder
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.file import RECIPES, dump_spec, load_spec, recipe_names, validate
from flowgrpo_ray.spec.sampling import AllSteps
from flowgrpo_ray.spec.sections import FullTuning
from flowgrpo_ray.spec.training import TrainingSpec

SAMPLING = (
    "sampling={size: [32, 48], steps: 10, eta: 0.8, group_size: 12, groups: 8, micro_batch: 24, "
    "window: {kind: random, length: 2, within: [0, 4]}}"
)


def spec(*overrides: str) -> TrainingSpec:
    """The tiny recipe with sizes that these tests can count on."""
    return load_spec("tiny-ocr", [SAMPLING, "objective.updates=2", *overrides])


def problem(*overrides: str) -> str:
    """The one line that a bad spec gets, without the name of the file."""
    with pytest.raises(SpecError) as caught:
        spec(*overrides)
    _, _, text = str(caught.value).rpartition("tiny-ocr.yaml:")
    assert "\n" not in text.strip(), "one mistake, one line"
    return text.strip()


# Override(s), and what the message must hold: the key, the value found, what to do.
BAD = {
    "unknown key": (["iteration=3"], ["iteration: unknown key", "'iterations'"]),
    "unknown nested key": (["sampling.grops=3"], ["sampling.grops: unknown key", "'groups'"]),
    "unknown key of a reward": (["rewards.ocr.wieght=1"], ["rewards.ocr.wieght", "'weight'"]),
    "unknown key in a union": (
        ["sampling.window.lenght=2"],
        ["sampling.window.lenght", "'length'"],
    ),
    "unknown key in another union": (
        ["tuning={kind: lora, rnak: 3}"],
        ["tuning.rnak: unknown key", "'rank'"],
    ),
    "unknown key of an optional part": (["ema.dekay=0.5"], ["ema.dekay: unknown key", "'decay'"]),
    "unknown key of an optional part, nested": (
        ["objective.kl={beta: 0.1, from: gaussian}"],
        ["objective.kl.from: unknown key", "'form'"],
    ),
    "a tie that follows no reward of the run": (
        ["objective.kl={beta: 0.1, adapt: {reward: colour}}"],
        ["objective.kl.adapt.reward = 'colour'", "no reward of this run (ocr, sign_colour)"],
    ),
    "a tie that follows a rank": (
        [
            "objective.kl={beta: 0.1, adapt: {reward: place}}",
            "rewards.place={reward: rank, options: {reward: ocr}}",
        ],
        ["objective.kl.adapt.reward = 'place'", "its mean cannot fall"],
    ),
    "a tie that allows no fall": (
        ["objective.kl={beta: 0.1, adapt: {reward: sign_colour, fall: 0}}"],
        ["objective.kl.adapt.fall", "greater than 0", "not 0"],
    ),
    "unknown key of a tie": (
        ["objective.kl={beta: 0.1, adapt: {reward: sign_colour, rates: 0.1}}"],
        ["objective.kl.adapt.rates: unknown key", "'rate'"],
    ),
    "unknown key of a reward named as a kind": (
        ["rewards.all={reward: ocr, wieght: 1}"],
        ["rewards.all.wieght: unknown key"],
    ),
    "nothing near": (["ema.zzz=1"], ["ema.zzz: unknown key", "decay, every"]),
    "unknown kind": (["tuning.kind=lorra"], ["tuning.kind: ", "'lorra'", "'lora'?"]),
    "no kind": (["tuning={rank: 3}"], ["tuning.kind: this key is required", "full, lora"]),
    "no kind of an objective": (
        ["objective={updates: 2}"],
        ["objective.kind: this key is required", "flow_grpo, grpo_guard, flow_dppo"],
    ),
    "no kind of a window": (
        ["sampling.window={length: 2}"],
        ["sampling.window.kind: this key is required", "all, random, progressive"],
    ),
    "a kind like no other": (
        ["objective.kind=ppo"],
        ["objective.kind: unknown kind 'ppo'", "kinds: flow_grpo, grpo_guard, flow_dppo"],
    ),
    "unknown key of an objective": (
        ["objective={kind: flow_dppo, max_divergance: 1e-5}"],
        ["objective.max_divergance: unknown key for kind flow_dppo", "'max_divergence'"],
    ),
    "key of another kind": (
        ["objective={kind: flow_dppo, clip_low: 1e-5}"],
        ["objective.clip_low: unknown key for kind flow_dppo", "max_divergence"],
    ),
    "unknown key of the advantages": (
        ["advantages.per_rewards=true"],
        ["advantages.per_rewards: unknown key", "'per_reward'"],
    ),
    "an objective that is none": (["objective=flow_grpo"], ["objective: ", "not 'flow_grpo'"]),
    "text for a number": (["seed=many"], ["seed: ", "integer", "'many'"]),
    "a fraction for a count": (["iterations=1.5"], ["iterations: ", "integer", "1.5"]),
    "a number for text": (["name=7"], ["name: ", "string", "7"]),
    "a scalar for a part": (["cluster.rollout=3"], ["cluster.rollout: ", "3"]),
    "not a number": (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate: ", "nan"]),
    "required key": (
        ["prompts={train: a}"],
        ["prompts: evaluate is required beside one training file"],
    ),
    "group of one": (["sampling.group_size=1"], ["sampling.group_size: ", "2", "not 1"]),
    "no stochastic step": (["sampling.eta=0"], ["sampling.eta: ", "not 0"]),
    "cps beyond a quarter turn": (
        ["sampling.kernel=cps", "sampling.eta=1.2"],
        ["eta = 1.2", "cps", "1"],
    ),
    "window outside the steps": (
        ["sampling.window.within=[2, 10]"],
        ["window.within = [2, 10]", "steps = 10", "[0, 9]"],
    ),
    "window turned round": (["sampling.window.within=[4, 2]"], ["window.within = [4, 2]"]),
    "window before the first step": (["sampling.window.within=[-1, 2]"], ["[-1, 2]"]),
    "window too long": (
        ["sampling.window.length=5"],
        ["window.length = 5", "window.within = [0, 4]"],
    ),
    "window longer than a range that starts late": (
        ["sampling.window={kind: random, length: 3, within: [2, 4]}"],
        ["window.length = 3", "window.within = [2, 4]"],
    ),
    "progressive window that starts too late": (
        ["sampling.window={kind: progressive, start: 7, length: 3, iterations: 5}"],
        ["window.start = 7 and window.length = 3 reach step 10", "steps = 10", "end by 9"],
    ),
    "progressive window that is too long": (
        ["sampling.window={kind: progressive, length: 10, iterations: 5}"],
        ["window.start = 0 and window.length = 10 reach step 10", "steps = 10", "end by 9"],
    ),
    "progressive window that never moves": (
        ["sampling.window={kind: progressive, length: 2, stride: 0, iterations: 5}"],
        ["sampling.window.stride: ", "1, not 0"],
    ),
    "guard on another kernel": (
        ["objective.kind=grpo_guard", "sampling.kernel=dance_sde"],
        ["objective.kind = grpo_guard needs sampling.kernel = flow_sde, not dance_sde"],
    ),
    "guard on another likelihood": (
        ["objective.kind=grpo_guard", "sampling.likelihood=squared_error"],
        ["objective.kind = grpo_guard needs sampling.likelihood = gaussian, not squared_error"],
    ),
    "micro-batches that straddle groups and do not come out": (
        ["sampling.micro_batch=9"],
        ["12 x 8 = 96 images", "not divisible by 36", "groups of 12", "micro-batches of 9"],
    ),
    "images left over": (
        ["sampling.micro_batch=60"],
        ["12 x 8 = 96 images", "not divisible by 60", "groups of 12", "micro-batches of 60"],
    ),
    "updates do not divide": (
        ["objective.updates=3"],
        ["objective.updates = 3", "4 blocks", "group_size 12 x groups 8", "24"],
    ),
    "ranks do not divide": (
        ["cluster.learner.count=3"],
        ["cluster.learner.count = 3", "2 micro-batches of an update"],
    ),
    "ranks divide the iteration and not an update": (
        ["cluster.learner.count=4"],
        ["cluster.learner.count = 4", "4 micro-batches in 2 updates"],
    ),
    "workers do not divide": (
        ["cluster.layout=colocated", "cluster.workers={count: 3}"],
        ["cluster.workers.count = 3", "2 micro-batches of an update"],
    ),
    "lag of workers that train": (
        ["cluster.layout=colocated", "sampling.max_lag=1"],
        ["sampling.max_lag = 1 does not go with cluster.layout = colocated"],
    ),
    "elastic workers that train": (
        ["cluster.layout=colocated", "cluster.rollout.max_count=3"],
        ["rollout.max_count = 3 does not go with layout = colocated"],
    ),
    "workers of the separate layout": (
        ["cluster.workers={count: 2}"],
        ["workers are those of layout = colocated, and layout = separate"],
    ),
    "one worker on two kinds of machine": (
        ["cluster.layout=colocated", "cluster.rollout.resources={sampler: 0.1}"],
        ["rollout.resources = {'sampler': 0.1}", "learner.resources = {}", "cluster.workers"],
    ),
    "two workers on a GPU": (
        ["cluster.layout=colocated", "cluster.workers={count: 2, gpus: 0.5}"],
        ["cluster.workers.count = 2 with cluster.workers.gpus = 0.5"],
    ),
    "two GPUs for an actor": (
        ["cluster.rollout.gpus=2"],
        ["cluster.rollout", "gpus = 2", "count"],
    ),
    "unknown reward": (["rewards={ocrr: {}}"], ["'ocrr'", "did you mean 'ocr'?"]),
    "unknown reward under another name": (
        ["rewards.text={reward: ocrr}"],
        ["rewards.text", "'ocrr'", "did you mean 'ocr'?"],
    ),
    "unknown module of a reward": (["rewards.x={reward: 'no.such:R'}"], ["'no.such:R'", "import"]),
    "unknown class of a reward": (
        ["rewards.x={reward: 'flowgrpo_ray.rewards.ocr:OcrRewards'}"],
        ["'OcrRewards'", "did you mean 'OcrReward'?"],
    ),
    "no reward": (["rewards={}"], ["rewards: "]),
    "every weight 0": (["rewards.ocr.weight=0"], ["weight", "0", "ocr, sign_colour"]),
    "--set without =": (["seed"], ["--set 'seed'", "key=value"]),
    "--set without a key": (["=1"], ["--set '=1'", "key=value"]),
    "--set below a scalar": (["name.first=a"], ["--set 'name.first=a'", "name has no keys below"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_names_key_and_value(case: str):
    overrides, fragments = BAD[case]
    text = problem(*overrides)
    for fragment in fragments:
        assert fragment in text


def test_micro_batches_may_straddle_groups():
    """9 divides no group of 24, as in the authors' recipe: 72 images are whole either way."""
    found = spec(
        "sampling={micro_batch: 9, group_size: 24, groups: 48, size: [32, 48], steps: 10, "
        "eta: 0.8, window: {kind: all}}"
    ).sampling
    assert (found.images, found.units) == (1152, 128)
    assert (found.units_per_block, found.groups_per_block) == (8, 3)


@pytest.mark.parametrize(
    ("micro_batch", "units", "groups"),
    [(1, 12, 1), (4, 3, 1), (12, 1, 1), (8, 3, 2), (24, 1, 2), (16, 3, 4), (96, 1, 8)],
)
def test_a_block_is_the_fewest_images_that_are_whole_either_way(
    micro_batch: int, units: int, groups: int
):
    """In groups of 12."""
    found = spec(f"sampling.micro_batch={micro_batch}", "objective.updates=1").sampling
    assert (found.units_per_block, found.groups_per_block) == (units, groups)


def test_a_progressive_window_may_touch_the_last_stochastic_step():
    found = spec("sampling.window={kind: progressive, start: 6, length: 3, iterations: 5}")
    assert found.sampling.trained_steps == 3


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("sd35-ocr-4gpu", [], (4, 1.0, 0.9)),
        ("sd35-pickscore-1gpu", [], (1, 2.0, 0.6)),  # beside a reward that takes the rest
        ("sd35-pickscore", [], (32, 1.0, 0.9)),  # each of the 32 has a GPU for itself
        ("sd35-pickscore", ["cluster.workers.count=8"], (8, 1.0, 0.9)),  # the rest follows
        ("sd35-ocr", ["cluster.rollout.count=14"], (16, 1.875, 0.9)),  # 30, of 64 micro-batches
        ("tiny-ocr", [], (2, 0.75, 0.0)),
        ("tiny-ocr", ["cluster.workers={count: 1, cpus: 2, threads: 2}"], (1, 2.0, 0.0)),
    ],
)
def test_workers_follow_from_the_two_kinds_that_they_replace(
    recipe: str, overrides: list[str], expected: tuple[int, float, float]
):
    spec = load_spec(recipe, ["cluster.layout=colocated", *overrides])
    assert list(spec.actors) == ["workers"]
    assert spec.samplers == spec.ranks == spec.actors["workers"]
    assert (spec.ranks.count, spec.ranks.cpus, spec.ranks.gpus) == expected


def test_another_kind_brings_its_own_numbers():
    """Whatever the order; the kind that is there keeps what the file says."""
    plain = load_spec("tiny-ocr")
    guard = ["objective.kind=grpo_guard", "objective.epochs=2"]
    for overrides in (guard, guard[::-1]):
        found = load_spec("tiny-ocr", overrides).objective
        assert found == GrpoGuard(kind="grpo_guard", epochs=2)
        assert found.clip_high != plain.objective.clip_high
        assert plain.objective.kl is not None
        assert found.kl is None
    assert load_spec("tiny-ocr", ["objective.kind=flow_grpo"]) == plain
    lora = load_spec("sd35-ocr", ["tuning.kind=full"]).tuning
    assert lora == FullTuning(kind="full")
    whole = load_spec("tiny-ocr", ["sampling.window.kind=all"]).sampling.window
    assert whole == AllSteps(kind="all")


def test_objectives_have_their_own_defaults():
    """An objective that is left out is Flow-GRPO."""
    guard = GrpoGuard(kind="grpo_guard", clip_low=2e-6, clip_high=2e-6, updates=2, epochs=1)
    assert spec("objective={kind: grpo_guard}").objective == guard
    dppo = FlowDppo(kind="flow_dppo", max_divergence=1e-5, updates=2, epochs=1)
    assert spec("objective={kind: flow_dppo}").objective == dppo
    data = spec().model_dump(mode="json")
    del data["objective"]
    assert validate(data, "-").objective == FlowGrpo(
        kind="flow_grpo", clip_low=1e-4, clip_high=1e-4
    )


def test_several_mistakes_are_told_at_once():
    with pytest.raises(SpecError) as caught:
        spec("iteration=3", "seed=many", "ema.dekay=1")
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip().partition(":")[0] for line in lines] == ["seed", "ema.dekay", "iteration"]


# --- the YAML itself


def recipe_text() -> str:
    return (RECIPES / "tiny-ocr.yaml").read_text(encoding="utf-8")


def load_text(tmp_path: Path, text: str) -> TrainingSpec:
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return load_spec(str(path))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("seed: 1\niterations: 2\nseed: 3\n", ["line 3", "'seed'", "twice"]),
        ("seed: 1\nema:\n  decay: 0.1\n  decay: 0.2\n", ["line 4", "'decay'", "twice"]),
        ("seed: [1\n", ["spec.yaml", "not YAML"]),
        ("- seed\n", ["spec.yaml", "mapping", "list"]),
        ("", ["spec.yaml", "mapping"]),
        ("name: {{ name }}\n", ["line 1"]),  # a template that nobody filled in
    ],
)
def test_bad_yaml_names_the_place(tmp_path: Path, text: str, fragments: list[str]):
    with pytest.raises(SpecError) as caught:
        load_text(tmp_path, text)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_spec_that_is_not_utf8(tmp_path: Path):
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SpecError, match=r"spec\.yaml: not UTF-8"):
        load_spec(str(path))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.e-4", ".1e-3", "0.0001", "1.0e-4"])
def test_numbers_with_an_exponent_are_floats(text: str):
    """YAML 1.1 reads 1e-4 as text; who writes it means a number."""
    assert spec(f"optimizer.learning_rate={text}").optimizer.learning_rate == 1e-4


def test_unknown_recipe_or_file():
    with pytest.raises(SpecError) as caught:
        load_spec("tiny-ocrr")
    assert "did you mean the recipe 'tiny-ocr'?" in str(caught.value)
    with pytest.raises(SpecError, match=r"'no/such/spec\.yaml' is neither a file nor a recipe"):
        load_spec("no/such/spec.yaml")


def test_set_reaches_nested_keys_with_yaml_types():
    found = spec(
        "seed=7",
        "sampling.window={kind: all}",
        "sampling.size=[64, 96]",
        "rewards.ocr.options.batch=3",
        "cluster.dashboard=true",
        "objective.kl=null",
        "optimizer.weight_decay=1e-2",
        "tracking.wandb='a=b'",
    )
    assert found.seed == 7
    assert found.sampling.window.kind == "all"
    assert found.sampling.size == (64, 96)
    assert found.rewards["ocr"].options["batch"] == 3
    assert found.cluster.dashboard is True
    assert found.objective.kl is None
    assert found.optimizer.weight_decay == 0.01
    assert found.tracking.wandb == "a=b"


# --- what the spec names: rewards' options, prompts, model, GPUs


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ("{detekt: false}", ["'ocr'", "'detekt'", "did you mean 'detect'?"]),
        ("{zzz: 1}", ["'zzz'", "options: ", "rec_width"]),
    ],
)
def test_unknown_reward_option(options: str, fragments: list[str]):
    with pytest.raises(SpecError) as caught:
        check_run(spec(f"rewards.ocr.options={options}"))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("device", "gpus", "says"),
    [
        ("cuda", 0, "a replica sees no GPU that it has not reserved"),
        ("cuda:1", 0, "Give it a share"),
        ("cpu", 0.5, "gpus = 0.5: the share of a GPU would be reserved and never used"),
    ],
)
def test_a_reward_computes_where_it_has_reserved(device: str, gpus: float, says: str):
    """In a run and in a deployment of its own."""
    from flowgrpo_ray.serving.args import RewardServiceArgs

    options = f"{{device: '{device}'}}"
    with pytest.raises(SpecError, match=re.escape(says)):
        spec(f"rewards={{pickscore: {{gpus: {gpus}, options: {options}}}}}")
    with pytest.raises(ValueError, match=re.escape(says)):
        RewardServiceArgs(name="pickscore", gpus=float(gpus), options={"device": device})
    spec("rewards={pickscore: {gpus: 0.5, options: {device: 'cuda'}}}")
    spec("rewards={pickscore: {options: {device: 'cpu'}}}")


SIGN = b'red sign "1"\n'


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ["no such file"]),
        (b"", ["no prompts"]),
        (b" \n\n", ["no prompts"]),
        (SIGN + b'red sign "caf\xe9"\n', ["line 2", "UTF-8"]),
        (SIGN * 2 + b"red sign\n", ["prompt 3", "rewards.ocr", "red sign"]),
        (SIGN + b'sign "2"\n', ["prompt 2", "rewards.sign_colour", 'sign "2"']),
        (SIGN * 7, ["7 prompts", "sampling.groups = 8"]),
    ],
)
def test_unfit_prompt_file(tmp_path: Path, content: bytes | None, fragments: list[str]):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        check_run(spec(f"prompts.train={path}"))
    for fragment in ["prompts.train", *fragments]:
        assert fragment in str(caught.value)


def test_held_out_prompts_are_checked_too(tmp_path: Path):
    (tmp_path / "held.txt").write_bytes(SIGN + b"red sign\n")
    with pytest.raises(PromptError, match=r"prompts\.evaluate: prompt 2"):
        check_run(spec(f"prompts.evaluate={tmp_path}/held.txt"))


def test_model_folder_that_is_none(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        check_run(spec(f"model.path={tmp_path}/sd3"))
    assert f"model.path = '{tmp_path}/sd3'" in str(caught.value)
    assert "no such folder" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        check_run(spec(f"model.path={tmp_path}"))
    assert f"model.path = '{tmp_path}'" in str(caught.value)
    assert "model_index.json" in str(caught.value)
    with pytest.raises(ModelError, match="builtin:tiny-sd4"):
        check_run(spec("model.path=builtin:tiny-sd4"))
    check_run(spec("model.path=owner/name"))  # a hub id: this machine cannot know


def test_an_unknown_family_is_an_error_that_lists_the_known():
    with pytest.raises(SpecError, match=rf"model\.family: 'sd4' .*{', '.join(FAMILIES)}"):
        spec("model.family=sd4")


def test_a_folder_of_another_family_is_an_error():
    with pytest.raises(ModelError, match=r"holds no llm_config\.json.*'bagel'"):
        check_run(spec("model.family=bagel"))


def test_a_lora_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ModelError, match=r"model\.lora = .*no such file or folder"):
        check_run(spec(f"model.lora={tmp_path / 'nowhere'}"))
    check_run(spec("model.lora=owner/name"))  # a hub id: this machine cannot know


def test_epochs_and_windows_count_in_the_estimate():
    """96 images; 2 updates and 3 trained steps an epoch; the reference is asked while sampling."""
    found = count_work(
        spec(
            "objective={kind: flow_dppo, epochs: 4, kl: {beta: 0.1}}",
            "sampling.window={kind: progressive, length: 3, iterations: 5}",
        ),
        held_out=0,
    )
    assert (found.updates, found.trained_forwards) == (8, 96 * 3 * 4)
    assert (found.rollout_forwards, found.reference_forwards) == (96 * 10, 96 * 3)


def test_more_gpus_than_this_machine_has():
    session.check_local_gpus(spec())
    greedy = spec(
        "cluster.rollout={count: 500, gpus: 1}", "cluster.learner.gpus=1", "rewards.ocr.gpus=0.5"
    )
    with pytest.raises(ClusterError) as caught:
        session.check_local_gpus(greedy)
    for fragment in [
        "501.5 GPUs",
        "cluster.rollout.gpus = 1 (x 500)",
        "cluster.learner.gpus = 1 (x 1)",
        "rewards.ocr.gpus",
    ]:
        assert fragment in str(caught.value)


# --- the run folder


def claim(root: Path, *overrides: str, resume: bool = False) -> RunFolder:
    return RunFolder.claim(root, spec(*overrides), resume=resume)


def begun(root: Path) -> Path:
    """A run that has finished an iteration; its folder."""
    claim(root).release()
    (root / "tiny-ocr" / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1}\n')
    return root / "tiny-ocr"


def refusal(root: Path, *overrides: str, resume: bool = False) -> str:
    with pytest.raises(RunFolderError) as caught:
        claim(root, *overrides, resume=resume)
    assert str(root / "tiny-ocr") in str(caught.value)
    return str(caught.value)


def test_a_folder_with_another_runs_spec_is_refused(tmp_path: Path):
    begun(tmp_path)
    before = (tmp_path / "tiny-ocr" / "spec.yaml").read_bytes()
    text = refusal(tmp_path, "sampling.eta=0.5", resume=True)
    assert "sampling.eta is 0.8 there and 0.5 here" in text
    assert "--set name=" in text
    assert (tmp_path / "tiny-ocr" / "spec.yaml").read_bytes() == before


def test_a_resumed_run_takes_the_linear_layers_that_it_had(tmp_path: Path):
    """``auto`` is timed once; another choice can still be made."""
    RunFolder(begun(tmp_path)).write_spec(spec().with_linear("onednn"))
    for asked, kept in (("auto", "onednn"), ("torch", "torch"), ("auto", "torch")):
        folder = claim(tmp_path, f"cluster.cpu_linear={asked}", resume=True)
        folder.release()
        assert folder.read_spec() == spec(f"cluster.cpu_linear={kept}")


@pytest.mark.parametrize(
    "override", ["model.dtype=bfloat16", "model.compile=true", "cluster.learner.gpus=1"]
)
def test_onednn_is_for_float32_on_a_cpu(override: str):
    with pytest.raises(SpecError, match=r"cluster\.cpu_linear = onednn is for actors without GPUs"):
        spec("cluster.cpu_linear=onednn", override)


@pytest.mark.parametrize(
    "free",
    [
        "iterations=9",
        "cluster.rollout.count=5",
        "cluster.cpu_linear=onednn",
        "checkpoint.every=3",
        "rewards.ocr.replicas=2",
    ],
)
def test_the_difference_told_is_one_that_matters(tmp_path: Path, free: str):
    """Not one of those that a resumed run may change."""
    begun(tmp_path)
    assert "seed is 0 there and 5 here" in refusal(tmp_path, free, "seed=5", resume=True)


def test_the_same_run_needs_resume(tmp_path: Path):
    begun(tmp_path)
    assert "--resume" in refusal(tmp_path)
    claim(tmp_path, "iterations=500", "cluster.rollout.count=3", resume=True).release()
    assert RunFolder.existing(tmp_path / "tiny-ocr").read_spec().iterations == 500


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path: Path):
    """However it ends: the lock goes with the process, even a killed one."""
    claim(tmp_path).release()
    lock = tmp_path / "tiny-ocr" / ".lock"
    hold = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
        "print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    assert "another process is training in it" in refusal(tmp_path, resume=True)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    ours = claim(tmp_path, resume=True)
    with lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ... and it is ours now
    ours.release()


# --- the resolved spec


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tuning={kind: lora, targets: [a.b, c]}", "sampling.window={kind: all}", "ema=null"],
        [
            "sampling.window={kind: progressive, length: 3, iterations: 9, roll_back: true}",
            "objective={kind: flow_dppo, epochs: 2}",
            "advantages={std: global, per_reward: true, refill: 2}",
            "watch={fall: 1, action: stop}",
        ],
        ["objective.kl={beta: 0.1, adapt: {reward: sign_colour, rate: 0.25}}"],
        ["objective.kl=null", "model.path=/a b/ü", "optimizer.learning_rate=1.234567890123e-7"],
        ["name='1e5'", "prompts.train='1e-4'", "model.path='2026-11-22'", "tracking.wandb='no'"],
    ],
    ids=["recipe", "unions", "other kinds", "a tie", "values", "text like numbers"],
)
def test_resolved_spec_reads_back_equal(tmp_path: Path, overrides: list[str]):
    """A run folder keeps the resolved spec: if it read back otherwise, no run could resume."""
    original = spec(*overrides)
    again = load_text(tmp_path, dump_spec(original))
    assert again == original
    assert again.digest() == original.digest()
    assert again.identity() == original.identity()
    assert original.digest() in dump_spec(original).splitlines()[0]


FREE = [
    "name=x",
    "iterations=9999",
    "cluster.rollout.count=7",
    "checkpoint.every=3",
    "tracking.tensorboard=false",
    "watch={window: 3, fall: 0.5, significance: 3, action: stop}",
    "rewards.ocr.replicas=4",
]
BOUND = [
    "seed=5",
    "model.dtype=bfloat16",
    "sampling.eta=0.7",
    "sampling.micro_batch=12",
    "sampling.likelihood=squared_error",
    "sampling.window={kind: progressive, length: 2, iterations: 3}",
    "sampling.window={kind: progressive, length: 2, iterations: 3, roll_back: true}",
    "rewards.ocr.weight=0.5",
    "rewards.ocr.options.batch=3",
    "optimizer.learning_rate=3e-4",
    "objective.clip_high=0.5",
    "objective.kind=grpo_guard",
    "objective.epochs=2",
    "advantages.std=global",
    "advantages.per_reward=true",
    "advantages.clamp=3",
    "advantages.refill=1",
    "prompts.train=other.txt",
    "ema=null",
    "evaluation.steps=3",
]


def test_identity_is_what_determines_the_numbers():
    plain = spec()
    for override in FREE:
        assert spec(override).identity() == plain.identity(), override
        assert spec(override).digest() != plain.digest(), override
    assert len({spec(o).identity() for o in BOUND} | {plain.identity()}) == len(BOUND) + 1


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid_short_and_says_what_it_is(name: str):
    found = load_spec(name)
    assert found.name == name
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert text.startswith("# ")
    assert yaml.safe_load(text)["name"] == name


def test_reading_a_spec_loads_neither_torch_nor_ray():
    """`plan` and every error of a spec are there in a second, on a machine without a GPU stack."""
    code = (
        "import sys, json; from flowgrpo_ray.spec.file import load_spec; load_spec('tiny-ocr');"
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    loaded = {module.partition(".")[0] for module in json.loads(run.stdout)}
    assert not loaded & {"torch", "ray", "diffusers", "transformers", "peft", "rapidocr", "PIL"}


def test_every_error_is_of_the_one_tree():
    for error in (SpecError, PromptError, ModelError, RunFolderError, ClusterError):
        assert issubclass(error, FlowGrpoError)
