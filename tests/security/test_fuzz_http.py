"""The HTTP servers and clients of this program against whoever speaks to them, on real sockets."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from monitors import RUN, Served, make_runs
from PIL import Image
from scripted_server import scripted
from test_fuzz_files import ROWS, bomb

from flowgrpo_ray.common.errors import RewardError
from flowgrpo_ray.rewards import http
from flowgrpo_ray.rewards.http import HttpReward
from flowgrpo_ray.rewards.unified_reward import UnifiedReward
from flowgrpo_ray.serving.batches import Call
from flowgrpo_ray.serving.http import Limits, build_api

TOKEN = "a-token-of-the-tests"


def talk(port: int, data: bytes) -> bytes:
    """What a server answers to raw bytes, after which nothing more comes."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        try:
            connection.sendall(data)
            if b"Connection: close" not in data:  # a request whose sender is gone is dropped
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # it had enough
            pass
        connection.settimeout(0.3)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
        return answer


WORDS = [
    *(b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"X" * 300),
    *(b"/", b"/runs", b"/run?run=", b"/file?run=tiny-ocr&name=spec.yaml", b"/picture?run=tiny-ocr"),
    *(b"/%00", b"/../../etc/passwd", b"/%2e%2e/%2e%2e/x", b"//evil/", b"http://evil/", b"*", b""),
    *(b"/run?run=tiny-ocr&since=00000000.1.1.1", b"/run?since=" + b"9" * 3000, b"\xff\xfe"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b"HTTP/9.9", b"PRI * HTTP/2.0"),
    *(b"Host: 127.0.0.1", b"Host: evil.example", b"Host:", b"Host: [::1", b"Host: 127.0.0.1:99999"),
    *(b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: " + b"9" * 40),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", b"Upgrade: websocket"),
    *(
        b"Connection: Upgrade",
        b"Expect: 100-continue",
        b"Range: bytes=0-1,1-2,5-",
        b"X: " + b"a" * 9000,
    ),
    *(b"Cookie: " + b"a=b;" * 900, b"Cookie: \xff", b"\0", b":", b" folded", b"A" * 70_000),
]


def request(rng: random.Random, cookie: bytes) -> bytes:
    """One to three requests on one connection, mostly wrong."""
    data = b""
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:  # so near to a right one that it is looked at
            place = rng.choice([w for w in WORDS if w.startswith(b"/")])
            line = rng.choice([b"GET ", b"GET ", b"HEAD ", b"POST "]) + place + b" HTTP/1.1"
            headers = [b"Host: 127.0.0.1", b"Connection: close", rng.choice([cookie, b"X: 1"])]
            headers += [rng.choice([w for w in WORDS if b": " in w])] * rng.randint(0, 1)
            data += b"\r\n".join([line, *headers, b"", b""])
            continue
        line = b" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
        headers = [rng.choice(WORDS) for _ in range(rng.randint(0, 5))]
        end = rng.choice([b"\r\n", b"\r\n", b"\n", b""])
        data += end.join([line, *headers, b"", b""]) + rng.randbytes(rng.choice([0, 0, 9, 300]))
    return data


# --- the monitor


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(make_runs(tmp_path_factory.mktemp("outside"))) as monitor:
        yield monitor


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    client = served.client()
    yield client
    client.close()


def port_of(served: Served) -> int:
    return int(served.address.rstrip("/").rpartition(":")[2])


def cookie_of(client: httpx.Client) -> bytes:
    return b"Cookie: " + "; ".join(f"{k}={v}" for k, v in client.cookies.items()).encode()


def test_a_thousand_hostile_requests(served: Served, client: httpx.Client):
    rng, statuses = random.Random(17), set()
    for number in range(1000):
        answer = talk(port_of(served), request(rng, cookie_of(client)))
        assert b"root:" not in answer
        assert b"secret" not in answer
        if answer.startswith(b"HTTP/"):
            statuses.add(int(answer[9:12]))
        if number % 50 == 0:
            assert client.get("/runs").status_code == 200
    assert client.get("/run", params={"run": RUN}).status_code == 200
    assert served.process.poll() is None
    assert {200, 400, 401, 404, 405} <= statuses
    assert max(statuses) < 500


