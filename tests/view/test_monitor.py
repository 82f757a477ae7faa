"""The monitor over real HTTP: who is let in, what is reached, what is sent."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from monitors import RUN, Served, make_runs
from PIL import Image
from sample_runs import WORK, evaluate, make_run, timing_row, train_row

from flowgrpo_ray.run.brief import brief
from flowgrpo_ray.run.found import find_runs
from flowgrpo_ray.run.tracking import RunRecorder, read_rows, save_samples, save_sources
from flowgrpo_ray.view.monitor import Feed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with Served(root) as monitor:
        yield monitor


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    client = served.client()
    yield client
    client.close()


# --- who is let in

PLACES = ("/", "/assets/page.css", "/runs", f"/run?run={RUN}", f"/file?run={RUN}&name=spec.yaml")


@pytest.mark.parametrize("place", [*PLACES, "/picture", "/nothing", "/docs", "/openapi.json"])
def test_nothing_without_the_token(served: Served, place: str):
    with httpx.Client(base_url=served.address, trust_env=False) as stranger:
        assert stranger.get(place).status_code == 401
        stranger.cookies.set("flowgrpo-00000000", "0" * 64)
        answer = stranger.get(place)
    assert answer.status_code == 401
    assert "tiny" not in answer.text


def test_a_wrong_token_opens_nothing(served: Served, client: httpx.Client):
    for wrong in ("", "x", served.token[:-1], served.token + "x", "é"):
        assert client.get("/", params={"token": wrong}).status_code == 401
    for name, value in client.cookies.items():
        fake = httpx.Cookies({name: value[:-1] + ("0" if value[-1] != "0" else "1")})
        assert httpx.get(served.address, cookies=fake, trust_env=False).status_code == 401
    assert client.get("/runs", params={"token": served.token}).status_code == 200
    only_token = httpx.get(served.address + "runs", params={"token": served.token}, trust_env=False)
    assert only_token.status_code == 401, "the token is taken at the entrance only"


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_cannot_use(served: Served):
    answer = httpx.get(served.entrance + "&run=a%26b", trust_env=False)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert served.token not in cookie
    assert served.token not in answer.text
    assert "url=/?run=a%26b" in answer.text


def test_every_answer_carries_the_policy(client: httpx.Client):
    for place in (*PLACES, "/nothing"):
        answer = client.get(place)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_it_only_answers(client: httpx.Client):
    for method in ("POST", "PUT", "DELETE"):
        assert client.request(method, "/runs").status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 400),
        ("evil.example:80", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example", 400),
        ("", 400),
        ("[::1", 400),
        ("localhost", 200),
        ("LOCALHOST:8899", 200),  # as seen through ssh -L
        ("127.0.0.1:1", 200),
        ("[::1]:8899", 200),
    ],
)
def test_names_that_are_not_of_this_machine_are_refused(
    client: httpx.Client, host: str, status: int
):
    """DNS rebinding: a stranger's name that was pointed at 127.0.0.1."""
    assert client.get("/runs", headers={"host": host}).status_code == status


def test_it_listens_on_loopback_only(served: Served):
    port = int(served.address.rstrip("/").rpartition(":")[2])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {at for _, at, _, state, *_ in lines if state == "0A" and int(at[9:], 16) == port}
    assert listening == {f"0100007F:{port:04X}"}
    assert not any(int(line.split()[1][-4:], 16) == port for line in tcp6())


def tcp6() -> list[str]:
    path = Path("/proc/net/tcp6")
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [line for line in lines if line.split()[3] == "0A"]


# --- what is reached

OUTSIDE = (
    "../secret",
    "..",
    ".",
    "/",
    "linked",
    "not-a-run",
    "more/../tiny-ocr",
    "tiny-ocr/",
    "\0",
)


@pytest.mark.parametrize("name", [*OUTSIDE, "%2e%2e/secret", "..\\secret", "", "tiny-ocr/samples"])
def test_no_name_leads_out_of_the_folder(client: httpx.Client, root: Path, name: str):
    for place, more in (
        ("/run", {}),
        ("/file", {"name": "spec.yaml"}),
        ("/picture", {"shot": "iteration-000000"}),
    ):
        assert client.get(place, params={"run": name, **more}).status_code == 404
    absolute = client.get("/run", params={"run": str(root.parent / "secret")})
    assert absolute.status_code == 404


