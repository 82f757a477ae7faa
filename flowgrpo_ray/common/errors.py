"""What can go wrong, as one tree: the command line prints these without a traceback.

A message names the key or file, the value found there, and what to do about it.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class FlowGrpoError(Exception):
    """Base of every error that this package raises on purpose."""


class SpecError(FlowGrpoError):
    """The training spec cannot work; raised before anything starts."""


class PromptError(FlowGrpoError):
    """A prompt file is missing, malformed or unfit for a reward of the spec."""


class NotFetchedError(PromptError):
    """A public prompt set is not here yet."""


class ModelError(FlowGrpoError):
    """A model, the base or one of a reward, cannot be loaded from the place that the spec names."""


class RunFolderError(FlowGrpoError):
    """A run folder belongs to another spec, or holds nothing to work on."""


class CheckpointError(FlowGrpoError):
    """A checkpoint is torn, altered or missing."""


class ClusterError(FlowGrpoError):
    """The Ray cluster cannot give what the spec asks for, or an actor is lost."""


class RewardError(FlowGrpoError):
    """A reward deployment could not score; carries the deployment's name and the cause."""


class RewardEnvironmentError(FlowGrpoError):
    """An environment of a reward is missing, broken or made for another base, or not built."""


class ContractError(FlowGrpoError):
    """The run would no longer be on-policy: weights or importance ratios do not agree."""


class TrackingError(FlowGrpoError):
    """A tracker could not be told something; the run folder has it, and the run goes on."""


def raised(error: Exception) -> str:
    """What a class of the user's raised, and where, for a message that has no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    *_, last = (frame for frame in frames if "importlib" not in frame.filename)
    where = f" ({Path(last.filename).name}, line {last.lineno})" if last != frames[0] else ""
    return f"{type(error).__name__}: {error}{where}"


def token_refused(address: str, cause: Exception) -> ClusterError:
    """The error for a person whose token a Ray cluster does not take."""
    return ClusterError(
        f"the Ray cluster at {address!r} wants its token: put it in RAY_AUTH_TOKEN, or the path of "
        f"its file in RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token. Cause: {cause}"
    )
