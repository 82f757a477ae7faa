"""A checkpoint that does not fit is refused by name, before it is loaded; none is half-loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, model_folder, spec_of
from tiny_runs import CPU

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.estimate.preflight import check_access, check_model
from flowgrpo_ray.policies import fit, hub, load_policy, policy_class
from flowgrpo_ray.spec.families import FAMILIES

NETWORK = frozenset({"network"})
Tensors = dict[str, torch.Tensor]


def copied(family: str, folder: Path) -> Path:
    return Path(shutil.copytree(model_folder(family), folder / family))


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(family: str, folder: Path) -> str:
    """What is said before a start, which is also said to whoever loads the model all the same."""
    spec = MODELS[family].spec(folder)
    with pytest.raises(ModelError) as before:
        check_model(spec.model)
    with pytest.raises(ModelError) as loading:
        load_policy(spec, CPU, NETWORK)
    assert str(before.value) == str(loading.value)
    return str(before.value)


def test_families_and_policies_name_the_same_pipelines():
    driven = [name for family in FAMILIES.values() for name in family.pipelines]
    assert len(driven) == len(set(driven)), "one family for each"
    for name, family in FAMILIES.items():
        own = policy_class(name).pipeline
        assert own in family.pipelines if own else not family.pipelines, name


@pytest.mark.parametrize(
    ("pipeline", "advice"),
    [
        ("FluxKontextPipeline", "Set model.family: flux_kontext"),
        ("FluxFillPipeline", "No family drives it"),
        ("QwenImagePipeline", "Set model.family: qwen_image"),
        (None, "No family drives it"),
    ],
)
def test_a_folder_of_another_pipeline_is_refused(tmp_path: Path, pipeline: str | None, advice: str):
    folder = copied("flux", tmp_path)
    check_model(MODELS["flux"].spec(folder).model)
    rewrite(folder / "model_index.json", _class_name=pipeline)
    said = refused("flux", folder)
    assert f"is of {pipeline}, and family 'flux' drives FluxPipeline. {advice}" in said


def test_a_hub_model_is_refused_by_its_index_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "hub_file", lambda _, name: model_folder("qwen_image") / name)
    model = spec_of("qwen_image").model.model_copy(update={"path": "owner/name"})
    check_access(model)
    with pytest.raises(ModelError, match=r"is of QwenImagePipeline, .* Set model\.family: qwen"):
        check_access(model.model_copy(update={"family": "flux"}))


@pytest.mark.parametrize(
    ("part", "config", "kind"),
    [
        (
            "transformer",
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes nf4",
        ),
        ("text_encoder_2", {"quant_method": "torchao", "quant_type": {}}, "torchao"),
        ("transformer", {"quant_method": "nunchaku_lite"}, "nunchaku_lite"),
        ("text_encoder", "fp8", "fp8"),
    ],
)
def test_quantised_weights_are_refused(tmp_path: Path, part: str, config: Any, kind: str):
    folder = copied("flux", tmp_path)
    rewrite(folder / part / "config.json", quantization_config=config)
    said = refused("flux", folder)
    assert f"the weights of '{part}' are quantised ({kind}). Quantised weights" in said
    assert said.endswith(
        "model.dtype: bfloat16 and cluster.learner.parallel: shard take the least memory"
    )


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float16, None),
        (torch.float64, None),
        (torch.int64, None),
    ],
)
def test_weights_of_less_than_16_bits_are_quantised_whatever_their_config_says(
    tmp_path: Path, dtype: torch.dtype, kind: str | None
):
    """As scaled or packed weights of fp8, torchao, bitsandbytes and nunchaku are."""
    folder = copied("flux", tmp_path)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    if kind is None:
        check_model(MODELS["flux"].spec(folder).model)
    else:
        assert f"({kind} in {file.name})" in refused("flux", folder)


def test_quantised_files_are_refused_by_their_names(tmp_path: Path):
    folder = copied("flux", tmp_path)
    (folder / "transformer" / "quanto_qmap.json").write_text("{}")
    assert "'transformer' are quantised (quanto)" in refused("flux", folder)
    folder = copied("flux", tmp_path / "gguf")
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.rename(file.with_suffix(".gguf"))
    assert "'transformer' are quantised (gguf)" in refused("flux", folder)
    single = file.with_suffix(".gguf")
    model = MODELS["flux"].spec(single).model
    with pytest.raises(ModelError, match=r"\.gguf' is one file, and models are folders"):
        check_model(model)


def test_quantised_weights_that_lie_flat_are_refused(tmp_path: Path):
    folder = copied("bagel", tmp_path)
    file = folder / "ema.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "scale": torch.zeros(2, dtype=torch.float8_e4m3fn)}, file)
    with pytest.raises(ModelError, match=r"are quantised \(F8_E4M3 in ema\.safetensors\)"):
        check_model(MODELS["bagel"].spec(folder).model)


@pytest.mark.parametrize("family", MODELS)
def test_models_as_they_are_published_are_not_quantised(family: str):
    check_model(spec_of(family).model)


def without_first(tensors: Tensors) -> None:
    del tensors[min(tensors)]


def with_another(tensors: Tensors) -> None:
    tensors["another.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("part", "change", "fragment"),
    [
        ("transformer", without_first, "1 are missing, as context_embedder.bias"),
        ("transformer", with_another, "1 have no place, as another.weight"),
        ("vae", without_first, "1 are missing, as decoder.conv_in.bias"),
        ("text_encoder", without_first, "1 are missing, as embeddings.position_embedding.weight"),
        ("text_encoder_2", without_first, "1 are missing, as encoder.block.0"),
    ],
)
def test_no_tensor_is_left_at_random(
    tmp_path: Path, part: str, change: Callable[[Tensors], None], fragment: str
):
    folder = copied("flux", tmp_path)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    parts = {"transformer": "network", "vae": "decoder"}
    with pytest.raises(ModelError) as caught:
        load_policy(MODELS["flux"].spec(folder), CPU, frozenset({parts.get(part, "encoder")}))
    assert f"the weights of '{part}' do not fit its config.json" in str(caught.value)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("family", MODELS)
def test_a_network_that_memory_cannot_hold_is_not_loaded(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    """It takes 4 bytes a value in float32, to the byte."""
    spec = spec_of(family)
    network = load_policy(spec, CPU, NETWORK).network
    size = 4 * sum(tensor.numel() for tensor in network.state_dict().values())
    monkeypatch.setattr(fit, "available_memory", lambda: size)
    load_policy(spec, CPU, NETWORK)
    monkeypatch.setattr(fit, "available_memory", lambda: size - 1)
    with pytest.raises(ModelError, match=r"takes .* GiB of memory, and .* GiB are available"):
        load_policy(spec, CPU, NETWORK)


def test_a_containers_limit_is_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in (
        ("memory.max", "5000\n"),
        ("memory.current", "1500\n"),
        ("memory.stat", "anon 900\ninactive_file 200\nactive_file 100\nshmem 300\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(fit, "CGROUP", tmp_path)
    assert fit.available_memory() == 5000 - 1500 + 300
    (tmp_path / "memory.max").write_text("max\n")
    assert fit.available_memory() > 2**20