@pytest.mark.parametrize("name", ["../spec.yaml", ".lock", "samples", "/etc/passwd", "a", "\0"])
def test_only_known_files_of_a_run_are_given(client: httpx.Client, name: str):
    assert client.get("/file", params={"run": RUN, "name": name}).status_code == 404
    assert client.get("/picture", params={"run": RUN, "shot": name}).status_code == 404


def test_links_out_of_a_run_are_not_followed(client: httpx.Client):
    run = "more/failed"
    shot = {"run": run, "shot": "iteration-000000"}
    assert client.get("/picture", params=shot).status_code == 404
    assert client.get("/file", params={"run": run, "name": "summary.json"}).status_code == 404
    assert client.get("/file", params={"run": run, "name": "spec.yaml"}).status_code == 200


@pytest.mark.parametrize("path", ["/../secret", "/assets/../page.html", "/assets/page.html", "/x"])
def test_the_address_itself_leads_nowhere_else(client: httpx.Client, path: str):
    assert client.get(path).status_code == 404


def test_files_and_pictures_are_the_bytes_of_the_run(client: httpx.Client, root: Path):
    answer = client.get("/file", params={"run": RUN, "name": "metrics.jsonl"})
    assert answer.content == (root / RUN / "metrics.jsonl").read_bytes()
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["content-disposition"].startswith("attachment")
    shot = {"run": RUN, "shot": "iteration-000004"}
    path = root / RUN / "samples" / "iteration-000004.png"
    assert client.get("/picture", params=shot).content == path.read_bytes()
    tile = client.get("/picture", params={**shot, "tile": 9}).content
    with Image.open(path) as grid, Image.open(io.BytesIO(tile)) as one:  # 8 in a row
        assert np.array_equal(np.asarray(one), np.asarray(grid)[40:80, 40:80])


def test_large_pictures_are_fetched_small_and_one_by_one_as_they_are(
    tmp_path: Path, root: Path, served: Served, client: httpx.Client
):
    images = np.random.default_rng(0).integers(0, 256, (3, 320, 512, 3), np.uint8)
    folder = make_run(root / "large", iterations=1, prompts=2)
    try:
        save_samples(folder, 5, images, ["a", "b", "c"], {"ocr": [0, 1, 0]})
        last = client.get("/run", params={"run": "large"}).json()["samples"][-1]
        assert (last["tile"], last["original_tile"]) == ([160, 256], [320, 512])
        small = client.get(last["image"])
        assert small.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(small.content)).size == (3 * 256, 160)
        whole = client.get(f"{last['image']}&tile=2").content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(whole))), images[2])
    finally:
        shutil.rmtree(folder)


def test_the_sources_of_edits_are_pictures_too(root: Path, served: Served, client: httpx.Client):
    folder = make_run(root / "edits", iterations=1, prompts=3)
    try:
        assert client.get("/run", params={"run": "edits"}).json()["sources"] is None
        assert client.get("/picture", params={"run": "edits", "shot": "sources"}).status_code == 404
        drawn = np.random.default_rng(0).integers(0, 256, (3, 1, 40, 40, 3), np.uint8)
        save_sources(folder, drawn)
        sources = client.get("/run", params={"run": "edits"}).json()["sources"]
        assert client.get(sources["image"]).content == (folder / "samples/sources.png").read_bytes()
        one = client.get(f"{sources['image']}&tile=2").content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(one))), drawn[2, 0])
    finally:
        shutil.rmtree(folder)


def test_the_list_of_runs(client: httpx.Client, root: Path):
    answer = client.get("/runs").json()
    assert answer["root"] == str(root)
    runs = {run["name"]: run for run in answer["runs"]}
    states = {name: run["state"] for name, run in runs.items()}
    assert states == {
        RUN: "finished",
        "more/failed": "failed",
        "lost": "lost",
        "starting": "unknown",
    }
    train = [row for row in read_rows(root / RUN / "metrics.jsonl") if row["kind"] == "train"]
    assert runs[RUN]["reward"] == train[-1]["reward"]["mean"]
    assert runs["more/failed"]["message"] == "no GPU"
    assert (
        99 < runs["lost"]["age"] < 3600 or runs["lost"]["age"] < 60
    )  # live.json is as new as this
    assert runs["lost"]["iterations"] == 60


# --- what is new


