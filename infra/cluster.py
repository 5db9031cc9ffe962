"""Where it runs: the one place that connects to Ray, and the settings of place, which never bear identity."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

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
GCS_PORT, CLIENT_PORT, JOB_PORT = 6379, 10001, 8265
"""Where a Ray head listens unless told otherwise: for drivers (HOST:6379), ray://HOST:10001, and http://HOST:8265."""
ANSWER_S = 8.0
"""An address that nobody answers at for so long is told as such."""
STAYS_HERE = [".git", ".venv", "runs", "tests", "docs", "*.parquet", "*.tar"]
"""What of the repo is not shipped to a cluster."""


class ClusterError(OSError):
    """ClusterError(text): a cluster or its job. What happened, and the next step, in whole sentences."""


@dataclass(frozen=True)
class Cluster:
    """Where to run: Ray's address (None: a local Ray) and how many CPUs a local one may use."""

    # For Prefect's form: pydantic itself would make `--help` slower.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    address: str | None = field(default_factory=lambda: os.environ.get("RAY_ADDRESS") or None)
    """Ray's address: HOST:6379, ray://HOST:10001, or for trainings http://HOST:8265; without one a Ray of its own is
    started on this machine for the time of the run."""
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
    `working_dir`, so that `from ops.fetch import fetch` means the same on every node; a Ray job has been shipped
    already. Raises ClusterError for an address that nobody answers at, or that trainings alone can be sent to.
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
                runtime_env={"env_vars": {**_quiet(), "PYTHONPATH": str(REPO)}},
            )
            try:
                yield _http(context.dashboard_url)
            finally:
                ray.shutdown()
        return
    if cluster.address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{cluster.address} takes trainings as jobs, and nothing else. Name the cluster itself: HOST:{GCS_PORT} "
            f"from one of its machines, or ray://HOST:{CLIENT_PORT}."
        )
    _check_answers(cluster.address)
    context = ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=None if is_job() else shipped(),
    )
    try:
        yield _http(context.dashboard_url)
    finally:
        ray.shutdown()


def is_job() -> bool:
    """Whether this process was started by a cluster's job server."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def shipped() -> dict[str, Any]:
    """The runtime environment of whoever comes from outside a cluster: this repo, and the quiet variables."""
    return {"working_dir": str(REPO), "excludes": STAYS_HERE, "env_vars": _quiet()}


def job_server(address: str) -> str | None:
    """The URL at which a cluster takes jobs; None for a cluster without a dashboard, which takes none.

    Of http://… itself, of ray://HOST:… port 8265 of that host, of HOST:6379 what the cluster says. Raises ClusterError
    if nobody answers.
    """
    if address.startswith(("http://", "https://")):
        _check_answers(address)
        return address.rstrip("/")
    if address.startswith("ray://"):
        url = f"http://{urlsplit(address).hostname}:{JOB_PORT}"
        _check_answers(url)
        return url
    _check_answers(address)
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RayError

    give_up_s = time.monotonic() + ANSWER_S
    try:
        known = GcsClient(address=canonicalize_bootstrap_address_or_die(address))
        # A head says so some seconds after it is up.
        while not (found := known.internal_kv_get(b"dashboard", b"dashboard")):
            if time.monotonic() > give_up_s:
                return None
            time.sleep(0.5)
        session = known.internal_kv_get(b"session_name", b"session").decode()
    except RayError as error:
        told = str(error).partition("\n")[0]
        raise ClusterError(f"{address} does not let us in: {told} Is RAY_AUTH_TOKEN that of the cluster?") from None
    url = f"http://{found.decode()}"
    return url if _session(url) == session else None


def _session(server: str) -> str | None:
    """Which Ray answers at a URL. A head without a dashboard names 127.0.0.1:8265 too, where another may listen."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    try:
        with urlopen(
            Request(f"{server}/api/version", headers=get_auth_headers_if_auth_enabled({})), timeout=ANSWER_S
        ) as told:
            return str(json.loads(told.read())["session_name"])
    except (OSError, ValueError, KeyError):
        return None


def _check_answers(address: str) -> None:
    """Raises ClusterError if nobody listens at an address; ray itself would go on asking for a minute."""
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is None or place.port is None:  # "auto", or what only ray understands
        return
    try:
        socket.create_connection((place.hostname, place.port), timeout=ANSWER_S).close()
    except OSError as error:
        raise ClusterError(
            f"Nobody answers at {address} ({error}). Start the cluster, or correct --address or RAY_ADDRESS; "
            "without them a Ray of its own is started here."
        ) from None


def _quiet() -> dict[str, str]:
    quiet_environment()
    return {name: os.environ[name] for name in QUIET}


def _http(url: str | None) -> str | None:
    return f"http://{url}" if url else None
