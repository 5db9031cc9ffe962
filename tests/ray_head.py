"""A Ray head with a job server on loopback, in a process group of its own: what a laptop has not and a cluster has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

from tests.buckets import free_ports


@dataclass(frozen=True)
class Head:
    """Where it listens: `address` for drivers, `server` for jobs, `metrics` for Prometheus."""

    address: str
    server: str
    metrics: str


@contextmanager
def ray_head(cpus: int = 2, names: str | None = None) -> Iterator[Head]:
    """Up when its job server answers; gone, with all of its processes, at the end of the `with`.

    `names`: a head without a job server, that says that it was this one, of another head.
    """
    # A short path: Ray's socket names must stay under 107 characters.
    with TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as folder:
        gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
        python = Path(sys.executable)
        command = [str(python.with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        server = names or f"http://127.0.0.1:{dashboard}"
        command += [f"--port={gcs}", f"--dashboard-port={server.rpartition(':')[2]}"]
        command += [f"--include-dashboard={str(names is None).lower()}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
        command += [
            f"--metrics-export-port={metrics}",
            f"--ray-client-server-port={client}",
            f"--num-cpus={cpus}",
            f"--temp-dir={folder}/ray",
        ]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        settings = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_enable_metrics_collection": "1",
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        }
        log = Path(folder) / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=os.environ | settings, stdout=out, stderr=out, start_new_session=True
            )
        try:
            give_up_s = time.monotonic() + 120
            while not ("Ray runtime started" in log.read_text() if names else _takes_jobs(server)):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < give_up_s, log.read_text()[-3000:]
                time.sleep(0.2)
            yield Head(f"127.0.0.1:{gcs}", server, f"http://127.0.0.1:{metrics}/metrics")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers end when it is gone
            process.wait()


def _takes_jobs(server: str) -> bool:
    try:
        return bool(urlopen(f"{server}/api/jobs/", timeout=5).status == 200)
    except (URLError, OSError):
        return False