def test_without_the_token_nothing_is_told_whatever_is_asked(served: Served):
    rng = random.Random(19)
    for _ in range(100):
        answer = talk(port_of(served), request(rng, b"Cookie: flowgrpo-00000000=0"))
        assert b"tiny-ocr" not in answer.replace(b"tiny-ocr&", b"")
        assert not answer.startswith(b"HTTP/1.1 200")


def test_slow_and_silent_visitors_keep_nobody_out(served: Served, client: httpx.Client):
    slow = [socket.create_connection(("127.0.0.1", port_of(served))) for _ in range(100)]
    try:
        for place, connection in enumerate(slow):
            connection.sendall(b"GET /runs HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "[: place % 40])
        began = time.monotonic()
        assert client.get("/runs").status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize(
    ("query", "status"),
    [
        *(("tile=" + "9" * 400, 422), ("tile=-1", 422), ("tile=1e9", 422), ("tile=1000000", 422)),
        *(("tile=", 422), ("v=" + "x" * 9000, 200), ("tile=0", 200)),
        *(("shot=../x", 404), ("shot=", 404), ("shot=%00", 404)),
    ],
    ids=range(10),
)
def test_hostile_numbers_in_an_address(client: httpx.Client, query: str, status: int):
    address = f"/picture?run={RUN}&shot=iteration-000000&{query}"
    assert client.get(address).status_code == status
    assert client.get("/runs").status_code == 200


