"""Flows of learning: the tokenizer from pictures, the transformer from captions and codes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from prefect import flow

from infra.cluster import Cluster
from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.transformer import TransformerSettings
from ops.jobs import Job, Place, TokenizerTrainSettings, TransformerTrainSettings
from ops.training import train
from pipelines.waves import on_ray


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    with on_ray(cluster):
        return asdict(train(Job("tokenizer", pairs, into, dvae, training), place, _say))


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
    with on_ray(cluster):
        return asdict(train(Job("transformer", tokens, into, transformer, training, sampling), place, _say))
