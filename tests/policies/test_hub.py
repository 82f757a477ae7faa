"""Models by hub id, from a hub on this machine: fetched, pinned by commit, refused with advice.

huggingface_hub reads its address when it is imported, so this happens in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_hub import COMMIT, GATED, REPO, tiny_hub
from tiny_runs import SMALL, small_spec

FOLDER = small_spec().model.folder

PROGRAM = """
import sys, torch
from flowgrpo_ray.common.errors import ModelError
from flowgrpo_ray.policies import load_policy
from flowgrpo_ray.policies.encodings import EncodingCache
from flowgrpo_ray.estimate.preflight import check_access
from flowgrpo_ray.policies.hub import identity
from flowgrpo_ray.spec.file import load_spec
paths, overrides = sys.argv[1].split(), sys.argv[2:]
for path in paths:
    model = f"model={{family: sd3, path: {path}, dtype: float32, max_sequence_length: 10}}"
    spec = load_spec("tiny-ocr", [*overrides, model])
    try:
        check_access(spec.model)
        print(f"before:{path} passes")
    except ModelError as error:
        print(f"before:{path} ModelError", error)
    try:
        policy = load_policy(spec, torch.device("cpu"))
        policy.sigmas(4, (32, 48))
        encoded = EncodingCache(policy).add(["a red sign"])
        print(path, identity(spec.model), "encoded", encoded)
    except ModelError as error:
        print(path, "ModelError", error)
"""


def load(paths: str, address: str | None, home: Path) -> dict[str, str]:
    """What a fresh process says of each model of ``paths``, also before a run (``before:PATH``);
    without an address, offline."""
    environment = {
        **os.environ,
        **({"HF_ENDPOINT": address} if address else {"HF_HUB_OFFLINE": "1"}),
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "FLOWGRPO_ENCODINGS": str(home / "encodings"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, paths, *SMALL],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = (line.partition(" ") for line in done.stdout.splitlines())
    return {path: rest for path, _, rest in said if path.removeprefix("before:") in paths.split()}


@pytest.mark.slow
def test_models_come_from_the_hub_or_with_advice(tmp_path):
    with tiny_hub(FOLDER) as (address, asked):
        said = load(f"{REPO} {GATED} owner/nowhere", address, tmp_path)
        weights = [path for path in asked if path.endswith("diffusion_pytorch_model.safetensors")]
    assert weights, "they came over the socket"
    assert said[REPO] == f"{COMMIT} encoded 1"
    assert said[f"before:{REPO}"] == "passes"
    for path in (GATED, "owner/nowhere"):
        for message in (said[path], said[f"before:{path}"]):
            assert message.startswith(f"ModelError model.path = '{path}'")
            assert "hf auth login" in message

    # The machine is offline. What was fetched is enough; what was not is an error with advice.
    said = load(f"{REPO} owner/other", None, tmp_path)
    assert said[REPO] == f"{COMMIT} encoded 0", "the encoding was kept, too"
    assert said["owner/other"].startswith("ModelError model.path = 'owner/other'")
    assert "local folder" in said["owner/other"]
