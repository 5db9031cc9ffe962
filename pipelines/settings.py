"""All settings of all stages in one value: defaults < presets < `--set`, layers in one language (TOML).

Each section is born beside the code that uses it. Only this file reads TOML; below pipelines/ nobody sees the whole.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from infra.store import ObjectPath, object_path
from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.transformer import TransformerSettings
from ops.errors import BadSetting, UsageError
from ops.fetch import FetchSettings
from ops.filters import FilterSettings
from ops.ingest import OutageSettings
from ops.jobs import TokenizerTrainSettings, TransformerTrainSettings
from ops.pictures import PictureSettings
from ops.plan import PlanSettings
from ops.tokenize import TokensSettings

PRESETS = Path(__file__).parent / "presets"
Presets = str | Sequence[str] | None
"""The presets of a command: one, several, or none."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class DemoSettings:
    """What `armchair demo` shows."""

    pictures: Literal["core", "all"] = "core"
    """Pairs that the transformer trains on: about 1,000 (`core`), or every pair of OpenMoji (`all`; takes longer)."""

    gates: bool = True
    """Whether a score below its gate (ops/demo_summary.py) ends the command with exit code 1."""

    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of torch in a training. The same number gives the same pictures, whatever the number of cores."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Settings:
    """Every section. The defaults are the paper's sizes; presets hold what fits a machine."""

    plan: PlanSettings = Field(default_factory=PlanSettings)
    """How lists become work orders."""
    fetch: FetchSettings = Field(default_factory=FetchSettings)
    """How pictures are asked for."""
    filters: FilterSettings = Field(default_factory=FilterSettings)
    """Which pairs are wanted."""
    picture: PictureSettings = Field(default_factory=PictureSettings)
    """How pictures are stored."""
    outage: OutageSettings = Field(default_factory=OutageSettings)
    """When a shard is put off instead of committed."""
    dvae: DvaeSettings = Field(default_factory=DvaeSettings)
    """The discrete VAE and its loss."""
    tokenizer_training: TokenizerTrainSettings = Field(default_factory=TokenizerTrainSettings)
    """How the dVAE is trained."""
    tokens: TokensSettings = Field(default_factory=TokensSettings)
    """How pictures become codes."""
    transformer: TransformerSettings = Field(default_factory=TransformerSettings)
    """The transformer over text and codes."""
    transformer_training: TransformerTrainSettings = Field(default_factory=TransformerTrainSettings)
    """How the transformer is trained."""
    sampling: SampleSettings = Field(default_factory=SampleSettings)
    """How codes are drawn from the transformer."""
    demo: DemoSettings = Field(default_factory=DemoSettings)
    """What `armchair demo` shows."""


ADAPTER = TypeAdapter(Settings)


@plain_dataclass(frozen=True)
class SettingRow:
    """One line of `armchair settings`: dotted path, value, its doc, and the layer that it came from."""

    path: str
    value: Any
    doc: str
    layer: str


def resolve(presets: Presets = (), sets: Sequence[str] = ()) -> Settings:
    """The settings of a command. A preset is a name in presets/ or a TOML file, `sets` are `path=value` lines.

    Of several presets the later goes over the earlier. Raises BadSetting with the dotted path, the layer it came from,
    and the nearest name.
    """
    merged, layers = _merge(presets, sets)
    try:
        return ADAPTER.validate_python(merged)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise BadSetting(path, _layer_of(path, layers), _explain(path, first)) from None


def rows(presets: Presets = (), sets: Sequence[str] = ()) -> Iterator[SettingRow]:
    """Every setting with its value, its doc and its layer, in the order of the sections."""
    _, layers = _merge(presets, sets)
    settings = resolve(presets, sets)
    for section in fields(Settings):
        value = getattr(settings, section.name)
        for field in fields(value):
            path = f"{section.name}.{field.name}"
            yield SettingRow(path, getattr(value, field.name), _doc(type(value), field.name), _layer_of(path, layers))


