"""Benchmark of ingestion against img2dataset: the same list, the same local web server, http and https.

    make bench STAGE=ingest

    img2dataset   its `download()`: webdataset, image_size 256, keep_ratio, quality 95, hash and EXIF as by default
    ours          plan and `ingest_shard` through the store, all filters on, at that geometry (256, quality 95)
    ours, 384     the same with our own geometry (short side 384, quality 90)
    in memory     decode, resize and encode of the same bytes by our code in one thread: what a perfect fetcher reaches

Each side has a process and the same one CPU, and as many threads; the server has a process of its own. Imports (their
CPU is shown apart) and a warm-up of a few pictures come before the rounds. img2dataset spawns a pool and a
logger that import everything again for every call; here its Reader, Downloader, Resizer and writer run in the side's
process without the two, so that what is compared is work alone (in its favour).

https is verified on both sides: SSL_CERT_FILE names the system's authorities and one made for the run.

Then, outside the rounds: where our CPU goes, and the PSNR of our pictures against full decode and area resize. The
exit status is 1 if a side lost a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench.harness import (
    ROUNDS,
    Measured,
    OwnProcess,
    alternate,
    cpu_s,
    device,
    print_last_line,
    print_table,
)
from tests.bench.photographs import SIZES, write_photographs

PACKAGES = ("img2dataset", "opencv-python-headless", "simplejpeg", "pyarrow")
THEIRS = (256, 95)
"""Short side in pixels and JPEG quality of img2dataset's defaults; ours are those of PictureSettings."""
OURS = (384, 90)


# --- the web ---------------------------------------------------------------------------------------------------------
@contextmanager
def web(folder: Path, certificate: Path | None, cpu: int) -> Iterator[str]:
    """A server of `folder` in a process of its own; its URL."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(folder, certificate, cpu, its))
    process.start()
    its.close()  # or the end of the process would not end `recv`
    try:
        yield ours.recv()
    finally:
        ours.send("end")
        process.join()


def _serve(folder: Path, certificate: Path | None, cpu: int, pipe: Connection) -> None:
    from ops.demo_web import serve

    os.sched_setaffinity(0, {cpu})
    with serve(folder) as demo:
        url = demo.url
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The handshake belongs to the thread of its connection, not to the one that accepts.
            demo.server.socket = context.wrap_socket(
                demo.server.socket, server_side=True, do_handshake_on_connect=False
            )
            url = url.replace("http://", "https://")
        pipe.send(url)
        pipe.recv()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Key and certificate of 127.0.0.1, and the bundle that trusts it: the system's authorities and one more.

    The bundle has the size of a real one: reading it is what a new SSL context costs.
    """
    import certifi
    import trustme

    authority = trustme.CA()
    certificate, bundle = folder / "server.pem", folder / "authorities.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    system = ssl.get_default_verify_paths().cafile or certifi.where()
    bundle.write_bytes(Path(system).read_bytes() + b"\n" + authority.cert_pem.bytes())
    return certificate, bundle


def write_list(path: Path, urls: list[str]) -> Path:
    """A Parquet list of these URLs, each with a caption that every filter keeps."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = [f"a photograph of leaves and stones, number {i}" for i in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


# --- the sides -------------------------------------------------------------------------------------------------------
def import_theirs() -> None:
    import img2dataset  # noqa: F401


def import_ours() -> None:
    from infra.cluster import quiet_environment

    quiet_environment()
    import cv2  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import simplejpeg  # noqa: F401

    import ops.ingest  # noqa: F401


def theirs(urls: Path, into: Path, threads: int) -> int:
    """img2dataset's own `download`, in this process; the pictures that lie in its tar."""
    main: Any = importlib.import_module("img2dataset.main")  # `img2dataset.main` is a function of that name
    main.multiprocessing_distributor = _in_this_process
    main.LoggerProcess = _NoLogger
    with contextlib.redirect_stdout(io.StringIO()):
        main.download(
            url_list=str(urls),
            input_format="parquet",
            url_col="url",
            caption_col="caption",
            output_folder=str(into),
            output_format="webdataset",
            processes_count=1,
            thread_count=threads,
            image_size=THEIRS[0],
            resize_mode="keep_ratio",
            encode_quality=THEIRS[1],
            enable_wandb=False,
        )
    return _pictures_in(into)


def _in_this_process(processes: int, downloader: Callable[[Any], Any], reader: Any, *rest: Any) -> None:
    for shard in reader:
        downloader(shard)


class _NoLogger:
    """In place of the process that prints img2dataset's rates."""

    def __init__(self, *arguments: Any) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None: ...

    def join(self) -> None: ...