def test_only_what_is_new_is_sent(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=3, prompts=2, finished=False)
    feed = Feed(folder, "run")
    first = feed.news("")
    assert first["reset"]
    assert first["metrics"] == read_rows(folder / "metrics.jsonl")
    assert first["timings"] == read_rows(folder / "timings.jsonl")
    assert len(first["samples"]) == 2
    again = feed.news(first["since"])
    assert not again["reset"]
    assert [again[key] for key in ("metrics", "timings", "samples")] == [[], [], []]
    recorder = RunRecorder(folder)
    row = train_row(4, 0.5, np.random.default_rng(0))
    recorder.log(row)
    with (folder / "timings.jsonl").open("a") as file:
        file.write('{"kind": "train", "iter')  # just being written
    new = feed.news(again["since"])
    assert not new["reset"]
    assert new["metrics"] == [json.loads(json.dumps(row))]
    assert new["timings"] == []
    assert new["headline"]["iterations"] == 4
    evaluate(folder, 4, 0.7, 2)
    assert [shot["iteration"] for shot in feed.news(new["since"])["samples"]] == [4]


def test_a_run_that_went_back_to_a_checkpoint_is_sent_anew(tmp_path: Path):
    folder = make_run(tmp_path / "run", iterations=5, prompts=2, finished=False)
    feed = Feed(folder, "run")
    since = feed.news("")["since"]
    recorder = RunRecorder(folder)
    recorder.truncate(3)
    recorder.log_timing(timing_row(4, 9.0, WORK))
    recorder.log_timing(timing_row(5, 9.0, WORK))
    recorder.log_timing(timing_row(6, 9.0, WORK))
    news = feed.news(since)
    assert news["reset"]
    assert news["timings"] == read_rows(folder / "timings.jsonl")
    assert [row["iteration"] for row in news["metrics"] if row["kind"] == "train"] == [1, 2, 3]
    assert feed.news("0123abcd.1.1.1")["reset"], "another monitor's"


def test_a_damaged_file_is_told_and_what_was_known_stays(tmp_path: Path, client: httpx.Client):
    folder = make_run(tmp_path / "run", iterations=3, prompts=2, finished=False)
    feed = Feed(folder, "run")
    known = feed.news("")
    path = folder / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    for _ in range(2):
        news = feed.news(known["since"])
        assert news["metrics"] == []
        assert not news["reset"]
        assert "metrics.jsonl, line 1 is not a row" in " ".join(news["notes"])
    assert brief(folder, "run")["state"] == "unreadable"
    assert client.get("/run", params={"run": RUN, "since": "x"}).status_code == 422


def test_runs_are_found_three_folders_deep_and_not_inside_each_other(tmp_path: Path):
    for path in ("a", "b/c", "d/e/f", "g/h/i/j", ".hidden", "a/checkpoints/x"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / ".lock").touch()
    assert list(find_runs(tmp_path)) == ["a", "b/c", "d/e/f"]
    assert find_runs(tmp_path / "a") == {"a": tmp_path / "a"}


# --- the command


def test_the_token_of_the_environment_is_used_and_not_printed(root: Path):
    token = "a token with = and é, long"
    with Served(root / RUN, FLOWGRPO_MONITOR_TOKEN=token) as served:
        assert served.token == "$FLOWGRPO_MONITOR_TOKEN"
        with httpx.Client(base_url=served.address, trust_env=False) as client:
            assert client.get("/", params={"token": token}).status_code == 200
            answer = client.get("/runs").json()
        assert answer["only"]
        assert [run["name"] for run in answer["runs"]] == [RUN]
        assert "monitor stopped" in served.stop()
    assert served.process.returncode == 0


def test_mistakes_are_one_message(command_line: Any, served: Served, tmp_path: Path, monkeypatch):
    port = served.address.rstrip("/").rpartition(":")[2]
    status, _, error = command_line("monitor", tmp_path, "--port", port)
    assert status == 2
    assert f"--port {port}: cannot listen there (Address already in use)" in " ".join(error.split())
    status, _, error = command_line("monitor", tmp_path / "absent")
    assert status == 2
    assert "give a run folder or a folder of them" in " ".join(error.split())
    monkeypatch.setenv("FLOWGRPO_MONITOR_TOKEN", "short")
    status, _, error = command_line("monitor", tmp_path)
    assert status == 2
    assert "FLOWGRPO_MONITOR_TOKEN has 5 characters" in " ".join(error.split())
