"""What can be wrong with a run and be seen without starting it; loads nothing heavy."""

from __future__ import annotations

import tempfile

from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.common.paths import local_path
from flowgrpo_ray.policies.hub import check_model_files
from flowgrpo_ray.rewards.environments import python_of
from flowgrpo_ray.spec.families import FAMILIES
from flowgrpo_ray.spec.prompts import Prompt, load_prompt_sets
from flowgrpo_ray.spec.sections import ModelSpec
from flowgrpo_ray.spec.training import TrainingSpec


def check_run(spec: TrainingSpec, *, elsewhere: bool = False) -> tuple[list[Prompt], list[Prompt]]:
    """The training and held-out prompts, after every check that needs no cluster.

    A run that will be ``elsewhere`` may use models in folders that this machine does not have.
    """
    if not (elsewhere and spec.model.path.startswith("/")):
        check_model(spec.model)
    return load_prompt_sets(spec)


def check_environments(spec: TrainingSpec) -> None:
    """``RewardEnvironmentError`` for a reward's environment that is not sound on this machine."""
    for reward in spec.rewards.values():
        if reward.environment is not None:
            python_of(reward.environment)


def check_encodings() -> None:
    """``ModelError`` where the encodings of prompts cannot be kept, as below a home folder that is
    read-only."""
    from flowgrpo_ray.policies.encodings import FOLDER_VARIABLE, encodings_folder

    folder = encodings_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ModelError(
            f"encodings cannot be kept in {folder}: {error}. Free space there, or name another "
            f"folder in the environment variable {FOLDER_VARIABLE}"
        ) from error


def check_model(model: ModelSpec) -> None:
    """``ModelError`` for a local folder that holds no model of the family or one with quantised
    weights, or for a LoRA that is not there; hub ids pass."""
    if model.lora is not None:
        local = local_path(model.lora)
        if local is not None and not local.exists():
            raise ModelError(
                f"model.lora = {model.lora!r}: there is no such file or folder (a hub id is "
                "written owner/name)"
            )
    if model.folder is None:
        return
    if model.folder.is_file():
        raise ModelError(
            f"model.path = {model.path!r} is one file, and models are folders. diffusers' "
            "from_single_file reads one in 16 or 32 bits, and its save_pretrained writes the "
            "folder; quantised ones (.gguf) are not loaded"
        )
    if not model.folder.is_dir():
        raise ModelError(
            f"model.path = {model.path!r}: there is no such folder (a hub id is written owner/name)"
        )
    index = FAMILIES[model.family].index
    if not (model.folder / index).is_file():
        raise ModelError(
            f"model.path = {model.path!r} holds no {index}, which models of family "
            f"{model.family!r} have: give the whole folder, as it was published or as "
            "pipeline.save_pretrained wrote it, not a part of it"
        )
    check_model_files(model)


def check_access(model: ModelSpec) -> None:
    """``ModelError`` for a hub model that this machine may not or cannot fetch, or that is not of
    the family."""
    if model.folder is None:
        check_model_files(model)
