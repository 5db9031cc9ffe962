"""Benchmark of the control plane: what a shard costs that is no work, when there are many of them. One row a shard.

    make bench STAGE=control            SHARDS=500 make bench STAGE=control for a quick look

    nothing      the flow, its waves, `drive`, Ray and Prefect over shards whose work returns at once
    whole        `armchair ingest` over as many real shards: one picture, work order, tar, sidecar, receipt, attempt
    status       `armchair status --json` on them: the first look, and again with the index that it wrote
    straggler    one shard that takes a minute among short ones: how busy the other slots are meanwhile

**Control** is what a shard takes outside of its own work (`ops.ingest.ingest_shard` in a Ray worker). It is told twice:
the wall time a shard of `nothing`, where control is all there is, and, in `whole`, the CPU time a shard of all
processes that do no shard's work: driver, raylet, GCS and agents, Prefect's server. What the workers and the web server
take stands beside it, and so does the wall time of everything.

Prefect's server has a home and a log of its own. Its rows are counted in its database: those of runs, their states,
artifacts and logs, and apart from them its events, which it forgets after a week. "Dropped" is looked for in the
server's and the driver's output, and each task run must have ended as Completed, which a lost message would prevent.
Exit status 1 if a shard was lost, a message dropped or a run left open.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from infra.store import LocalStore, open_store
from ops.attempts import list_attempts, read_attempt
from ops.ingest import IngestTask, pending_tasks, start_pairs
from ops.ingest import ingest as ingest_shards
from ops.plan import Columns, extend_plan, read_instalments, read_work_order
from ops.waves import ShardOutcome, drive, on_ray
from pipelines.settings import resolve
from tests.bench.harness import device, measured, print_last_line
from tests.bench.ingest import web
from tests.bench.photographs import draw_photograph

REPO = Path(__file__).parent.parent.parent
PARTS = ("nothing", "whole", "straggler")
SAMPLE_S = 1.0
SETS = ("plan.pairs_per_shard=1", 'fetch.allow_private=["127.0.0.0/8"]', "fetch.deadline_s=120")
SHORT_MS = 250
"""What a shard beside the straggler waits for its picture."""


# --- who uses what ---------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    """What each role had used (CPU-seconds) and held (resident bytes), and how many receipts there were."""

    at_s: float
    done: int
    cpu_s: dict[str, float]
    bytes: dict[str, int]


@dataclass
class Sampler:
    """Looks at processes every second, by their roles; `roots` maps a role to the process it begins at."""

    roots: dict[str, int]
    receipts: Path | None = None
    samples: list[Sample] = field(default_factory=list)

    def __enter__(self) -> Sampler:
        self._ended = threading.Event()
        self._ended_cpu_s: dict[tuple[int, str], tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            self.samples.append(self._look())
            self._ended.wait(SAMPLE_S)

    def _look(self) -> Sample:
        held: Counter[str] = Counter()
        parents: dict[int, tuple[int, str, float, int]] = {}
        tick_s, page = 1.0 / os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            cpu_s = tick_s * (int(fields[11]) + int(fields[12]))
            parents[int(path.parent.name)] = (int(fields[1]), fields[19], cpu_s, page * int(fields[21]))
        roles = {pid: role for role, pid in self.roots.items()}
        for pid, (_, birth, cpu_s, resident) in parents.items():
            above = pid
            while above not in roles and above in parents:
                above = parents[above][0]
            if (role := roles.get(above)) is None:
                continue
            if role == "driver" and pid != self.roots["driver"]:
                role = "workers" if _command(pid).startswith("ray::") else "ray"
            held[role] += resident
            self._ended_cpu_s[pid, birth] = role, cpu_s  # of one that ends, the last look counts
        used: defaultdict[str, float] = defaultdict(float)
        for role, seconds in self._ended_cpu_s.values():
            used[role] += seconds
        done = sum(1 for _ in self.receipts.iterdir()) if self.receipts and self.receipts.is_dir() else 0
        return Sample(time.monotonic(), done, dict(used), dict(held))

    def of_a_shard(self, shards: int) -> dict[str, Any]:
        """Milliseconds a shard, wall and CPU by role, between the first and the last tenth: no start, no end in it."""
        middle = self._middle(shards)
        first, last = middle[0], middle[-1]
        count = max(last.done - first.done, 1)
        cpu = {role: 1000 * (last.cpu_s[role] - first.cpu_s.get(role, 0.0)) / count for role in last.cpu_s}
        return {"shards": count, "wall_ms": 1000 * (last.at_s - first.at_s) / count, "cpu_ms": cpu}

    def _middle(self, shards: int) -> list[Sample]:
        middle = [sample for sample in self.samples if 0.1 * shards <= sample.done <= 0.9 * shards]
        return middle if len(middle) > 1 else self.samples  # so few shards that all were done between two looks

    def memory(self, shards: int) -> dict[str, Any]:
        """Resident MB of each role when a tenth was done and at nine tenths, and the MB more for 10,000 shards."""
        middle = self._middle(shards)
        told = {}
        for role in middle[-1].bytes:
            began, ended = (sample.bytes.get(role, 0) / 1e6 for sample in (middle[0], middle[-1]))
            grown = (ended - began) / max(middle[-1].done - middle[0].done, 1)
            told[role] = {"began_mb": began, "ended_mb": ended, "mb_per_10000_shards": 1e4 * grown}
        return told


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


# --- Prefect ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Server:
    """Prefect's server in a process of its own: where it answers, its database, what it logs."""

    pid: int
    url: str
    home: Path
    log: Path

    def rows(self) -> Counter[str]:
        """Table -> rows."""
        with sqlite3.connect(f"file:{self.home / 'prefect.db'}?mode=ro", uri=True) as base:
            tables = [name for (name,) in base.execute("select name from sqlite_master where type = 'table'")]
            return Counter({name: base.execute(f"select count(*) from [{name}]").fetchone()[0] for name in tables})

    def open_runs(self) -> list[str]:
        """Task runs that the server does not know as Completed."""
        with sqlite3.connect(f"file:{self.home / 'prefect.db'}?mode=ro", uri=True) as base:
            rows = base.execute("select name, state_type from task_run").fetchall()
        return [f"{name} {state}" for name, state in rows if state != "COMPLETED"]

    def settle(self) -> None:
        """Waits until the server has written what it was sent: events come behind."""
        before, until_s = self.rows(), time.monotonic() + 60
        while time.monotonic() < until_s:
            time.sleep(6)  # longer than its services wait between two looks
            if (now := self.rows()) == before and not self.open_runs():
                return
            before = now