def test_hostile_run_folders_become_answers(served: Served, client: httpx.Client, tmp_path: Path):
    """Of the shape that the page shows, never a failure of the server."""
    root = Path(client.get("/runs").json()["root"])
    folder = root / "hostile"
    folder.mkdir()
    for row in ROWS:
        for name in ("metrics.jsonl", "timings.jsonl", "live.json", "summary.json"):
            for file in folder.iterdir():
                file.unlink()
            (folder / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1}\n')
            (folder / name).write_text(row + "\n")
            answer = client.get("/run", params={"run": "hostile"})
            assert answer.status_code in (200, 422)
            assert answer.status_code == 200 or isinstance(answer.json()["detail"], str)
            runs = {run["name"]: run for run in client.get("/runs").json()["runs"]}
            assert runs[RUN]["state"] == "finished"
            assert "state" in runs["hostile"]
    picture = root / RUN / "samples" / "iteration-000000.png"
    whole = picture.read_bytes()
    address = {"run": RUN, "shot": "iteration-000000", "tile": 0}
    for content in (bomb(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"", whole[:99]):
        picture.write_bytes(content)
        assert client.get("/picture", params=address).status_code == 422
    picture.write_bytes(whole)
    assert client.get("/picture", params=address).status_code == 200
    assert served.process.poll() is None


# --- a reward over HTTP

LIMITS = Limits(images=4, pixels=64 * 64, body_bytes=200_000)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a reward's web application, as a replica serves it, with a token."""

    async def score(call: Call) -> np.ndarray:
        return call.images.reshape(len(call.images), -1).mean(1, dtype=np.float32)

    api = build_api("mean", LIMITS, lambda call: None, score, TOKEN)
    server = uvicorn.Server(uvicorn.Config(api, log_level="critical"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (51, 51, 51)).save(file, "PNG")
    return file.getvalue()


def test_why_a_reward_failed_stays_in_the_log(caplog: pytest.LogCaptureFixture):
    async def score(call: Call) -> np.ndarray:
        raise OSError("cannot read /models/of/ours with key 1234")

    api = build_api("mean", LIMITS, lambda call: None, score)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            data, files = {"prompts": '["x"]'}, {"images": ("0.png", png())}
            return await client.post("/score", data=data, files=files)

    with caplog.at_level("ERROR", "ray.serve"):
        answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert "models" not in answer.text
    assert "OSError" not in answer.text
    reference = answer.json()["error"].rpartition(" ")[2]
    assert f"reference {reference}" in caplog.text
    assert "OSError: cannot read /models/of/ours with key 1234" in caplog.text


def post(port: int, **content: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.post(f"http://127.0.0.1:{port}/score", headers=headers, timeout=20, **content)  # pyright: ignore[reportArgumentType]


def works(port: int) -> bool:
    answer = post(port, files={"images": ("0.png", png())}, data={"prompts": '["x"]'})
    return answer.status_code == 200 and answer.json()["scores"] == [51.0]


IMAGE = ("images", ("0.png", png()))
RAW = {"X-Shape": "1,1,1,3"}  # of another size


@contextmanager
def little_memory(most: int = 150 * 2**20) -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most


@pytest.mark.parametrize(
    ("files", "data", "status"),
    [
        ([("images", ("0.png", bomb()))], {"prompts": '["x"]'}, 413),
        ([("images", ("0.png", png(65)))], {"prompts": '["x"]'}, 413),
        ([("images", ("0.png", png()))] * 5, {"prompts": '["x"]'}, 413),
        ([("images", ("0", b""))] * 1001, {"prompts": '["x"]'}, 400),
        ([("images", ("0.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"))], {"prompts": '["x"]'}, 422),
        ([("images", ("0.png", png()))], {"prompts": "[" * 50_000}, 422),
        ([("images", ("0.png", png()))], {"prompts": '[{"a": ' * 9000}, 422),
        ([("images", ("0.png", png()))], {"prompts": "[" + "9" * 9000 + "]"}, 422),
        ([("images", ("0.png", png()))], {"prompts": '["\\ud800"]'}, 422),
        ([("images", ("0.png", png()))], {"prompts": '["x"]', "metadata": "[NaN]"}, 422),
        ([("images", ("0.png", png()))], {"prompts": '["x"]', "metadata": '[{"a": 1e999}]'}, 422),
        ([("images", ("0.png", png()))], {"prompts": '["x", "y"]'}, 422),
        ([("prompts", ("0.png", png()))], {"images": "x"}, 422),
        ([("images", ("../../etc/passwd", png()))], {"prompts": '["x"]'}, 200),
        ([("images", ("\0\r\nX: 1", png()))], {"prompts": '["x"]'}, 200),
        ([IMAGE, ("sources", ("0.png", bomb()))], {"prompts": '["x"]'}, 413),
        ([IMAGE, *[("sources", ("0.png", png()))] * 5], {"prompts": '["x"]'}, 413),
        ([IMAGE, ("sources", ("0.png", b"\x89PNG"))], {"prompts": '["x"]'}, 422),
        ([IMAGE, IMAGE, ("sources", ("0.png", png()))], {"prompts": '["x", "y"]'}, 422),
        ([IMAGE, ("sources", ("0", b"abc", "", RAW))], {"prompts": '["x"]'}, 422),
    ],
    ids=range(20),
)
def test_traps_in_a_request(port: int, files: list, data: dict[str, str], status: int):
    with little_memory():
        answer = post(port, files=files, data=data)
    assert answer.status_code == status, answer.text[:200]
    assert status == 200 or list(answer.json()) == ["error"]
    assert works(port)


def test_a_body_without_end_is_refused_while_it_arrives(port: int):
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b"--b\r\nContent-Disposition: form-data; name=images; filename=x\r\n\r\n"
        while sent < 200 * LIMITS.body_bytes:
            sent += 2**14
            yield b"\0" * 2**14

    with little_memory():
        try:
            kind = {"Content-Type": "multipart/form-data; boundary=b"}
            answer = httpx.post(
                f"http://127.0.0.1:{port}/score",
                content=endless(),
                headers={"Authorization": f"Bearer {TOKEN}", **kind},
                timeout=20,
            )
        except httpx.WriteError:  # it hung up while it was still being sent to
            pass
        else:
            assert answer.status_code == 413
    assert sent < 100 * LIMITS.body_bytes
    assert works(port)


def test_without_the_token_no_body_is_read(port: int):
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as connection:
        connection.sendall(head)  # and nothing of the body
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=é",
        ),
        *("multipart/form-data; boundary=" + "b" * 9000, "application/x-www-form-urlencoded", "x"),
        *("multipart/form-data; boundary=b; charset=utf-7", "multipart/mixed; boundary=b"),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--",
        b"--b\r\n\r\n",
        b"--b\r\n" * 9000,
        b"--b\r\nContent-Disposition: form-data; name=prompts\r\n\r\n" + b"[" * 150_000,
        b"--b\r\n" + b"X: y\r\n" * 20_000,
        b"--b\r\nContent-Disposition: " + b"form-data;" * 9000 + b"\r\n\r\nx\r\n--b--",
        b"--b\r\nContent-Disposition: form-data; name=images; filename*=utf-8''%00\r\n\r\n\r\n--b",
        b"a=" + b"%" * 50_000,
        b"&" * 100_000,
    ],
    ids=range(10),
)
def test_forms_that_are_none(port: int, kind: str, body: bytes):
    began = time.process_time()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind.encode("latin-1")}
    url = f"http://127.0.0.1:{port}/score"
    answer = httpx.post(url, content=body, headers=headers, timeout=20)  # pyright: ignore[reportArgumentType]
    assert answer.status_code in (400, 413, 422), answer.text[:200]
    assert list(answer.json()) == ["error"]
    assert time.process_time() - began < 3


