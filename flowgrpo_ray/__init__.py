"""Online reinforcement learning for flow-matching text-to-image models, on Ray."""

import os

# Once imported, by us or by a library, onnxruntime would write a device id into the home folder
# and report its use.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
