from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from torch import Tensor

from infra.store import open_store
from ops.attempts import list_attempts, read_attempt
from ops.drops import add_drops, drop_rows
from ops.encoder import ENCODE_BATCH, Encoding, PixelBatch
from ops.errors import DamagedArtifact, RecipeChanged, UsageError
from ops.learning import images_of
from ops.pictures import decode_stored, tokenizer_crop, transformer_crop
from ops.seeds import derived_seed
from ops.shards import read_receipt, read_receipts
from ops.tokenize import (
    Encoders,
    TokenizeTask,
    TokensSettings,
    ahead,
    pending_tasks,
    start_tokens,
    tokenize,
    tokenize_shard,
    workers_for,
)
from ops.trained import load_tokenizer, tokenizer_digest
from ops.verify import verify
from tests.ops.conftest import Learned
from tests.small_runs import TOKENS, tokenize_here, write_pair_shard


def _rows(stage: Path, shard: int, generation: int | None = None) -> list[dict[str, object]]:
    store = open_store(str(stage))
    receipt = read_receipts(store)[shard] if generation is None else read_receipt(store, shard, generation)
    rows: list[dict[str, object]] = pq.read_table(stage / receipt.files["parquet"].key).to_pylist()
    return rows


def test_every_kept_pair_has_k_rows_of_codes_and_keeps_its_columns(learned: Learned) -> None:
    for shard in (0, 1):
        kept = [row for row in _rows(learned.pairs, shard) if row["status"] == "success"]
        tokens = _rows(learned.tokens, shard)
        assert [row["uid"] for row in tokens] == [row["uid"] for row in kept] * 2
        assert [row["k"] for row in tokens] == [0] * len(kept) + [1] * len(kept)
        for row, pair in zip(tokens, kept * 2, strict=True):
            for name in ("key", "caption", "split", "weight", "colour"):
                assert row[name] == pair[name]
            assert len(row["codes"]) == 16  # type: ignore[arg-type]
        receipt = read_receipts(open_store(str(learned.tokens)))[shard]
        assert receipt.made_from == {
            "pairs": read_receipts(open_store(str(learned.pairs)))[shard].digest,
            "tokenizer": tokenizer_digest(str(learned.tokenizer)),
        }
    assert verify(open_store(str(learned.tokens)), deep=True).ok


def test_the_codes_are_those_of_the_recorded_crop(learned: Learned) -> None:
    dvae, _ = load_tokenizer(str(learned.tokenizer))
    pairs = {row["uid"]: row for row in _rows(learned.pairs, 0)}
    tar = (learned.pairs / read_receipts(open_store(str(learned.pairs)))[0].files["tar"].key).read_bytes()
    tokens = _rows(learned.tokens, 0)
    pictures = []
    for row in tokens:
        pair = pairs[row["uid"]]
        picture = decode_stored(tar[pair["tar_offset"] : pair["tar_offset"] + pair["jpg_size"]])  # type: ignore[operator, misc]
        rng = np.random.default_rng(derived_seed("crop", 0, str(row["uid"]), int(str(row["k"]))))
        pixels, (x, y, side) = transformer_crop(picture, 16, rng, crop=True)
        assert row["crop"] == pytest.approx({"x": x, "y": y, "side": side}, abs=1e-4)
        pictures.append(pixels)
    codes = dvae.encode(images_of(np.stack(pictures))).tolist()
    assert codes == [row["codes"] for row in tokens]
    # Scaled to 16, 17 or 18 pixels, a square has 1, 4 or 9 places for one of 16.
    assert len({tuple(row["crop"].values()) for row in tokens}) > 10  # type: ignore[attr-defined]


def test_the_same_pairs_and_tokenizer_give_the_same_bytes(learned: Learned, tmp_path: Path) -> None:
    assert tokenize_here(learned.pairs, learned.tokenizer, tmp_path / "again") == ["committed"] * 2
    again, before = (read_receipts(open_store(str(stage))) for stage in (tmp_path / "again", learned.tokens))
    assert again == before


