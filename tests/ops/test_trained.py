from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from infra.store import open_store
from ops.errors import DamagedArtifact, UnknownFormat, UsageError
from ops.trained import (
    forget_after,
    freeze_tokenizer,
    latest_checkpoint,
    load_tokenizer,
    load_transformer,
    load_weights,
    save_weights,
    tokenizer_digest,
    write_checkpoint,
)
from tests.ops.conftest import Learned
from tests.small_runs import DVAE, TRANSFORMER


def test_a_step_without_its_receipt_is_no_checkpoint(learned: Learned, tmp_path: Path) -> None:
    stage = shutil.copytree(learned.tokenizer, tmp_path / "stage")
    assert latest_checkpoint(open_store(str(stage))).step == 20  # type: ignore[union-attr]
    (stage / "steps" / "0000020" / "receipt.json").unlink()
    assert latest_checkpoint(open_store(str(stage))).step == 10  # type: ignore[union-attr]
    (stage / "steps" / "0000010" / "receipt.json").unlink()
    assert latest_checkpoint(open_store(str(stage))) is None
    with pytest.raises(UsageError, match="no checkpoint yet"):
        load_tokenizer(str(stage))


def test_a_checkpoint_names_its_files_and_the_averaged_weights_are_the_model(learned: Learned) -> None:
    checkpoint = latest_checkpoint(open_store(str(learned.model)))
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.cursor) == (20, 160)
    assert sorted(checkpoint.files) == ["model.safetensors", "part-0000-of-0001.safetensors"]
    for ref in checkpoint.files.values():
        data = (learned.model / ref.key).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (ref.bytes, ref.sha256)
    assert checkpoint.digest == checkpoint.files["model.safetensors"].sha256


def test_what_lies_past_a_checkpoint_is_forgotten(learned: Learned, tmp_path: Path) -> None:
    """A resume with another interval would write its rows under other names, beside those of the killed run."""
    stage = shutil.copytree(learned.tokenizer, tmp_path / "stage")
    word = stage / "steps" / "0000030" / "part-0001-of-0002.run-0003.json"
    word.parent.mkdir()
    word.write_text("{}")
    forget_after(open_store(str(stage)), 10)
    assert not word.exists()
    assert sorted(path.name for path in (stage / "metrics").iterdir()) == ["0000010.jsonl"]
    assert sorted(path.name for path in (stage / "sheets").iterdir()) == ["0000010.png"]


def test_the_receipt_is_put_after_everything_it_speaks_of(tmp_path: Path) -> None:
    class Recording(type(open_store(str(tmp_path)))):  # type: ignore[misc]
        keys: list[str] = []  # noqa: RUF012

        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            self.keys.append(key)
            return super().put(key, data, if_absent=if_absent)  # type: ignore[no-any-return]

    save_weights(tmp_path / "w", {"a": torch.ones(2)}, {})
    write_checkpoint(Recording(tmp_path / "stage"), 3, 30, {"model.safetensors": tmp_path / "w"}, [], b"png", keep=1)
    assert Recording.keys[-1] == "steps/0000003/receipt.json"
    assert len(Recording.keys) == 4


def test_equal_weights_give_equal_bytes_and_come_back_with_what_they_are_about(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2)}
    about = {"kind": "dvae", "settings": {"z": 1, "a": [1, 2]}}
    save_weights(tmp_path / "1", tensors, about)
    save_weights(tmp_path / "2", dict(reversed(tensors.items())), about)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    back, told = load_weights((tmp_path / "1").read_bytes(), "here")
    assert told == about
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_models_come_back_with_their_settings(learned: Learned) -> None:
    dvae, digest = load_tokenizer(str(learned.tokenizer))
    assert dvae.settings == DVAE
    assert digest == tokenizer_digest(str(learned.tokenizer))
    transformer, captions, recipe, _ = load_transformer(str(learned.model))
    assert transformer.settings == TRANSFORMER
    assert captions.decode(captions.encode(["a red square"], 8)[0]) == "a red square"
    assert recipe["inputs"]["tokenizer"] == digest
    assert not any(parameter.requires_grad for parameter in [*dvae.parameters(), *transformer.parameters()])


def test_tokens_and_model_carry_the_tokenizer_that_made_the_codes(learned: Learned) -> None:
    digests = {load_tokenizer(str(stage))[1] for stage in (learned.tokenizer, learned.tokens, learned.model)}
    assert len(digests) == 1


def test_a_frozen_tokenizer_stays_when_its_source_goes_on(learned: Learned, tmp_path: Path) -> None:
    source = shutil.copytree(learned.tokenizer, tmp_path / "source")
    into = open_store(str(tmp_path / "into"))
    digest = freeze_tokenizer(str(source), into)
    (source / "steps" / "0000020" / "receipt.json").unlink()  # another checkpoint is the latest now
    freeze_tokenizer(str(source), into)
    assert tokenizer_digest(into.location) == digest
    assert load_tokenizer(into.location)[1] == digest


@pytest.mark.parametrize("part", ["weights", "bpe", "frozen"])
def test_bytes_that_differ_from_the_receipt_are_not_loaded(learned: Learned, tmp_path: Path, part: str) -> None:
    stage = shutil.copytree(learned.model, tmp_path / "model")
    path = {
        "weights": next((stage / "steps" / "0000020").glob("model-*.safetensors")),
        "bpe": stage / "bpe.json",
        "frozen": next((stage / "tokenizer").glob("*.safetensors")),
    }[part]
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    load = load_tokenizer if part == "frozen" else load_transformer
    with pytest.raises(DamagedArtifact, match=path.name):
        load(str(stage))


def test_the_wrong_directory_is_named_in_words(learned: Learned, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is of the stage tokenizer, not transformer"):
        load_transformer(str(learned.tokenizer))
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_checkpoint_of_a_later_version_is_refused(learned: Learned, tmp_path: Path) -> None:
    stage = shutil.copytree(learned.tokenizer, tmp_path / "stage")
    receipt = stage / "steps" / "0000020" / "receipt.json"
    receipt.write_text(json.dumps(json.loads(receipt.read_bytes()) | {"format": 7}))
    with pytest.raises(UnknownFormat):
        latest_checkpoint(open_store(str(stage)))
