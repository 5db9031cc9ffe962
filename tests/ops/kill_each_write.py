"""A program for test_ingest.py: ingests one planned shard again and again, killed before or after its n-th write.

    kill_each_write.py PLANNED WHERE COUNTS_URL

Each round copies the directory PLANNED, forks a child that kills itself at one call of fsync, link, replace or mkdir,
and then a child that is left alone; one JSON line a round says how both ended. Forks of one process, since imports
take longer than a round.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from infra.store import LocalStore
from ops.ingest import ingest_shard
from ops.shards import committed_generations
from tests.pairs import pending

WRITES = ("fsync", "link", "replace", "mkdir")


def ingest_in_child(store: LocalStore, kill_at: int | None, when: str, result: Path) -> int:
    """Returns the status of os.waitpid."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        calls = 0

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == kill_at and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                answer = call(*args, **kwargs)
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer

            return wrapped

        for name in WRITES:
            setattr(os, name, deadly(getattr(os, name)))
        (task,) = pending(store) or [None]
        state = ingest_shard(task).state if task else "already"
        result.write_text(json.dumps({"state": state, "calls": calls}))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(planned: Path, where: Path, counts_url: str) -> None:
    def asked() -> int:
        with urlopen(counts_url) as answer:
            return sum(json.load(answer).values())

    def copy(name: str) -> LocalStore:
        return LocalStore(shutil.copytree(planned, where / name))

    where.mkdir()
    result = where / "result.json"
    # Once in this process: what is imported at first use is there in every child.
    assert [ingest_shard(task).state for task in pending(copy("at-first"))] == ["committed"]
    assert ingest_in_child(copy("undisturbed"), None, "", result) == 0
    for n in range(1, json.loads(result.read_text())["calls"] + 1):
        for when in ("before", "after"):
            store = copy(f"{n}-{when}")
            killed = ingest_in_child(store, n, when, result)
            had_receipt, before = bool(committed_generations(store)), asked()
            again = ingest_in_child(store, None, "", result)
            assert again == 0, again
            kill = {
                "store": str(store.root),
                "killed_by": os.WTERMSIG(killed),
                "had_receipt": had_receipt,
                "then": json.loads(result.read_text())["state"],
                "asked_again": asked() - before,
            }
            print(json.dumps(kill), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
