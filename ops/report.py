"""report.html: what a run did, what came of it, and what to do next, read from a RUN as it stands.

Lives here: what concerns the run as a whole. The stages' parts are ops/report_stages.py, the page ops/report_page.py.
May not live here: computing a score, drawing a sheet.
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any

from infra.store import Store, absolute, join, open_store
from ops.charts import number
from ops.errors import UsageError
from ops.funnel import evenly
from ops.recipes import RECIPE, read_json
from ops.report_page import Changed, ReportData, Section, Sheet, Step, Table, render, shown_value
from ops.report_stages import (
    SETTINGS,
    TOKENIZER,
    TRANSFORMER,
    Part,
    Problems,
    Say,
    codes_part,
    pairs_part,
    planned_lists,
    preset_of,
    read_picture,
    training_part,
)
from ops.run_record import read_run
from ops.snapshot import SNAPSHOT, read_snapshot, source_fingerprint
from ops.trained import latest_checkpoint, tokenizer_digest

REPORT = "report.html"
SUMMARY = "summary.json"
PICTURES_AT_MOST = 12
PROMPTS_AT_MOST = 4
"""More prompts than this are counted under a sheet, not listed: they stand in the sheet itself."""
PROGRESS_S = 5.0


def write_run_report(run: str) -> str:
    """Reads RUN as it stands, writes RUN/report.html, returns where that is. Raises UsageError if there is no run.

    Says on stderr what it reads, each five seconds.
    """
    with _progress() as say:
        data = report_of_run(run, say)
        say("writing")
        open_store(run).put(REPORT, render(data).encode(), if_absent=False)
    return join(run, REPORT)


def report_of_run(run: str, say: Say = lambda what: None) -> ReportData:
    """What a RUN tells, finished or not; what can't be read becomes a line.

    Scores, a licence line (`licence`) and the kind of run (`title`) come from summary.json where there is one.
    Raises UsageError for a place without any stage.
    """
    store, problems = open_store(run), Problems()
    if store.stat(RECIPE) is not None:
        stage = (problems.tried(RECIPE, read_json, store, RECIPE) or {}).get("stage", "unknown")
        raise UsageError(f"{run} is a stage ({stage}), not a run.", "Name the directory above: armchair report RUN")
    stages = [
        pairs_part(run, say),
        training_part(run, TOKENIZER),
        codes_part(run, say),
        training_part(run, TRANSFORMER),
    ]
    say("the run")
    summary = problems.tried(SUMMARY, _json, store, SUMMARY) or {}
    pictures = _pictures_section(store, problems)
    if all(part.section is None for part in stages) and pictures is None:
        raise UsageError(f"{run} holds no run.", "`armchair build LIST --into RUN` or `armchair demo` makes one.")
    there = [
        pictures,
        *(part.section for part in stages),
        problems.tried(SUMMARY, _scores_section, summary),
        _settings_section(run),
        _lineage_section(run, summary),
    ]
    sections = [section for section in there if section is not None]
    if problems.lines:
        sections[0] = replace(sections[0], problems=[*problems.lines, *sections[0].problems])
    return ReportData(
        title=str(summary.get("title", f"armchair · {_name(run)}")),
        summary=_lead(summary),
        sections=sections,
        stages=[part.stage for part in stages],
        steps=_steps(run, stages, sections),
        licence=str(summary.get("licence", "")),
    )


@contextmanager
def _progress() -> Iterator[Say]:
    """`say(what)`: what is being read is printed on stderr each five seconds, and never if all takes less."""
    ended, now = threading.Event(), [""]

    def tell() -> None:
        while not ended.wait(PROGRESS_S):
            sys.stderr.write(f"report: {now[0]}\n")
            sys.stderr.flush()

    thread = threading.Thread(target=tell, name="report", daemon=True)
    thread.start()
    try:
        yield lambda what: now.__setitem__(0, what)
    finally:
        ended.set()
        thread.join()


def _name(run: str) -> str:
    """The last part of the place.

    >>> _name("s3://bucket/runs/demo/"), _name("/runs/demo")
    ('demo', 'demo')
    """
    return PurePosixPath(absolute(run).rstrip("/")).name or run


def _lead(summary: Mapping[str, Any]) -> str:
    parts = [f"Seed {summary['seed']}" if "seed" in summary else "", str(summary.get("device", ""))]
    for clock, name in (("wall", "wall time"), ("cpu", "CPU time")):
        seconds = _seconds(summary.get("seconds", {}), clock)
        if seconds:
            parts.append(f"{seconds / 60:.1f} min {name}")
    return " · ".join(part for part in parts if part)


def _seconds(value: Any, clock: str) -> float:
    """The sum over stages of {stage: {"wall", "cpu"}}; a stage named "total" is that sum already."""
    stages = value if isinstance(value, dict) else {}
    of_stages = {name: part[clock] for name, part in stages.items() if isinstance(part, dict) and clock in part}
    return float(of_stages.get("total", sum(of_stages.values())))


# --- what to do next -------------------------------------------------------------------------------------------------


def _steps(run: str, stages: Sequence[Part], sections: Sequence[Section]) -> list[Step]:
    """What is unfinished, in the order of the stages; then what can be done with what is there."""
    steps: list[Step] = []
    for part in stages:
        steps += part.steps
        if part.stage.state != "done":
            break  # the stages after it wait for this one
    if stages[-1].stage.share:
        steps.append(Step("Draw something:", f'armchair generate {shlex.quote(join(run, "model"))} "a prompt" -n 9'))
    lines = list(dict.fromkeys(line for section in sections for mark in section.marks for line in mark.settings))
    if lines and all(part.stage.state == "done" for part in stages):
        sets = " ".join(f"--set {shlex.quote(line)}" for line in lines)
        steps.append(Step("Try what the marks above suggest, one or all, and compare:", _again(run, lines, sets)))
    return steps


def _again(run: str, lines: Sequence[str], sets: str) -> str:
    """The command that trains again with other settings, beside this run or from its codes."""
    if all(line.startswith("transformer") for line in lines):
        into = shlex.quote(join(run, "model-2"))
        return f"armchair train transformer {shlex.quote(join(run, 'tokens'))} --into {into}{preset_of(run)} {sets}"
    lists = " ".join(map(shlex.quote, planned_lists(open_store(join(run, "pairs"))))) or "LIST"
    return f"armchair build {lists} --into {shlex.quote(run.rstrip('/') + '-2')}{preset_of(run)} {sets}"


# --- pictures and scores ---------------------------------------------------------------------------------------------


def _pictures_section(store: Store, problems: Problems) -> Section | None:
    # Sheets only: the single pictures of a prompt lie one directory deeper.
    keys = [e.key for e in store.list("pictures/") if e.key.endswith(".png") and e.key.count("/") == 1]
    if not keys:
        return None
    sheets = []
    for key in evenly(keys, PICTURES_AT_MOST):
        beside = problems.tried(key, _json, store, key.removesuffix(".png") + ".json") or {}
        picture = problems.tried(key, read_picture, store, key)
        if picture:
            sheets.append(Sheet(_picture_caption(key, beside), picture))
    left_out = f" {len(keys) - PICTURES_AT_MOST} more lie in pictures/." if len(keys) > PICTURES_AT_MOST else ""
    return Section("Pictures from prompts", f"Drawn by the transformer, code by code.{left_out}", sheets=sheets)


def _picture_caption(key: str, beside: Mapping[str, Any]) -> str:
    prompts = list(dict.fromkeys(map(str, beside.get("prompts") or filter(None, [beside.get("prompt")]))))
    told = " · ".join(prompts) if len(prompts) <= PROMPTS_AT_MOST else f"{len(prompts)} prompts"
    parts = [PurePosixPath(key).stem.replace("-", " ").replace("_", " "), told]
    if "seed" in beside:
        parts.append(f"seed {beside['seed']}")
    return ". ".join(part for part in parts if part)


def _scores_section(summary: Mapping[str, Any]) -> Section | None:
    parts = {name: value for name, value in summary.items() if isinstance(value, dict) and name != "pairs"}
    if not parts:
        return None
    tables = [
        Table(name, ("", ""), _flat(value), is_folded=name in ("seconds", "retrieval")) for name, value in parts.items()
    ]
    return Section("Scores", "From summary.json.", tables=tables)


def _flat(value: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, part in value.items():
        label = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(part, dict):
            rows += _flat(part, f"{label} · ")
        else:
            is_number = isinstance(part, int | float) and not isinstance(part, bool)
            rows.append((label, number(part) if is_number else str(part)))
    return rows


# --- how it was made -------------------------------------------------------------------------------------------------


def default_settings() -> dict[str, dict[str, Any]]:
    """Section -> name -> default, of the settings that recipes hold; as JSON would give them back."""
    from models.dvae import DvaeSettings
    from models.transformer import TransformerSettings
    from ops.filters import FilterSettings
    from ops.jobs import TokenizerTrainSettings, TransformerTrainSettings
    from ops.pictures import PictureSettings
    from ops.plan import PlanSettings
    from ops.tokenize import TokensSettings

    sections: dict[str, Any] = {
        "plan": PlanSettings(),
        "filters": FilterSettings(),
        "picture": PictureSettings(),
        "dvae": DvaeSettings(),
        "tokenizer_training": TokenizerTrainSettings(),
        "tokens": TokensSettings(),
        "transformer": TransformerSettings(),
        "transformer_training": TransformerTrainSettings(),
    }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps({name: asdict(value) for name, value in sections.items()}))
    return plain


def _settings_section(run: str) -> Section | None:
    """What differs from the defaults, from the recipes of the stages; then the whole settings.toml, folded."""
    problems, defaults = Problems(), default_settings()
    changed: dict[str, list[Changed]] = {}
    is_any = False
    for stage in ("pairs", "tokenizer", "tokens", "model"):
        store = open_store(join(run, stage))
        if store.stat(RECIPE) is None:
            continue
        is_any = True
        identity: dict[str, Any] = (problems.tried(f"{stage}/{RECIPE}", read_json, store, RECIPE) or {}).get(
            "identity", {}
        )
        for name, values in identity.items():
            usual = defaults.get(name, {})
            differing = [
                Changed(field, shown_value(value), shown_value(usual.get(field)))
                for field, value in values.items()
                if value != usual.get(field)
            ]
            if differing:
                changed[name] = differing
    text = problems.tried(SETTINGS, _text, open_store(run), SETTINGS) or ""
    if not is_any and not text:
        return None
    told = "What was set otherwise than by default (in brackets), of what decides the outcome. "
    told += "The defaults are the sizes of the paper." if changed else "Here: nothing."
    folded = {"Every setting of this run (settings.toml)": text} if text else None
    return Section("Settings", told, problems.lines, changed=changed, folded=folded)


def _lineage_section(run: str, summary: Mapping[str, Any]) -> Section | None:
    """What was made from what, by digests; versions and machines."""
    problems = Problems()
    stores = {name: open_store(join(run, name)) for name in ("pairs", "tokenizer", "tokens", "model")}
    recipes = {
        name: problems.tried(f"{name}/{RECIPE}", read_json, store, RECIPE) or {}
        for name, store in stores.items()
        if store.stat(RECIPE) is not None
    }
    if not recipes:
        return None
    rows: list[tuple[str, str, str]] = []
    if "pairs" in recipes:
        rows.append(("pairs", _short(problems.tried("pairs", source_fingerprint, stores["pairs"])), "lists"))
    tokenizer: str | None = None
    if "tokenizer" in recipes:
        tokenizer = problems.tried("tokenizer", _model_digest, stores["tokenizer"])
        rows += _snapshot_rows("tokenizer", stores["tokenizer"], "pairs", problems)
        rows.append(("tokenizer", _short(tokenizer), "its snapshot"))
    if "tokens" in recipes:
        made_by = problems.tried("tokens/tokenizer", tokenizer_digest, join(run, "tokens"))
        rows.append(("codes", f"by {_short(made_by)}", _same(made_by, tokenizer)))
    if "model" in recipes:
        decoder = problems.tried("model/tokenizer", tokenizer_digest, join(run, "model"))
        rows += _snapshot_rows("model", stores["model"], "codes", problems)
        rows.append(("decoder of the model", _short(decoder), _same(decoder, tokenizer)))
        rows.append(("model", _short(problems.tried("model", _model_digest, stores["model"])), "its snapshot"))
    tables = [Table("Made from", ("what", "digest", "from"), rows), *_versions(recipes, stores, summary, problems)]
    text = "Each part names by digest what it was made from, so that no part can be exchanged in silence."
    return Section("Lineage", text, problems.lines, tables=tables)


def _same(found: str | None, tokenizer: str | None) -> str:
    if not found or not tokenizer:
        return "a tokenizer"
    return "this tokenizer" if found == tokenizer else "another tokenizer than the one here"


def _model_digest(store: Store) -> str:
    checkpoint = latest_checkpoint(store)
    return checkpoint.digest if checkpoint else ""


def _snapshot_rows(name: str, store: Store, source: str, problems: Problems) -> list[tuple[str, str, str]]:
    if store.stat(SNAPSHOT) is None:
        return []
    snapshot = problems.tried(f"{name}/{SNAPSHOT}", read_snapshot, store)
    if snapshot is None:
        return []
    told = f"{source}: {snapshot.rows():,} to train on, {snapshot.rows('held_out'):,} held out"
    return [(f"snapshot of the {name}", _short(snapshot.digest), told)]


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "unknown"


def _versions(
    recipes: Mapping[str, Any], stores: Mapping[str, Store], summary: Mapping[str, Any], problems: Problems
) -> list[Table]:
    """Versions of code and libraries, one line each unless stages differ; and the machines that trained."""
    rows: list[tuple[str, str]] = [("device", str(summary["device"]))] if "device" in summary else []
    by_name: dict[str, dict[str, list[str]]] = {}
    for stage, recipe in recipes.items():
        for name, version in recipe.get("versions", {}).items():
            by_name.setdefault(name, {}).setdefault(version, []).append(stage)
    for name, versions in by_name.items():
        for version, stages in versions.items():
            rows.append((name if len(versions) == 1 else f"{name} ({', '.join(stages)})", version))
    for stage in ("tokenizer", "model"):
        record = problems.tried(f"{stage}/runs", read_run, stores[stage]) or {}
        if record.get("host"):
            rows.append((f"machine that trained the {stage}", str(record["host"])))
    return [Table("Versions and machines", ("", ""), rows)] if rows else []


def _text(store: Store, key: str) -> str:
    try:
        return store.read(key).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _json(store: Store, key: str) -> dict[str, Any]:
    text = _text(store, key)
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}
