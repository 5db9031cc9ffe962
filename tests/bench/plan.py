"""Benchmark of planning: millions of rows with 20 % duplicate URLs, and what another million on top of them costs.

    make bench STAGE=plan                      1 million rows, then another one, each with and without language ids
    ROWS=10000000 make bench STAGE=plan        10 million, as in DIARY.md; scratch (TMPDIR) needs about 1 GB a million

    all         ROWS rows in Parquet lists of a million each, planned into a new directory
    another     a further million into that directory: checked against everything that was planned before
    first       a million like that one into a directory of its own: what it costs with nothing before it

Each is a process of its own. CPU-seconds are of the process and its children, imports included; memory is the highest
sum of RSS of all of them, sampled 20 times a second, and the kernel's own figure for the planner alone. One URL in
five was listed before, with another caption. The exit status is 1 if the plan does not find exactly these.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import ops.filters
from infra.store import LocalStore
from ops.filters import FilterSettings
from ops.languages import Guess
from ops.plan import Columns, PlanSettings, extend_plan, read_instalments
from tests.bench.harness import device, print_last_line

MILLION = 1_000_000
DUPLICATES = 0.2
SEED = 7

_WORDS = {
    "adjective": "small old red bright wooden quiet young golden dusty modern narrow friendly frozen empty green busy",
    "noun": "boat dog house bicycle woman child horse lamp train teapot garden tower musician bridge cat kitchen",
    "does": "standing|resting|waiting|seen from above|covered in snow|painted by hand|in evening light|under repair",
    "place": "by the river|in the old town|near a harbour|on a mountain road|at the market|in front of a white wall",
}


def words(kind: str) -> pa.Array:
    """The words or phrases of one kind."""
    text = _WORDS[kind]
    return pa.array(text.split("|" if "|" in text else " "))


def write_list(path: Path, ids: np.ndarray[Any, Any], rng: np.random.Generator) -> None:
    """A list of these pictures: the id decides the URL, the caption is drawn anew for each row."""
    mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sizes = ((40, 4999), (24, 97), (8, 16))
    host, folder, slug = ((mixed >> np.uint64(shift)) % np.uint64(size) for shift, size in sizes)
    text = lambda numbers: pa.array(numbers).cast(pa.string())  # noqa: E731
    url = pc.binary_join_element_wise(
        pc.binary_join_element_wise("https://images", text(host), ".example-photos.com/wp-content/uploads/20", ""),
        text(folder), "/", words("noun").take(pa.array(slug)), "-", text(ids), "_1024x768.jpg?quality=85", "",
    )  # fmt: skip
    drawn = [words(kind).take(pa.array(rng.integers(0, len(words(kind)), len(ids)))) for kind in _WORDS]
    year = text(rng.integers(1950, 2024, len(ids)))
    caption = pc.binary_join_element_wise("A", drawn[0], drawn[1], drawn[2], drawn[3], "in", year, " ")
    score = pa.array(rng.random(len(ids)).astype(np.float32))
    pq.write_table(pa.table({"URL": url, "TEXT": caption, "similarity": score}), path, row_group_size=MILLION // 10)


def listed(first: int, rows: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Ids of a list: new ones from `first` on, and in a fifth of the rows one that was listed before."""
    ids = np.arange(first, first + rows)
    again = (rng.random(rows) < DUPLICATES) & (ids > 0)
    ids[again] = rng.integers(0, ids[again])
    return ids


def plan_lists(store: str, folder: str, language: bool) -> None:
    """The work of one process. Without `language` no model is asked: what it costs by itself is the difference."""
    if not language:
        ops.filters.guess_languages = lambda texts, model: [Guess("en", 1.0)] * len(texts)
    extend_plan(LocalStore(Path(store)), [folder], PlanSettings(), FilterSettings(), Columns("URL", "TEXT"))


