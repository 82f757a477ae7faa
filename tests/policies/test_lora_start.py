"""Runs that start from a LoRA (``model.lora``): where it is, what it becomes, what fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_rules
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hub import REPO, tiny_hub
from tiny_models import spec_of
from tiny_runs import (
    CPU,
    FULL,
    LORA,
    PROMPTS,
    alone,
    conditions,
    draw_batches,
    one_thread,
    perturb,
    small_spec,
    state_of,
    update,
)

from flowgrpo_ray.algorithm.learner import Learner
from flowgrpo_ray.algorithm.sampling import batch_condition
from flowgrpo_ray.common.errors import ModelError, SpecError
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.base import Policy
from flowgrpo_ray.policies.lora_file import LoraFile, read_lora
from flowgrpo_ray.run.inference import generate, load_trained

DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"
TARGETS = (
    "[attn.add_k_proj, attn.add_q_proj, attn.add_v_proj, attn.to_add_out, attn.to_k, "
    "attn.to_out.0, attn.to_q, attn.to_v]"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def tuned(*overrides: str, reference: bool = True) -> Policy:
    policy = load_policy(small_spec(*overrides), CPU, frozenset({"network"}))
    policy.tune(seed=3, with_reference=reference)
    return policy


def start(place: Path | str) -> str:
    return f"model.lora={place}"


@pytest.fixture(scope="module")
def made() -> Policy:
    """A policy whose adapters are no longer what they were drawn as."""
    policy = tuned(LORA)
    perturb(policy, size=0.1)
    return policy


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> Path:
    """Its adapters in diffusers' layout."""
    path: Path = tmp_path_factory.mktemp("lora")
    made.save_lora(path)
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


@torch.no_grad()
def velocity(policy: Policy) -> torch.Tensor:
    condition = batch_condition(policy, conditions(policy.guidance), (0, 1))
    x = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    return policy.velocity(x, 0.6, condition)


def as_peft(folder: Path, out: Path, **config: Any) -> Path:
    """The adapters of ``folder`` in peft's layout."""
    from peft import LoraConfig

    out.mkdir()
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["attn.to_q"], **config}
    LoraConfig(**settings).save_pretrained(str(out))
    weights = load_file(folder / DIFFUSERS)
    named = {n.replace("transformer.", "base_model.model.", 1): w for n, w in weights.items()}
    save_file(named, out / PEFT)
    return out


# --- what it becomes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["folder", "file", "another name", "peft", "peft's file"])
def test_adapters_go_on_from_the_file_bit_for_bit(made, folder, layout, dtype, tmp_path):
    place = {
        "folder": lambda: folder,
        "file": lambda: folder / DIFFUSERS,
        "another name": lambda: shutil.copy(folder / DIFFUSERS, tmp_path / "mine.safetensors"),
        "peft": lambda: as_peft(folder, tmp_path / "peft"),
        "peft's file": lambda: as_peft(folder, tmp_path / "peft") / PEFT,
    }[layout]()
    policy = tuned(LORA, start(place), f"model.dtype={dtype}")
    trainable = policy.trainable()
    assert trainable.keys() == made.trainable().keys()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert all(torch.equal(p, made.trainable()[name]) for name, p in trainable.items())
    if dtype == "float32":
        assert torch.equal(velocity(policy), velocity(made))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_what_training_started_from(folder, dtype):
    policy = tuned(LORA, start(folder), f"model.dtype={dtype}")
    first, base = velocity(policy), velocity(tuned(LORA, f"model.dtype={dtype}"))
    assert (first - base).abs().max() > 1e-2
    perturb(policy)
    trained, names = velocity(policy), list(policy.trainable())
    assert (trained - first).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(velocity(policy), first)
    assert torch.equal(velocity(policy), trained)
    assert list(policy.trainable()) == names


def test_the_reference_copy_is_neither_trained_nor_saved(folder, tmp_path):
    policy = tuned(LORA, start(folder))
    plain = tuned(LORA, start(folder), reference=False)
    assert list(policy.trainable()) == list(plain.trainable())
    policy.save_lora(tmp_path / "again")
    again, before = load_file(tmp_path / "again" / DIFFUSERS), load_file(folder / DIFFUSERS)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in again)
    policy.velocity(
        torch.ones(1, 4, 8, 12), 0.6, batch_condition(policy, conditions(), (0,))
    ).sum().backward()
    with_gradient = {n for n, p in policy.network.named_parameters() if p.grad is not None}
    assert with_gradient
    assert with_gradient <= set(policy.trainable())


