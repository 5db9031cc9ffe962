"""A program for kill tests: ingests what is missing in a planned directory, on a Ray of its own, and prints outcomes.

python -m tests.ingest_driver PAIRS
"""

from __future__ import annotations

import sys

from infra.cluster import Cluster, connect
from infra.store import open_store
from ops.ingest import ingest
from tests.pairs import pending

if __name__ == "__main__":
    tasks = pending(open_store(sys.argv[1]))
    with connect(Cluster(address=None, cpus=2)):
        for outcome in ingest(sys.argv[1], tasks):
            print(outcome.shard, outcome.state, outcome.deaths, flush=True)
