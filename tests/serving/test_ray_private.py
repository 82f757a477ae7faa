"""What the program takes from Ray beyond its public interface is there in the installed version."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import ray

import flowgrpo_ray

PACKAGE = Path(flowgrpo_ray.__file__).parent
# module, object in it, and a text that its source must hold where it is an attribute of instances
NEEDED = [
    ("ray.actor", "ActorHandle._actor_id", None),
    ("ray._private.worker", "get_dashboard_url", None),
    ("ray._private.services", "get_ray_address_from_environment", "Could not find any running"),
    ("ray._private.state", "available_resources_per_node", None),
    ("ray._private.utils", "set_sigterm_handler", None),
    ("ray._private.services", "ConsolePopen", None),
    ("ray._private.services", "start_ray_process", "ConsolePopen("),
    ("ray._raylet", "CoreWorker", None),
    ("ray._private.worker", "connect", "ray._raylet.CoreWorker("),
    ("ray.util.metrics", "Metric._record", "def _record("),
    ("ray.serve.context", "_get_global_client", None),
    ("ray.serve._private.client", "ServeControllerClient.get_serve_details", None),
    ("ray.serve._private.client", "ServeControllerClient.http_config", None),
    ("ray.serve._private.client", "ServeControllerClient", "self._controller"),
    ("ray.serve._private.controller", "ServeController.get_proxy_location", None),
    ("ray.serve._private.common", "ReplicaID.to_full_id_str", "REPLICA_ID_FULL_ID_STR_PREFIX"),
    ("ray.serve._private.replica", "add_port_to_grpc_server", None),
    ("ray.serve._private.replica", "", "add_port_to_grpc_server(self._server, "),
]


@pytest.mark.parametrize(("module", "name", "text"), NEEDED)
def test_this_version_of_ray_has_it(module: str, name: str, text: str | None):
    lacks = f"Ray {ray.__version__} lacks {module}.{name} as serving/ray_private.py uses it"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{lacks}: {error}")
    for part in filter(None, name.split(".")):
        # Serve wraps its controller's class into an actor's.
        found = getattr(found, "__ray_metadata__", found)
        found = getattr(found, "modified_class", found)
        assert hasattr(found, part), lacks
        found = getattr(found, part)
    if text is not None:
        assert text in inspect.getsource(found), f"{lacks}: {text!r} is not in its source"


def private_names(code: str) -> set[str]:
    """Names of ``code`` that begin with ``_`` and are taken from Ray or from an actor's handle."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if part.startswith("_")}
        elif isinstance(node, ast.Attribute) and node.attr in ("_actor_id", "_record", "_private"):
            found.add(node.attr)
    return found


def test_no_other_file_uses_private_names_of_ray():
    users = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := private_names(path.read_text("utf-8")))
    }
    assert set(users) == {"serving/ray_private.py"}
    assert private_names("import ray\nray.actor._private.x, h._actor_id") == {
        "_private",
        "_actor_id",
    }
