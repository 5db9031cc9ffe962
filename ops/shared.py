"""Whether every node of the cluster sees a directory: on one machine of many it would be a directory of its own.

A shard that is committed on a disk of one node would be there for nobody else, so this is asked before work is given
out. Buckets are the same from everywhere and are not asked.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from infra.store import TEMPORARY, absolute
from ops.errors import NotShared

ANSWER_S = 60.0
"""A node that can't start a task within that time is not asked any more: it can't do a shard either."""


def check_shared(*locations: str) -> None:
    """Raises NotShared for a local directory that some node of the connected Ray does not see as this process does.

    A file of a random name is written into each and looked for by a task on every node; directories that can't be
    written to, or are not there, are left to those who use them. Nothing is done on a single node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    local = [absolute(location) for location in locations if "://" not in location]
    if len(nodes) < 2 or not local:
        return
    look = ray.remote(_sees)
    for location in local:
        probe = Path(location) / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            probe.touch()
        except OSError:
            continue
        try:
            asked = {}
            for node in nodes:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                name = f"sees {location}"
                asked[look.options(name=name, num_cpus=0, scheduling_strategy=there).remote(str(probe))] = node
            answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
            blind = []
            for answer in answers:
                with suppress(ray.exceptions.RayError):  # a node that went away meanwhile
                    blind += [] if ray.get(answer) else [asked[answer]["NodeManagerAddress"]]
        finally:
            with suppress(OSError):
                probe.unlink()
        if blind:
            raise NotShared(location, sorted(blind))


def _sees(path: str) -> bool:
    # An NFS client may believe for seconds that a name is not there, unless it reads the directory anew.
    return Path(path).name in {entry.name for entry in Path(path).parent.glob(f"{TEMPORARY}*")}
