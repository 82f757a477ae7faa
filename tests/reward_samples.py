"""Rewards for the tests of the reward service; replicas import them by path."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np


class Probe:
    """Mean brightness in [0, 1]; a metadata key of the first image asks for something else."""

    def __call__(self, images, prompts, metadata):
        scores = (images.mean(axis=(1, 2, 3)) / 255).astype(np.float32)
        for i, asked in enumerate(metadata):
            if "nan" in asked:
                scores[i] = np.nan
            if "batch size" in asked:
                scores[i] = len(images)
            if "pid" in asked:
                scores[i] = os.getpid()  # exact in float32: below 2**24
            if "torch" in asked:
                scores[i] = "torch" in sys.modules
            if "fail" in asked:
                raise RuntimeError("the probe was asked to fail")
            if "seconds" in asked:
                time.sleep(asked["seconds"])
            if "die once" in asked and not Path(asked["die once"]).exists():
                Path(asked["die once"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if "short" in asked:
                return scores[:-1]
            if "double" in asked:
                return scores.astype(np.float64)
        return scores

    @staticmethod
    def check_prompt(prompt, metadata):
        if not prompt:
            raise ValueError("the probe wants a prompt")


class Darkness:
    """One minus what a probe that is asked for nothing gives."""

    def __call__(self, images, prompts, metadata):
        return (1 - images.mean(axis=(1, 2, 3)) / 255).astype(np.float32)


class BadConstructor:
    def __init__(self, size: int = 1):
        raise ValueError(f"size={size} is not served here")