def test_a_second_run_has_nothing_to_do_and_a_new_shard_is_all_of_the_third(learned: Learned, tmp_path: Path) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    assert tokenize_here(pairs, learned.tokenizer, tokens) == []
    write_pair_shard(pairs, 2, list(range(80, 90)))
    assert [task.shard for task in pending_tasks(str(pairs), str(tokens), TOKENS)] == [2]
    assert tokenize_here(pairs, learned.tokenizer, tokens) == ["committed"]
    assert tokenize_here(pairs, learned.tokenizer, tokens) == []


def _regenerate(pairs: Path, side: int = 32) -> None:
    """Generation 1 of shard 0: its pairs again, with other pairs in the place of the last four."""
    write_pair_shard(pairs, 0, [*range(36), 200, 201, 202, 203], side=side, generation=1)


def _codes_and_crops(tokens: Path, generation: int | None = None) -> dict[object, object]:
    return {(row["uid"], row["k"]): (row["codes"], row["crop"]) for row in _rows(tokens, 0, generation)}


def test_a_regenerated_pair_shard_gives_its_token_shard_a_generation(learned: Learned, tmp_path: Path) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    _regenerate(pairs)
    (task,) = pending_tasks(str(pairs), str(tokens), TOKENS)
    assert (task.shard, task.generation, task.pairs_generation) == (0, 1, 1)
    assert tokenize_shard(task).state == "committed"
    assert tokenize_shard(task).state == "already"
    assert pending_tasks(str(pairs), str(tokens), TOKENS) == []
    assert verify(open_store(str(tokens)), deep=True).ok
    tokenize_here(pairs, learned.tokenizer, tmp_path / "fresh")
    assert _codes_and_crops(tmp_path / "fresh") == _codes_and_crops(tokens)


def test_a_regenerated_shard_copies_the_codes_of_unchanged_uids_and_encodes_only_new_ones(
    learned: Learned, tmp_path: Path
) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    _regenerate(pairs, side=48)  # larger pictures: a crop of them that is encoded now says so by its side
    tokenize_here(pairs, learned.tokenizer, tokens)
    before, after = _codes_and_crops(tokens, 0), _codes_and_crops(tokens)
    copied = before.keys() & after.keys()
    assert len(copied) > 50
    assert all(after[key] == before[key] for key in copied)
    assert len(after.keys() - copied) == 6
    assert all(after[key][1]["side"] > 32 for key in after.keys() - copied)  # type: ignore[index]


def test_another_tokenizer_or_other_crops_are_refused(learned: Learned, tmp_path: Path) -> None:
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    other = shutil.copytree(learned.tokenizer, tmp_path / "tokenizer")
    (other / "steps" / "0000020" / "receipt.json").unlink()
    with pytest.raises(UsageError, match="is at step 10 of 20"):
        start_tokens(str(learned.pairs), str(other), str(tokens), TOKENS)
    recipe = json.loads((other / "recipe.json").read_bytes())
    recipe["identity"]["tokenizer_training"]["steps"] = 10
    (other / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeChanged, match="tokenizer: was"):
        start_tokens(str(learned.pairs), str(other), str(tokens), TOKENS)
    with pytest.raises(RecipeChanged, match=r"tokens\.crops: was 2, now 3"):
        start_tokens(str(learned.pairs), str(learned.tokenizer), str(tokens), replace(TOKENS, crops=3))


def test_tokens_stand_alone_without_the_directory_of_their_tokenizer(learned: Learned, tmp_path: Path) -> None:
    dvae, digest = load_tokenizer(str(learned.tokens))
    original, wanted = load_tokenizer(str(learned.tokenizer))
    assert digest == wanted
    assert all((a == b).all() for a, b in zip(dvae.parameters(), original.parameters(), strict=True))


