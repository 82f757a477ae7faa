"""Rewards as a service against the same classes called directly: requests, latency, bytes moved.

Each reward scores requests of 8 images: called directly in this process, through a handle with
object references (as a training run does) on 1 and on 2 replicas, and over HTTP with raw images and
with PNG files, the files on 2 replicas, too. To the rewards that compare images a request is one
group: `rank` of `ocr`, and `pairwise_judge`, which asks 48 times about two of the images; that
judge answers at once. Direct calls come one after another, the others from 4 callers at once. The
ways take turns, because machines drift; medians over the rounds are printed, and ratios within a
round.
Bytes are those that crossed sockets of this machine, from the counters of its loopback interface:
what shared memory hands over is not among them.

Then many calls over HTTP come at once, of one image each, to a reward with its default arguments:
their wall time against that of the same calls, 16 at a time, which take turns with them, and
against the time that the reward worked.

    .venv/bin/python benchmarks/rewards.py [--rounds 5] [--seconds 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from flowgrpo_ray.cluster.session import private_environment
from flowgrpo_ray.common.ports import reserve_port
from flowgrpo_ray.rewards import build
from flowgrpo_ray.rewards.signs import render_plain

IMAGES, CALLERS = 8, 4
SIZES = {"small": (32, 48), "512": (512, 512)}
Rewards = dict[str, dict[str, dict[str, Any]]]  # options, by reward and size
REWARDS: Rewards = {
    "sign_colour": {"small": {}, "512": {}},
    "jpeg_compressibility": {"small": {}, "512": {}},
    "ocr": {"small": {"detect": False}, "512": {"detect": True}},
    "rank": {"small": {"reward": "ocr", "options": {"detect": False}}},
}
PROMPT = 'red sign "407"'
CROWDS, AT_A_TIME = (65, 200), 16
CROWDED = "crowded"  # the deployment that many call at once


@dataclass(frozen=True)
class Measured:
    """One way of one round: requests per second, seconds of each, socket bytes per image."""

    rate: float
    p50: float
    p95: float
    socket_bytes: float


def loopback_bytes() -> int:
    """Bytes that were sent over the loopback interface since the machine started."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


