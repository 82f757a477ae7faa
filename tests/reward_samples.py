"""Rewards for the tests of the reward service; replicas import them by path."""

import importlib
import os
import signal
import sys
import time
import uuid
from pathlib import Path

import numpy as np

from flowgrpo_ray.rewards.golden import Golden


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
            if "variable" in asked:
                scores[i] = int(os.environ[asked["variable"]] or 0)
            if "infinite" in asked:
                scores[i] = np.inf
            if "fail" in asked or asked.get("fail on") == os.getpid():
                raise RuntimeError("the probe was asked to fail")
            _take_time(asked)
            if "die once" in asked and not Path(asked["die once"]).exists():
                Path(asked["die once"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if "garbage" in asked:
                return ["very good"] * len(images)
            if "short" in asked:
                return scores[:-1]
            if "double" in asked:
                return scores.astype(np.float64)
        return scores

    @staticmethod
    def check_prompt(prompt, metadata):
        if not prompt:
            raise ValueError("the probe wants a prompt")
        if "sign in" in metadata:  # a file for each image, as soon as its call has arrived
            Path(metadata["sign in"], f"{uuid.uuid4()}.{os.getpid()}").touch()


class Sees:
    """How many images it sees at once, and how light the image is: 3.2 for one of 51 among three.

    A metadata key of the first image makes it fail.
    """

    over_group = True

    def __call__(self, images, prompts, metadata):
        if "fail" in metadata[0]:
            raise RuntimeError("it was asked to fail")
        light = images.mean(axis=(1, 2, 3)) / 255
        return (len(images) + light).astype(np.float32)


def _take_time(asked):
    time.sleep(asked.get("seconds", 0))
    time.sleep(3 if asked.get("slow on") == os.getpid() else 0)
    time.sleep(300 if asked.get("hang on") == os.getpid() else 0)
    while "until" in asked and not Path(asked["until"]).exists():
        time.sleep(0.02)


class Darkness:
    """One minus what a probe that is asked for nothing gives."""

    def __call__(self, images, prompts, metadata):
        return (1 - images.mean(axis=(1, 2, 3)) / 255).astype(np.float32)


class Ranked(Probe):
    """A probe that knows that white is brighter than black; it forgets that when asked to."""

    def __init__(self, sign: int = 1):
        self.sign = sign

    def __call__(self, images, prompts, metadata):
        scores = super().__call__(images, prompts, metadata)
        if any("forget" in asked for asked in metadata):
            self.sign = -1
        return np.float32(self.sign) * scores

    def golden(self):
        white, black = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4, 3), np.uint8)
        return [[Golden(white, "bright"), Golden(black, "bright")]]


class BadConstructor(Probe):
    def __init__(self, size: int = 1):
        raise ValueError(f"size={size} is not served here")


class LibraryVersion:
    """Major and minor version, as 1.16, of the library that this process imports."""

    def __init__(self, library: str):
        version = importlib.import_module(library).__version__
        self.version = float(".".join(version.split(".")[:2]))

    def __call__(self, images, prompts, metadata):
        return np.full(len(images), self.version, np.float32)
