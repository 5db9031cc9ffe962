from __future__ import annotations

import tomllib
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from models.dvae import Dvae
from models.transformer import Transformer
from ops.errors import BadSetting, UsageError
from ops.filters import judge_captions, judge_file, judge_header
from ops.pictures import Header
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


def test_of_several_presets_the_later_goes_over_the_earlier_and_layers_tell_which() -> None:
    both = resolve(["demo", "datacomp"])
    assert both.dvae == resolve("demo").dvae
    assert (both.filters.min_caption_chars, both.filters.min_side_px, both.filters.max_aspect) == (6, 200, 3)
    assert resolve(["datacomp", "demo"]).filters.min_side_px == 64
    layers = {row.path: row.layer for row in rows(["demo", "datacomp"], ["filters.max_aspect=4"])}
    assert layers["dvae.vocabulary"] == "preset demo.toml"
    assert layers["filters.min_side_px"] == "preset datacomp.toml"
    assert layers["filters.max_aspect"] == "--set filters.max_aspect=4"


PAIRS = {  # caption, bytes, width and height -> the presets that keep it
    ("a red apple on a wooden table", 20_000, 640, 480): {"paper", "laion", "datacomp"},
    ("Apfelkuchen mit Streuseln und Sahne", 20_000, 640, 480): set(),
    ("the children play football", 4_999, 640, 480): {"paper", "datacomp"},
    ("the children play football", 20_000, 900, 300): {"laion", "datacomp"},
    ("the children play football", 20_000, 3_000, 300): {"laion"},
    ("photo taken on the 12th of May 2014", 20_000, 640, 480): {"laion", "datacomp"},
    ("wedding", 20_000, 640, 480): set(),  # CLD3: probably Xhosa
    ("the", 20_000, 640, 480): {"paper"},
}


@pytest.mark.parametrize("preset", ["paper", "laion", "datacomp"])
def test_a_preset_of_filters_keeps_what_its_source_keeps(preset: str) -> None:
    filters = resolve(["tiny", preset]).filters
    kept = [
        pair
        for pair in PAIRS
        if judge_captions([pair[0]], filters).reasons == [None]
        and judge_file(pair[1], filters) is judge_header(Header("jpeg", pair[2], pair[3]), filters) is None
    ]
    assert kept == [pair for pair, keepers in PAIRS.items() if preset in keepers]


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


@pytest.mark.parametrize("preset", ["gpu", "dalle-12b"])
def test_a_preset_that_nobody_ran_yet_is_written_out_in_full(preset: str) -> None:
    """A default that is tuned on small machines must not reach a run of weeks."""
    written = tomllib.loads((PRESETS / f"{preset}.toml").read_text())
    of_place = {"fetch", "outage", "demo"}
    of_progress = {"keep_checkpoints", "log_every", "evaluate_pictures", "where", "prompts"}
    for name, values in asdict(resolve(preset)).items():
        decides = {key for key, value in values.items() if value is not None} - of_progress
        assert name in of_place or set(written[name]) == decides, name


def test_the_papers_preset_has_the_published_parameters_item_by_item() -> None:
    """MODELS.md §2, in millions: the paper's 12 billion, and beside them what ours adds."""
    settings = resolve("dalle-12b")
    with torch.device("meta"):
        dvae, transformer = Dvae(settings.dvae), Transformer(settings.transformer)
    counted = {name: p.numel() / 1e6 for name, p in transformer.named_parameters() if not name.startswith("blocks.")}
    published = {"tokens.weight": 65.0, "codes.weight": 32.5, "text_positions_TD": 1.0}
    added = {"rows_hD": 0.13, "columns_wD": 0.13, "pads_TD": 1.0, "text_head.weight": 65.0, "image_head.weight": 32.5}
    assert {name: round(counted[name], 1) for name in published} == published
    assert round(sum(counted[name] for name in published), 1) == 98.5
    assert {name: round(counted[name], 2 if value < 1 else 1) for name, value in added.items()} == added
    assert set(counted) - set(published) - set(added) == {"norm.weight", "norm.bias"}
    matrices = sum(p.numel() for p in transformer.blocks.parameters() if p.dim() == 2)
    assert matrices == 12 * 64 * 3968**2  # 12.09 billion
    assert settings.transformer.width == 3968 == settings.transformer.heads * 64
    halves = [sum(p.numel() for p in part.parameters()) for part in (dvae.encoder, dvae.decoder)]
    assert [round(half / 1e6, 1) for half in halves] == [53.8, 43.8]
