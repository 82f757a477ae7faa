"""A local Ray cluster for the tests that need one."""

import atexit
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowgrpo_ray.spec.families import FAMILIES

# Ray reads these when it is imported. Everything binds to 127.0.0.1, and the token stands in the
# environment alone, so that none is written to the home folder.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# As a run that starts its own Ray sets it.
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = (
    "flowgrpo_ray.serving.json_errors:middlewares"
)
os.environ["FLOWGRPO_TEST_TOKEN"] = secrets.token_hex(16)  # of a reward's HTTP; replicas inherit it
# Prompt encodings belong to this run of the tests, not to the user's cache.
os.environ["FLOWGRPO_ENCODINGS"] = tempfile.mkdtemp(prefix="fge", dir="/tmp")
atexit.register(shutil.rmtree, os.environ["FLOWGRPO_ENCODINGS"], ignore_errors=True)


# Files that take longest, those of whole runs before all: whoever shares tests out among processes
# begins with them, so that none works alone at the end.
LONGEST = (
    *("test_end_to_end.py", "test_reward_service.py", "test_rewards_ocr.py", "test_learner.py"),
    *("test_cluster.py", "test_policy_contract.py", "test_fuzz_specs.py", "test_export_models.py"),
    *("test_monitor_page.py", "test_reward_failures.py", "test_footprint.py"),
)


# Of the tests over all families, two of each are quick, and all of those families that differ most.
OTHER_FAMILIES = {*FAMILIES, "flux2_dev"} - {"sd3", "flux", "bagel"}
OVER_FAMILIES = ("tests/policies", "tests/estimate", "tests/run/test_export_models.py")
OF_ONE_FAMILY = "_policy.py"  # files of which all tests are quick
QUICK = (
    "test_a_replayed_trajectory_has_a_log_ratio_of_exactly_zero[lora-bfloat16-{}]",
    "test_ode_sampling_is_the_pipelines[alone-{}-4",  # with guidance
    "test_ode_sampling_is_the_pipelines[alone-z_image-3",  # with its own
)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow by its family, and begin with the longest files."""
    for item in items:
        if item.nodeid.startswith(OVER_FAMILIES) and not item.path.name.endswith(OF_ONE_FAMILY):
            given = {*item.name.partition("[")[2].rstrip("]").split("-")}
            for family in given & OTHER_FAMILIES:
                if not item.name.startswith(tuple(name.format(family) for name in QUICK)):
                    item.add_marker(pytest.mark.slow)
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A file's tests share a process; those of whole runs, which take turns anyway, share one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "whole runs" if file in takes_turns else file

    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    takes_turns = {
        str(file.relative_to(config.rootpath))
        for file in files
        if "hardly_disturbed" in file.read_text("utf-8")
    }
    return ByFile(config, log)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray with four logical CPUs, without dashboard, in a folder that is removed at the end."""
    import ray
    from ray import serve

    folder = tempfile.mkdtemp(prefix="fgr", dir="/tmp")  # short: socket paths have a limit
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        _temp_dir=folder,
        # The rewards of reward_samples.py are imported by replicas.
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def hardly_disturbed() -> Iterator[None]:
    """One module at a time has this: Ray gives its processes 30 s to start, which many clusters at
    once on a small machine do not manage."""
    with Path(tempfile.gettempdir(), "flowgrpo-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``command_line("plan", "tiny-ocr") -> (status, stdout, stderr)``, in this process."""
    from flowgrpo_ray import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["flowgrpo-ray", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    return call
