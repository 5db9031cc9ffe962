"""Flows of learning: the tokenizer from pictures, the transformer from captions and codes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from prefect import flow

from infra.cluster import Cluster, Place
from infra.store import open_store
from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.transformer import TransformerSettings
from ops.jobs import Job, TokenizerTrainSettings, TransformerTrainSettings
from ops.run_record import read_run
from ops.training import Trained, prepare, train
from pipelines.artifacts import Board
from pipelines.waves import on_ray


@flow(name="train-tokenizer", persist_result=False)
def train_tokenizer(
    pairs: str,
    into: str,
    dvae: DvaeSettings = DvaeSettings(),
    training: TokenizerTrainSettings = TokenizerTrainSettings(),
    cluster: Cluster = Cluster(),
    place: Place = Place(),
) -> dict[str, Any]:
    """Trains the discrete VAE on the pictures of PAIRS, from its latest checkpoint on."""
    return _train(Job("tokenizer", pairs, into, dvae, training), cluster, place)


@flow(name="train-transformer", persist_result=False)
def train_transformer(
    tokens: str,
    into: str,
    transformer: TransformerSettings = TransformerSettings(),
    training: TransformerTrainSettings = TransformerTrainSettings(),
    sampling: SampleSettings = SampleSettings(),
    cluster: Cluster = Cluster(),
    place: Place = Place(),
) -> dict[str, Any]:
    """Trains the transformer on the captions and codes of TOKENS, from its latest checkpoint on.

    `sampling` is for the sheets on the way and decides nothing else.
    """
    return _train(Job("transformer", tokens, into, transformer, training, sampling), cluster, place)


def _train(job: Job, cluster: Cluster, place: Place) -> dict[str, Any]:
    store = open_store(job.into)
    prepare(job)  # what can be refused is refused before Ray starts
    with Board(f"train-{job.kind}", job.into) as board, on_ray(cluster, board, job.source, job.into):

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            record = read_run(store)
            if record is not None and "step" in record:
                board.progress(record["step"] / record["steps"], line.removeprefix(job.kind).strip())

        trained = train(job, place, say)
        board.progress(1.0, f"step {trained.step}")
        board.markdown("report", report_of(job, trained))
        if sheets := [entry.key for entry in store.list("sheets/")]:
            board.picture("sheet", store.read(sheets[-1]), f"What the model makes at step {trained.step}")
        return asdict(trained)


def report_of(job: Job, trained: Trained) -> str:
    """A page of Markdown about one training: where it ended, what the last evaluation says, and what to do next."""
    lines = [f"# train {job.kind}: step {trained.step} of {job.training.steps}", f"`{job.into}`", ""]
    lines += [f"- **model** `{trained.digest[:16]}`", f"- **from** `{job.source}`"]
    if trained.was_done:
        lines += ["- it was finished already"]
    numbers = [(name, value) for name, value in trained.evaluation.items() if isinstance(value, (int, float))]
    if numbers:
        lines += ["", "| last evaluation | |", "|---|---:|", *(f"| {name} | {value:.4g} |" for name, value in numbers)]
    follows = {
        "tokenizer": f"armchair tokenize {job.source} --tokenizer {job.into} --into TOKENS",
        "transformer": f'armchair generate {job.into} "a prompt"',
    }
    return "\n".join([*lines, "", "## What next", "", f"- `{follows[job.kind]}`"])
