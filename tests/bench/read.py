"""Benchmark of reading pictures for training, against webdataset and Ray Data, at 1, 2 and 4 workers; and of codes.

    make bench STAGE=read
    pip install --no-deps --target DIR webdataset braceexpand    (outside the repo; then PYTHONPATH=DIR make bench …;
                                                                  without it that side is left out)

    ours            `pictures_reader`, cut into batches, `Prefetch`, decoded in one thread
    ours, children  the same, decoded in one child process
    webdataset      WebDataset of the worker's own tars, .shuffle(1000), WebLoader with one loader process
    ray_data        read_webdataset(shuffle="files"), map_batches, streaming_split: one consumer a worker

A worker reads as a rank does: it takes tensors [32, 3, 256, 256] until all its pictures have come. All sides read the
same tars (short side 384, quality 90) and make crops with the same function, so what differs is the way there. A worker
of the first three is one process on one CPU with what it starts; Ray Data has as many tasks of a kind at a time as
there are workers, on any CPU, and does not shuffle rows (both in its favour).

    pictures/s      of all workers together, from the first demand to the last batch; processes are there before
    CPU-ms          of all processes of a side for each picture; that of Ray's at rest is in it
    first batch     seconds until the slowest worker has it: part of the above
    waited          share of the time that steps of fixed length waited for their batch, after the first one
    ratios          of CPU for each picture, theirs to ours, as in all benchmarks: the lowest of the numbers of workers;
                    `wall_ratios` of the time of a round (medians of pairs of rounds), which others on the machine sway

Then threads and children decode batches of 64 while the main thread of their process runs Python, as a training step of
many small operations does: pictures/s, and the pace of that Python as a share of its pace alone.

The exit status is 1 if a side gave another number of pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.harness import Measured, OwnProcess, alternate, cpu_s, device, print_last_line
from tests.bench.photographs import SIZES, draw_photograph

BATCH = 32
SIZE_PX = 256
SHARD_ROWS = 256
CODES = 1024
"""Of a picture."""
PACKAGES = ("numpy", "pyarrow", "simplejpeg", "opencv-python-headless", "torch", "ray")


@dataclass(frozen=True)
class Taken:
    """What one worker had of one round: pictures, and seconds."""

    pictures: int
    first_s: float
    waited_share: float


# --- what is read ----------------------------------------------------------------------------------------------------
def write_pairs(location: Path, jpegs: list[bytes], shards: int) -> None:
    """PAIRS of these stored pictures in turn, none of them held out."""
    import pyarrow as pa

    from infra.store import open_store
    from ops.recipes import start_stage
    from ops.shards import Receipt, publish, sidecar_schema, write_table, write_tar

    store = open_store(str(location))
    start_stage(store, "pairs", {"picture": {}}, {}, "")
    for shard in range(shards):
        rows, members = [], []
        for row in range(SHARD_ROWS):
            number = shard * SHARD_ROWS + row
            key, jpeg = f"{shard:05d}{row:04d}", jpegs[number % len(jpegs)]
            members += [(f"{key}.jpg", jpeg), (f"{key}.json", b"{}"), (f"{key}.txt", b"leaves")]
            known = {"key": key, "uid": f"{number:032x}", "caption": "leaves", "status": "success", "split": "train"}
            rows.append(known | {"weight": 1.0, "jpg_size": len(jpeg)})
        scratch = location.parent / f"scratch-{shard}"
        scratch.mkdir(parents=True)
        offsets = write_tar(scratch / "tar", members)
        for record in rows:
            record["tar_offset"] = offsets[f"{record['key']}.jpg"]
        groups = write_table(scratch / "parquet", pa.Table.from_pylist(rows, schema=sidecar_schema()))
        receipt = Receipt("pairs", shard, 0, {}, rows=len(rows), kept=len(rows), row_groups=groups)
        assert publish(store, receipt, {name: scratch / name for name in ("tar", "parquet")})


def write_tokens(location: Path, shards: int, rows: int) -> None:
    """TOKENS of random codes: one row a picture, row groups as ops/tokenize.py makes them."""
    import pyarrow as pa

    from infra.store import open_store
    from ops.recipes import start_stage
    from ops.shards import Receipt, publish, write_table
    from ops.tokenize import ROW_GROUP_ROWS

    store, rng = open_store(str(location)), np.random.default_rng(0)
    start_stage(store, "tokens", {"tokens": {"crops": 1}}, {"tokenizer": "a" * 64}, "")
    for shard in range(shards):
        codes = pa.array(rng.integers(0, 8192, rows * CODES).astype(np.uint16))
        table = pa.table(
            {
                "uid": [f"{shard * rows + row:032x}" for row in range(rows)],
                "caption": ["a photograph of leaves and stones"] * rows,
                "codes": pa.FixedSizeListArray.from_arrays(codes, CODES),
                "split": ["train"] * rows,
                "weight": [1.0] * rows,
            }
        )
        scratch = location.parent / f"codes-{shard}"
        groups = write_table(scratch, table, ROW_GROUP_ROWS)
        made_from = {"tokenizer": "a" * 64}
        receipt = Receipt("tokens", shard, 0, made_from, rows=rows, kept=rows, row_groups=groups)
        assert publish(store, receipt, {"parquet": scratch})


# --- the sides -------------------------------------------------------------------------------------------------------
def taken(batches: Iterator[Any], step_s: float, begun_s: float) -> Taken:
    """Takes all batches of images_BCHW, with a step of `step_s` after each."""
    pictures, first_s, waited_s = 0, 0.0, 0.0
    while True:
        asked_s = time.perf_counter()
        images_BCHW = next(batches, None)
        now_s = time.perf_counter()
        if images_BCHW is None:
            break
        assert tuple(images_BCHW.shape[1:]) == (3, SIZE_PX, SIZE_PX)
        if pictures:
            waited_s += now_s - asked_s
        else:
            first_s, first_at_s = now_s - begun_s, now_s
        pictures += len(images_BCHW)
        time.sleep(step_s)
    return Taken(pictures, first_s, waited_s / max(time.perf_counter() - first_at_s, 1e-9))


def cropped(jpeg: bytes, seed: int) -> np.ndarray:
    """The picture that all sides make of a JPEG."""
    from ops.pictures import decode_stored, tokenizer_crop

    return tokenizer_crop(decode_stored(jpeg), SIZE_PX, np.random.default_rng(seed), crop=True, flip=True)


def ours(pairs: Path, rank: int, world: int, step_s: float, processes: int) -> Taken:
    import torch

    from infra.store import open_store
    from ops.decoding import Decoders, Stored
    from ops.learning import images_of
    from ops.reader import Prefetch, pictures_reader
    from ops.snapshot import take_snapshot

    torch.set_num_threads(1)
    begun_s, store = time.perf_counter(), open_store(str(pairs))
    reader = pictures_reader(store, take_snapshot(store, "pictures", {}), 0)
    with Decoders(str(pairs), SIZE_PX, processes=processes) as decoders:

        def batch(step: int) -> Any:
            first = (step * world + rank) * BATCH
            rows = reader.rows(first, min(first + BATCH, reader.rows_per_epoch))
            return images_of(decoders.crops([Stored(r.uid, r.payload, r.position) for r in rows], crop=True, flip=True))

        steps = -(-(reader.rows_per_epoch - rank * BATCH) // (world * BATCH))
        with Prefetch(batch, 0, steps) as batches:
            return taken((batches.take() for _ in range(steps)), step_s, begun_s)


def webdataset(pairs: Path, rank: int, world: int, step_s: float) -> Taken:
    import torch
    import webdataset as wds

    from ops.learning import images_of

    torch.set_num_threads(1)
    begun_s = time.perf_counter()
    urls = sorted(str(path) for path in (pairs / "data").glob("*.tar"))[rank::world]

    def image(sample: dict[str, Any]) -> Any:
        return images_of(cropped(sample["jpg"], int(sample["__key__"]))[None])[0]

    dataset = wds.WebDataset(urls, shardshuffle=100, select_files=lambda name: name.endswith(".jpg"))
    dataset = dataset.shuffle(1000).map(image).batched(BATCH, collation_fn=torch.stack)
    # fork, as everywhere on Linux; in a process that was spawned it would be spawn, which is slow to start.
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    return taken(iter(loader), step_s, begun_s)


def ray_data(pairs: Path, world: int, step_s: float) -> Measured:
    import ray

    def crops(batch: dict[str, Any]) -> dict[str, Any]:
        images = [cropped(jpeg, int(key)) for jpeg, key in zip(batch["jpg"], batch["__key__"], strict=True)]
        return {"image": np.stack(images)}

    class Consumer:
        def take(self, shard: Any) -> Taken:
            import torch

            from ops.learning import images_of

            torch.set_num_threads(1)
            begun_s = time.perf_counter()
            batches = (batch["image"] for batch in shard.iter_batches(batch_size=BATCH, batch_format="numpy"))
            return taken((images_of(images) for images in batches), step_s, begun_s)

    paths = sorted(str(path) for path in (pairs / "data").glob("*.tar"))
    dataset = ray.data.read_webdataset(
        paths, decoder=None, fileselect=["*.jpg"], shuffle="files", concurrency=world
    ).map_batches(crops, batch_size=BATCH, compute=ray.data.TaskPoolStrategy(size=world))
    consumers = [ray.remote(num_cpus=0)(Consumer).remote() for _ in range(world)]
    ray.get([consumer.__ray_ready__.remote() for consumer in consumers])
    begun_s, begun_cpu_s = time.perf_counter(), descendants_cpu_s()
    splits = dataset.streaming_split(world, equal=False)
    found = ray.get([consumer.take.remote(split) for consumer, split in zip(consumers, splits, strict=True)])
    turn = Measured(found, descendants_cpu_s() - begun_cpu_s, time.perf_counter() - begun_s)
    for consumer in consumers:
        ray.kill(consumer)
    return turn


def descendants_cpu_s() -> float:
    """CPU of all processes below this one, and of their children that ended: Ray's, while the other sides are idle."""
    parents, used_s = {}, {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                parents[int(place.name)] = int(fields[1])
                used_s[int(place.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total_s = 0.0
    for pid in used_s:
        above = parents.get(pid)
        while above not in (None, os.getpid()):
            above = parents.get(above)
        total_s += used_s[pid] if above else 0.0
    return total_s


def codes(tokens: Path) -> int:
    """Reads two epochs of codes in batches, as arrays; the number of rows."""
    from infra.store import open_store
    from ops.reader import Prefetch, codes_reader
    from ops.snapshot import take_snapshot

    store = open_store(str(tokens))
    reader = codes_reader(store, take_snapshot(store, "codes", {}), 0, "a" * 64)
    rows, size = 0, 512

    def batch(step: int) -> Any:
        return np.stack([row.payload for row in reader.rows(step * size, (step + 1) * size)])

    steps = 2 * reader.rows_per_epoch // size
    with Prefetch(batch, 0, steps) as batches:
        for _ in range(steps):
            rows += len(batches.take())
    return rows


def beside_python(jpegs: list[bytes], kind: str, count: int, seconds: float = 1.0) -> tuple[float, float]:
    """(pictures/s, pace of the main thread's Python) of Decoders with `count` threads or processes."""
    from ops.decoding import Decoders, Stored

    pictures = [Stored(str(i), jpegs[i % len(jpegs)], i) for i in range(64)]
    with Decoders("pairs", SIZE_PX, **{kind: count}) as decoders:
        decoders.crops(pictures, crop=True, flip=True)  # starts the children
        has_ended, batches = threading.Event(), 0

        def decode() -> None:
            nonlocal batches
            while not has_ended.is_set():
                decoders.crops(pictures, crop=True, flip=True)
                batches += 1

        thread = threading.Thread(target=decode)
        begun_s = time.perf_counter()
        thread.start()
        pace = python_pace(seconds)
        has_ended.set()
        thread.join()
        return 64 * batches / (time.perf_counter() - begun_s), pace


def python_pace(seconds: float) -> float:
    """Rounds of Python a second."""
    rounds, begun_s = 0, time.perf_counter()
    while time.perf_counter() - begun_s < seconds:
        sum(i * i for i in range(1000))
        rounds += 1
    return rounds / (time.perf_counter() - begun_s)


# --- the run ---------------------------------------------------------------------------------------------------------
def ready() -> None:
    """What is imported before the rounds."""
    import torch  # noqa: F401

    import ops.decoding
    import ops.learning  # noqa: F401


class Sides:
    """Processes of workers, alive for all rounds, and Ray; each method gives a side at a number of workers."""

    def __init__(self, stack: ExitStack, pairs: Path, most: int) -> None:
        cpus, environment = sorted(os.sched_getaffinity(0)), {"OMP_NUM_THREADS": "1"}
        self._pairs = pairs
        self._workers = [
            stack.enter_context(OwnProcess(cpus[rank % len(cpus)], environment, ready)) for rank in range(most)
        ]
        self._threads = stack.enter_context(ThreadPoolExecutor(most))

    def of_processes(self, work: Callable[..., Taken], world: int, step_s: float, *more: Any) -> Measured:
        """All workers at once, each in its process."""
        begun_s = time.perf_counter()
        each = list(
            self._threads.map(
                lambda rank: self._workers[rank].run(work, self._pairs, rank, world, step_s, *more), range(world)
            )
        )
        wall_s = time.perf_counter() - begun_s
        return Measured([turn.made for turn in each], sum(turn.cpu_s for turn in each), wall_s)

    def at(self, world: int, step_s: float, has_webdataset: bool) -> dict[str, Callable[[], Measured]]:
        sides: dict[str, Callable[[], Measured]] = {
            "ours": lambda: self.of_processes(ours, world, step_s, 0),
            "ours, children": lambda: self.of_processes(ours, world, step_s, 1),
            "ray_data": lambda: ray_data(self._pairs, world, step_s),
        }
        if has_webdataset:
            sides["webdataset"] = lambda: self.of_processes(webdataset, world, step_s)
        return sides


def stored_photographs(count: int) -> list[bytes]:
    """Drawn photographs as ingestion would store them."""
    from ops.pictures import PictureSettings, encode_jpeg, resize_short_side

    settings = PictureSettings()
    drawn = (draw_photograph(number, *SIZES[number % len(SIZES)]) for number in range(count))
    return [encode_jpeg(resize_short_side(each, settings.short_side_px), settings.jpeg_quality) for each in drawn]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=16, help=f"of {SHARD_ROWS} pictures; all are read each round")
    parser.add_argument("--drawn", type=int, default=64, help="different photographs among them")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=200.0, help="length of a step of 32 pictures, for the waiting")
    parser.add_argument("--codes", type=int, default=65_536, help="rows of codes")
    arguments = parser.parse_args()
    where, has_webdataset = device(*PACKAGES), importlib.util.find_spec("webdataset") is not None
    print(where)
    told: dict[str, dict[str, dict[str, float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    wall_ratios: dict[str, dict[str, float]] = {}
    pictures, wrong = arguments.shards * SHARD_ROWS, False
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        pairs, tokens = Path(scratch) / "pairs", Path(scratch) / "tokens"
        jpegs = stored_photographs(arguments.drawn)
        write_pairs(pairs, jpegs, arguments.shards)
        print(
            f"{pictures:,} pictures of {np.mean([len(jpeg) for jpeg in jpegs]) / 1e3:.0f} kB in {arguments.shards} tars"
        )
        _start_ray(stack)
        sides = Sides(stack, pairs, max(arguments.workers))
        head = f"{'pictures/s':>11}{'(lowest - highest)':>20}{'CPU-ms':>8}{'first s':>9}{'waited':>9}"
        print(f"{'workers':8}{'':16}{head}")
        for world in arguments.workers:
            turns = alternate(sides.at(world, 0.0, has_webdataset), arguments.rounds)
            stepped = {name: side() for name, side in sides.at(world, arguments.step_ms / 1000, has_webdataset).items()}
            for name, rounds in turns.items():
                wrong |= any(given(turn) != pictures for turn in (*rounds, stepped[name]))
                each = [pictures / turn.wall_s for turn in rounds]
                found = {
                    "pictures_per_s": statistics.median(each),
                    "cpu_ms": 1000 * cpu_s(rounds) / pictures,
                    "first_s": statistics.median(max(one.first_s for one in turn.made) for turn in rounds),
                    "waited_share": float(np.mean([one.waited_share for one in stepped[name].made])),
                }
                told.setdefault(name, {})[str(world)] = found
                print(
                    f"{world:<8}{name:16}{found['pictures_per_s']:11.0f}{f'({min(each):.0f} - {max(each):.0f})':>20}"
                    f"{found['cpu_ms']:8.2f}{found['first_s']:9.2f}{100 * found['waited_share']:7.1f} %"
                )
                ours_and_it = zip(turns["ours"], rounds, strict=True)
                wall = statistics.median(turn.wall_s / mine.wall_s for mine, turn in ours_and_it)
                wall_ratios.setdefault(name, {})[str(world)] = wall
                ratios.setdefault(name, {})[str(world)] = cpu_s(rounds) / cpu_s(turns["ours"])
            print(f"{'':8}load average {os.getloadavg()[0]:.1f}", flush=True)
        write_tokens(tokens, 8, arguments.codes // 8)
        begun_s = time.perf_counter()
        assert codes(tokens) == 2 * arguments.codes
        codes_per_s = 2 * arguments.codes / (time.perf_counter() - begun_s)
        print(
            f"codes: {codes_per_s:,.0f} rows of {CODES} a second, one worker, two epochs, the first of which verifies"
        )
    beside: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for kind, count in (("threads", 1), ("processes", 1), ("threads", 2), ("processes", 2)):
            alone = python_pace(0.5)
            rate, pace = beside_python(jpegs, kind, count)
            of = beside.setdefault(f"{count} {kind}", {"pictures_per_s": [], "pace": []})
            of["pictures_per_s"].append(rate)
            of["pace"].append(pace / alone)
    for name, found in beside.items():
        rate, pace = (statistics.median(found[what]) for what in ("pictures_per_s", "pace"))
        print(
            f"beside a main thread that runs Python: {name:12}{rate:6.0f} pictures/s, its pace {pace:.2f} of that alone"
        )
    if wrong:
        print(f"a side gave another number of pictures than {pictures}: the ratios mean nothing", file=sys.stderr)
    lowest = {name: min(of.values()) for name, of in ratios.items() if name in ("webdataset", "ray_data")}
    more = {"ratios_by_workers": ratios, "wall_ratios": wall_ratios, "sides": told, "codes_rows_per_s": codes_per_s}
    more["beside_python"] = {n: {w: statistics.median(v) for w, v in of.items()} for n, of in beside.items()}
    print_last_line("read", where, lowest, **more)
    return int(wrong)


def given(turn: Measured) -> int:
    """The pictures that all workers had together."""
    return sum(one.pictures for one in turn.made)


def _start_ray(stack: ExitStack) -> None:
    from infra.cluster import QUIET, REPO, quiet_environment

    quiet_environment()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    import ray.data

    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
    environment = {name: os.environ[name] for name in QUIET} | {"PYTHONPATH": str(REPO)}
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=1 << 30,
        _temp_dir=place,
        runtime_env={"env_vars": environment},
    )
    stack.callback(ray.shutdown)
    ray.data.DataContext.get_current().enable_progress_bars = False


if __name__ == "__main__":
    sys.exit(main())