def test_a_damaged_pair_shard_gives_no_receipt(learned: Learned, tmp_path: Path) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    tar = pairs / read_receipts(open_store(str(pairs)))[1].files["tar"].key
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(bytes(data))
    start_tokens(str(pairs), str(learned.tokenizer), str(tmp_path / "tokens"), TOKENS)
    first, second = pending_tasks(str(pairs), str(tmp_path / "tokens"), TOKENS)
    assert tokenize_shard(first).state == "committed"
    with pytest.raises(DamagedArtifact, match=tar.name):
        tokenize_shard(second)
    assert list(read_receipts(open_store(str(tmp_path / "tokens")))) == [0]


def test_a_shard_of_which_nothing_was_kept_is_committed_empty(learned: Learned, tmp_path: Path) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    write_pair_shard(pairs, 2, [])
    assert tokenize_here(pairs, learned.tokenizer, tmp_path / "tokens") == ["committed"] * 3
    assert verify(open_store(str(tmp_path / "tokens")), deep=True).ok
    assert read_receipts(open_store(str(tmp_path / "tokens")))[2].row_groups == ()


def test_a_rerun_that_brings_the_first_pictures_of_a_shard_is_encoded(learned: Learned, tmp_path: Path) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    write_pair_shard(pairs, 2, [])
    tokenize_here(pairs, learned.tokenizer, tmp_path / "tokens")
    write_pair_shard(pairs, 2, list(range(200, 210)), generation=1)
    assert tokenize_here(pairs, learned.tokenizer, tmp_path / "tokens") == ["committed"]
    assert read_receipts(open_store(str(tmp_path / "tokens")))[2].kept == 8


def test_several_crops_of_the_same_square_are_refused() -> None:
    with pytest.raises(ValidationError, match="repeat the central square"):
        TokensSettings(crops=2, random_crops=False)


def test_without_random_crops_the_tokenizer_sees_what_it_was_evaluated_on() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    mine, _ = transformer_crop(picture, 16, np.random.default_rng(1), crop=False)
    assert (mine == tokenizer_crop(picture, 16, np.random.default_rng(2), crop=False, flip=False)).all()


class Counted(Encoding):
    """How many pictures each shard had encoded."""

    pictures: ClassVar[list[int]] = []

    def __call__(self, pixels_BHWC: PixelBatch) -> Tensor:
        self.pictures.append(len(pixels_BHWC))
        return super().__call__(pixels_BHWC)