def planned(store: Path, folder: Path, language: bool) -> dict[str, float]:
    """Plans in a process of its own; CPU and wall seconds, and MB of memory."""
    command = [sys.executable, "-m", "tests.bench.plan", "--work", str(store), str(folder), str(int(language))]
    started, highest = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            highest = max(highest, sum(_rss_bytes(pid) for pid in _tree(process.pid)))
            time.sleep(0.05)
        told = json.loads(process.stdout.read()) if process.stdout and not process.returncode else None
    if told is None:
        raise SystemExit(f"the planner of {folder} ended with {process.returncode}")
    return {"wall_s": time.perf_counter() - started, "all_processes_mb": highest / 1e6, **told}


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = children.read_text().split()
        except OSError:
            continue  # ended meanwhile
        for child in below:
            yield from _tree(int(child))


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _work(store: str, folder: str, language: str) -> None:
    import resource

    plan_lists(store, folder, language == "1")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in used)
    # Not ru_maxrss: a child begins with that of the process that it was forked from.
    highest = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"cpu_s": cpu_s, "driver_mb": int(highest.split()[1]) * 1024 / 1e6}))


def statuses(store: Path) -> Counter[str | None]:
    """Rows of the whole plan by their verdict."""
    counts: Counter[str | None] = Counter()
    for instalment in read_instalments(LocalStore(store)):
        for order in instalment.work_orders:
            values = pq.read_table(store / order.key, columns=["status"])["status"].value_counts()
            counts.update({value["values"].as_py(): value["counts"].as_py() for value in values})
    return counts


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=int(os.environ.get("ROWS", MILLION)))
    parser.add_argument("--language", choices=("on", "off", "both"), default=os.environ.get("LANGUAGE", "both"))
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        _work(*arguments.work)
        return 0
    rows, rng, wrong = arguments.rows, np.random.default_rng(SEED), 0
    print(where := device("pyarrow", "numpy"))
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="armchair-bench-plan-") as scratch:
        below = Path(scratch)
        for name in ("all", "another", "first"):
            (below / name).mkdir()
        seen = []
        for number, first in enumerate(range(0, rows, MILLION)):
            seen.append(listed(first, min(MILLION, rows - first), rng))
            write_list(below / "all" / f"{number:04d}.parquet", seen[-1], rng)
        another = listed(rows, MILLION, rng)
        write_list(below / "another" / "a.parquet", another, rng)
        write_list(below / "first" / "a.parquet", listed(0, MILLION, rng), rng)
        different = len(np.unique(np.concatenate([*seen, another])))
        print(f"{rows:,} rows, then {MILLION:,}; {different:,} different URLs")
        print(f"{'':24}{'CPU-s':>9}{'us a row':>10}{'wall s':>9}{'MB, all':>9}{'planner':>9}")
        for language in {"on": [True], "off": [False], "both": [False, True]}[arguments.language]:
            name = "language ids" if language else "no language ids"
            into = below / f"pairs-{language}"
            own = below / "own"
            for step, store, count in (("all", into, rows), ("another", into, MILLION), ("first", own, MILLION)):
                got = planned(store, below / step, language)
                told[f"{step}, {name}"] = got
                print(
                    f"{step + ', ' + name:24}{got['cpu_s']:9.1f}{1e6 * got['cpu_s'] / count:10.2f}{got['wall_s']:9.1f}"
                    f"{got['all_processes_mb']:9.0f}{got['driver_mb']:9.0f}",
                    flush=True,
                )
            counts = statuses(into)
            if not language and (counts[None], counts["url_duplicate"]) != (different, rows + MILLION - different):
                print(f"the plan says {dict(counts)}", file=sys.stderr)
                wrong = 1
            for done in (into, own):
                shutil.rmtree(done)
    ratios = {
        name.removeprefix("first, "): got["cpu_s"] / told[name.replace("first", "another")]["cpu_s"]
        for name, got in told.items()
        if name.startswith("first")
    }
    print_last_line("plan", where, ratios, rows=rows, **told)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