def test_two_hundred_hostile_requests_leave_the_reward_answering(port: int):
    rng = random.Random(23)
    token = f"Authorization: Bearer {TOKEN}".encode()
    for _ in range(200):
        talk(port, request(rng, token))
    assert works(port)


# --- servers that this program asks


REPLIES = [
    *("[" * 100_000, '{"scores": ' * 3000, '{"scores": [' + "9" * 5000 + "]}", "NaN", "null", ""),
    *('{"scores": [1e999]}', '{"scores": [NaN]}', '{"scores": [[1]]}', '{"scores": {"0": 1}}'),
    *('{"scores": [true]}', '{"scores": ["1"]}', '{"scores": []}', '{"scores": [1, 1]}'),
    *('{"choices": {"0": 1}}', '{"choices": [7]}', '{"choices": [{"message": {"content": {}}}]}'),
    *(
        '{"choices": [{"message": {"content": ["Final Score: 5"]}}]}',
        '{"choices": [{"message": []}]}',
    ),
    *('{"choices": [{"message": {"content": 5}}]}', "\x1b[2J<script>", '{"scores": ["\\ud800"]}'),
]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF_S", 0.01)


@pytest.mark.parametrize("reply", REPLIES, ids=range(len(REPLIES)))
def test_a_hostile_answer_is_an_error_and_no_score(reply: str):
    image = np.zeros((1, 8, 8, 3), np.uint8)
    for status in (200, 500):
        with scripted(lambda number, body, status=status: (status, reply)) as server:
            with pytest.raises(RewardError):
                HttpReward(server.url, retries=0)(image, ["x"], [{}])
            with pytest.raises(RewardError):
                UnifiedReward(server.url, retries=0)(image, ["x"], [{}])


@contextmanager
def raw_server(answer: Iterator[bytes]) -> Iterator[str]:
    """Reads a request's first bytes and sends ``answer``, as long as somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with closing(listener.accept()[0]) as connection:
                connection.recv(65536)
                try:
                    for part in answer:
                        connection.sendall(part)
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(timeout=10)
        assert not thread.is_alive()


def endless(*head: bytes) -> Iterator[bytes]:
    yield from head
    while True:
        yield b" " * 2**16


def test_an_answer_without_end_is_not_read_to_its_end():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"
    too_much = pytest.raises(RewardError, match="more than 16 MiB")
    with little_memory(), raw_server(endless(head)) as url, too_much:
        HttpReward(url, retries=0)(image, ["x"], [{}])


def test_an_answer_that_unpacks_to_much_more_is_not_unpacked():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    packed = gzip.compress(b" " * 2**27, 1)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: "
    answer = iter([head + str(len(packed)).encode() + b"\r\n\r\n", packed])
    too_much = pytest.raises(RewardError, match="more than 16 MiB")
    with little_memory(), raw_server(answer) as url, too_much:
        HttpReward(url, retries=0)(image, ["x"], [{}])


def test_a_packed_answer_of_a_fair_size_is_read():
    """The test of the tests above."""
    image = np.zeros((1, 8, 8, 3), np.uint8)
    packed = gzip.compress(json.dumps({"scores": [0.25]}).encode())
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: "
    answer = iter([head + str(len(packed)).encode() + b"\r\n\r\n" + packed])
    with raw_server(answer) as url:
        assert HttpReward(url, retries=0)(image, ["x"], [{}]).tolist() == [0.25]
