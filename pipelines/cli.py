"""The command line. One function a command, each a few lines that call one flow or op.

torch, ray and prefect are imported inside the commands: `--help` answers in a blink. An ArmchairError becomes its
text and its exit code: 0 done, 2 the user can fix it now, 3 storage or cluster, 4 training diverged, 5 not everything.
"""

from __future__ import annotations

import json as json_module
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter, validators

from infra.cluster import Cluster, ClusterError, Place, quiet_environment

if TYPE_CHECKING:
    from pipelines.settings import Settings

PREFECT = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # an empty home needs 15-22 s of migrations
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the command line prints errors itself, once
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # a server that is gone: a page of each event that it misses
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
}
"""Set before prefect is imported; a value of the user's wins."""


def _version() -> str:
    from importlib.metadata import version

    return version("armchair")


app = App(
    name="armchair",
    version=_version,
    help="From a list of picture URLs and captions to a text-to-image model. "
    "Start with `armchair demo`; build your own with `armchair build LIST --into RUN --preset demo`. "
    "Every command can be run again: it does only what is missing.",
    help_format="markdown",
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `main` says how to go on
)
train = App(name="train", help="Train one of the two models on what an earlier stage made.")
app.command(train)
app.register_install_completion_command(help="Complete commands, options, presets and settings with TAB, from now on.")


def _presets(context: object) -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.toml"))


def _setting_paths(context: object) -> list[str]:
    from pipelines.settings import rows

    return [f"{row.path}=" for row in rows()]


Pairs = Annotated[str, Parameter(help="Directory that `ingest` made.")]
Directory = Annotated[str, Parameter(help="Directory of pairs or of tokens.")]
Into = Annotated[str, Parameter(help="Directory that this command makes or continues.")]
Preset = Annotated[
    tuple[str, ...],
    Parameter(
        negative="",
        help="tiny, demo, laptop, gpu, dalle-12b; filters alone: paper, laion, datacomp; or a TOML file. "
        "May be repeated: later over earlier.",
        completer=_presets,
    ),
]
Sets = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        help="path=value, one setting; may be repeated. Over the presets.",
        completer=_setting_paths,
    ),
]
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object and nothing else.")]
Cpus = Annotated[int | None, Parameter(help="CPUs of a local Ray; default: all. Ignored with RAY_ADDRESS.")]
Address = Annotated[
    str | None,
    Parameter(
        help="Train as a job of a Ray cluster: http://HOST:8265, ray://HOST:10001, or HOST:6379. Over RAY_ADDRESS."
    ),
]
UrlCol = Annotated[str, Parameter(help="Column of the lists that holds URLs.")]
CaptionCol = Annotated[str, Parameter(help="Column of the lists that holds captions.")]
Placed = Annotated[Place, Parameter(name="*", negative_bool="")]
Seed = Annotated[int, Parameter(help="Another seed gives other models and pictures.")]


@app.command(sort_key=1)
def demo(
    *,
    into: Into = "runs/demo",
    preset: Preset = ("demo",),
    sets: Sets = (),
    seed: Seed = 0,
    cpus: Cpus = None,
    json: Json = False,
) -> int:
    """The whole way on real pictures (OpenMoji), from a local web server that also misbehaves; minutes on two cores.

    Ends with a table, `summary.json`, `report.html`, and a sheet of pictures drawn from prompts.
    """
    from pipelines.demo import run_demo

    return run_demo(into, _settings(preset, sets), seed, _cluster(cpus), as_json=json)


@app.command(sort_key=2)
def build(
    *lists: Annotated[str, Parameter(help="List files or folders of them: Parquet, CSV, TSV, JSON, JSONL, txt.")],
    into: Into,
    preset: Preset = (),
    sets: Sets = (),
    url_col: UrlCol = "url",
    caption_col: CaptionCol = "caption",
    cpus: Cpus = None,
    place: Placed = Place(),
    json: Json = False,
) -> None:
    """The whole way: ingest, train the tokenizer, tokenize, train the transformer, write the report."""
    from pipelines.stages import Run, missing_stages

    settings, columns = _settings(preset, sets), _columns(url_col, caption_col)
    if not missing_stages(lists, Run(into), settings, columns):
        _say({"into": into, "done": True}, json, f"{into} is finished: nothing to do. Its report is {into}/report.html")
        return
    from pipelines.build import build as flow

    told = _run(flow, list(lists), into, settings, columns, _cluster(cpus), place)
    _say(told, json, f"finished: {told['report']}")