@contextmanager
def prefect_server(scratch: Path) -> Iterator[Server]:
    """A server on a free port, with an empty home below scratch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home, log = scratch / "prefect", scratch / "server.log"
    environment = {**os.environ, "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1"}
    environment |= {"PREFECT_SERVER_LOGGING_LEVEL": "WARNING", "PREFECT_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        until_s = time.monotonic() + 180
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError(f"Prefect's server did not start:\n{log.read_text()}") from None
                time.sleep(0.5)
        yield Server(process.pid, f"http://127.0.0.1:{port}/api", home, log)
    finally:
        process.terminate()
        process.wait()


# --- the parts, each the driver in a process of its own --------------------------------------------------------------
@dataclass(frozen=True)
class Nothing:
    """A shard without work."""

    shard: int
    generation: int = 0
    run: str = ""


def do_nothing(task: Nothing) -> ShardOutcome:
    return ShardOutcome(task.shard, 0, "committed", rows=1, kept=1)


def drive_part(part: str, into: str, shards: int, cpus: int) -> None:
    """In the driver's process: a flow over shards without work, or over those of `into` with the straggler first."""
    from prefect import flow

    from infra.cluster import Cluster
    from pipelines.artifacts import Board
    from pipelines.waves import end_state, run_in_waves
    from pipelines.waves import on_ray as ray_for

    @flow(name=part, persist_result=False)
    def control() -> Any:
        tasks: Sequence[Any]
        with Board(part, into) as board, ray_for(Cluster(address=None, cpus=cpus), board):
            if part == "nothing":
                tasks, store = [Nothing(n) for n in range(shards)], open_store(into)
                began = time.perf_counter(), time.process_time()
                tally = run_in_waves(
                    part,
                    into,
                    tasks,
                    lambda tick: drive(tasks, on_ray(do_nothing, part), store, "pairs", tick=tick),
                    board,
                )
                wall_s, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
                print(json.dumps({"wall_s": wall_s, "driver_cpu_s": cpu_s, "done": tally.states["committed"]}))
            else:
                tasks = _straggler_first(into)
                tally = run_in_waves(part, into, tasks, lambda tick: ingest_shards(into, tasks, tick=tick), board)
            return end_state(part, into, tally, board)

    control()