def test_a_regenerated_shard_encodes_its_new_pictures_and_no_other(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    _regenerate(pairs)
    monkeypatch.setattr("ops.tokenize.Encoding", Counted)
    monkeypatch.setattr(Counted, "pictures", [])
    tokenize_here(pairs, learned.tokenizer, tokens)
    assert sum(Counted.pictures) == 3 * 2, "three of the four new pairs are kept, each has two crops"


def test_a_dropped_picture_is_not_even_encoded(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    gone = [str(row["uid"]) for row in _rows(pairs, 0) if row["status"] == "success"][3:7]
    add_drops(open_store(str(pairs)), drop_rows([(bytes.fromhex(uid), None) for uid in gone], "takedown"))
    monkeypatch.setattr("ops.tokenize.Encoding", Counted)
    monkeypatch.setattr(Counted, "pictures", [])
    tokenize_here(pairs, learned.tokenizer, tmp_path / "tokens")
    assert sum(Counted.pictures) == (64 - 4) * 2
    left = {row["uid"] for row in _rows(tmp_path / "tokens", 0)}
    assert len(left) == 28
    assert not left & set(gone)


def test_a_picture_that_is_no_jpeg_is_named(learned: Learned, tmp_path: Path) -> None:
    """The bytes are those of the receipt: it was committed like this."""
    pairs = tmp_path / "pairs"
    write_pair_shard(pairs, 0, list(range(40)), damaged=17)
    start_tokens(str(pairs), str(learned.tokenizer), str(tmp_path / "tokens"), TOKENS)
    (task,) = pending_tasks(str(pairs), str(tmp_path / "tokens"), TOKENS)
    with pytest.raises(DamagedArtifact, match=f"picture {17:032x}"):
        tokenize_shard(task, threads=2)
    assert read_receipts(open_store(str(tmp_path / "tokens"))) == {}


@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_ahead_gives_the_bytes_of_a_plain_loop(learned: Learned, threads: int, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    write_pair_shard(pairs, 0, list(range(300)))
    start_tokens(str(pairs), str(learned.tokenizer), str(tmp_path / "tokens"), TOKENS)
    (task,) = pending_tasks(str(pairs), str(tmp_path / "tokens"), TOKENS)
    tokenize_shard(task, threads)
    dvae, _ = load_tokenizer(str(learned.tokenizer))
    tar = (pairs / read_receipts(open_store(str(pairs)))[0].files["tar"].key).read_bytes()
    crops, codes = [], []
    for row in _rows(pairs, 0):
        if row["status"] == "success":
            picture = decode_stored(tar[row["tar_offset"] :][: row["jpg_size"]])  # type: ignore[misc]
            for k in range(2):
                rng = np.random.default_rng(derived_seed("crop", 0, str(row["uid"]), k))
                crops.append((row["uid"], k, transformer_crop(picture, 16, rng, crop=True)[0]))
    for first in range(0, len(crops), ENCODE_BATCH):
        codes += dvae.encode(
            images_of(np.stack([pixels for *_, pixels in crops[first : first + ENCODE_BATCH]]))
        ).tolist()
    wanted = {(uid, k): line for (uid, k, _), line in zip(crops, codes, strict=True)}
    assert {(row["uid"], row["k"]): row["codes"] for row in _rows(tmp_path / "tokens", 0)} == wanted
    assert len(wanted) == 480


def test_what_is_ahead_is_in_order_and_bounded() -> None:
    begun = taken = most = 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        time.sleep(0.001 * (number % 3))
        return number

    made = []
    for number in ahead(work, range(100), threads=4, limit=6):
        time.sleep(0.002)
        made.append(number)
        with lock:
            taken += 1
    assert made == list(range(100))
    assert 4 <= most <= 6 + 1, "the limit, and the one that is in the hands of the taker"


def test_what_fails_ahead_is_raised_in_its_turn_and_nothing_more_begins() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise ValueError("number 5")
        return number

    made: list[int] = []
    with pytest.raises(ValueError, match="number 5"):
        made.extend(ahead(work, range(1000), threads=2, limit=4))
    assert made == [0, 1, 2, 3, 4]
    assert max(begun) < 10


@pytest.mark.cluster
def test_on_ray_the_bytes_are_the_same(ray_cluster: None, learned: Learned, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    start_tokens(str(learned.pairs), str(learned.tokenizer), str(tokens), TOKENS)
    outcomes = list(tokenize(str(tokens), pending_tasks(str(learned.pairs), str(tokens), TOKENS), Encoders()))
    assert sorted((outcome.shard, outcome.state) for outcome in outcomes) == [(0, "committed"), (1, "committed")]
    mine, its = (read_receipts(open_store(str(stage))) for stage in (tokens, learned.tokens))
    assert {n: receipt.files for n, receipt in mine.items()} == {n: receipt.files for n, receipt in its.items()}


def _long_shards(tmp_path: Path, tokenizer: Path, shards: int = 4, rows: int = 600) -> list[TokenizeTask]:
    pairs = tmp_path / "pairs"
    for shard in range(shards):
        write_pair_shard(pairs, shard, list(range(shard * rows, (shard + 1) * rows)))
    start_tokens(str(pairs), str(tokenizer), str(tmp_path / "tokens"), TOKENS)
    return pending_tasks(str(pairs), str(tmp_path / "tokens"), TOKENS)


def _attempts(tokens: Path) -> list[dict[str, Any]]:
    store = open_store(str(tokens))
    return [read_attempt(store, name) for name in list_attempts(store)]


@pytest.mark.cluster
def test_a_killed_actor_costs_its_open_shard_and_nothing_else(
    ray_cluster: None, learned: Learned, tmp_path: Path
) -> None:
    tasks, tokens = _long_shards(tmp_path, learned.tokenizer), tmp_path / "tokens"
    killed: list[tuple[int, int]] = []

    def kill_one() -> None:
        """Stops the first worker that is at a shard, makes sure that it has not committed, and kills it."""
        until_s = time.monotonic() + 60
        while not killed and time.monotonic() < until_s:
            for record in _attempts(tokens):
                if record["state"] == "running":
                    os.kill(record["pid"], signal.SIGSTOP)
                    if read_receipts(open_store(str(tokens))).get(record["shard"]) is None:
                        killed.append((record["shard"], record["pid"]))
                        os.kill(record["pid"], signal.SIGKILL)
                        return
                    os.kill(record["pid"], signal.SIGCONT)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcomes = {outcome.shard: outcome for outcome in tokenize(str(tokens), tasks, Encoders(actors=2, threads=1))}
    killer.join()
    ((shard, pid),) = killed
    assert {n: (outcome.state, outcome.deaths) for n, outcome in outcomes.items()} == {
        n: ("committed", int(n == shard)) for n in range(4)
    }
    attempts = _attempts(tokens)
    assert [(record["shard"], record["pid"]) for record in attempts if record["state"] == "died"] == [(shard, pid)]
    assert sorted(record["shard"] for record in attempts if record["state"] == "committed") == [0, 1, 2, 3]
    assert len(attempts) == 5, "the other actor's shards were begun once"
    assert tokenize_here(tmp_path / "pairs", learned.tokenizer, tmp_path / "plain") == ["committed"] * 4
    plain, ours = (read_receipts(open_store(str(stage))) for stage in (tmp_path / "plain", tokens))
    assert {n: receipt.files for n, receipt in ours.items()} == {n: receipt.files for n, receipt in plain.items()}


@pytest.mark.cluster
def test_a_run_that_is_stopped_says_that_its_shards_were_interrupted(
    ray_cluster: None, learned: Learned, tmp_path: Path
) -> None:
    tasks, tokens = _long_shards(tmp_path, learned.tokenizer), tmp_path / "tokens"
    outcomes = tokenize(str(tokens), tasks, Encoders(actors=1, threads=1))
    first = next(outcomes)
    while not any(record["state"] == "running" for record in _attempts(tokens)):
        time.sleep(0.005)
    outcomes.close()  # type: ignore[attr-defined]
    states = {record["shard"]: record["state"] for record in _attempts(tokens)}
    assert states.pop(first.shard) == "committed"
    assert list(states.values()) == ["interrupted"]


@pytest.mark.cluster
def test_as_many_actors_as_the_nodes_hold_and_never_more_than_shards(ray_cluster: None) -> None:
    """Of a Ray of two CPUs."""
    assert workers_for(Encoders(), shards=10) == (1, 2)
    assert workers_for(Encoders(threads=1), shards=10) == (2, 1)
    assert workers_for(Encoders(threads=1), shards=1) == (1, 1)
    assert workers_for(Encoders(threads=1, actors=5), shards=10) == (5, 1), "a cluster may grow"
    with pytest.raises(UsageError, match="a CPU and 3 CPUs for an actor"):
        workers_for(Encoders(threads=3), shards=10)


@pytest.mark.cluster
def test_gpus_that_are_not_there_are_refused_in_words(ray_cluster: None, learned: Learned, tmp_path: Path) -> None:
    tasks = _long_shards(tmp_path, learned.tokenizer, 1, 5)
    with pytest.raises(UsageError, match="No node of the connected Ray has a GPU"):
        next(tokenize(str(tmp_path / "tokens"), tasks, Encoders(gpu=True)))
