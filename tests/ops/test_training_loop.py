"""One loop over any number of ranks, with copies (DDP) or shares (FSDP2): one path, the same files, exact restarts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infra.cluster import Place
from infra.store import open_store
from models.schedules import plateau_halvings
from ops.checkpoints import overlaps
from ops.errors import RecipeChanged, UsageError
from ops.jobs import Job, Worker
from ops.shards import read_receipts
from ops.takedown import drop
from ops.tokenize import pending_tasks, start_tokens, tokenize_shard
from ops.trained import (
    latest_checkpoint,
    load_tokenizer,
    load_transformer,
    load_weights,
    read_checkpoint_file,
    read_metrics,
)
from ops.training import train, train_here
from tests.ops.conftest import Learned
from tests.small_runs import (
    TOKENIZER_TRAINING,
    TOKENS,
    TRANSFORMER_TRAINING,
    tokenizer_job,
    transformer_job,
    write_pair_shard,
)
from tests.training_rounds import train_undisturbed

KINDS = ("tokenizer", "transformer")


def _job(learned: Learned, kind: str, into: Path, **changed: Any) -> Job:
    if kind == "tokenizer":
        return tokenizer_job(learned.pairs, into, replace(TOKENIZER_TRAINING, **changed))
    return transformer_job(learned.tokens, into, replace(TRANSFORMER_TRAINING, **changed))


def _losses(into: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(open_store(str(into))) if row["kind"] == "train"]


def _digests(into: Path) -> dict[str, str]:
    checkpoint = latest_checkpoint(open_store(str(into)))
    assert checkpoint is not None
    return {name: ref.sha256 for name, ref in checkpoint.files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_copies_shares_and_one_worker_follow_the_same_path(learned: Learned, tmp_path: Path, kind: str) -> None:
    places = {"one": Place(), "copies": Place(workers=2), "shares": Place(workers=2, sharded=True)}
    for name, place in places.items():  # an odd batch: the ranks' parts differ in size
        job = _job(learned, kind, tmp_path / name, batch=7, log_every=1, learning_rate=1e-3)
        train_undisturbed(job, place, 20)
    for name in ("copies", "shares"):
        assert len(_losses(tmp_path / name)) == 20
        assert _losses(tmp_path / name) == pytest.approx(_losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_any_number_of_workers_and_what_arrives_meanwhile_moves_no_position(
    learned: Learned, tmp_path: Path, kind: str
) -> None:
    """1, 2 (shares), 1, 4 workers, five steps each; after the first five comes a list, and a drop that both runs meet.
    Of a batch of five the fourth of four workers has nothing."""
    changed = {"batch": 5, "log_every": 1, "checkpoint_every": 5, "learning_rate": 1e-3}
    paths = {name: shutil.copytree(_source(learned, kind), tmp_path / name / "source") for name in ("same", "other")}
    jobs = {
        name: replace(_job(learned, kind, tmp_path / name / "into", **changed), source=str(paths[name]))
        for name in paths
    }
    for job in jobs.values():
        train_undisturbed(job, Place(), 5)
    gone = tmp_path / "gone.txt"
    gone.write_text("\n".join(f"{number:032x}" for number in range(3, 11)))
    for path in paths.values():
        drop([str(path)], None, str(gone))
    _grow(learned, kind, paths["other"], tmp_path)
    train_undisturbed(jobs["same"], Place(), 15)
    for place in (Place(workers=2, sharded=True), Place(), Place(workers=4)):
        train_undisturbed(jobs["other"], place, 5)
    same, other = (_losses(tmp_path / name / "into") for name in ("same", "other"))
    assert len(same) == 20
    assert other == pytest.approx(same, rel=1e-5)
    undropped = _job(learned, kind, tmp_path / "undropped", **changed)
    train_undisturbed(undropped, Place(), 20)
    assert _losses(tmp_path / "undropped")[:5] == same[:5]
    assert _losses(tmp_path / "undropped")[5:] != same[5:], "the drop was not honoured"


def _source(learned: Learned, kind: str) -> Path:
    return learned.pairs if kind == "tokenizer" else learned.tokens


def _grow(learned: Learned, kind: str, source: Path, scratch: Path) -> None:
    pairs = source if kind == "tokenizer" else shutil.copytree(learned.pairs, scratch / "grown")
    write_pair_shard(pairs, 2, list(range(80, 120)))
    if kind == "transformer":
        before = len(read_receipts(open_store(str(source))))
        start_tokens(str(learned.pairs), str(learned.tokenizer), str(source), TOKENS)
        assert [tokenize_shard(task).state for task in pending_tasks(str(pairs), str(source), TOKENS)] == ["committed"]
        assert len(read_receipts(open_store(str(source)))) == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_two_workers_that_stopped_and_went_on_end_with_the_bytes_of_an_undisturbed_run(
    learned: Learned, tmp_path: Path, kind: str, sharded: bool
) -> None:
    place = Place(workers=2, sharded=sharded)
    stopped, undisturbed = (_job(learned, kind, tmp_path / name) for name in ("stopped", "undisturbed"))
    train_undisturbed(stopped, place, 13)  # three updates past the checkpoint, done again below
    assert latest_checkpoint(open_store(stopped.into)).step == 10  # type: ignore[union-attr]
    train_undisturbed(stopped, place, 10)
    train_undisturbed(undisturbed, place, 20)
    assert _digests(tmp_path / "stopped") == _digests(tmp_path / "undisturbed")
    assert sorted(_digests(tmp_path / "stopped")) == [
        "model.safetensors", "part-0000-of-0002.safetensors", "part-0001-of-0002.safetensors",
    ]  # fmt: skip
    kept = [path.name for path in (tmp_path / "stopped" / "steps" / "0000020").iterdir()]
    assert len(kept) == 4, "a word between ranks was left behind"
    load = load_tokenizer if kind == "tokenizer" else load_transformer
    assert load(stopped.into)[-1] == _digests(tmp_path / "stopped")["model.safetensors"]


@pytest.mark.slow
def test_parts_of_a_batch_and_activations_computed_again_change_nothing_but_the_memory(
    learned: Learned, tmp_path: Path
) -> None:
    changed = {"batch": 7, "log_every": 1, "learning_rate": 1e-3}
    places = {
        "whole": Place(),
        "parts": Place(accumulate=3, recompute=True),
        "shares": Place(workers=2, accumulate=2, sharded=True, recompute=True),
        "copies": Place(workers=2, accumulate=2),
    }
    for name, place in places.items():
        train_undisturbed(_job(learned, "transformer", tmp_path / name, **changed), place, 20)
    for name in ("parts", "shares", "copies"):
        assert _losses(tmp_path / name) == pytest.approx(_losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_learns_what_fp32_learns_and_keeps_its_weights_in_fp32(
    learned: Learned, tmp_path: Path, kind: str
) -> None:
    for name, place in (("one", Place()), ("shares", Place(workers=2, sharded=True))):
        train_undisturbed(_job(learned, kind, tmp_path / name, precision="bf16", log_every=1), place, 20)
        fp32 = _losses(learned.tokenizer if kind == "tokenizer" else learned.model)
        bf16 = _losses(tmp_path / name)
        assert bf16[0] != fp32[0]
        assert sum(bf16[15:]) / 5 == pytest.approx(fp32[-1], abs=0.15)
        checkpoint = latest_checkpoint(open_store(str(tmp_path / name)))
        assert checkpoint is not None
        for file in checkpoint.files:
            tensors, _ = load_weights(read_checkpoint_file(open_store(str(tmp_path / name)), checkpoint, file), file)
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_rate_is_halved_on_a_plateau_and_a_resume_knows_of_it(learned: Learned, tmp_path: Path) -> None:
    """A rate of almost nothing learns nothing: each interval that the batches make no easier is a plateau."""
    changed = {"schedule": "plateau", "plateau_patience": 1, "checkpoint_every": 2, "log_every": 1, "warmup_steps": 0}
    changed |= {"learning_rate": 1e-9, "final_learning_rate": 1e-11, "evaluate_pictures": 0}
    jobs = [_job(learned, "transformer", tmp_path / name, **changed) for name in ("stopped", "undisturbed")]
    train_here(jobs[0], threads=1, stop_after=9)
    for job in jobs:
        train_here(job, threads=1)
    rows = [row for row in read_metrics(open_store(jobs[0].into)) if row["kind"] == "train"]
    means = [(a["loss"] + b["loss"]) / 2 for a, b in zip(rows[::2], rows[1::2], strict=True)]
    halvings = [plateau_halvings(means[:interval], 1) for interval in range(10)]
    assert halvings[-1] > 1
    assert [row["learning_rate"] for row in rows[::2]] == [max(1e-11, 1e-9 * 0.5**times) for times in halvings]
    assert _digests(tmp_path / "stopped") == _digests(tmp_path / "undisturbed")
    with pytest.raises(RecipeChanged, match="checkpoint_every: was 2, now 3"):  # it decides the weights now
        train_here(_job(learned, "transformer", tmp_path / "stopped", **changed | {"checkpoint_every": 3}))


@pytest.mark.parametrize(("was", "now"), [(1, 3), (3, 1), (2, 3), (5, 2)])
def test_a_rank_reads_the_parts_that_hold_its_rows_and_no_others(was: int, now: int) -> None:
    for rows in (1, 2, 7, 30):
        seen: list[int] = []
        for rank in range(now):
            first, stop = Worker(rank, now).part(rows)
            spread = SimpleNamespace(shapes={"w": (rows, 2)}, rows=lambda name, at=(first, stop): at)
            for part, (begin, end) in overlaps(Worker(world=was), spread, "w").items():  # type: ignore[arg-type]
                there = Worker(part, was).part(rows)
                assert there[0] <= begin < end <= there[1]
                seen += range(begin, end)
        assert seen == list(range(rows))


def test_what_cannot_be_split_is_refused_before_anything_starts(learned: Learned, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dvae\.usage is 0\.05"):
        train(_job(learned, "tokenizer", tmp_path / "into"), Place(accumulate=2))
    with pytest.raises(UsageError, match="--most-workers 1 is less than --workers 2"):
        train(_job(learned, "tokenizer", tmp_path / "into"), Place(workers=2, most_workers=1))
    with pytest.raises(UsageError, match="--accumulate is 0"):
        train(_job(learned, "transformer", tmp_path / "into"), Place(accumulate=0))
    assert not (tmp_path / "into").exists()
