"""Where it runs: the one place that connects to Ray, and the settings of place, which never bear identity."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

REPO = Path(__file__).resolve().parent.parent

QUIET = {
    "OMP_WAIT_POLICY": "passive",  # two spinning threads on a busy machine cost 7x the CPU time
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # A time series for each name of a task, and ours name their shard: 30 kB a shard in the driver, for ever.
    "RAY_enable_metrics_collection": "0",
    "OPENCV_IO_MAX_IMAGE_PIXELS": "100000000",  # the second line against picture bombs, behind filters.max_pixels
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
"""Set before ray, torch or cv2 is imported, here and in every worker; a value of the user's wins."""


@dataclass(frozen=True)
class Cluster:
    """Where to run: Ray's address (None: a local Ray) and how many CPUs a local one may use."""

    # For Prefect's form: pydantic itself would make `--help` slower.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    address: str | None = field(default_factory=lambda: os.environ.get("RAY_ADDRESS") or None)
    """Ray's address; without one a Ray of its own is started on this machine for the time of the run."""
    cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    """CPUs of a local Ray."""
    dashboard: bool = False
    """Whether a local Ray shows its dashboard; the run links to it."""


@dataclass(frozen=True)
class Place:
    """How a training is spread over machines. None of it bears identity: a run may go on with other values."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    workers: int = 1
    """Training processes."""
    most_workers: int | None = None
    """Elastic: between `workers` and so many, as machines come and go."""
    threads: int | None = None
    """Threads of torch in each worker; None: this machine's cores shared among the workers."""
    gpu: bool = False
    """One GPU for each worker."""
    sharded: bool = False
    """Weights, gradients, averages and optimizer are split over the workers (FSDP2), not copied to each (DDP)."""
    accumulate: int = 1
    """Parts of a worker's batch that go through the model one after another, to save memory."""
    recompute: bool = False
    """Compute a block's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile each block (torch.compile): minutes at the start, faster steps on a GPU."""


def quiet_environment() -> None:
    """Sets the variables of `QUIET` that the user has not set. Called first thing by the command line."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect(cluster: Cluster) -> Iterator[str | None]:
    """Connects to Ray for the time of a `with`; yields the dashboard's URL or None. Nested calls share one Ray.

    A local Ray ends with the outermost `with`; a cluster that was joined goes on. Joining ships the repo as
    `working_dir`, so that `from ops.fetch import fetch` means the same on every node.
    """
    handler = signal.getsignal(signal.SIGTERM)
    is_handled = callable(handler) and threading.current_thread() is threading.main_thread()
    is_connected, came = False, False

    def interrupt(number: int, frame: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    # ray.init puts a handler of its own in place, and one of C that aborts with a dump of the stack. And of what a
    # handler may raise while Ray waits only this one exception comes out of it for sure. So SIGTERM is Ctrl-C as long
    # as Ray is there, and then what it was before: the signal is sent once more.
    try:
        with _connected(cluster) as dashboard:
            is_connected = True
            if is_handled:
                signal.signal(signal.SIGTERM, interrupt)
            yield dashboard
    except SystemExit:
        came = came or not is_connected  # how Ray's handler leaves, if the signal comes while it starts
        raise
    finally:
        if is_handled:
            signal.signal(signal.SIGTERM, handler)
            if came:
                os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _connected(cluster: Cluster) -> Iterator[str | None]:
    quiet_environment()
    if cluster.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a Ray of our own on loopback; token auth is for clusters
    import ray

    if ray.is_initialized():
        yield None
        return
    environment = {name: os.environ[name] for name in QUIET}
    if cluster.address is None:
        # A short path: Ray's socket names must stay under 107 characters.
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
            context = ray.init(
                address="local",
                num_cpus=cluster.cpus,
                include_dashboard=cluster.dashboard,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=256 << 20,
                _temp_dir=scratch,
                runtime_env={"env_vars": {**environment, "PYTHONPATH": str(REPO)}},
            )
            try:
                yield _http(context.dashboard_url)
            finally:
                ray.shutdown()
        return
    excludes = [".git", ".venv", "runs", "tests", "docs", "*.parquet", "*.tar"]
    context = ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"working_dir": str(REPO), "excludes": excludes, "env_vars": environment},
    )
    try:
        yield _http(context.dashboard_url)
    finally:
        ray.shutdown()


def _http(url: str | None) -> str | None:
    return f"http://{url}" if url else None
