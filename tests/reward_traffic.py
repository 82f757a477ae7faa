"""A program that scores without pause until its standard input ends; prints what it saw as JSON."""

import asyncio
import json
import sys
import threading

import numpy as np
import ray

from flowgrpo_ray.serving.client import Patience, RewardClient

ray.init(log_to_driver=False)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
names = sys.argv[1:]
client = RewardClient(dict.fromkeys(names, Patience(retries=0)))
image = np.full((1, 32, 48, 3), 51, np.uint8)
failures: list[str] = []
scores: set[float] = set()


async def caller() -> None:
    while not stop.is_set():
        scored = await client.score(image, ['red sign "A"'], [{"seconds": 0.02}])
        failures.extend(scored.failures.values())
        scores.update(float(scored.rewards[name][0]) for name in names)


async def callers() -> None:
    first = await client.score(image, ['red sign "A"'], [{}])
    assert not first.failures, first.failures
    print("started", flush=True)
    await asyncio.gather(*[caller() for _ in range(6)])


asyncio.run(callers())
stats = {name: seen.as_json() for name, seen in client.take_stats().items()}
print(json.dumps({"failures": failures, "scores": sorted(scores), "stats": stats}))
