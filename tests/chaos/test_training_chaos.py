"""Twelve kills for each of the two models: one worker and two, copies and shares. Twin: tests/ops/test_training.py."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from infra.cluster import Place
from ops.training import train_here
from tests.small_runs import (
    TOKENIZER_TRAINING,
    TRANSFORMER_TRAINING,
    tokenize_here,
    tokenizer_job,
    transformer_job,
    write_pair_shard,
)
from tests.training_rounds import Target, describe, training_rounds

ENDLESS = {"steps": 1_000_000, "checkpoint_every": 10, "log_every": 5, "evaluate_pictures": 8}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("workers_of_tokenizer", "victims"), [(1, ["worker", "driver", "peer"]), (2, ["peer", "machine", "worker"])]
)
def test_kills_of_both_trainings_leave_no_trace_in_the_weights(
    tmp_path: Path, workers_of_tokenizer: int, victims: list[str], sharded: bool
) -> None:
    pairs, tokens = tmp_path / "pairs", tmp_path / "tokens"
    for shard in range(2):
        write_pair_shard(pairs, shard, list(range(40 * shard, 40 * shard + 40)))
    train_here(tokenizer_job(pairs, tmp_path / "finished"), threads=1)
    tokenize_here(pairs, tmp_path / "finished", tokens)
    targets = [
        Target(
            tokenizer_job(pairs, tmp_path / "tokenizer", replace(TOKENIZER_TRAINING, **ENDLESS)),
            Place(workers=workers_of_tokenizer, threads=1, sharded=sharded),
        ),
        Target(
            transformer_job(tokens, tmp_path / "model", replace(TRANSFORMER_TRAINING, **ENDLESS)),
            Place(workers=3 - workers_of_tokenizer, threads=1, sharded=sharded),
        ),
    ]
    began_s = time.monotonic()
    training_rounds(tmp_path, targets, victims, seed=workers_of_tokenizer + 2 * sharded)
    print(describe(targets, time.monotonic() - began_s))
