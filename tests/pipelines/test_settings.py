from __future__ import annotations

import tomllib
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from models.dvae import Dvae
from models.transformer import Transformer
from ops.errors import BadSetting, UsageError
from pipelines.settings import PRESETS, Settings, resolve, rows, to_toml

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


@pytest.mark.parametrize("preset", [None, *NAMES])
def test_the_resolved_settings_written_as_a_preset_give_themselves(preset: str | None, tmp_path: Path) -> None:
    settings = resolve(preset)
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings))
    assert resolve(str(path)) == settings


def test_a_set_goes_over_the_preset_and_the_preset_over_the_default() -> None:
    assert resolve().dvae.vocabulary == 8192
    assert resolve("demo").dvae.vocabulary == 256
    assert resolve("demo", ["dvae.vocabulary=512"]).dvae.vocabulary == 512
    layers = {row.path: row.layer for row in rows("demo", ["dvae.vocabulary=512"])}
    assert layers["dvae.vocabulary"] == "--set dvae.vocabulary=512"
    assert layers["dvae.beta"] == "preset demo.toml"
    assert layers["fetch.max_redirects"] == "default"


def test_a_bare_word_and_a_list_are_values() -> None:
    settings = resolve(None, ["transformer.attention=dense", 'fetch.allow_private=["127.0.0.0/8"]'])
    assert settings.transformer.attention == "dense"
    assert settings.fetch.allow_private == ("127.0.0.0/8",)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("dvae.vocabulery=512", "did you mean dvae.vocabulary?"),
        ("dvea.vocabulary=512", "did you mean dvae?"),
        ("filters.short_side_px=64", "did you mean picture.short_side_px?"),
        ("plan.pairs_per_shard=0", "plan.pairs_per_shard (--set plan.pairs_per_shard=0)"),
        ("transformer.attention=sparse", "'paper' or 'dense'"),
    ],
)
def test_a_wrong_setting_names_its_path_its_layer_and_its_neighbour(line: str, told: str) -> None:
    with pytest.raises(BadSetting) as caught:
        resolve(None, [line])
    assert told in str(caught.value)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"Did you mean demo\? Presets: .*tiny"):
        resolve("demoo")


def test_a_line_without_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match="path=value"):
        resolve(None, ["dvae.vocabulary"])


def test_every_setting_has_a_doc() -> None:
    undocumented = [row.path for row in rows() if not row.doc]
    assert not undocumented
    sections = Settings.__pydantic_fields__  # type: ignore[attr-defined]
    assert all(sections[field.name].description for field in fields(Settings))


def test_settings_toml_is_toml_a_person_can_read() -> None:
    text = to_toml(resolve("demo"))
    assert set(tomllib.loads(text)) == set(asdict(resolve("demo")))
    assert "# " in text


@pytest.mark.parametrize("preset", [None, *NAMES])
def test_every_presets_models_can_be_built_and_fit_each_other(preset: str | None) -> None:
    """On the meta device, where the paper's 12 billion parameters cost nothing."""
    settings = resolve(preset)
    with torch.device("meta"):
        tokenizer, transformer = Dvae(settings.dvae), Transformer(settings.transformer)
    assert (tokenizer.grid, tokenizer.vocabulary) == (settings.transformer.grid, settings.transformer.image_vocabulary)
    assert sum(p.numel() for p in transformer.parameters()) > 0
    assert settings.picture.short_side_px >= settings.dvae.image_size, "pictures are never enlarged"
