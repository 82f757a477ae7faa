"""Prompt files of every kind, of the hub, and the public sets."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_hub import COMMIT, REPO, tiny_hub

from flowgrpo_ray.common.errors import PromptError
from flowgrpo_ray.spec import public_prompts
from flowgrpo_ray.spec.prompt_files import READERS, Prompt, load_prompts
from flowgrpo_ray.spec.public_prompts import PublicFile, git_id

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a "sign", in\ntwo lines', "target": "sign", "n": "3"},
    {"prompt": "ein Schild “zwei”", "target": None, "n": "4"},
]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps({k: v for k, v in row.items() if v}) for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps([{k: v for k, v in row.items() if v} for row in rows], indent=1).encode()


WRITERS = {".jsonl": as_lines, ".NDJSON": as_lines, ".json": as_json, ".csv": as_csv}
WRITERS |= {".Parquet": as_parquet}


def test_every_kind_of_table_holds_the_same_prompts(tmp_path: Path) -> None:
    assert {suffix.lower() for suffix in WRITERS} | {".txt"} == READERS.keys()
    for suffix, write in WRITERS.items():
        path = tmp_path / f"p{suffix}"
        path.write_bytes(write(ROWS))
        assert load_prompts(str(path), "k") == [
            Prompt('a "sign", in\ntwo lines', {"target": "sign", "n": "3"}),
            Prompt("ein Schild “zwei”", {"n": "4"}),
        ], suffix


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".txt", ".JSONL", ".csv"])
def test_lines_end_as_on_any_system(tmp_path: Path, suffix: str, end: str) -> None:
    lines = {".txt": ["a", "", "b "], ".JSONL": ['{"prompt": "a"}', "", '{"prompt": "b"}']}
    text = end.join(["\ufeff" + lines.get(suffix, ["prompt", "a", "", "b"])[0]])
    text = end.join([text, *lines.get(suffix, ["prompt", "a", "", "b"])[1:], ""])
    path = tmp_path / f"p{suffix}"
    path.write_bytes(text.encode())
    assert load_prompts(str(path), "k") == [Prompt("a"), Prompt("b")]


def test_a_json_list_may_hold_texts(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('["a", {"prompt": "b", "tag": 1}]')
    assert load_prompts(str(path), "k") == [Prompt("a"), Prompt("b", {"tag": 1})]


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("p.yaml", b"a", "prompts are not read from .yaml; kinds of files: .txt, .jsonl"),
        ("p", b"a", "prompts are not read from a file without suffix"),
        ("p.json", b'{"prompt": "a"}', "one list; is this a .jsonl file?"),
        ("p.json", b'["a", 3]', "item 2 holds no prompt: expected a JSON object"),
        ("p.json", b'["a"', "not JSON (Expecting ',' delimiter"),
        ("p.csv", b"text,n\na,1\n", "no column is called prompt; columns: text, n"),
        ("p.csv", b"prompt,n\na,1\nb\nc,2,3\n", "line 4 holds no prompt: more cells than columns"),
        ("p.csv", b'prompt,n\na,1\n"b', "not CSV after line 2: unexpected end of data"),
        ("p.csv", b"prompt,n\n,1\n", "line 2 holds no prompt: expected"),
        ("p.csv", b"prompt,n\r\xff,1\r", "line 2 is not UTF-8 text"),
        ("p.csv", b"prompt,n\n", "the file holds no prompts"),
        ("p.parquet", b"PAR1 or not", "not Parquet: "),
        ("p.jsonl", b'{"prompt": "' + b"a" * 70_000 + b'"}', "line 1 holds no prompt: 70,0"),
    ],
)
def test_what_is_no_prompt_file_is_told(
    tmp_path: Path, name: str, content: bytes, fragment: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        load_prompts(str(path), "prompts.train")
    assert str(caught.value).startswith(f"prompts.train = '{path}': ")
    assert fragment in str(caught.value)


def test_pictures_inside_of_parquet_are_told_what_to_do_with(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(as_parquet([{"prompt": "a", "image": {"bytes": b"\x89PNG", "path": "a.png"}}]))
    with pytest.raises(PromptError, match=r"row 1 holds no prompt: 'image' holds a picture itself"):
        load_prompts(str(path), "k")


# --- of the hub


def test_a_data_set_on_the_hub_is_fetched_once_and_pinned(tmp_path: Path) -> None:
    """huggingface_hub reads its address when it is imported: in a process of its own."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "p.jsonl").write_bytes(as_lines(ROWS))
    program = (
        "import sys\n"
        "from flowgrpo_ray.common.errors import PromptError\n"
        "from flowgrpo_ray.spec.prompt_files import load_prompts\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(len(load_prompts(path, 'k')))\n"
        "    except PromptError as error: print(str(error).splitlines()[0])\n"
    )
    good = f"hf://datasets/{REPO}@{COMMIT}/train/p.jsonl"
    paths = [good, good, f"hf://datasets/{REPO}/train/q.jsonl", f"hf://{REPO}/p.jsonl"]
    with tiny_hub(tmp_path / "data") as (address, asked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", program, *paths],
            env=environment | {"HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    found, again, absent, malformed = done.stdout.splitlines()
    assert (found, again) == ("2", "2")
    assert "cannot be fetched from the hub" in absent
    assert "hf://datasets/owner/name@revision/folder/file.jsonl" in malformed
    assert sum("p.jsonl" in path and COMMIT in path for path in asked) <= 2  # its head, its body


# --- the public sets


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A server of the files of a set of our own, and its folder."""
    folder = tmp_path / "mirror"
    (folder / "ocr").mkdir(parents=True)
    files = []
    for name in ("train", "test"):
        content = f'a {name} sign "1"\n'.encode()
        (folder / "ocr" / f"{name}.txt").write_bytes(content)
        of = PublicFile(f"ocr-{name}.txt", f"ocr/{name}.txt", git_id(content), f"{name} prompts")
        files.append(of)
    monkeypatch.setitem(public_prompts.SETS, "ocr", tuple(files))
    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def test_public_sets_are_fetched_as_they_should_be_or_not_at_all(
    mirror: tuple[str, Path], tmp_path: Path, command_line: Any
) -> None:
    (source, served), out = mirror, tmp_path / "prompts"
    fetch = functools.partial(command_line, "prompts", "fetch", "--source", source, "--folder", out)
    status, told, _ = fetch("ocr")
    assert status == 0
    assert "yifan123/flow_grpo; licence: MIT" in told
    assert f"{out / 'ocr-train.txt'}: train prompts" in told
    assert load_prompts(str(out / "ocr-test.txt"), "k") == [Prompt('a test sign "1"')]
    assert sorted(path.name for path in out.iterdir()) == ["ocr-test.txt", "ocr-train.txt"]
    assert fetch("ocr")[1].count("is there already") == 2

    (out / "ocr-test.txt").write_text("mine")
    status, _, error = fetch("ocr")
    assert (status, (out / "ocr-test.txt").read_text()) == (2, "mine")
    assert "exists and is another file" in error
    (served / "ocr" / "test.txt").write_text("forged")
    status, _, error = fetch("ocr", "--overwrite")
    assert (status, (out / "ocr-test.txt").read_text()) == (2, "mine")
    assert "is not the file of commit" in " ".join(error.split())
    (served / "ocr" / "test.txt").unlink()
    status, _, error = fetch("ocr", "--overwrite")
    assert status == 2
    assert "404" in error
    assert fetch("orc")[0] == 2


@pytest.mark.skipif("FLOWGRPO_TEST_DATA" not in os.environ, reason="needs FLOWGRPO_TEST_DATA")
@pytest.mark.parametrize(
    ("name", "file"), [("ocr", "ocr_test.txt"), ("geneval", "geneval_test.jsonl")]
)
def test_the_public_files_are_known_by_their_ids(name: str, file: str) -> None:
    content = Path(os.environ["FLOWGRPO_TEST_DATA"], file).read_bytes()
    known = public_prompts.SETS[name][1]
    assert git_id(content) == known.git_id
    assert known.holds.startswith(f"{len(content.splitlines()):,} ")


def test_a_recipe_without_its_prompts_says_how_to_get_them() -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts("prompts/geneval-test.jsonl", "prompts.evaluate")
    message = str(caught.value)
    assert "there is no such file. It is the public set 'geneval' (2,212 JSON objects" in message
    assert "`flowgrpo-ray prompts fetch geneval` puts below prompts/" in message
