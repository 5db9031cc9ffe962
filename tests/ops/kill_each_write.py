"""A program for test_ingest.py: ingests one planned shard again and again, disturbed at its n-th write.

    kill_each_write.py PLANNED WHERE COUNTS_URL HOW…

HOW is `before` or `after` (SIGKILL before or after the write), `EIO` or `ENOSPC` (the write fails, once or from there
on), `short` (half of the bytes arrive and nobody says so) or `clock` (half a day passes in a moment).
Each round copies the directory PLANNED, forks a child that is disturbed at one call of fsync, link, replace or mkdir,
and then a child that is left alone; one JSON line a round says how both ended. Forks of one process, since imports
take longer than a round.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
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


def ingest_in_child(store: LocalStore, at: int | None, how: str, result: Path) -> tuple[int, int]:
    """The child, and the status of os.waitpid; `result` says what the child made of it, if it could."""
    child = os.fork()
    if child:
        return child, os.waitpid(child, os.WUNTRACED)[1]
    calls, told = 0, {"state": "already", "text": ""}
    try:
        for name in WRITES:
            call = getattr(os, name)

            def disturbed(*args: Any, call: Callable[..., Any] = call, name: str = name, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at and how == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                if calls == at and how == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if (calls == at and how == "EIO") or (at is not None and calls >= at and how == "ENOSPC"):
                    number = getattr(errno, how)
                    raise OSError(number, os.strerror(number))
                if calls == at and how == "short" and name == "link":
                    os.truncate(args[0], Path(args[0]).stat().st_size // 2)
                if calls == at and how == "clock":
                    now = time.time
                    time.time = lambda: now() + 13 * 3600
                answer = call(*args, **kwargs)
                if calls == at and how == "after":
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer

            setattr(os, name, disturbed)
        (task,) = pending(store) or [None]
        told["state"] = ingest_shard(task).state if task else "already"
    except Exception as error:
        told = {"state": "raised", "text": str(error)}
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    result.write_text(json.dumps(told | {"calls": calls}))
    os._exit(0)


def main(planned: Path, where: Path, counts_url: str, ways: list[str]) -> None:
    def asked() -> int:
        with urlopen(counts_url) as answer:
            return sum(json.load(answer).values())

    def copy(name: str) -> LocalStore:
        return LocalStore(shutil.copytree(planned, where / name))

    def committed(store: LocalStore) -> dict[str, bytes]:
        return {entry.key: store.read(entry.key) for kind in ("data/", "receipts/") for entry in store.list(kind)}

    where.mkdir()
    result, other = where / "result.json", where / "other.json"
    # Once in this process: what is imported at first use is there in every child.
    assert [ingest_shard(task).state for task in pending(copy("at-first"))] == ["committed"]
    assert ingest_in_child(copy("undisturbed"), None, "", result)[1] == 0
    for n in range(1, json.loads(result.read_text())["calls"] + 1):
        for how in ways:
            store = copy(f"{n}-{how}")
            result.unlink(missing_ok=True)
            child, ended = ingest_in_child(store, n, how, result)
            had_receipt, before = bool(committed_generations(store)), asked()
            assert ingest_in_child(store, None, "", other)[1] == 0
            asked_again = asked() - before
            if os.WIFSTOPPED(ended):
                stands = committed(store)
                os.kill(child, signal.SIGCONT)
                ended = os.waitpid(child, 0)[1]
                assert committed(store) == stands, "somebody who slept changed what was committed meanwhile"
            first = json.loads(result.read_text()) if result.exists() else {"state": "killed", "text": ""}
            disturbed = {
                "store": str(store.root),
                "how": how,
                "killed_by": os.WTERMSIG(ended),
                "first": first["state"],
                "text": first["text"],
                "had_receipt": had_receipt,
                "then": json.loads(other.read_text())["state"],
                "asked_again": asked_again,
            }
            print(json.dumps(disturbed), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
