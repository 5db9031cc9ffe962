"""A Ray cluster of three nodes on this machine that share no scratch: each has mounts, process ids, a host name and an
address of its own (`unshare`; node-1 to node-3; 127.0.0.1 to 127.0.0.3), and a tmpfs in the place of the scratch
folder. One can be switched off.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.buckets import free_ports

RAY = Path(sys.executable).with_name("ray")
UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
UNSHARE += [] if os.geteuid() == 0 else ["--map-root-user"]
MOUNT = """
hostname "$NODE"
for at in "$TMPDIR" $BESIDE; do mount -t tmpfs -o size=1g tmpfs "$at"; done
exec "$@"
"""


@dataclass
class Node:
    """One node: the process that all of its processes hang on."""

    name: str
    process: subprocess.Popen[bytes]

    def switch_off(self) -> None:
        """SIGKILL to every process of the node at once, like a machine that loses its power."""
        if self.process.poll() is None:
            # The kernel ends a namespace of process ids with its first process, which unshare takes along.
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Nodes:
    """The cluster: its address for RAY_ADDRESS, and the nodes, the head first."""

    address: str
    nodes: list[Node]
    _start: Callable[[int], Node]

    def switch_on(self, node: Node) -> None:
        """A machine of that name joins again, with nothing that it had."""
        number = self.nodes.index(node)
        self.nodes[number] = self._start(number)


@contextmanager
def three_nodes(*unshared: Path, environment: dict[str, str] | None = None, cpus: int = 1) -> Iterator[Nodes]:
    """A head and two more nodes. `unshared` are directories that each node sees empty, and its own."""
    # A short path: Ray's socket names must stay under 107 characters.
    with TemporaryDirectory(prefix="three-", ignore_cleanup_errors=True) as folder:
        root, starts = Path(folder), count()
        (root / "scratch").mkdir()
        [port] = free_ports(1)
        beside = " ".join(str(path) for path in unshared)
        settings = {"TMPDIR": str(root / "scratch"), "BESIDE": beside, "RAY_AUTH_MODE": "disabled"}
        settings |= {"RAY_USAGE_STATS_ENABLED": "0"} | (environment or {})
        # Ray takes 30 s and more to believe that a node is gone; a test is not to wait so long.
        settings |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "10"}

        def start(number: int) -> Node:
            place = ["--head", f"--port={port}", "--include-dashboard=false"]
            place = place if number == 0 else [f"--address=127.0.0.1:{port}"]
            command = [str(RAY), "start", "--block", *place, f"--node-ip-address=127.0.0.{number + 1}"]
            command += [f"--num-cpus={cpus}", f"--temp-dir={root / f'ray-{number}-{next(starts)}'}"]
            command += ["--disable-usage-stats", "--object-store-memory=80000000"]
            log = root / f"node-{number}.txt"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [*UNSHARE, "sh", "-ec", MOUNT, "sh", *command],
                    env=os.environ | settings | {"NODE": f"node-{number + 1}"},
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            _wait_until_up(process, log)
            return Node(f"node-{number + 1}", process)

        nodes: list[Node] = []
        try:
            for number in range(3):
                nodes.append(start(number))
            yield Nodes(f"127.0.0.1:{port}", nodes, start)
        finally:
            for node in reversed(nodes):
                node.switch_off()


def _wait_until_up(process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, f"a node did not start:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < give_up_s, f"a node did not start in time:\n{log.read_text()[-3000:]}"
        time.sleep(0.1)
