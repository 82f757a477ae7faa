"""A judge that prefers light images, for a scripted server: what it answers to a request."""

import base64
import io
import json
import math

import numpy as np
from PIL import Image


def levels_of(body):
    """How light the images of a request are."""
    *images, question = json.loads(body)["messages"][0]["content"]
    assert question["type"] == "text"
    for image in images:
        file = base64.b64decode(image["image_url"]["url"].partition(",")[2], validate=True)
        yield float(np.array(Image.open(io.BytesIO(file))).mean())


def answers(*tokens):
    """An answer that begins with these, each a text and its probability."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
    found = {"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return 200, json.dumps({"choices": [found]})


def prefers_light(number, body):
    """0.9 for the first of two if it is lighter, else 0.3: light ones, and the first a little."""
    *_, one, other = levels_of(body)
    first = 0.9 if one > other else 0.3
    return answers(("1", first / 2), (" 1", first / 2), ("2", 1 - first), ("x", 1e-3))