def test_full_tuning_merges_it_into_the_weights(made, folder):
    """``(W + B A) x`` for ``W x + B (A x)``: velocities of size 4 agree to rounding, 5e-6."""
    policy = tuned(FULL, start(folder))
    first = velocity(policy)
    assert (first - velocity(tuned(FULL))).abs().max() > 1e-2
    assert (first - velocity(made)).abs().max() < 2e-5
    assert policy.trainable().keys() == tuned(FULL).trainable().keys()
    weight = policy.network.get_parameter(f"{LAYER}.weight")
    base = tuned(FULL).network.get_parameter(f"{LAYER}.weight")
    a, b = (made.trainable()[f"{LAYER}.lora_{which}.default.weight"] for which in "AB")
    exact = base.double() + 8 / 4 * b.double() @ a.double()
    assert (weight.double() - exact).abs().max() < 1e-7
    perturb(policy)
    with policy.reference():
        assert torch.equal(velocity(policy), first)


def test_masters_are_merged_in_float32_whatever_the_dtype_of_forwards(folder):
    exact = tuned(FULL, start(folder)).trainable()
    half = tuned(FULL, start(folder), "model.dtype=bfloat16").trainable()
    assert all(torch.equal(exact[name], p) for name, p in half.items())


def test_any_rank_can_be_merged(folder):
    """The file's own rank and alpha count; full tuning has none."""
    with pytest.raises(SpecError):
        tuned("tuning={kind: lora, rank: 2, alpha: 8}", start(folder))
    assert torch.equal(velocity(tuned(FULL, start(folder))), velocity(tuned(FULL, start(folder))))


def test_a_file_of_another_alpha_starts_as_strong_as_it_is(made, copied):
    """Without an alpha its strength is 1, as diffusers has it; whatever ``tuning.alpha`` is, B A is
    scaled to it, bit for bit with quotients of powers of two."""
    file = copied / DIFFUSERS
    save_file(load_file(file), file)  # without its header
    half = "tuning={kind: lora, rank: 4, alpha: 2}"
    for tuning in (LORA, "tuning={kind: lora, rank: 4, alpha: 4}", half):
        policy = tuned(tuning, start(copied))
        assert torch.equal(velocity(policy), velocity(made))
        with policy.reference():
            assert torch.equal(velocity(policy), velocity(made))
    b = f"{LAYER}.lora_B.default.weight"
    assert torch.equal(tuned(half, start(copied)).trainable()[b], 4 * made.trainable()[b])


def test_other_quotients_round_each_entry_of_b_once(folder):
    """By half a unit in the last place, 2^-24 of its size."""
    thirds = tuned("tuning={kind: lora, rank: 4, alpha: 3}", start(folder)).trainable()
    ones = tuned("tuning={kind: lora, rank: 4, alpha: 4}", start(folder)).trainable()
    for name, parameter in thirds.items():
        exact = ones[name].double() * (4 / 3 if ".lora_B." in name else 1)
        assert ((parameter.double() - exact).abs() <= exact.abs() * 2**-24).all()


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_a_learner_trains_on_from_it(folder, tuning):
    with alone():
        spec = small_spec(tuning, start(folder), "objective.kl={beta: 0.5}")
        learner = Learner(spec, CPU)
        workers = tuned(tuning, start(folder)).trainable()
        first = state_of(learner).weights
        assert all(torch.equal(torch.from_numpy(first[n]), p) for n, p in workers.items())
        for batch in draw_batches(spec, 1):
            stats = batch.into(learner)
            assert (stats.gate_max, stats.sums.get("kl", 0.0)) == (0.0, 0.0)
        update(learner, draw_batches(spec, 1))
        moved = state_of(learner).weights
        assert any((moved[n] != first[n]).any() for n in first)


