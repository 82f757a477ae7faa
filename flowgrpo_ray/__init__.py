"""Online reinforcement learning for flow-matching text-to-image models, on Ray."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowgrpo_ray.cluster.api import train
    from flowgrpo_ray.run.opened import Run, Samples
    from flowgrpo_ray.spec.file import load_spec
    from flowgrpo_ray.spec.training import TrainingSpec

# Once imported, by us or by a library, onnxruntime would write a device id into the home folder
# and report its use.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["Run", "Samples", "TrainingSpec", "__version__", "load_spec", "train"]

# Looked up when they are used: `import flowgrpo_ray` loads nothing.
_WHERE = {
    "Run": "run.opened",
    "Samples": "run.opened",
    "TrainingSpec": "spec.training",
    "load_spec": "spec.file",
    "train": "cluster.api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