def ours(urls: Path, into: Path, threads: int, geometry: tuple[int, int]) -> int:
    """Plan, fetch, filter, commit, as the flow does it without Ray; the pictures that lie in the tar."""
    from infra.store import open_store
    from ops.fetch import FetchSettings
    from ops.filters import FilterSettings
    from ops.ingest import OutageSettings, ingest_shard, pending_tasks, start_pairs
    from ops.pictures import PictureSettings
    from ops.plan import Columns, PlanSettings, extend_plan

    store, plan, filters = open_store(str(into)), PlanSettings(), FilterSettings()
    picture = PictureSettings(short_side_px=geometry[0], jpeg_quality=geometry[1])
    # One server stands for all hosts of a shard: the limit of requests to one host would only slow the clock down.
    fetch = FetchSettings(threads=threads, connections_per_host=threads, allow_private=("127.0.0.0/8",))
    start_pairs(store, plan, filters, picture)
    extension = extend_plan(store, [str(urls)], plan, filters, Columns())
    for task in pending_tasks(str(into), extension.instalments, fetch, picture, filters, OutageSettings()):
        ingest_shard(task)
    return _pictures_in(into / "data")


def _pictures_in(folder: Path) -> int:
    from ops.shards import tar_members

    return sum(name.endswith(".jpg") for path in folder.glob("*.tar") for name, _, _ in tar_members(path))


def in_memory(pictures: list[Path], times: int, geometry: tuple[int, int]) -> int:
    """Decode, resize, encode of bytes that are here already, in one thread; how many."""
    from ops.pictures import encode_jpeg

    bodies = [path.read_bytes() for path in pictures]
    for _ in range(times):
        for data in bodies:
            encode_jpeg(_pixels_to_store(data, geometry[0]), geometry[1])
    return times * len(bodies)


def _pixels_to_store(data: bytes, short_side_px: int) -> Any:
    """What ingestion makes of a JPEG before it is a JPEG again."""
    from ops.pictures import Header, decode, read_header, resize_short_side
    from ops.reasons import Rejected

    header = read_header(data)
    assert isinstance(header, Header)
    pixels = decode(data, header, short_side_px)
    assert not isinstance(pixels, Rejected)
    return resize_short_side(pixels, short_side_px)


# --- where our time goes, and what a picture loses -------------------------------------------------------------------
STAGES = {
    "fetch": "ops.fetch.Fetcher.fetch",
    "sha256 of the body": "ops.ingest.sha256",
    "header": "ops.ingest.read_header",
    "filters of the header": "ops.ingest.judge_header",
    "decode": "ops.ingest.decode",
    "filters of the pixels": "ops.ingest.judge_pixels",
    "resize": "ops.ingest.resize_short_side",
    "hash": "ops.ingest.dhash",
    "encode": "ops.ingest.encode_jpeg",
    "spool": "ops.sidecar.Spool.append",
    "plan": "ops.plan.extend_plan",
    "tar": "ops.ingest.write_tar",
    "sidecar": "ops.ingest.sidecar",
    "parquet": "ops.ingest.write_table",
    "commit": "ops.ingest.publish",
}
"""Stage -> the function whose CPU it is. None of them calls another."""


def profile(urls: Path, into: Path, threads: int, geometry: tuple[int, int]) -> dict[str, float]:
    """One round of ours with a clock of the thread's CPU around each stage; stage -> share of all CPU."""
    spent: Counter[str] = Counter()
    lock = threading.Lock()

    def clocked(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*arguments, **named)
            finally:
                with lock:
                    spent[stage] += time.thread_time() - started

        return run

    places = []
    for stage, path in STAGES.items():
        room, module, *names = path.split(".")
        place: Any = importlib.import_module(f"{room}.{module}")
        for name in names[:-1]:
            place = getattr(place, name)
        places.append((place, names[-1], getattr(place, names[-1])))
        setattr(place, names[-1], clocked(stage, getattr(place, names[-1])))
    started = time.process_time()
    try:
        ours(urls, into, threads, geometry)
    finally:
        for place, name, work in places:
            setattr(place, name, work)
    total = time.process_time() - started
    shares = {stage: spent[stage] / total for stage in STAGES}
    return shares | {"threads, rows, the rest": 1 - sum(shares.values())}