def test_a_spec_without_a_run_stands_for_the_model_with_its_lora(made, folder):
    spec = small_spec(LORA, start(folder))
    policy = load_trained(spec, None, "ema")
    assert torch.equal(velocity(policy), velocity(made))
    images = generate(policy, spec, PROMPTS[:1], 2, 0, 1)
    base = generate(load_trained(small_spec(), None, "ema"), small_spec(), PROMPTS[:1], 2, 0, 1)
    assert (images != base).any()


# --- the hub


def test_a_hub_id_is_downloaded(made, folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with tiny_hub(folder) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        policy = tuned(LORA, start(REPO))
    assert any(path.endswith(DIFFUSERS) for path in asked)
    assert torch.equal(velocity(policy), velocity(made))


# --- what does not fit


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (
            "{kind: lora, rank: 8, alpha: 16}",
            r"tuning\.rank = 8 does not fit the adapters of model\.lora = '.*', which have rank 4"
            r"\. Set tuning\.rank: 4$",
        ),
        (
            "{kind: lora, rank: 4, alpha: 8, targets: [attn.to_q, attn.to_k]}",
            r"tuning\.targets = \['attn\.to_q', 'attn\.to_k'\] chooses 6 layers and does not fit "
            r".* which are on 23; 'transformer_blocks\.0\.attn\.add_k_proj' is only there",
        ),
        (
            "{kind: lora, rank: 4, alpha: 8, targets: [attn.to_q, ff.net.2]}",
            r"'transformer_blocks\.\d\.[a-z_.]+' is only ",
        ),
    ],
)
def test_a_tuning_that_differs_names_both_and_what_to_set(folder, tuning, message):
    with pytest.raises(SpecError, match=message) as error:
        tuned(f"tuning={tuning}", start(folder))
    if "targets" in tuning:
        assert str(error.value).endswith(f"Set tuning.targets: {TARGETS}")


def test_what_to_set_works(folder):
    tuned(f"tuning={{kind: lora, rank: 4, alpha: 8, targets: {TARGETS}}}", start(folder))


def test_a_place_that_is_not_there_is_an_error_that_names_the_key(tmp_path):
    with pytest.raises(ModelError, match=r"model\.lora = '.*nowhere'.*no such file or folder"):
        tuned(LORA, start(tmp_path / "nowhere"))


def test_a_hub_that_does_not_answer_is_an_error_that_names_the_key(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ModelError, match=r"model\.lora = 'owner/absent'.*hub model that this mach"):
        tuned(LORA, start("owner/absent"))


