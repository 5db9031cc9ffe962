"""Small stages for the tests of learning: pairs for each test, and one learned run for the session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops.training import train_here
from tests.small_runs import tokenize_here, tokenizer_job, transformer_job, write_pair_shard

MakePairs = Callable[..., Path]


def _make_pairs(location: Path, shards: int, rows: int, weight: float = 1.0) -> Path:
    for shard in range(shards):
        write_pair_shard(location, shard, list(range(shard * rows, (shard + 1) * rows)), weight=weight)
    return location


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """make_pairs(shards=2, rows=40, weight=1.0) -> the path of a new PAIRS stage."""

    def make(shards: int = 2, rows: int = 40, weight: float = 1.0, name: str = "a") -> Path:
        return _make_pairs(tmp_path / name / "pairs", shards, rows, weight)

    return make


@dataclass(frozen=True)
class Learned:
    """The stages of one run of tiny models. Read only: tests that write copy a stage first."""

    pairs: Path
    tokenizer: Path
    tokens: Path
    model: Path


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """Pairs, a tokenizer, tokens and a model, trained in a few seconds without Ray."""
    root = tmp_path_factory.mktemp("learned")
    run = Learned(*(root / name for name in ("pairs", "tokenizer", "tokens", "model")))
    _make_pairs(run.pairs, 2, 40)
    train_here(tokenizer_job(run.pairs, run.tokenizer), threads=1)
    tokenize_here(run.pairs, run.tokenizer, run.tokens)
    train_here(transformer_job(run.tokens, run.model), threads=1)
    return run
