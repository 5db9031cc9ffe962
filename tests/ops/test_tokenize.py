from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from infra.store import open_store
from ops.errors import DamagedArtifact, RecipeChanged, UsageError
from ops.learning import images_of
from ops.pictures import decode_stored, tokenizer_crop, transformer_crop
from ops.seeds import derived_seed
from ops.shards import read_receipt, read_receipts
from ops.tokenize import Encoders, TokensSettings, pending_tasks, start_tokens, tokenize, tokenize_shard
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


@pytest.mark.cluster
def test_on_ray_the_bytes_are_the_same(ray_cluster: None, learned: Learned, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    start_tokens(str(learned.pairs), str(learned.tokenizer), str(tokens), TOKENS)
    outcomes = list(tokenize(str(tokens), pending_tasks(str(learned.pairs), str(tokens), TOKENS), Encoders()))
    assert sorted((outcome.shard, outcome.state) for outcome in outcomes) == [(0, "committed"), (1, "committed")]
    mine, its = (read_receipts(open_store(str(stage))) for stage in (tokens, learned.tokens))
    assert {n: receipt.files for n, receipt in mine.items()} == {n: receipt.files for n, receipt in its.items()}