def rewrite(file: Path, change: Any) -> None:
    """``change`` the file's weights, and keep its metadata."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata=metadata)


@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"text_encoder.q.lora_A.weight": torch.ones(4, 8)}),
            r"it holds 'text_encoder\.q\.lora_A\.weight'.*the denoiser's layers alone",
        ),
        (
            lambda w: w.update({"transformer.proj_out.lora_up.weight": torch.ones(4, 8)}),
            "proj_out lacks its A or its B",
        ),
        (
            lambda w: w.update({f"transformer.{LAYER}.dora_scale": torch.ones(8)}),
            r"it holds 'transformer\..*to_q\.dora_scale'.*plain adapters",
        ),
        (
            lambda w: w.update({f"transformer.{LAYER}.alpha": torch.tensor(4.0)}),
            "it has an alpha for each layer and another for all",
        ),
        (
            lambda w: w.update({"lora_unet_foo.lora_up.weight": torch.ones(8, 4)}),
            r"it holds 'lora_unet_foo\.lora_up\.weight', which names no layer of this model, or",
        ),
        (
            lambda w: w.update({f"diffusion_model.{LAYER}.lora_A.weight": torch.ones(4, 128)}),
            f"it adapts {LAYER} twice, once as",
        ),
        (dict.clear, "it holds nothing"),
        (
            lambda w: w.update({f"transformer.up.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
            "made for another model: it adapts 1 layers that .* does not have .*, as 'up'",
        ),
        (
            lambda w: w.update({f"transformer.{LAYER}.lora_A.weight": torch.ones(4, 96)}),
            r"made for another model: .*to_q\.lora_A\.weight is \(4, 96\) there and \(4, 128\)",
        ),
        (
            lambda w: w.update({f"transformer.{LAYER}.lora_A.weight": torch.ones(2, 128)}),
            r"its layers have ranks \[2, 4\]",
        ),
        (lambda w: w.pop(f"transformer.{LAYER}.lora_B.weight"), "to_q.* lacks its A or its B"),
    ],
    ids=[
        *("text encoder", "old names", "dora", "alphas", "unknown", "twice"),
        *("empty", "layer", "shape", "ranks", "half"),
    ],
)
def test_a_file_of_something_else_is_an_error_that_names_the_key(copied, tuning, change, message):
    rewrite(copied / DIFFUSERS, change)
    with pytest.raises(ModelError, match=message) as error:
        tuned(tuning, start(copied))
    assert f"model.lora = '{copied}'" in str(error.value)


A, B = torch.ones(2, 8), torch.ones(8, 2)


def network_of(family: str) -> torch.nn.Module:
    return load_policy(spec_of(family, FULL), CPU, frozenset({"network"})).network


def written_by_others(family: str, style: str) -> dict[str, torch.Tensor]:
    """Adapters of rank 3 of some layers of the family's tiny model, as the published one calls
    them, each with an alpha of its own where the style has alphas."""
    generator = torch.Generator().manual_seed(0)
    prefix, down, up = {
        "kohya": ("lora_unet_", "lora_down", "lora_up"),
        "comfy": ("diffusion_model.", "lora_A", "lora_B"),
    }[style]
    file: dict[str, torch.Tensor] = {}
    published = comfy_rules.Published(family, network_of(family).state_dict())
    blocks = [
        n
        for n in published.weights
        if re.search(r"(blocks|layers)\.1\.|refiner\.0\.", n) and ".norm" not in n
    ]
    for number, name in enumerate(sorted(blocks), 1):
        rows, columns = published.weights[name].shape
        stem = prefix + (name.replace(".", "_") if style == "kohya" else name)
        file[f"{stem}.{down}.weight"] = torch.randn((3, columns), generator=generator)
        file[f"{stem}.{up}.weight"] = torch.randn((rows, 3), generator=generator)
        if number % 2:  # some have none: as strong as rank 3 then
            file[f"{stem}.alpha"] = torch.tensor(float(number))
    return file


@pytest.mark.parametrize("style", ["kohya", "comfy"])
@pytest.mark.parametrize("family", comfy_rules.BLOCKS)
def test_files_of_other_programs_change_the_weights_as_comfyui_does(family, style, tmp_path):
    """Fused layers and an alpha per layer: against the published rules, to rounding."""
    file = written_by_others(family, style)
    save_file(file, tmp_path / "theirs.safetensors", metadata={"ss_network_alpha": "1.0"})
    spec = spec_of(family, FULL, start(tmp_path / "theirs.safetensors"))
    policy = load_policy(spec, CPU, frozenset({"network"}))
    base = comfy_rules.Published(family, policy.network.state_dict())
    policy.tune(seed=0, with_reference=False)
    ours = comfy_rules.Published(family, policy.network.state_dict()).weights
    for name, weight in base.with_lora(file).items():
        assert (weight - ours[name]).abs().max() < 1e-4
        changed = any(key.split(".lora_")[0].endswith((name, flat(name))) for key in file)
        assert torch.equal(base.weights[name], ours[name]) != changed


def flat(name: str) -> str:
    return name.replace(".", "_")


def read(
    path: Path, names: dict[str, torch.Tensor], network: torch.nn.Module, pipeline: str = ""
) -> LoraFile:
    save_file({name: x.clone() for name, x in names.items()}, path / "theirs.safetensors")
    model = small_spec(LORA, start(path / "theirs.safetensors")).model
    return read_lora(model, network, pipeline, {})


def of_layers(*names: str) -> torch.nn.Module:
    """A network with a linear layer, 8 to 8, at each of ``names``."""
    network = torch.nn.Module()
    for name in names:
        place = network
        *above, last = name.split(".")
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, torch.nn.Linear(8, 8))
    return network


@pytest.mark.parametrize("style", ["lora_transformer_a_b.lora_{}", "lycoris_a_b.lora.{}"])
def test_flat_names_are_read_where_they_name_one_layer(style, tmp_path):
    names = {f"{style.format(side)}.weight": x for side, x in (("down", A), ("up", B))}
    file = read(tmp_path, names, of_layers("a.b", "c"))
    assert (file.layers, file.rank, file.alpha) == (["a.b"], 2, 2)
    with pytest.raises(ModelError, match="names no layer of this model, or more than one"):
        read(tmp_path, names, of_layers("a.b", "a_b"))


def test_other_names_are_left_to_diffusers(tmp_path):
    """XLabs' are; what it does not know is refused by name."""
    theirs, pipeline = "double_blocks.0.processor.proj_lora1", "FluxPipeline"
    names = {f"{theirs}.{side}.weight": x for side, x in (("down", A), ("up", B))}
    file = read(tmp_path, names, of_layers("a"), pipeline)
    assert file.layers == ["transformer_blocks.0.attn.to_out.0"]
    names = {f"lora_unet_double_blocks_9_other.lora_{side}.weight": A for side in ("down", "up")}
    with pytest.raises(ModelError, match=r"(?s)Incompatible keys.*double_blocks_9_other"):
        read(tmp_path, names, of_layers("a"), pipeline)