async def drive(call: Callable[[], Awaitable[object]], callers: int, seconds: float) -> Measured:
    """As many calls as `callers` at once make in `seconds`."""
    took: list[float] = []
    await call()
    began, before = time.perf_counter(), loopback_bytes()

    async def caller() -> None:
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            await call()
            took.append(time.perf_counter() - start)

    await asyncio.gather(*[caller() for _ in range(callers)])
    wall = time.perf_counter() - began
    moved = (loopback_bytes() - before) / (len(took) * IMAGES)
    return Measured(len(took) / wall, median(took), float(np.quantile(took, 0.95)), moved)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class Judge(BaseHTTPRequestHandler):
    """Prefers the first image by 3 to 1."""

    protocol_version = "HTTP/1.1"  # connections stay open

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        likeliest = [{"token": "1", "logprob": log(0.75)}, {"token": "2", "logprob": log(0.25)}]
        said = {"message": {"content": "1"}, "logprobs": {"content": [{"top_logprobs": likeliest}]}}
        body = json.dumps({"choices": [said]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None: ...


def judge(tell: Connection) -> None:
    """A process: tells the port at which it judges."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    tell.send(server.server_port)
    server.serve_forever()


@contextmanager
def judged() -> Iterator[Rewards]:
    """All rewards, while there is a judge for those that ask one."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=judge, args=(theirs,), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    yield REWARDS | {"pairwise_judge": {"small": {"url": url, "model": "judge"}}}
    process.terminate()


class Bench:
    """One reward at one size."""

    def __init__(self, reward: str, size: str, options: dict[str, Any], port: int) -> None:
        from flowgrpo_ray.serving.client import Patience, RewardClient

        self.reward, self.size = reward, size
        self.images = np.stack([render_plain("407", "red", SIZES[size])] * IMAGES)
        self.prompts, self.metadata = [PROMPT] * IMAGES, [{}] * IMAGES
        self.direct = build(reward, options)
        name = f"{reward}-{size}"
        self.clients = {
            replicas: RewardClient({f"{name}-{replicas}": Patience(retries=0)})
            for replicas in (1, 2)
        }
        self.url = f"http://127.0.0.1:{port}/{name}-{{}}/score"

    async def round(self, seconds: float) -> dict[str, Measured]:
        async def direct() -> object:
            return self.direct(self.images, self.prompts, self.metadata)

        measured = {"direct": await drive(direct, 1, seconds)}
        for replicas in self.clients:
            call = self.by_handle(replicas)
            measured[f"handle x{replicas}"] = await drive(call, CALLERS, seconds)
        shape = ",".join(map(str, self.images.shape))
        raw = ("i", self.images.tobytes(), "application/octet-stream", {"X-Shape": shape})
        files = [("images", (f"{i}.png", png(image))) for i, image in enumerate(self.images)]
        data = {"prompts": json.dumps(self.prompts)}
        async with httpx.AsyncClient(timeout=60) as http:
            for way, parts, replicas in (
                ("http raw", [("images", raw)], 1),
                ("http png", files, 1),
                ("http png x2", files, 2),
            ):

                async def post(parts: list = parts, url: str = self.url.format(replicas)) -> object:
                    answer = await http.post(url, data=data, files=parts)
                    answer.raise_for_status()
                    return answer

                measured[way] = await drive(post, CALLERS, seconds)
        return measured

    def by_handle(self, replicas: int) -> Callable[[], Awaitable[object]]:
        import ray

        async def call() -> object:
            scored = await self.clients[replicas].score(
                ray.put(self.images), self.prompts, self.metadata
            )
            assert not scored.failures, scored.failures
            return scored

        return call


def deploy(rewards: Rewards, port: int) -> None:
    from flowgrpo_ray.serving.args import RewardServiceArgs
    from flowgrpo_ray.serving.deploy import start_rewards

    args = [
        RewardServiceArgs(
            name=f"{reward}-{size}-{replicas}",
            reward=reward,
            options=options,
            replicas=replicas,
            cpus=0.0,
            max_batch_images=IMAGES,
            batch_wait_ms=0.0,
        )
        for reward, sizes in rewards.items()
        for size, options in sizes.items()
        for replicas in (1, 2)
    ]
    args.append(RewardServiceArgs(name=CROWDED, reward="ocr", options={"detect": False}, cpus=0.0))
    start_rewards(args, http_port=port, deadline_s=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.update(private_environment())
    import ray

    reserved = reserve_port()
    port = reserved.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="fgr", dir="/tmp")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
    )
    rows = []
    with judged() as rewards:
        deploy(rewards, port)
        reserved.close()  # Serve listens there
        for reward, sizes in rewards.items():
            for size, given in sizes.items():
                bench = Bench(reward, size, given, port)
                rows += measure(bench, options.rounds, options.seconds)
    rows += [crowd(port, calls, options.rounds) for calls in CROWDS]
    ray.shutdown()
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(bench: Bench, count: int, seconds: float) -> list[dict[str, object]]:
    """Prints and returns one row for each way."""
    rounds = [asyncio.run(bench.round(seconds)) for _ in range(count)]
    rows = []
    for way in rounds[0]:
        seen = [asdict(of_round[way]) for of_round in rounds]
        of_way = {key: median(row[key] for row in seen) for key in seen[0]}
        ratio = median(r[way].rate / r["direct"].rate for r in rounds)
        rows.append({"reward": bench.reward, "size": bench.size, "way": way, **of_way})
        rows[-1]["of_direct"] = ratio
        print(
            f"{bench.reward:22} {bench.size:6} {way:11} {of_way['rate']:8.1f} requests/s "
            f"({ratio:5.2f} of direct)  p50 {1000 * of_way['p50']:7.1f} ms  "
            f"p95 {1000 * of_way['p95']:7.1f} ms  {of_way['socket_bytes']:10.0f} B/image",
            flush=True,
        )
    return rows


def crowd(port: int, calls: int, rounds: int) -> dict[str, object]:
    """Prints and returns what `calls` calls at once take."""
    post = httpx.Request(
        "POST",
        f"http://127.0.0.1:{port}/{CROWDED}/score",
        headers={"Connection": "close"},
        data={"prompts": json.dumps([PROMPT])},
        files={"images": ("0.png", png(render_plain("407", "red", SIZES["small"])))},
    )
    lines = [f"POST {post.url.path} HTTP/1.1", *(f"{k}: {v}" for k, v in post.headers.items())]
    request = "\r\n".join([*lines, "", ""]).encode() + post.read()

    async def ask(room: asyncio.Semaphore) -> None:
        """Over a bare socket: a client's own pool of 200 connections would take more than all."""
        async with room:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 200 "), answer

    async def all_of_them(at_once: int) -> None:
        room = asyncio.Semaphore(at_once)
        await asyncio.gather(*[ask(room) for _ in range(calls)])

    def timed(at_once: int) -> tuple[float, float]:
        worked, began = busy(), time.perf_counter()
        asyncio.run(all_of_them(at_once))
        wall = time.perf_counter() - began
        return wall, busy() - worked

    rows = [(timed(AT_A_TIME), timed(calls)) for _ in range(rounds)]
    row = {
        "reward": CROWDED,
        "calls": calls,
        "at_once_s": median(at_once for _, (at_once, _) in rows),
        "of_few_at_a_time": median(at_once / few for (few, _), (at_once, _) in rows),
        "of_work": median(at_once / work for _, (at_once, work) in rows),
    }
    print(
        f"{calls} calls over HTTP at once: {row['at_once_s']:.2f} s, {row['of_few_at_a_time']:.2f} "
        f"of {AT_A_TIME} at a time, {row['of_work']:.2f} of the reward's own time",
        flush=True,
    )
    return row


def busy() -> float:
    """Seconds that the crowded reward has worked since it started."""
    from ray import serve

    from flowgrpo_ray.serving.types import app_name

    (stats,) = serve.get_app_handle(app_name(CROWDED)).broadcast("stats").results(timeout_s=60)
    return stats.busy_s


if __name__ == "__main__":
    main()
