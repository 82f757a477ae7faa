"""Whether a model's files are those of its family, and fit this machine; never half-loaded.

Needs no torch: what a folder shows is looked at before anything starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.strict_json import parse
from flowgrpo_ray.spec.families import FAMILIES, family_of

if TYPE_CHECKING:
    from flowgrpo_ray.spec.sections import ModelSpec

QUANTO = "quanto_qmap.json"  # of optimum-quanto, beside its weights
SMALL = re.compile(r"(F[4-8](_\w+)?|[IU][1-8])$")  # dtypes of safetensors with fewer than 16 bits
CGROUP = Path("/sys/fs/cgroup")  # of this machine or container


def check_class(model: ModelSpec, index: Mapping[str, Any]) -> None:
    """``ModelError`` unless model_index.json, here ``index``, is of a pipeline of the family."""
    driven = FAMILIES[model.family].pipelines
    found = index.get("_class_name")
    if not driven or found in driven:
        return
    other = family_of(found)
    raise ModelError(
        f"model.path = {model.path!r}: model_index.json is of {found}, and family "
        f"{model.family!r} drives {' and '.join(driven)}. "
        + (f"Set model.family: {other}" if other else "No family drives it: take another model")
    )


def check_config(model: ModelSpec, part: str, config: Mapping[str, Any]) -> None:
    """``ModelError`` for a part whose config.json says that its weights are quantised."""
    if quantised := config.get("quantization_config"):
        of = quantised if isinstance(quantised, dict) else {"quant_method": quantised}
        kind = [str(of[key]) for key in ("quant_method", "bnb_4bit_quant_type") if of.get(key)]
        _refuse(model, part, " ".join(kind))


def check_files(model: ModelSpec, part: str, folder: Path) -> None:
    """``ModelError`` for a part whose files hold quantised weights: by what they are, whatever its
    config.json says."""
    files = [*folder.glob("*.safetensors")]
    if (folder / QUANTO).exists():
        _refuse(model, part, "quanto")
    if not files and [*folder.glob("*.gguf")]:
        _refuse(model, part, "gguf")
    for file in files:
        kinds = {str(entry.get("dtype")) for entry in _tensors(file).values()}
        if small := sorted(kind for kind in kinds if SMALL.match(kind)):
            _refuse(model, part, f"{small[0]} in {file.name}")


def _refuse(model: ModelSpec, part: str, kind: str) -> NoReturn:
    raise ModelError(
        f"model.path = {model.path!r}: the weights of {part!r} are quantised ({kind}). Quantised "
        "weights are not loaded: samplers and learners could not share them to the last bit. Take "
        "the model as it was published in 16 or 32 bits; for a LoRA, model.dtype: bfloat16 and "
        "cluster.learner.parallel: shard take the least memory"
    )


def check_tensors(
    model: ModelSpec, part: str, missing: Collection[str], unexpected: Collection[str]
) -> None:
    """``ModelError`` for tensors that would be left at random, or that have no place."""
    if missing or unexpected:
        told = [
            f"{len(names)} {what}, as {min(names)}"
            for names, what in ((missing, "are missing"), (unexpected, "have no place"))
            if names
        ]
        raise ModelError(
            f"model.path = {model.path!r}: the weights of {part!r} do not fit its config.json: of "
            f"its tensors {' and '.join(told)}. Copy the whole folder of one model anew"
        )


def check_memory(model: ModelSpec, part: str, needed: int) -> None:
    """``ModelError`` where a part's ``needed`` bytes are more than this machine can give."""
    available = available_memory()
    if needed > available:
        raise ModelError(
            f"model.path = {model.path!r}: {part!r} takes {needed / 2**30:.1f} GiB of memory, and "
            f"{available / 2**30:.1f} GiB are available on this machine. Give it more, fewer "
            "actors, or a smaller dtype (full tuning loads float32)"
        )


def values_in(folder: Path) -> int:
    """How many values the tensors of a part's safetensors files hold, by their headers."""
    return sum(_values(file) for file in folder.glob("*.safetensors") if "fp16" not in file.name)


def _values(file: Path) -> int:
    try:
        return sum(math.prod(entry["shape"]) for entry in _tensors(file).values())
    except (KeyError, TypeError):
        return 0  # whoever loads it says what is wrong


def _tensors(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file as its header describes them; none of a damaged one."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse(stream.read(min(length, file.stat().st_size)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return entries if all(isinstance(of, dict) for of in entries.values()) else {}
    except (OSError, ValueError, AttributeError):
        return {}  # whoever loads it says what is wrong


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container's limit."""
    import psutil

    available: int = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        rows = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:  # no container, or one of the older kind
        return available
    if limit == "max":
        return available
    kinds = dict(row.split() for row in rows)
    freed = int(kinds["inactive_file"]) + int(kinds["active_file"])  # when it is needed
    return min(available, int(limit) - used + freed)
