"""What is said of an address at which no cluster is, before Ray is asked."""

from __future__ import annotations

import socket
import threading

import pytest

from flowgrpo_ray.cluster import session
from flowgrpo_ray.common import addresses
from flowgrpo_ray.common.addresses import probe_cluster, probe_jobs
from flowgrpo_ray.common.errors import ClusterError

VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture
def closed():
    """A port that is ours and at which nobody listens."""
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{ours.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "is not the address of a cluster's head: write HOST:6379"),
        ("ray://127.0.0.1:10001", "is not the address of a cluster's head: write HOST:6379"),
        ("local", "is not the address of a cluster's head.*Without RAY_ADDRESS a run starts"),
        ("head", "no cluster answers there .*it has no host and port"),
        ("head:one", "no cluster answers there .*Port could not be cast"),
        ("no.such.host.invalid:6379", "no cluster answers there within 3 s"),
    ],
)
def test_what_is_no_cluster_is_named(address, message):
    with pytest.raises(ClusterError, match=rf"RAY_ADDRESS = '{address}'.*{message}"):
        probe_cluster(address, "RAY_ADDRESS")


def test_a_dead_cluster_is_named_by_every_command_that_asks_one(closed, command_line, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for command in (
        ("rewards", "status", "--address", closed),
        ("rewards", "scale", "ocr", 2, "--address", closed),
        ("rewards", "remove", "ocr", "--address", closed),
        ("submit", "tiny-ocr", "--address", f"http://{closed}"),
    ):
        status, out, err = command_line(*command)
        assert status == 2
        assert closed in err.replace("\n", "")
        assert "Traceback" not in out + err
    monkeypatch.setenv("RAY_ADDRESS", closed)
    status, _, err = command_line("train", "tiny-ocr")
    assert status == 2
    assert f"RAY_ADDRESS = '{closed}'" in err.replace("\n", " ")


def test_a_cluster_that_ray_remembers_is_asked_first(closed, command_line, monkeypatch):
    """What "auto" means may be gone: Ray itself would ask it for minutes."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    remembered = "ray._private.services.find_bootstrap_address"
    monkeypatch.setattr(remembered, lambda _: closed)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    for command in (
        ("rewards", "status"),
        ("rewards", "status", "--address", "auto"),
        ("submit", "tiny-ocr"),
    ):
        status, _, err = command_line(*command)
        assert (status, closed in err.replace("\n", "")) == (2, True)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    status, _, err = command_line("train", "tiny-ocr")
    assert (status, f"RAY_ADDRESS = '{closed}'" in err.replace("\n", " ")) == (2, True)
    monkeypatch.setattr(remembered, lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    session.probe()  # Ray says at once that there is none


def test_a_host_that_swallows_what_is_sent_takes_three_seconds(monkeypatch):
    asked = []

    def swallowed(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(addresses.socket, "create_connection", swallowed)
    with pytest.raises(ClusterError, match="timed out"):
        probe_cluster("10.0.0.7:6379", "--address")
    assert asked == [(("10.0.0.7", 6379), 3.0)]


def test_an_empty_variable_names_no_cluster(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
    assert not session.joined()
    session.probe()
    probe_jobs(None)


def test_whoever_listens_is_asked_further():
    """A head greets as gRPC does: an HTTP server, or one that says nothing, is none."""
    answers = (b"\0\0\0\4\0\0\0\0\0", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"")
    for answer in answers:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def greet(server: socket.socket = server, answer: bytes = answer) -> None:
                with server.accept()[0] as connection:
                    assert connection.recv(100).startswith(b"PRI * HTTP/2.0")
                    connection.sendall(answer)

            listener = threading.Thread(target=greet)
            listener.start()
            address = f"127.0.0.1:{server.getsockname()[1]}"
            if answer == answers[0]:
                probe_cluster(address, "RAY_ADDRESS")
            else:
                with pytest.raises(ClusterError, match="what listens there is no Ray head"):
                    probe_cluster(address, "RAY_ADDRESS")
            listener.join()
            probe_jobs(f"http://{address}")


def test_names_that_nobody_resolves_take_three_seconds(monkeypatch):
    monkeypatch.setattr(addresses, "PROBE_S", 0.1)
    resolved, closed = threading.Event(), socket.socket()
    monkeypatch.setattr(
        addresses.socket, "create_connection", lambda *_: resolved.wait() and closed
    )
    with pytest.raises(ClusterError, match="timed out"):
        probe_cluster("head:6379", "RAY_ADDRESS")
    resolved.set()  # and not before: it was not waited for
