"""The demo: OpenMoji's drawings and names, served by a local web server that also misbehaves, and the whole way.

It is `armchair build` on a list of its own, then the scores of what came out. Nothing here is special-cased for the
demo but the list, the server and the scores.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.cluster import REPO, Cluster, Place
from infra.metrics import Cost, timed
from infra.store import open_store
from ops.demo_scores import gallery
from ops.demo_summary import GATES, score_demo
from ops.demo_web import HOSTILE
from ops.errors import StorageError, UsageError
from ops.openmoji import LICENCE, DemoPicture, list_rows, render, write_list
from ops.report import write_run_report
from ops.status import status
from ops.trained import read_metrics
from ops.verify import verify
from pipelines.settings import Settings
from pipelines.stages import Run, missing_stages

MISBEHAVE_SHARE = 0.04
"""Extra URLs that misbehave, over the good ones: the funnel of a first run is a real one."""


def run_demo(into: str, settings: Settings, seed: int, cluster: Cluster, *, as_json: bool = False) -> int:
    """Runs the whole demo into a local directory, and prints the summary for people or as one JSON object.

    Returns the exit code: 1 if a gate is missed, else 0.
    """
    if "://" in into:
        raise UsageError(f"{into}: the demo's pictures come from this machine.", "Use a local --into.")
    directory, run = Path(into), Run(into)
    seconds = _earlier_costs(directory)
    settings = _for_demo(settings, seed)
    with timed("pictures", seconds):
        _tell(f"drawing OpenMoji's pictures into {directory / 'openmoji'} (once)")
        pictures = render(directory / "openmoji")
        port = _port(directory)
        listed = directory / "list.tsv"
        if not listed.exists():
            write_list(listed, _rows(pictures, f"http://127.0.0.1:{port}"))
    missing = missing_stages([str(listed)], run, settings)
    if missing:
        _tell(f"to do: {', '.join(missing)}")
        with _web_server(directory / "openmoji", port):
            from pipelines.build import build
            from pipelines.prefect_server import run_flow

            place = Place(threads=settings.demo.threads)
            built = run_flow(build, [str(listed)], into, settings, cluster=cluster, place=place)
            seconds |= built["seconds"]
    with timed("verify", seconds):
        for stage in (run.pairs, run.tokens):
            proof = verify(open_store(stage), deep=True)
            if not proof.ok:
                raise StorageError(f"{stage}: {proof.problems[0].what}.", f"armchair verify {stage} --deep tells all.")
    with timed("scores", seconds):
        _tell("scoring what the models learned")
        scored = score_demo(
            run.pairs, run.tokens, run.model, gallery(pictures, directory / "openmoji"), settings.sampling, seed
        )
        (directory / "pictures").mkdir(exist_ok=True)
        (directory / "pictures" / "demo.png").write_bytes(scored.sheet)
    training_cpu = {
        stage: _cpu_of_training(location)
        for stage, location in (("tokenizer", run.tokenizer), ("transformer", run.model))
    }
    summary = {
        "pairs": status(open_store(run.pairs))["pairs"],
        "tokenizer": scored.tokenizer,
        "transformer": scored.transformer,
        "samples": scored.samples,
        "retrieval": scored.retrieval,
        "seconds": {
            **seconds,
            "training_cpu": sum(training_cpu.values()),
            "sampling_cpu_a_picture": scored.sampling_cpu_a_picture,
            # Summed: what Ray's processes used can't be asked for any more once they have ended.
            "total": {kind: sum(cost[kind] for cost in seconds.values()) for kind in ("wall", "cpu")},
        },
        "seed": seed,
        "device": _device(),
        "title": "armchair demo",
        "licence": LICENCE,
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=1))
    report = write_run_report(into)
    missed = [gate for gate in GATES if settings.demo.gates and not gate.holds(summary)]
    sheet = str(directory / "pictures" / "demo.png")
    if as_json:
        print(json.dumps(summary | {"sheet": sheet, "report": report}))
    else:
        print(table(summary))
        print(f"\nsheet    {sheet}\nreport   {report}\nsummary  {directory / 'summary.json'}")
        print(f'next     armchair generate {run.model} "red heart"')
    for gate in missed:
        print(f"gate missed: {gate}, got {gate.value(summary):.3f}", file=sys.stderr)
    return 1 if missed else 0


def _for_demo(settings: Settings, seed: int) -> Settings:
    drawings: dict[str, str | list[str]] = {"held": ["", "composition", "concept"]}
    return replace(
        settings,
        fetch=replace(settings.fetch, allow_private=("127.0.0.0/8",)),
        # Not on what the misbehaving URLs gave: photographs among line drawings take most of the codes for themselves.
        tokenizer_training=replace(settings.tokenizer_training, seed=seed, where=drawings),
        transformer_training=replace(
            settings.transformer_training,
            seed=seed,
            where=drawings | ({"subset": "core"} if settings.demo.pictures == "core" else {}),
        ),
    )


def _rows(pictures: list[DemoPicture], server: str) -> list[dict[str, str]]:
    """The good pairs, and among them those that misbehave, each kind equally often, under captions that say so."""
    rows = list_rows(pictures, f"{server}/pictures")
    kinds = sorted(HOSTILE)
    for number in range(max(len(kinds), round(MISBEHAVE_SHARE * len(rows)))):
        kind = kinds[number % len(kinds)]
        caption = f"what the server answers to {kind.replace('_', ' ')}, number {number}"
        url = f"{server}/hostile/{kind}/{number}"
        # In neither the subset nor the scores: these pairs are here for the funnel.
        rows.append(
            {"url": url, "caption": caption, "split": "train", "weight": "1.0", "subset": "", "held": "misbehaves"}
        )
    return rows


def _port(directory: Path) -> int:
    """The server's port, the same at every start: the list names it, and a list with other URLs is another list."""
    path = directory / "port"
    if path.exists():
        return int(path.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(str(port))
    return port


@contextmanager
def _web_server(folder: Path, port: int) -> Iterator[None]:
    """The web server in a process of its own, for the time of a `with`."""
    command = [sys.executable, "-m", "ops.demo_web", str(folder.absolute()), "--port", str(port)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline().startswith("http"):
                raise UsageError(
                    f"port {port} of this machine is taken.", "End what listens there, or use another --into."
                )
            yield
        finally:
            server.terminate()


def _earlier_costs(directory: Path) -> dict[str, Cost]:
    """What the stages cost that an earlier call did, from its summary."""
    try:
        found = json.loads((directory / "summary.json").read_bytes())["seconds"]
    except FileNotFoundError:
        return {}
    return {name: cost for name, cost in found.items() if isinstance(cost, dict) and name != "total"}


def _cpu_of_training(location: str) -> float:
    return float(sum(row.get("cpu_s", 0.0) for row in read_metrics(open_store(location))))


def _device() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{os.uname().machine}, {os.cpu_count()} cores"


def _tell(line: str) -> None:
    print(f"demo        {line}", file=sys.stderr, flush=True)


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    pairs, t, x, s = (summary[name] for name in ("pairs", "tokenizer", "transformer", "samples"))
    rejected = ", ".join(f"{reason} {count}" for reason, count in pairs["rejected"].items())
    nats, at_5, tone = x["image_nats_per_code"], s["concept_at_5"], s["tone"]
    total = summary["seconds"]["total"]
    lines = [
        ("pairs", f"{pairs['planned']} planned, {pairs['kept']} kept; rejected: {rejected}"),
        (
            "tokenizer",
            f"{t['psnr_db']:.1f} dB, {t['bits_per_dim']:.2f} bits/dim, perplexity {t['perplexity']:.0f}, "
            f"{100 * t['used_fraction']:.0f} % of codes used, on concepts never seen",
        ),
        (
            "transformer",
            f"{nats['right']:.2f} nats/code with the right caption, {nats['shuffled']:.2f} with a wrong one, "
            f"{nats['none']:.2f} with none, on compositions never seen",
        ),
        (
            "right concept",
            f"among the first five: {at_5['held_out']:.2f} never seen, {at_5['trained']:.2f} trained "
            f"(best possible {at_5['ceiling']:.2f}, by chance {at_5['shifted_captions']:.2f})",
        ),
        (
            "skin tone",
            f"{tone['generated']:.2f} generated, {tone['reconstructed']:.2f} reconstructed, "
            f"{tone['true']:.2f} true pictures, {tone['chance']:.2f} by chance",
        ),
        ("memorised", f"{s['exact_at_1_trained']:.2f} of the trained prompts give the very picture"),
        ("time", f"{total['wall']:.0f} s, {total['cpu']:.0f} CPU-s ({summary['device']})"),
    ]
    return "\n".join(f"{name:<14}{text}" for name, text in lines)