def to_toml(settings: Settings) -> str:
    """The resolved settings as TOML, each with its doc as a comment: `--preset FILE` repeats the run."""
    out = []
    for section in fields(Settings):
        value = getattr(settings, section.name)
        out.append(f"\n[{section.name}]")
        for field in fields(value):
            out.append(f"# {_doc(type(value), field.name)}")
            item = getattr(value, field.name)
            # TOML has no null: a value that is None by default is left out.
            out.append(f"# {field.name} is not set" if item is None else f"{field.name} = {_toml_value(item)}")
    return "\n".join(out).lstrip() + "\n"


def _doc(section: type, name: str) -> str:
    # pydantic reads docstrings from a class's own source: those of an inherited field stand in its base.
    for owner in section.__mro__:
        known: dict[str, FieldInfo] = vars(owner).get("__pydantic_fields__", {})
        if name in known and known[name].description:
            return " ".join((known[name].description or "").split())
    return ""


def _toml_value(value: Any) -> str:
    if is_dataclass(value):
        raise TypeError(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # numbers, booleans and strings read alike in JSON and TOML


def _merge(presets: Presets, sets: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    merged: dict[str, Any] = {}
    layers: dict[str, str] = {}
    for preset in [presets] if isinstance(presets, str) else presets or ():
        name, content = _read_preset(preset)
        _overlay(merged, content, name, layers)
    for line in sets:
        _overlay(merged, _parse_set(line), f"--set {line}", layers)
    return merged, layers


def _read_preset(preset: str) -> tuple[str, dict[str, Any]]:
    path: Path | ObjectPath = PRESETS / f"{preset}.toml"
    if not path.is_file():
        path = object_path(preset) if "://" in preset else Path(preset)
    if not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.toml"))
        near = difflib.get_close_matches(preset, names, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no preset {preset!r}.", f"{hint}Presets: {', '.join(names)}, or a TOML file.")
    try:
        return f"preset {path.name}", tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.", "Correct the file.") from None


def _parse_set(line: str) -> dict[str, Any]:
    key, equals, value = line.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {line}: a setting reads path=value,", "for example --set dvae.vocabulary=512")
    try:
        return tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        # A bare word is meant as a string: quoting it for the shell and for TOML is one quoting too many.
        try:
            return tomllib.loads(f"{key} = {json.dumps(value.strip())}")
        except tomllib.TOMLDecodeError:
            raise UsageError(f"--set {line}: {key.strip()!r} is no dotted path.", "Example: dvae.vocabulary") from None


def _overlay(under: dict[str, Any], over: dict[str, Any], layer: str, layers: dict[str, str], prefix: str = "") -> None:
    for key, value in over.items():
        path = f"{prefix}{key}"
        # Only sections are merged; a table that is a value (`where`) is replaced as a whole.
        if isinstance(value, dict) and not prefix:
            _overlay(under.setdefault(key, {}), value, layer, layers, f"{path}.")
        else:
            under[key] = value
            layers[path] = layer


def _layer_of(path: str, layers: dict[str, str]) -> str:
    while path:
        if path in layers:
            return layers[path]
        path = path.rpartition(".")[0]
    return "default"


def _explain(path: str, error: Any) -> str:
    if error["type"] != "unexpected_keyword_argument":
        shown = json.dumps(error.get("input"), default=str)
        return f"{error['msg'].lower()}, not {shown}"
    section = path.rpartition(".")[0]
    known = [f"{s.name}.{f.name}" for s in fields(Settings) for f in _section_fields(s.name)]
    candidates = known if section else [f.name for f in fields(Settings)]
    near = difflib.get_close_matches(path, candidates, n=1, cutoff=0.5)
    if not near and section:  # right name, wrong section
        name = path.rpartition(".")[2]
        near = [p for p in known if p.rpartition(".")[2] == name][:1]
    return "there is no such setting" + (f"; did you mean {near[0]}?" if near else "")


def _section_fields(name: str) -> Any:
    return fields(Settings.__pydantic_fields__[name].default_factory)  # type: ignore[attr-defined, arg-type]