def test_alphas_become_part_of_b(tmp_path):
    names = {"a.lora_A.weight": A, "a.lora_B.weight": B, "a.alpha": torch.tensor(6.0)}
    names |= {"b.lora_A.weight": A, "b.lora_B.weight": B}
    file = read(tmp_path, names, of_layers("a", "b"))
    assert (file.rank, file.alpha) == (2, 2)
    assert torch.equal(file.weights["a.lora_B.weight"], 3 * B)
    assert torch.equal(file.weights["b.lora_B.weight"], B)


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.tensor(torch.nan), torch.ones(2)])
def test_an_alpha_that_is_no_strength_is_refused(alpha, tmp_path):
    names = {"a.lora_A.weight": A, "a.lora_B.weight": B, "a.alpha": alpha}
    with pytest.raises(ModelError, match=r"a\.alpha is .*, for rank 2"):
        read(tmp_path, names, of_layers("a"))


def test_pefts_layout_needs_its_config(folder, tmp_path):
    (as_peft(folder, tmp_path / "peft") / "adapter_config.json").unlink()
    with pytest.raises(
        ModelError, match=r"model\.lora.*peft's layout: a folder with adapter_config"
    ):
        tuned(LORA, start(tmp_path / "peft"))


def test_layers_that_full_tuning_never_trains_are_not_merged_into(folder, monkeypatch):
    """They would be lost on export, and prompts that were encoded before would not know of them."""
    policy = load_policy(small_spec(FULL, start(folder)), CPU, frozenset({"network"}))
    some = [p for n, p in policy.network.named_parameters() if ".add_q_proj." not in n]
    monkeypatch.setattr(policy, "full_parameters", lambda: iter(some))
    with pytest.raises(ModelError, match=r"adapts 3 layers that .* never trains.*add_q_proj"):
        policy.tune(seed=0, with_reference=False)


@pytest.mark.parametrize("key", ["use_dora", "use_rslora"])
def test_other_kinds_of_lora_are_refused(folder, key, tmp_path):
    place = as_peft(folder, tmp_path / "peft", **{key: True})
    with pytest.raises(ModelError, match=rf"model\.lora.*it uses {key}"):
        tuned(FULL, start(place))


def test_a_folder_of_several_files_needs_a_name(folder, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(folder / DIFFUSERS, tmp_path / name)
    with pytest.raises(ModelError, match=r"model\.lora.*holds 2 safetensors files; name one"):
        tuned(LORA, start(tmp_path))
    tuned(LORA, start(tmp_path / "b.safetensors"))


def test_a_cut_off_file_and_a_broken_config_are_errors_that_name_the_key(copied, tmp_path):
    peft = as_peft(copied, tmp_path / "peft")
    (peft / "adapter_config.json").write_text(json.dumps({"r": 4})[:-1])
    with pytest.raises(ModelError, match=r"model\.lora"):
        tuned(LORA, start(peft))
    file = copied / DIFFUSERS
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.lora"):
        tuned(LORA, start(copied))