def _straggler_first(into: str) -> list[IngestTask]:
    store, s = open_store(into), resolve(sets=SETS)
    tasks = pending_tasks(into, read_instalments(store), s.fetch, s.picture, s.filters, s.outage)
    slow = {t.shard for t in tasks if "straggler" in read_work_order(store, t.work_order)["caption"][0].as_py()}
    return sorted(tasks, key=lambda task: task.shard not in slow)


@dataclass(frozen=True)
class Ended:
    """A driver that ended: what it printed and how long it ran."""

    out: str
    err: str
    wall_s: float


def run_driver(
    command: list[str], server: Server, more: dict[str, int], receipts: Path | None = None
) -> tuple[Ended, Sampler]:
    """Runs a driver against the server and watches it. Raises RuntimeError if it fails."""
    environment = {**os.environ, "PREFECT_HOME": str(server.home), "PREFECT_API_URL": server.url}
    environment |= {"PREFECT_LOGGING_LEVEL": "WARNING", "PREFECT_LOGGING_INTERNAL_LEVEL": "WARNING"}
    began_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        driver = subprocess.Popen(command, cwd=REPO, env=environment, stdout=out, stderr=err)
        with Sampler({"driver": driver.pid, "prefect": server.pid, **more}, receipts) as sampler:
            code = driver.wait()
        out.seek(0)
        err.seek(0)
        ended = Ended(out.read(), err.read(), time.monotonic() - began_s)
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit status {code}\n{ended.err[-4000:]}")
    return ended, sampler


# --- the measurements ------------------------------------------------------------------------------------------------
def plan_pairs(location: Path, lines: list[tuple[str, str]], scratch: Path) -> tuple[Path, float]:
    """A list and its plan with one row a shard; with the CPU-seconds of planning it."""
    listed = scratch / f"{location.name}.tsv"
    listed.write_text("url\tcaption\n" + "".join(f"{url}\t{caption}\n" for url, caption in lines))
    store, s = LocalStore(location), resolve(sets=SETS)
    start_pairs(store, s.plan, s.filters, s.picture)
    planned = measured(extend_plan, store, [str(listed)], s.plan, s.filters, Columns())
    return listed, planned.cpu_s


def measure_nothing(server: Server, shards: int, cpus: int, scratch: Path) -> dict[str, Any]:
    empty = server.rows()
    command = [sys.executable, "-m", "tests.bench.control", "--part", "nothing", "--into", str(scratch / "nothing")]
    ended, sampler = run_driver([*command, "--shards", str(shards), "--cpus", str(cpus)], server, {})
    told = json.loads(ended.out.splitlines()[-1])
    server.settle()
    memory = [sample.bytes.get("driver", 0) / 1e6 for sample in sampler.samples]
    return {
        "done": told["done"],
        "wall_ms": 1000 * told["wall_s"] / shards,
        "driver_cpu_ms": 1000 * told["driver_cpu_s"] / shards,
        "driver_mb": max(memory),
        **rows_of(server.rows() - empty),
        "dropped": dropped(ended.err),
    }