def psnrs(pictures: list[Path], short_side_px: int) -> list[float]:
    """dB of our way (a JPEG decoded at a fraction) to full decode and area resize, before the JPEG is written."""
    import cv2
    import numpy as np

    values = []
    for path in pictures:
        data = path.read_bytes()
        pixels = _pixels_to_store(data, short_side_px)
        full = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        wanted = cv2.resize(full, pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
        error = np.mean((pixels.astype(np.float64) - wanted) ** 2)
        values.append(float(10 * np.log10(255**2 / max(error, 1e-3))))  # equal pictures: 78 dB
    return values


# --- the run ---------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ingest")
    parser.add_argument("--pictures", type=int, default=48, help="different photographs")
    parser.add_argument("--times", type=int, default=5, help="URLs for each of them")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--schemes", nargs="+", choices=("http", "https"), default=["http", "https"])
    with tempfile.TemporaryDirectory(prefix="armchair-bench-") as scratch:
        sys.exit(_run(parser.parse_args(), Path(scratch)))


def _run(arguments: argparse.Namespace, scratch: Path) -> int:
    where = device(*PACKAGES)
    folder = scratch / "pictures"
    folder.mkdir()
    pictures = write_photographs(folder, arguments.pictures)
    count = len(pictures) * arguments.times
    _print_setting(where, arguments, pictures)
    certificate, bundle = make_certificate(scratch)
    cpus = sorted(os.sched_getaffinity(0))
    environment = {"SSL_CERT_FILE": str(bundle), "NO_ALBUMENTATIONS_UPDATE": "1"}
    fresh = _fresh_names(scratch / "into")
    with ExitStack() as stack:
        lists, warm = {}, {}
        for scheme in arguments.schemes:
            url = stack.enter_context(web(folder, certificate if scheme == "https" else None, cpus[-1]))
            urls = [f"{url}/pictures/{path.name}?copy={i}" for i in range(arguments.times) for path in pictures]
            lists[scheme] = write_list(scratch / f"{scheme}.parquet", urls)
            warm[scheme] = write_list(scratch / f"{scheme}-warm.parquet", urls[:8])
        their = stack.enter_context(OwnProcess(cpus[0], environment, import_theirs))
        our = stack.enter_context(OwnProcess(cpus[0], environment, import_ours))
        print(f"imports, CPU-s: img2dataset {their.start_up_cpu_s:.2f}, ours {our.start_up_cpu_s:.2f}")
        sides: dict[str, Callable[[], Measured]] = {}
        for scheme, urls in lists.items():
            for side, process, work, *rest in (
                ("img2dataset", their, theirs),
                ("ours", our, ours, THEIRS),
                ("ours, 384", our, ours, OURS),
            ):
                process.run(work, warm[scheme], next(fresh), arguments.threads, *rest)
                sides[f"{scheme} {side}"] = _side(process, work, urls, fresh, arguments.threads, *rest)
        sides["in memory"] = partial(our.run, in_memory, pictures, arguments.times, THEIRS)
        turns = alternate(sides, arguments.rounds)
        shares = {
            scheme: our.run(profile, urls, next(fresh), arguments.threads, THEIRS).made
            for scheme, urls in lists.items()
        }
        quality = {str(px): our.run(psnrs, pictures, px).made for px, _ in (THEIRS, OURS)}
    print_table(turns, count, "picture")
    _print_profile(shares)
    limit = {scheme: cpu_s(turns["in memory"]) / cpu_s(turns[f"{scheme} ours"]) for scheme in lists}
    print("of the in-memory limit we reach: " + ", ".join(f"{100 * share:.0f} % on {s}" for s, share in limit.items()))
    psnr = {px: {"median": statistics.median(dB), "worst": min(dB)} for px, dB in quality.items()}
    for px, dB in psnr.items():
        print(f"PSNR to full decode and area resize, {px} px: median {dB['median']:.1f}, worst {dB['worst']:.1f} dB")
    ratios = {}
    for scheme in lists:
        base = cpu_s(turns[f"{scheme} img2dataset"])
        ratios |= {scheme: base / cpu_s(turns[f"{scheme} ours"])}
        ratios |= {f"{scheme}_384": base / cpu_s(turns[f"{scheme} ours, 384"])}
    kept = {side: min(turn.made for turn in rounds) for side, rounds in turns.items()}
    lost = {side: made for side, made in kept.items() if made != count}
    for side, made in lost.items():
        print(f"{side} kept {made} of {count} pictures: the ratios mean nothing", file=sys.stderr)
    print_last_line("ingest", where, ratios, pictures=count, kept=kept, psnr_db=psnr, share_of_limit=limit)
    return 1 if lost else 0


def _print_setting(where: str, arguments: argparse.Namespace, pictures: list[Path]) -> None:
    kilobytes = [path.stat().st_size / 1000 for path in pictures]
    print(where)
    print(
        f"{arguments.times} URLs for each of {len(pictures)} drawn photographs, {min(kilobytes):.0f} to "
        f"{max(kilobytes):.0f} kB (mean {statistics.mean(kilobytes):.0f}), "
        + ", ".join(f"{width}x{height}" for width, height in SIZES)
    )
    print(f"{arguments.threads} threads, one CPU a side, medians of {arguments.rounds} alternating rounds")


def _fresh_names(below: Path) -> Iterator[Path]:
    below.mkdir()
    number = 0
    while True:
        number += 1
        yield below / str(number)


def _side(
    process: OwnProcess, work: Callable[..., int], urls: Path, fresh: Iterator[Path], *rest: Any
) -> Callable[[], Measured]:
    return lambda: process.run(work, urls, next(fresh), *rest)


def _print_profile(shares: dict[str, dict[str, float]]) -> None:
    print("share of our CPU   " + "".join(f"{scheme:>8}" for scheme in shares))
    for stage in next(iter(shares.values())):
        print(f"  {stage:<23}" + "".join(f"{100 * of[stage]:6.1f} %" for of in shares.values()))


if __name__ == "__main__":
    main()
