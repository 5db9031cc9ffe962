"""A program for test_adopt.py: adopts one folder again and again, killed before or after its n-th write, then again.

    kill_each_adoption.py FOLDER LIST WHERE

One JSON line for an undisturbed adoption, then one for each kill: what is kept and what waits after the second run.
Forks of one process, since imports take longer than a round.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.store import LocalStore
from tests.ops.kill_each_write import WRITES
from tests.ops.test_adopt import adopt, waiting
from tests.pairs import rows


def adopt_in_child(store: LocalStore, folder: str, listed: str, kill_at: int | None, when: str, result: Path) -> int:
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
        adopt(store, folder, [listed])
        made = calls
        kept = sorted(row["url"] for row in rows(store))
        result.write_text(json.dumps({"calls": made, "kept": kept, "waiting": waiting(store)}))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(folder: str, listed: str, where: Path) -> None:
    where.mkdir()
    result = where / "result.json"
    adopt(LocalStore(where / "at-first"), folder, [listed])  # what is imported at first use is there in every child
    assert adopt_in_child(LocalStore(where / "undisturbed"), folder, listed, None, "", result) == 0
    undisturbed = json.loads(result.read_text())
    calls = undisturbed.pop("calls")
    print(json.dumps(undisturbed), flush=True)
    for n in range(1, calls + 1):
        when = ("before", "after")[n % 2]
        store = LocalStore(where / f"{n}-{when}")
        killed = adopt_in_child(store, folder, listed, n, when, result)
        assert adopt_in_child(store, folder, listed, None, "", result) == 0
        told = json.loads(result.read_text())
        del told["calls"]
        print(json.dumps({**told, "killed_by": os.WTERMSIG(killed)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