def measure_whole(server: Server, shards: int, cpus: int, scratch: Path) -> dict[str, Any]:
    import simplejpeg

    folder = scratch / "pictures"
    folder.mkdir()
    small = simplejpeg.encode_jpeg(draw_photograph(1, 240, 200), quality=80)
    (folder / "small.jpg").write_bytes(small)
    pairs = scratch / "pairs"
    with web(folder, None, sorted(os.sched_getaffinity(0))[-1]) as url:
        lines = [(f"{url}/pictures/small.jpg?copy={n}", f"leaves and stones, number {n}") for n in range(shards)]
        listed, plan_cpu_s = plan_pairs(pairs, lines, scratch)
        web_pid = next(pid for pid in _children(os.getpid()) if "spawn_main" in _command(pid))
        command = [sys.executable, "-m", "pipelines", "ingest", str(listed), "--into", str(pairs), "--json"]
        command += ["--cpus", str(cpus), *(word for line in SETS for word in ("--set", line))]
        before = server.rows()
        ended, sampler = run_driver(command, server, {"web": web_pid}, pairs / "receipts")
    told = json.loads(ended.out.splitlines()[-1])
    server.settle()
    of_a_shard = sampler.of_a_shard(shards)
    control = sum(ms for role, ms in of_a_shard["cpu_ms"].items() if role not in ("workers", "web"))
    return {
        "done": min(told["shards"].get("committed", 0), told["pairs"]["kept"]),
        "seconds": ended.wall_s,
        "plan_cpu_ms": 1000 * plan_cpu_s / shards,
        "instalment_bytes_a_shard": (pairs / "plan/part-0000.json").stat().st_size / shards,
        "control_cpu_ms": control,
        "of_a_shard": of_a_shard,
        "memory": sampler.memory(shards),
        **rows_of(server.rows() - before),
        "dropped": dropped(ended.err),
    }


def rows_of(tables: Counter[str]) -> dict[str, int]:
    """Rows of runs (with their states, artifacts, logs), and rows of events."""
    events = sum(count for table, count in tables.items() if table.startswith("event"))
    return {"prefect_rows": tables.total() - events, "task_runs": tables["task_run"], "event_rows": events}


def _children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def measure_status(pairs: Path) -> dict[str, Any]:
    """Seconds of `armchair status` as people call it, its start included."""

    def look() -> tuple[float, dict[str, Any]]:
        began_s = time.monotonic()
        command = [sys.executable, "-m", "pipelines", "status", str(pairs), "--json"]
        out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
        return time.monotonic() - began_s, json.loads(out)

    first_s, told = look()
    again_s, same = look()
    assert told["shards"] == same["shards"]
    assert told["pairs"] == same["pairs"]
    return {"first_s": first_s, "again_s": again_s, "shards": told["shards"], "bytes": told["bytes"]}


def measure_straggler(server: Server, seconds: float, cpus: int, scratch: Path) -> dict[str, Any]:
    """The others' share of their slots' time while one shard was open for `seconds`."""
    pairs = scratch / "straggler"
    with web(scratch, None, sorted(os.sched_getaffinity(0))[-1]) as url:
        # Enough that the others' work outlasts the straggler, whatever a slot needs beside its waiting.
        others = round(1.1 * (cpus - 1) * 1000 * seconds / SHORT_MS)
        lines = [
            (f"{url}/generated/{n}.jpg?delay_ms={SHORT_MS}", f"leaves and stones, number {n}") for n in range(others)
        ]
        lines += [(f"{url}/generated/{others}.jpg?delay_ms={1000 * seconds}", "the straggler of them all")]
        plan_pairs(pairs, lines, scratch)
        command = [sys.executable, "-m", "tests.bench.control", "--part", "straggler", "--into", str(pairs)]
        run_driver([*command, "--cpus", str(cpus)], server, {})
    return {"others": others, "slots": cpus, **busy_beside(LocalStore(pairs))}


def busy_beside(store: LocalStore) -> dict[str, Any]:
    """From attempt records: the longest attempt, and of how many others' time its duration was full."""
    spans = []
    for name in list_attempts(store):
        record = read_attempt(store, name)
        began_s = datetime.fromisoformat(record["started"]).timestamp()
        spans.append((began_s, began_s + record["seconds"]))
    began_s, ended_s = max(spans, key=lambda span: span[1] - span[0])
    others = [span for span in spans if span != (began_s, ended_s)]
    # Until the work is used up, or the straggler ends: no slot can be busy without work.
    until_s = min(ended_s, max(begin for begin, _ in others))
    busy_s = sum(max(0.0, min(end, until_s) - max(begin, began_s)) for begin, end in others)
    return {"open_s": ended_s - began_s, "watched_s": until_s - began_s, "others_busy": busy_s / (until_s - began_s)}


