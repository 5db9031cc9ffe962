"""Checkpoints of a training that is spread over ranks: each rank writes its part, while the training goes on.

    steps/0000500/model-1f3a….safetensors                  the whole model that is published, by rank 0
                  part-0001-of-0004-9c0b….safetensors      rank 1's rows of each weight, its average and moments
                  part-0001-of-0004.run-0003.json          "my part is there", from rank 1 to rank 0; gone afterwards
                  receipt.json                             the commit, by rank 0, when all parts are there

A part does not tell how the weights were spread: any number of ranks, with copies or with shares, takes it up again.
May not live here: what a commit is (ops/trained.py), how a model is spread (ops/spread.py).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from infra.store import Store
from ops.errors import DamagedArtifact
from ops.jobs import Worker
from ops.reader import Prefetch
from ops.shards import FileRef, scratch_directory
from ops.spread import Spread
from ops.trained import (
    MODEL,
    Checkpoint,
    load_weights,
    put_file,
    read_checkpoint_file,
    save_weights,
    write_checkpoint,
)

_PART = re.compile(r"part-(\d{4,})-of-(\d{4,})\.safetensors")
LOOK_S = 0.05
"""How often rank 0 looks for the parts of the others."""
Tensors = Mapping[str, Mapping[str, Tensor]]
"""What is kept of each weight ("weight", "average", "exp_avg", "exp_avg_sq") -> its name -> a tensor like it."""


class Writer:
    """Writes one checkpoint at a time in a thread of its own. `wait` raises what went wrong in it."""

    def __init__(self, store: Store, run: int, worker: Worker, keep: int, check_owner: Callable[[], None]) -> None:
        self._store, self._run, self._worker, self._keep = store, run, worker, keep
        self._check_owner = check_owner
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self, step: int, spread: Spread, tensors: Tensors, model: Mapping[str, Tensor], about: Mapping[str, Any],
        commit: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Copies this rank's part of `tensors`, and goes on in the thread. `model` (on the CPU), `about` and `commit`
        (what `write_checkpoint` is told) are rank 0's. Waits for the checkpoint before it."""
        self.wait()
        part = {
            f"{kind}/{name}": spread.share(name, tensor).detach().to("cpu", copy=True)
            for kind, named in tensors.items()
            for name, tensor in named.items()
        }
        args = (step, part, model, about, commit)
        self._thread = threading.Thread(target=self._guarded, args=args, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that was begun is written; on rank 0, committed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _guarded(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # carried to the thread that waits
            self._error = error

    def _write(
        self, step: int, part: dict[str, Tensor], model: Mapping[str, Tensor], about: Mapping[str, Any],
        commit: Mapping[str, Any],
    ) -> None:  # fmt: skip
        rank, world = self._worker.rank, self._worker.world
        name = f"part-{rank:04d}-of-{world:04d}.safetensors"
        with scratch_directory() as directory:
            save_weights(directory / name, part, {"rank": rank, "world": world})
            if rank == 0:
                save_weights(directory / MODEL, model, about)
                files = {MODEL: directory / MODEL, name: directory / name}
                keep, check = self._keep, self._check_owner
                write_checkpoint(self._store, step, files=files, others=self._others(step), keep=keep,
                                 check_owner=check, **commit)  # fmt: skip
                return
            ref = put_file(self._store, step, name, directory / name, self._check_owner)
            said = json.dumps({"name": name, **asdict(ref)}).encode()
            self._store.put(self._word(step, rank), said, if_absent=False)

    def _word(self, step: int, rank: int) -> str:
        return f"steps/{step:07d}/part-{rank:04d}-of-{self._worker.world:04d}.run-{self._run:04d}.json"

    def _others(self, step: int) -> Callable[[], dict[str, FileRef]]:
        def wait() -> dict[str, FileRef]:
            refs = {}
            for rank in range(1, self._worker.world):
                while self._store.stat(self._word(step, rank)) is None:
                    self._check_owner()
                    time.sleep(LOOK_S)
                said = json.loads(self._store.read(self._word(step, rank)))
                name = said.pop("name")
                refs[name] = FileRef(**said)
            for rank in range(1, self._worker.world):
                self._store.delete(self._word(step, rank))
            return refs

        return wait


def restore(store: Store, checkpoint: Checkpoint, spread: Spread, tensors: Tensors) -> None:
    """Fills `tensors` from the parts of a checkpoint, of any number of ranks; reads only those that hold its rows.

    Raises DamagedArtifact for a part that is gone, cut, or not what its receipt says.
    """
    parts = sorted(name for name in checkpoint.files if _PART.fullmatch(name))
    place = f"{store.location}/steps/{checkpoint.step:07d}"
    if not parts or any(name.count(f"-of-{len(parts):04d}.") == 0 for name in parts):
        raise DamagedArtifact(place, "the parts of all ranks", ", ".join(parts) or "none")
    earlier = Worker(world=len(parts))
    needed = sorted({part for name in spread.shapes for part in overlaps(earlier, spread, name)})

    def read(index: int) -> dict[str, Tensor]:
        name = parts[needed[index]]
        return load_weights(read_checkpoint_file(store, checkpoint, name), f"{place}/{name}")[0]

    with Prefetch(read, 0, len(needed), depth=1) as loaded, torch.no_grad():
        for part in needed:
            found = loaded.take()
            for kind, named in tensors.items():
                for name, tensor in named.items():
                    if part not in (needs := overlaps(earlier, spread, name)):
                        continue
                    if (rows := found.get(f"{kind}/{name}")) is None:
                        raise DamagedArtifact(f"{place}/{parts[part]}", f"{kind} of {name}", "nothing of it")
                    (begin, end), here = needs[part], spread.rows(name)[0]
                    there = earlier.part(spread.shapes[name][0], part)[0]
                    tensor[begin - here : end - here].copy_(rows[begin - there : end - there])


def overlaps(earlier: Worker, spread: Spread, name: str) -> dict[int, tuple[int, int]]:
    """Part -> the rows of a weight that this rank needs of it."""
    first, stop = spread.rows(name)
    found = {}
    share = -(-spread.shapes[name][0] // earlier.world)
    for part in range(first // share, -(-stop // share)) if stop > first else ():
        begin, end = earlier.part(spread.shapes[name][0], part)
        found[part] = (max(first, begin), min(stop, end))
    return found