@app.command(sort_key=3)
def ingest(
    *lists: Annotated[str, Parameter(help="List files or folders of them: Parquet, CSV, TSV, JSON, JSONL, txt.")],
    into: Into,
    preset: Preset = (),
    sets: Sets = (),
    url_col: UrlCol = "url",
    caption_col: CaptionCol = "caption",
    accept_partial: Annotated[bool, Parameter(negative="", help="Commit shards of an outage at once.")] = False,
    engine: Annotated[
        Literal["armchair", "img2dataset"] | None,
        Parameter(
            help="Who makes the pictures: the same as --set picture.engine. img2dataset's are slower, 16-bit ones come "
            "out white and turned ones stay so; connections, filters and commits are ours either way."
        ),
    ] = None,
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Plan, fetch, filter and commit pairs. Run again: does only what is missing. New lists extend what is there."""
    from pipelines.ingest import ingest as flow

    s = _settings(preset, (*sets, f"picture.engine={engine}") if engine else sets)
    columns = _columns(url_col, caption_col)
    told = _run(
        flow,
        list(lists),
        into,
        columns,
        s.plan,
        s.filters,
        s.fetch,
        s.picture,
        s.outage,
        _cluster(cpus),
        accept_partial,
    )
    _end(into, told, json)


@app.command(sort_key=3)
def adopt(
    folder: Annotated[str, Parameter(help="Output of img2dataset, with --output_format webdataset; local or s3://.")],
    *lists: Annotated[str, Parameter(help="The lists it was made from: for pairs that no file of it tells any more.")],
    into: Into,
    preset: Preset = (),
    sets: Sets = (),
    url_col: UrlCol = "url",
    caption_col: CaptionCol = "caption",
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Take over a folder that img2dataset made. Sound pairs are not fetched again; the others wait for `ingest`."""
    from pipelines.adopt import adopt as flow

    s, columns = _settings(preset, sets), _columns(url_col, caption_col)
    _end(into, _run(flow, folder, list(lists), into, columns, s.plan, s.filters, s.picture, _cluster(cpus)), json)


@app.command(sort_key=3)
def forecast(
    *lists: Annotated[str, Parameter(help="List files or folders of them: Parquet, CSV, TSV, JSON, JSONL, txt.")],
    sample: Annotated[
        int, Parameter(help="Rows that are really fetched. Four times as many halve the intervals.")
    ] = 500,
    seed: Annotated[int, Parameter(help="Another seed draws other rows.")] = 0,
    cores: Annotated[int | None, Parameter(help="Cores of the planned run; default: those of this machine.")] = None,
    preset: Preset = (),
    sets: Sets = (),
    url_col: UrlCol = "url",
    caption_col: CaptionCol = "caption",
    json: Json = False,
) -> None:
    """What lists will give and cost, with 95 % intervals, from a sample that is fetched and thrown away."""
    from ops.forecast import forecast as foresee
    from pipelines.progress import Progress
    from pipelines.show import show_forecast

    s, columns, cores = _settings(preset, sets), _columns(url_col, caption_col), cores or os.cpu_count() or 1
    with Progress("forecast") as progress:
        told = foresee(
            lists, sample, seed, cores, s.plan, s.filters, s.fetch, s.picture, s.outage, columns, progress.tell
        )
    _say(told, json, show_forecast(told))


@app.command(sort_key=3)
def estimate(
    *preset: Annotated[str, Parameter(help="Presets or TOML files, later over earlier.", completer=_presets)],
    gpus: Annotated[int, Parameter(help="GPUs that train together.")] = 1,
    kind: Annotated[str, Parameter(help="V100, A100, H100, H200 or B200.")] = "H100",
    mfu: Annotated[float | None, Parameter(help="Share of the GPU's bf16 rate that is used; default: 0.35.")] = None,
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Parameters, FLOPs, memory of a GPU and days of both trainings of a preset, before a GPU is rented."""
    from ops.estimate import estimate as foresee
    from pipelines.progress import Progress
    from pipelines.show import show_estimate

    s = _settings(preset, sets)
    with Progress("estimate"):
        told = foresee(s.dvae, s.tokenizer_training, s.transformer, s.transformer_training, gpus, kind, mfu)
    _say(told, json, show_estimate(told))


@app.command(sort_key=4)
def status(
    directory: Annotated[str, Parameter(help="Directory of pairs, of tokens, of a trained model, or of a whole run.")],
    *,
    watch: Annotated[bool, Parameter(negative="", help="Show it live, until Ctrl-C.")] = False,
    json: Json = False,
) -> None:
    """How far it is: shards by state, pairs by reason, steps of a training, rates, time left, who is alive."""
    if watch:
        from pipelines.watch import watch as show

        return show(directory, as_json=json)
    from infra.store import open_store
    from ops.status import status as count
    from pipelines.show import show_status

    told = count(open_store(directory))
    return _say(told, json, show_status(told))


@app.command(sort_key=5)
def rerun(
    pairs: Pairs,
    *,
    only: Annotated[Literal["transient"] | None, Parameter(help="Only rows that may come; the default.")] = None,
    shards: Annotated[str | None, Parameter(help="Such as 3,7-9; alone: all their rejected rows.")] = None,
    preset: Preset = (),
    sets: Sets = (),
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Ask again for the rows of committed shards whose reason can have changed; each shard gets a new generation."""
    from pipelines.ingest import parse_shards
    from pipelines.ingest import rerun as flow

    s = _settings(preset or _settings_beside(pairs), sets)
    numbers = parse_shards(shards) if shards else None
    again: Literal["transient", "rejected"] = "rejected" if numbers and only is None else "transient"
    _end(pairs, _run(flow, pairs, again, numbers, s.fetch, s.outage, _cluster(cpus)), json)


@app.command(sort_key=6)
def verify(
    directory: Directory,
    *,
    deep: Annotated[bool, Parameter(negative="", help="Read every byte, not only sizes and counts.")] = False,
    json: Json = False,
) -> int:
    """Prove that every pair is accounted for once, and with --deep every byte."""
    from infra.store import open_store
    from ops.verify import verify as prove
    from pipelines.progress import Progress
    from pipelines.show import show_proof

    with Progress("verify") as progress:
        proof = prove(open_store(directory), deep=deep, tell=progress.tell)
    problems = [asdict(problem) for problem in proof.problems]
    told = {"ok": proof.ok, "pairs": proof.pairs, "shards": proof.shards, "problems": problems}
    _say(told, json, show_proof(directory, proof.ok, proof.pairs, problems))
    return 0 if proof.ok else 3


@app.command(sort_key=7)
def why(
    target: Annotated[str, Parameter(help="A URL as the list has it, or a uid (8 or more of its digits).")],
    *,
    stages: Annotated[
        tuple[str, ...],
        Parameter(name="--in", negative="", consume_multiple=True, help="Runs, or directories of their stages."),
    ],
    into: Annotated[str | None, Parameter(help="Directory for the pictures; default: why-UID.")] = None,
    json: Json = False,
) -> int:
    """The life of one pair: list line, shard, attempts, status, picture, codes, drops, and who trained on it."""
    from ops.why import has_problem
    from ops.why import why as ask
    from pipelines.progress import Progress
    from pipelines.show import show_why

    with Progress("why") as progress:
        told = ask(target, stages, into, progress.tell)
    _say(told, json, show_why(told))
    return 3 if has_problem(told) else 0


@app.command(sort_key=7)
def drop(
    *directories: Annotated[str, Parameter(help="Directories of pairs and of tokens, or runs that hold them.")],
    urls: Annotated[
        str | None, Parameter(help="File with a URL a line, or Parquet with a column url; -: stdin.")
    ] = None,
    uids: Annotated[
        str | None, Parameter(help="File with a uid a line, or Parquet with a column uid; -: stdin.")
    ] = None,
    kind: Annotated[
        Literal["takedown", "filter"], Parameter(help="A takedown takes copies along that `dedup` finds.")
    ] = "takedown",
    json: Json = False,
) -> int:
    """Leave pairs out from now on: in training, in new codes, in pictures shown. A URL holds for later lists too.

    Without a file: what is down in the pairs goes down in the tokens named too. Nothing is rewritten or deleted.
    """
    from ops.takedown import drop as take_down
    from pipelines.progress import Progress
    from pipelines.show import show_drop

    with Progress("drop") as progress:
        told = take_down(directories, urls, uids, kind, progress.tell)
    _say(told, json, show_drop(told))
    return 5 if told["not_found"] else 0


@app.command(sort_key=7)
def dedup(pairs: Pairs, *, cpus: Cpus = None, json: Json = False) -> None:
    """Find pictures that are there more than once, by bytes and by picture, and leave out all but the first."""
    from pipelines.dedup import dedup as flow
    from pipelines.show import show_dedup

    told = _run(flow, pairs, _cluster(cpus))
    _say(told, json, show_dedup(pairs, told))


@app.command(sort_key=7)
def sweep(
    directory: Directory,
    *,
    grace_hours: Annotated[float, Parameter(help="Age below which nothing is touched.")] = 24.0,
    superseded: Annotated[
        bool, Parameter(negative="", help="Also replaced generations; trained models may name them.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove what no receipt or instalment names and is older than the grace time."""
    from infra.store import open_store
    from ops.sweep import sweep as clean
    from pipelines.progress import Progress

    with Progress("sweep") as progress:
        place = open_store(directory)
        removed = clean(place, grace_s=3600 * grace_hours, superseded=superseded, tell=progress.tell)
    _say({"removed": removed}, json, f"removed {len(removed)} files")


@train.command
def tokenizer(
    pairs: Pairs,
    *,
    into: Into,
    preset: Preset = (),
    sets: Sets = (),
    cpus: Cpus = None,
    address: Address = None,
    place: Placed = Place(),
    json: Json = False,
) -> None:
    """Train the discrete VAE on pictures."""
    from pipelines.show import show_trained
    from pipelines.train import train_tokenizer as flow

    s = _settings(preset, sets)
    told = _run(flow, pairs, into, s.dvae, s.tokenizer_training, _cluster(cpus, address), place)
    _say(told, json, show_trained(told))


@app.command(sort_key=8)
def tokenize(
    pairs: Pairs,
    *,
    tokenizer: Annotated[str, Parameter(help="Directory of a trained tokenizer.")],
    into: Into,
    preset: Preset = (),
    sets: Sets = (),
    cpus: Cpus = None,
    actors: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1), help="Actors that encode; default: as many as the cluster holds."
        ),
    ] = None,
    gpu: Annotated[bool, Parameter(negative="", help="Encode on GPUs, one for each actor.")] = False,
    json: Json = False,
) -> None:
    """Turn the pictures of PAIRS into codes, one token shard for each pair shard."""
    from ops.tokenize import Encoders
    from pipelines.tokenize import tokenize as flow

    encoders = Encoders(actors=actors, gpu=gpu)
    _end(into, _run(flow, pairs, tokenizer, into, _settings(preset, sets).tokens, _cluster(cpus), encoders), json)


@train.command
def transformer(
    tokens: Annotated[str, Parameter(help="Directory that `tokenize` made.")],
    *,
    into: Into,
    preset: Preset = (),
    sets: Sets = (),
    cpus: Cpus = None,
    address: Address = None,
    place: Placed = Place(),
    json: Json = False,
) -> None:
    """Train the transformer on captions and codes."""
    from pipelines.show import show_trained
    from pipelines.train import train_transformer as flow

    s = _settings(preset, sets)
    told = _run(flow, tokens, into, s.transformer, s.transformer_training, s.sampling, _cluster(cpus, address), place)
    _say(told, json, show_trained(told))


@app.command(sort_key=9)
def generate(
    model: Annotated[str, Parameter(help="Directory that `train transformer` made.")],
    *prompts: Annotated[str, Parameter(help="What the pictures should show, each in quotes.")],
    n: Annotated[int, Parameter(name=["-n", "--pictures"], help="Pictures a prompt.")] = 9,
    seed: Seed = 0,
    into: Annotated[str | None, Parameter(help="PNG file of the sheet; default: MODEL/../pictures/PROMPT.png.")] = None,
    tokenizer: Annotated[
        str | None, Parameter(help="Directory of a tokenizer; default: the one MODEL carries.")
    ] = None,
    preset: Preset = (),
    sets: Sets = (),
    json: Json = False,
) -> None:
    """Draw pictures from prompts, best first."""
    from ops.generate import generate as draw
    from pipelines.progress import Progress

    sampling = _settings(preset or _settings_beside(model), sets).sampling
    with Progress("generate") as progress:
        told = draw(model, prompts, n, seed, into, tokenizer, sampling, progress.tell)
    for one in told["prompts"]:
        if one["note"]:
            print(f"generate    {one['prompt'][:40]!r}: {one['note']}", file=sys.stderr)
    _say(told, json, "\n".join(f"{path}" for path in told["sheets"]))


@app.command(sort_key=10)
def report(
    run: Annotated[str, Parameter(help="Directory that `build` or `demo` made.")], *, json: Json = False
) -> None:
    """Write RUN/report.html: funnel, curves, reconstructions, samples. One file, no outside references."""
    from ops.report import write_run_report
    from pipelines.progress import Progress

    with Progress("report"):
        path = write_run_report(run)
    _say({"report": path}, json, path)


@app.command(sort_key=11)
def settings(*, preset: Preset = (), sets: Sets = (), json: Json = False) -> None:
    """Every setting: value, unit and meaning, and the layer that it came from."""
    from pipelines.settings import rows

    found = list(rows(preset, sets))
    text = "\n".join(f"{row.path} = {row.value!r}   [{row.layer}]\n    {row.doc}" for row in found)
    _say({row.path: {"value": row.value, "layer": row.layer, "doc": row.doc} for row in found}, json, text)


def _run(flow: Any, *arguments: Any) -> dict[str, Any]:
    from pipelines.prefect_server import run_flow

    told: dict[str, Any] = run_flow(flow, *arguments)
    return told


def _settings(preset: str | tuple[str, ...] | None, sets: tuple[str, ...]) -> Settings:
    from pipelines.settings import resolve

    return resolve(preset, sets)


def _settings_beside(stage: str) -> str | None:
    from pipelines.stages import settings_beside

    return settings_beside(stage)


def _cluster(cpus: int | None, address: str | None = None) -> Cluster:
    cluster = Cluster(dashboard=True) if cpus is None else Cluster(cpus=cpus, dashboard=True)
    return cluster if address is None else replace(cluster, address=address)


def _columns(url: str, caption: str) -> Any:
    from ops.plan import Columns

    return Columns(url=url, caption=caption)


def _end(into: str, told: dict[str, Any], as_json: bool) -> None:
    """The end of a sharded stage: what became of it, and exit code 5 if shards are left."""
    from pipelines.show import show_tally
    from pipelines.waves import raise_if_unfinished

    _say(told, as_json, show_tally(into, told))
    raise_if_unfinished(into, told)


def _say(told: Any, as_json: bool, text: str | None = None) -> None:
    if as_json:
        print(json_module.dumps(told, default=str))
    elif text is not None:
        print(text)


def _check_install() -> None:
    """Raises UsageError for the one package that makes Prefect's server die without a word of its cause."""
    from importlib.metadata import PackageNotFoundError, version

    from ops.errors import UsageError

    try:
        found = version("dataclasses")
    except PackageNotFoundError:
        return
    raise UsageError(
        f"the back-port dataclasses {found} is installed: it shadows the standard library, and Prefect's server dies.",
        "Remove it: pip uninstall -y dataclasses",
    )


def main(arguments: list[str] | None = None) -> None:
    """The entry point `armchair`; `arguments` are those of the process unless given. Ends the process."""
    quiet_environment()
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)
    from infra.store import StoreError
    from ops.errors import ArmchairError

    interrupted: list[tuple[float, int]] = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append((time.monotonic(), number))
        if len(interrupted) == 1:
            raise KeyboardInterrupt
        if interrupted[-1][0] - interrupted[0][0] > 1.0:  # the second Ctrl-C of somebody who won't wait for cleaning up
            if (server := sys.modules.get("pipelines.prefect_server")) is not None:
                server.stop_server()
            os._exit(128 + number)

    # SIGTERM is how systemd, Kubernetes and a worker stop a process: to the person it is Ctrl-C by other means.
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _check_install()
        code = app(sys.argv[1:] if arguments is None else arguments)
    except ArmchairError as error:
        print(f"armchair: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (StoreError, ClusterError) as error:
        print(f"armchair: {error}", file=sys.stderr)
        sys.exit(3)
    except BrokenPipeError:  # `armchair status | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except FileNotFoundError as error:
        print(f"armchair: {error.filename or error} does not exist. Check the path.", file=sys.stderr)
        sys.exit(2)
    except NotADirectoryError as error:
        print(f"armchair: {error}. Name another directory.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"armchair: storage: {error}. Check the path, its rights and the space left.", file=sys.stderr)
        sys.exit(3)
    except (KeyboardInterrupt, Exception) as error:
        # What a Ctrl-C becomes on its way through Prefect may be another exception.
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        print("armchair: stopped. Run the same command again to go on from here.", file=sys.stderr)
        sys.exit(128 + interrupted[0][1] if interrupted else 130)
    finally:
        if not interrupted:
            for number, handler in before.items():
                signal.signal(number, handler)
    sys.exit(code if isinstance(code, int) else 0)