def dropped(text: str) -> list[str]:
    """Lines that tell of messages that were lost."""
    return [line[:300] for line in text.splitlines() if re.search(r"\bdropp|queue is full|queue full", line, re.I)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.control")
    parser.add_argument("--shards", type=int, default=int(os.environ.get("SHARDS", "25000")))
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--straggler-s", type=float, default=60.0)
    parser.add_argument("--part", choices=("nothing", "straggler"), help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        drive_part(arguments.part, arguments.into, arguments.shards, arguments.cpus)
        return
    with tempfile.TemporaryDirectory(prefix="armchair-bench-", ignore_cleanup_errors=True) as scratch:
        sys.exit(_run(arguments, Path(scratch)))


def _run(arguments: argparse.Namespace, scratch: Path) -> int:
    shards, cpus, parts = arguments.shards, arguments.cpus, arguments.parts
    where = device("ray", "prefect", "pyarrow")
    print(f"{where}\n{shards} shards of one row, {cpus} slots", flush=True)
    told: dict[str, Any] = {"shards": shards, "slots": cpus}
    ratios = {}
    with prefect_server(scratch) as server:
        if "nothing" in parts:
            nothing = told["nothing"] = measure_nothing(server, shards, cpus, scratch)
            ratios["control_wall_budget_5ms"] = 5.0 / nothing["wall_ms"]
            print(f"nothing    {nothing['wall_ms']:.2f} ms a shard, driver {nothing['driver_cpu_ms']:.2f} CPU-ms")
            print(f"           Prefect: {_rows_text(nothing)}", flush=True)
        if "whole" in parts:
            whole = told["whole"] = measure_whole(server, shards, cpus, scratch)
            ratios["control_cpu_budget_5ms"] = 5.0 / whole["control_cpu_ms"]
            _print_whole(whole)
            looks = told["status"] = measure_status(scratch / "pairs")
            print(f"status     first {looks['first_s']:.1f} s, again {looks['again_s']:.1f} s", flush=True)
        if "straggler" in parts:
            # Its shards wait and need no CPU: as many slots as show that the others go on.
            straggler = told["straggler"] = measure_straggler(server, arguments.straggler_s, 4, scratch)
            busy = f"{straggler['others_busy']:.2f} of {straggler['slots'] - 1} slots were busy"
            print(f"straggler  {straggler['open_s']:.1f} s; beside it {busy}", flush=True)
        server.settle()
        lost, left = dropped(server.log.read_text()), server.open_runs()
    lost += [line for part in ("nothing", "whole") if part in told for line in told[part]["dropped"]]
    for line in [*lost, *left]:
        print(f"lost       {line}", file=sys.stderr)
    done = [told[part]["done"] for part in ("nothing", "whole") if part in told]
    print_last_line("control", where, ratios, **told, lost_messages=lost, open_runs=left)
    return 1 if lost or left or any(count != shards for count in done) else 0


def _rows_text(part: dict[str, Any]) -> str:
    return f"{part['prefect_rows']} rows of runs ({part['task_runs']} task runs), {part['event_rows']} of events"


def _print_whole(whole: dict[str, Any]) -> None:
    of = whole["of_a_shard"]
    roles = ", ".join(f"{role} {ms:.2f}" for role, ms in sorted(of["cpu_ms"].items()))
    print(f"whole      {of['wall_ms']:.2f} ms a shard; CPU-ms: {roles}; control {whole['control_cpu_ms']:.2f}")
    for role, told in sorted(whole["memory"].items()):
        grown = f"{told['mb_per_10000_shards']:+.1f} MB for 10,000 shards"
        print(f"           memory of {role}: {told['began_mb']:.0f} MB, then {told['ended_mb']:.0f} MB ({grown})")
    print(f"           Prefect: {_rows_text(whole)}")
    print(f"           planning {whole['plan_cpu_ms']:.2f} CPU-ms a shard; all {whole['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
