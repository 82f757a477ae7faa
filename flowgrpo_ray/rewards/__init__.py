"""Rewards: how good is an image for its prompt, as one number.

A reward is a plain class: its constructor takes the options of the spec, its `__call__` scores a
batch. `BUILTIN` names those of this package; any other is named by its import path
`module:Class`. This module needs NumPy and pydantic alone, and a reward's own libraries are
imported when it is built, so that a spec can be checked without them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flowgrpo_ray.common.errors import FlowGrpoError, RewardError, SpecError, raised
from flowgrpo_ray.common.own_classes import import_class
from flowgrpo_ray.rewards.options import arguments_of

BUILTIN: dict[str, str] = {
    "ocr": "flowgrpo_ray.rewards.ocr:OcrReward",
    "pickscore": "flowgrpo_ray.rewards.pickscore:PickScoreReward",
    "hps": "flowgrpo_ray.rewards.hps:HpsReward",
    "clipscore": "flowgrpo_ray.rewards.clipscore:ClipScoreReward",
    "clip_iqa": "flowgrpo_ray.rewards.clip_iqa:ClipIqaReward",
    "aesthetic": "flowgrpo_ray.rewards.aesthetic:AestheticReward",
    "imagereward": "flowgrpo_ray.rewards.imagereward:ImageRewardReward",
    "jpeg_compressibility": "flowgrpo_ray.rewards.jpeg:JpegCompressibilityReward",
    "jpeg_incompressibility": "flowgrpo_ray.rewards.jpeg:JpegIncompressibilityReward",
    "geneval": "flowgrpo_ray.rewards.geneval:GenevalReward",
    "unified_reward": "flowgrpo_ray.rewards.unified_reward:UnifiedReward",
    "vlm_judge": "flowgrpo_ray.rewards.vlm_judge:VlmJudge",
    "pairwise_judge": "flowgrpo_ray.rewards.pairwise_judge:PairwiseJudge",
    "rank": "flowgrpo_ray.rewards.rank:RankReward",
    "http": "flowgrpo_ray.rewards.http:HttpReward",
    "sign_colour": "flowgrpo_ray.rewards.sign_colour:SignColourReward",
    "preservation": "flowgrpo_ray.rewards.preservation:PreservationReward",
}


class Reward(Protocol):
    """Scores a batch of images. Not assumed to be thread-safe.

    Its options are the constructor's parameters, as annotated (`rewards.options`). A static method
    `check_options(options)` may raise ValueError for options, all with their defaults, that do not
    go together. A class may also have a static method `check_prompt(prompt, metadata)` that raises
    ValueError for a prompt which it could never score; prompts are checked with it before a run
    starts. If it has a parameter `options`, it is given the reward's own. Another one,
    `check_read(prompt, metadata, read)`, raises ValueError where the model reads only `read`, the
    beginning of a long prompt, and what is scored stands behind it. A
    method `golden()` returns pictures whose ranking is known (`rewards.golden`): a deployment is
    refused where it does not rank them so. An attribute `SIZE` (`loading.ModelSize`) lets
    `flowgrpo-ray plan` count its model. A class with `over_group = True` compares the images of a
    group: each call holds all images of one prompt, whole groups and one at a time, and it is not
    asked in evaluations, where a prompt has one image. A class with `takes_sources = True` is given
    as a fourth argument `sources`, uint8 [b, n, H, W, 3], the images that the prompts name to be
    changed, of the size of `images`; where they name none, it is not asked without, unless that
    parameter has a default. An attribute `reads` names the metadata keys that a class reads; lines
    that nearly name one of them are refused.
    """

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> np.ndarray:
        """Scores, float32 [b], of `images`, uint8 [b, H, W, 3] (read-only); NaN: no score."""
        ...


def resolve(reward: str) -> type:
    """The class that `reward` names: a key of `BUILTIN`, or an import path `module:Class`."""
    found = import_class("reward", reward, BUILTIN)
    if not any("__call__" in vars(base) for base in found.__mro__):
        raise SpecError(
            f"reward {reward!r}: {found.__name__} scores nothing: a reward is a class with __call__"
        )
    if getattr(found, "takes_sources", False) and _sources_of(found) is None:
        raise SpecError(
            f"reward {reward!r}: {found.__name__} says takes_sources = True, and its __call__ has "
            "no parameter sources"
        )
    return found


def _sources_of(cls: Any) -> inspect.Parameter | None:
    """The parameter of a class's `__call__` that takes source images."""
    return inspect.signature(cls.__call__).parameters.get("sources")


def is_over_group(reward: str) -> bool:
    """Whether `reward` must see all images of a group together."""
    return bool(getattr(resolve(reward), "over_group", False))


def takes_sources(reward: str) -> bool:
    """Whether `reward` is given the source images of an edit."""
    return bool(getattr(resolve(reward), "takes_sources", False))


def needs_sources(reward: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether `reward` scores nothing without them; a class may say so by its options, in a static
    method of this name."""
    cls = resolve(reward)
    if own := getattr(cls, "needs_sources", None):
        return own(options or {})
    given = _sources_of(cls) if takes_sources(reward) else None
    return given is not None and given.default is given.empty


def ask(
    reward: Reward,
    images: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    sources: np.ndarray | None = None,
) -> np.ndarray:
    """What `reward` says of images; it is given the `sources`, [b, n, H, W, 3], if it takes any."""
    scorer: Callable[..., np.ndarray] = reward
    takes = sources is not None and getattr(reward, "takes_sources", False)
    return scorer(images, prompts, metadata, *([sources] if takes else []))


def check_options(reward: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the constructor of `reward` declares them; SpecError for others."""
    cls = resolve(reward)
    try:
        return arguments_of(cls, options)
    except ValueError as error:
        raise SpecError(f"reward {reward!r}: {error}") from error


def build(reward: str, options: Mapping[str, Any] | None = None) -> Reward:
    """A reward, constructed from the options of its spec."""
    arguments = check_options(reward, options or {})
    try:
        return resolve(reward)(**arguments)
    except ValueError as error:
        raise SpecError(f"reward {reward!r}: {error}") from error
    except FlowGrpoError:
        raise
    except Exception as error:  # it may be the user's code: anything
        raise RewardError(f"reward {reward!r} cannot be made: {raised(error)}") from error


def prompt_check(
    reward: str, options: Mapping[str, Any] | None = None
) -> Callable[[str, Mapping[str, Any]], None]:
    """The function that raises ValueError for a prompt which `reward` could never score."""
    return _own_check(reward, "check_prompt", options)


def read_check(
    reward: str, options: Mapping[str, Any] | None = None
) -> Callable[[str, Mapping[str, Any], str], None]:
    """The function that raises ValueError for a prompt of which the model reads a beginning only,
    and `reward` asks for the rest."""
    return _own_check(reward, "check_read", options)


def _own_check(reward: str, name: str, options: Mapping[str, Any] | None) -> Callable[..., None]:
    """A check of the reward's class by its name, which is given the options if it takes any."""
    check = getattr(resolve(reward), name, _accept)
    if "options" in inspect.signature(check).parameters:
        return functools.partial(check, options=options or {})
    return check


def keys_read(reward: str, options: Mapping[str, Any] | None = None) -> frozenset[str] | None:
    """The metadata keys that `reward` reads, `None`: maybe any. A class says so in an attribute
    `reads`, or by its options in a static method of this name."""
    own: Any = getattr(resolve(reward), "reads", () if reward in BUILTIN else None)
    found: Any = own(options or {}) if callable(own) else own
    return None if found is None else frozenset(found)


def checked(scores: object, count: int) -> np.ndarray:
    """What a reward returned for `count` images, float32 [count]; TypeError for anything else."""
    if isinstance(scores, np.ndarray) and scores.dtype == np.float32 and scores.shape == (count,):
        return scores
    raise TypeError(f"it must return float32 [{count}], not {describe(scores)}")


def describe(value: object) -> str:
    """Dtype and shape of an array, for a message; of anything else the type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def weighted_total(
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    asked: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Weighted sum of the rewards, float32 [b], from `scores` {reward: [b]}.

    A score that is NaN or infinite makes the total of its image NaN, but not where the reward was
    not `asked` (bool [b] by reward; all, if it is not there). A reward of weight 0 is only watched:
    it never enters the total, and neither does its NaN.
    """
    if scores.keys() != weights.keys():
        raise ValueError(f"scores of {sorted(scores)}, but weights of {sorted(weights)}")
    shapes = {name: np.shape(values) for name, values in scores.items()}
    if not shapes or len(set(shapes.values())) > 1:
        raise ValueError(f"rewards must have scores of one shape, got {shapes}")
    total = np.zeros(next(iter(shapes.values())), dtype=np.float64)
    for name, weight in weights.items():
        if weight != 0:
            values = np.asarray(scores[name], dtype=np.float64)
            values = np.where(np.isfinite(values), values, np.nan)
            total += weight * np.where((asked or {}).get(name, True), values, 0)
    return total.astype(np.float32)


def _accept(prompt: str, metadata: Mapping[str, Any], read: str = "") -> None:
    """The checks of a reward that has none of its own."""
