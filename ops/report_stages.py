"""What each stage of a run tells its report: a card, a section, and what to do next.

A stage that is not begun has a card that says so. A file that is damaged or missing becomes a line of the section, and
the rest is shown. May not live here: what concerns the run as a whole (ops/report.py), the page (ops/report_page.py).
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from PIL import Image

from infra.store import Store, join, open_store
from ops.charts import Chart, number
from ops.code_usage import TILES, CodeUsage, code_tiles, read_code_usage
from ops.errors import ArmchairError, UsageError
from ops.funnel import MEANINGS, Sampled, evenly, read_funnel
from ops.marks import Mark, evaluated_on, marks_of
from ops.plan import read_instalments
from ops.reasons import SUCCESS, Reason, is_transient, reason_class
from ops.recipes import RECIPE, read_json
from ops.report_page import Cause, Fact, Funnel, Section, Sheet, Stage, State, Step, percent
from ops.run_record import ALIVE_S, read_run
from ops.shards import Receipt, read_receipts
from ops.status import status
from ops.trained import Checkpoint, latest_checkpoint, read_metrics

T = TypeVar("T")
Say = Callable[[str], None]
DAMAGE = (ArmchairError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file that is damaged, missing or of another shape raises."""

SETTINGS = "settings.toml"
SHEETS_IN_STRIP = 8

TITLES = {
    "image_nats_per_code": ("Picture, nats a code", "lower is better; the right caption should lie lowest"),
    "information_gain_nats_per_code": ("What the caption tells, nats a code", "higher is better; 0 means unused"),
    "text_nats_per_token": ("Caption, nats a token", "lower is better"),
    "psnr_db": ("PSNR of reconstructions, dB", "higher is better"),
    "bits_per_dim": ("Bits a dimension, discretised", "lower is better"),
    "nats_per_dim": ("Distortion + β·KL, nats a dimension", "lower is better"),
    "perplexity": ("Perplexity of the codes", "higher is better: more codes carry the pictures"),
    "used_fraction": ("Share of the codebook in use", "higher is better"),
    "hard_minus_relaxed_nats_per_dim": ("Hard minus relaxed codes, nats a dimension", "near 0 is good"),
    "loss": ("Objective", "lower is better"),
    "distortion_nats": ("Distortion, nats a picture", "lower is better"),
    "kl_nats": ("KL, nats a picture", "the price of the codes; 0 means that they say nothing"),
    "usage": ("KL of the mean code use to uniform, nats", "lower is better"),
    "gradient_norm": ("Norm of the gradient", "steady is good"),
    "steps_per_s": ("Updates a second", "higher is better"),
    "waited_share": ("Share of time that waited for data", "lower is better"),
    "learning_rate": ("Learning rate", ""),
}
"""Charts in their order on the page: (title, which direction is good). Other numbers come after these, by name."""
MORE = {"loss", "distortion_nats", "kl_nats", "usage", "gradient_norm", "steps_per_s", "waited_share", "learning_rate"}
"""Folded, unless something is bad there."""
NOT_CHARTED = {
    "step", "kind", "pictures", "tau", "cpu_s", "tokens_per_s",
    "kl_nats_per_picture", "hard_nats_per_dim", "relaxed_nats_per_dim",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one stage gives to the report."""

    stage: Stage
    section: Section | None = None
    steps: Sequence[Step] = ()


@dataclass
class Problems:
    """Lines about what could not be read."""

    lines: list[str] = field(default_factory=list)

    def tried(self, what: str, read: Callable[..., T], *of: Any) -> T | None:
        """What `read(*of)` gives; None, and a line, if it is damaged or missing."""
        try:
            return read(*of)
        except DAMAGE as error:
            detail = str(error) if isinstance(error, ArmchairError | OSError) else f"{type(error).__name__}: {error}"
            self.lines.append(f"{what} can't be read. {detail}")
            return None


# --- pairs -----------------------------------------------------------------------------------------------------------


def pairs_part(run: str, say: Say) -> Part:
    """The funnel, its examples, the hosts that fail."""
    location, problems = join(run, "pairs"), Problems()
    state: State
    store = open_store(location)
    say("pairs: receipts")
    receipts = problems.tried("pairs/receipts", read_receipts, store) or {}
    told = problems.tried("pairs", _counts, store, receipts)
    if told is None or not told["pairs"]["planned"]:
        begins = f"armchair ingest LIST --into {shlex.quote(location)}"
        if not problems.lines and not _is_begun(store):
            return Part(
                Stage("Pairs", "not begun", "–", "pictures and captions"), None, [Step("Collect pairs:", begins)]
            )
        state = "damaged" if problems.lines else "unfinished"
        section = Section("Pairs", "Nothing is counted yet.", problems.lines)
        return Part(Stage("Pairs", state, "–", "nothing is counted"), section, [Step("Collect pairs:", begins)])
    pairs, shards = told["pairs"], told["shards"]
    sampled = problems.tried("pairs/data", read_funnel, store, receipts, say) or Sampled()
    problems.lines += sampled.problems
    steps = _pairs_steps(run, store, told, sampled)
    is_whole = shards["committed"] >= shards["planned"]
    text = "Each planned pair is kept, or has one reason why not."
    if not is_whole:
        text += f" {shards['planned'] - shards['committed']:,} of {shards['planned']:,} shards are not committed yet."
    facts = [
        Fact(
            "pairs kept", f"{pairs['kept']:,}", f"{percent(pairs['kept'] / pairs['planned'])} of {pairs['planned']:,}"
        ),
        Fact("shards committed", f"{shards['committed']:,}", f"of {shards['planned']:,}"),
        Fact("stored", f"{told['bytes'] / 1e6:,.1f} MB", "pictures and their tables"),
    ]
    section = Section("Pairs", text, problems.lines, facts, funnel=_funnel(pairs, sampled))
    share = shards["committed"] / max(1, shards["planned"])
    state = "done" if is_whole else "under way" if told["alive"] else "unfinished"
    note = f"kept of {pairs['planned']:,} planned"
    return Part(Stage("Pairs", state, f"{pairs['kept']:,}", note, share), section, steps)


def _is_begun(store: Store) -> bool:
    return next(iter(store.list()), None) is not None


def _counts(store: Store, receipts: Mapping[int, Receipt]) -> dict[str, Any] | None:
    """`status`, or the same of the receipts alone where there is no plan; None where there is neither."""
    try:
        return status(store)
    except UsageError:
        if not receipts:
            return None
    rejected: dict[str, int] = {}
    for receipt in receipts.values():
        for reason, count in receipt.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    kept = sum(receipt.kept for receipt in receipts.values())
    return {
        "shards": {"planned": len(receipts), "committed": len(receipts)},
        "pairs": {"planned": kept + sum(rejected.values()), "kept": kept, "rejected": rejected},
        "bytes": sum(ref.bytes for receipt in receipts.values() for ref in receipt.files.values()),
        "alive": [],
    }


def _funnel(pairs: Mapping[str, Any], sampled: Sampled) -> Funnel:
    causes = [
        Cause(name, count, MEANINGS[Reason(name)], str(reason_class(Reason(name))), sampled.examples.get(name, ()))
        for name, count in pairs["rejected"].items()
    ]
    read_from = f"all {sampled.of:,} committed shards"
    if sampled.shards < sampled.of:
        read_from = f"{sampled.shards:,} of {sampled.of:,} committed shards, evenly over all of them"
    return Funnel(
        pairs["planned"],
        pairs["kept"],
        causes,
        sampled.examples.get(SUCCESS, ()),
        sampled.hosts,
        sampled.failed,
        f"Examples and hosts are of {read_from}. What we did not want (policy) is no host's failure.",
    )


def _pairs_steps(run: str, store: Store, told: Mapping[str, Any], sampled: Sampled) -> list[Step]:
    shards, location = told["shards"], shlex.quote(join(run, "pairs"))
    steps = []
    if shards["committed"] < shards["planned"]:
        lists = " ".join(map(shlex.quote, planned_lists(store))) or "LIST"
        left = shards["planned"] - shards["committed"]
        alive = " An ingest is at work on them." if told["alive"] else ""
        shards_left = "shard that is" if left == 1 else "shards that are"
        text = f"Collect the {left:,} {shards_left} left; what is committed is not asked for again.{alive}"
        steps.append(Step(text, f"armchair ingest {lists} --into {location}{preset_of(run)}"))
    transient = sum(count for reason, count in told["pairs"]["rejected"].items() if is_transient(reason))
    if transient:
        text = f"Ask again for the {transient:,} pairs that may come now."
        if sampled.hosts and all(host.name in ("localhost", "127.0.0.1", "[::1]") for host in sampled.hosts):
            text += " They lie on this machine: their server must be running."
        busy = any(host.help.endswith("fetch.connections_per_host") for host in sampled.hosts)
        steps.append(Step(text, f"armchair rerun {location}{' --set fetch.connections_per_host=2' if busy else ''}"))
    return steps


def planned_lists(store: Store) -> list[str]:
    """The paths of the lists that were planned, in their order."""
    try:
        instalments = read_instalments(store)
    except DAMAGE:
        return []
    return list(dict.fromkeys(file.label for instalment in instalments for file in instalment.lists))


def preset_of(run: str) -> str:
    """` --preset RUN/settings.toml`, where there is one."""
    there = open_store(run).stat(SETTINGS) is not None
    return f" --preset {shlex.quote(join(run, SETTINGS))}" if there else ""


# --- codes -----------------------------------------------------------------------------------------------------------


def codes_part(run: str, say: Say) -> Part:
    """How often each code is used, and whether all pairs have codes."""
    location, problems = join(run, "tokens"), Problems()
    store = open_store(location)
    makes = (
        f"armchair tokenize {shlex.quote(join(run, 'pairs'))} --tokenizer {shlex.quote(join(run, 'tokenizer'))} "
        f"--into {shlex.quote(location)}{preset_of(run)}"
    )
    if not _is_begun(store):
        return Part(
            Stage("Codes", "not begun", "–", "pictures as codes"), None, [Step("Turn pictures into codes:", makes)]
        )
    say("codes: receipts")
    receipts = problems.tried("tokens/receipts", read_receipts, store) or {}
    pairs = problems.tried("pairs/receipts", read_receipts, open_store(join(run, "pairs"))) or {}
    coded = sum(receipt.kept for receipt in receipts.values())
    behind = [
        shard
        for shard, receipt in pairs.items()
        if shard not in receipts or receipts[shard].made_from.get("pairs") != receipt.digest
    ]
    steps = [Step(f"Pair shards without codes, or with old ones: {len(behind):,}. Make them:", makes)] if behind else []
    usage: CodeUsage | None = None
    tiles: list[Sheet] = []
    if receipts:
        recipe = problems.tried("tokenizer/recipe.json", _identity, open_store(join(run, "tokenizer"))) or {}
        vocabulary = recipe.get("dvae", {}).get("vocabulary")
        if vocabulary:
            usage = problems.tried("tokens/data", read_code_usage, store, receipts, vocabulary, say)
    if usage is not None:
        say("codes: pictures of the most used ones")
        most = usage.most_used(TILES)
        shares = usage.counts_V / max(1, usage.counts_V.sum())
        pictures = problems.tried("tokens/tokenizer", code_tiles, location, most) or []
        tiles = [Sheet(percent(shares[code]), picture) for code, picture in zip(most, pictures, strict=False)]
    text = "Each picture is a grid of codes. The more evenly they are used, the more a picture's codes can tell."
    if usage is not None and usage.shards < usage.of:
        text += f" Counted in {usage.shards:,} of {usage.of:,} shards, evenly over all of them."
    section = Section("Codes", text, problems.lines, _usage_facts(usage), charts=_usage_charts(usage), tiles=tiles)
    state: State = "damaged" if problems.lines else "unfinished" if behind or not receipts else "done"
    share = 1 - len(behind) / len(pairs) if pairs else None
    return Part(Stage("Codes", state, f"{coded:,}", "pictures as codes", share), section, steps)


def _identity(store: Store) -> dict[str, Any]:
    identity: dict[str, Any] = read_json(store, RECIPE)["identity"]
    return identity


def _usage_facts(usage: CodeUsage | None) -> list[Fact]:
    if usage is None:
        return []
    return [
        Fact("perplexity", number(usage.perplexity), f"of {len(usage.counts_V):,} codes"),
        Fact("of the codebook is in use", percent(usage.used_share), f"{int((usage.counts_V > 0).sum()):,} codes"),
        Fact(
            "go to the most used code", percent(float(usage.shares[0])), f"even use: {percent(1 / len(usage.counts_V))}"
        ),
        Fact("codes counted", f"{int(usage.counts_V.sum()):,}", f"of {usage.pictures:,} pictures"),
    ]


def _usage_charts(usage: CodeUsage | None) -> list[Chart]:
    if usage is None:
        return []
    points = [(float(rank), 100 * float(share)) for rank, share in enumerate(usage.shares, 1) if share > 0]
    even = [(1.0, 100 / len(usage.counts_V)), (float(len(usage.counts_V)), 100 / len(usage.counts_V))]
    good = "flat is better; the curve ends at the last code that is used"
    return [
        Chart("Share of each code, %", {"used": points, "even use": even}, "codes, most used first", good, is_log=True)
    ]


# --- the two trainings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The words for one of the two trainings. `settings` is the name of its training settings in the recipe."""

    name: str
    title: str
    text: str
    strip_title: str
    settings: str
    makes: str


TOKENIZER = Training(
    "tokenizer",
    "Tokenizer",
    "A discrete variational autoencoder turns a picture into a grid of codes and back. What it loses here, the "
    "transformer can't bring back: look at the pictures and, below each, what is left of it in codes.",
    "Originals, and below each its reconstruction",
    "tokenizer_training",
    "armchair train tokenizer {pairs} --into {tokenizer}",
)
TRANSFORMER = Training(
    "model",
    "Transformer",
    "A transformer reads a caption and predicts the codes one after the other. If the captions tell it something, the "
    "right caption's curve lies below the shuffled one's.",
    "Samples with their prompts",
    "transformer_training",
    "armchair train transformer {tokens} --into {model}",
)


def training_part(run: str, of: Training) -> Part:
    """A training: how far it is, its curves with marks, its pictures over time."""
    problems, store = Problems(), open_store(join(run, of.name))
    places = {name: shlex.quote(join(run, name)) for name in ("pairs", "tokenizer", "tokens", "model")}
    makes = of.makes.format(**places) + preset_of(run)
    if not _is_begun(store):
        begin = Step(f"Train the {of.title.lower()}:", makes)
        return Part(Stage(of.title, "not begun", "–", "updates"), None, [begin])
    checkpoint = problems.tried(f"{of.name}/steps", latest_checkpoint, store)
    recipe = problems.tried(f"{of.name}/{RECIPE}", _identity, store) or {}
    rows: list[dict[str, Any]] = []
    if checkpoint is not None:
        rows = problems.tried(f"{of.name}/metrics", read_metrics, store) or []
    training = recipe.get(of.settings, {})
    stage, steps = _training_state(of, store, checkpoint, training.get("steps"), makes, problems)
    marks = problems.tried(f"{of.name}: marks", _marks, rows, of.settings, recipe) or []
    marks = _with_checkpoint(marks, store, checkpoint)
    charts = problems.tried(f"{of.name}: curves", charts_of, rows, marks) or {}
    shown = {name for name in charts if name not in MORE or any(mark.kind == "bad" for mark in charts[name].marks)}
    facts = [] if checkpoint is None else [Fact("updates", f"{checkpoint.step:,}", f"model {checkpoint.digest[:12]}")]
    section = Section(
        of.title,
        of.text if checkpoint else f"{of.text} There is no checkpoint yet.",
        problems.lines,
        [*facts, *_evaluation_facts(rows)],
        [mark for mark in marks if mark.kind != "good" and not _is_only_charted(mark)],
        strip=_strip(store, checkpoint.step, of.name, problems) if checkpoint else (),
        strip_title=of.strip_title,
        charts=[charts[name] for name in charts if name in shown],
        more_charts=[charts[name] for name in charts if name not in shown],
    )
    if problems.lines and stage.state == "done":
        stage = replace(stage, state="damaged")
    return Part(stage, section, steps)


def _is_only_charted(mark: Mark) -> bool:
    """Marks without advice are for the eye that is on the chart."""
    return not mark.advice


def _training_state(
    of: Training, store: Store, checkpoint: Checkpoint | None, steps: int | None, makes: str, problems: Problems
) -> tuple[Stage, list[Step]]:
    record = problems.tried(f"{of.name}/runs", read_run, store) or {}
    done = checkpoint.step if checkpoint else 0
    value, note = f"{done:,}", f"of {steps:,} updates" if steps else "updates"
    share = done / steps if steps else None
    if steps and done >= steps:
        return Stage(of.title, "done", value, note, share), []
    if record.get("state") == "running" and record["age_s"] <= ALIVE_S:
        left = f", about {record['seconds_left'] / 60:.0f} min left" if "seconds_left" in record else ""
        told = Step(f"The {of.title.lower()} is in training on {record['host']}{left}: write the report again then.")
        return Stage(of.title, "under way", value, note, share), [told]
    why = {"diverged": "diverged", "stopped": "was stopped", "failed": "failed"}.get(
        record.get("state", ""), "has not ended"
    )
    text = f"The training of the {of.title.lower()} {why} after {done:,} updates; the same command goes on from there."
    if record.get("state") == "diverged":
        text += " It will diverge again unless its learning rate is lower, which needs another --into."
    state: State = "damaged" if problems.lines and checkpoint is None else "unfinished"
    return Stage(of.title, state, value, note, share), [Step(text, makes)]


def _marks(rows: Sequence[Mapping[str, Any]], section: str, recipe: Mapping[str, Any]) -> list[Mark]:
    return marks_of(rows, section, recipe.get(section, {}), _codes_a_word(recipe))


def _codes_a_word(recipe: Mapping[str, Any]) -> float:
    dvae = recipe.get("dvae")
    if not dvae:
        return 0.0
    grid = dvae["image_size"] // (dvae["stem_unshuffle"] << (len(dvae["widths"]) - 1))
    return float(grid * grid / dvae["vocabulary"])


def _with_checkpoint(marks: Sequence[Mark], store: Store, checkpoint: Checkpoint | None) -> list[Mark]:
    """A mark at an earlier step also says whether the model of that step can still be had."""
    told = []
    for mark in marks:
        if mark.kind == "bad" and checkpoint and mark.step and mark.text.startswith("Over-fitting"):
            is_kept = store.stat(f"steps/{int(mark.step):07d}/receipt.json") is not None
            kept = "is still there" if is_kept else "is not kept any more (keep_checkpoints)"
            mark = replace(mark, advice=f"{mark.advice} The checkpoint of that step {kept}.")
        told.append(mark)
    return told


def _evaluation_facts(rows: Sequence[Mapping[str, Any]]) -> list[Fact]:
    row: Mapping[str, Any] = next((row for row in reversed(rows) if row["kind"] == "evaluation"), {})
    on = evaluated_on(rows).replace("_", "-")
    note = f"{row['pictures']:,} {on} pictures" if "pictures" in row else on
    names = {
        "psnr_db": ("PSNR of reconstructions", " dB"),
        "bits_per_dim": ("bits a dimension", ""),
        "perplexity": ("perplexity of the codes", ""),
        "image_nats_per_code": ("nats a code, right caption", ""),
        "information_gain_nats_per_code": ("nats a code saved by the caption", ""),
    }
    facts = []
    for name, (label, unit) in names.items():
        value = row.get(name)
        if isinstance(value, dict):
            value = value.get("right")
        if isinstance(value, int | float):
            facts.append(Fact(label, f"{number(value)}{unit}", note))
    return facts


def _strip(store: Store, last_step: int, name: str, problems: Problems) -> list[Sheet]:
    """Sheets of at most eight checkpoints, evenly over the training, the first and the last among them."""
    found = {
        int(stem): entry.key
        for entry in store.list("sheets/")
        if entry.key.endswith(".png") and (stem := PurePosixPath(entry.key).stem).isdigit()
    }
    sheets = []
    for step in evenly(sorted(step for step in found if step <= last_step), SHEETS_IN_STRIP):
        data = problems.tried(f"{name}/{found[step]}", read_picture, store, found[step])
        if data:
            sheets.append(Sheet(f"after {step:,} updates", data))
    return sheets


def read_picture(store: Store, key: str) -> bytes:
    """The bytes of a picture, which can be opened. Raises OSError."""
    data = store.read(key)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    return data


def charts_of(rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark] = ()) -> dict[str, Chart]:
    """Name -> chart of each number of the metrics rows, training and evaluation together, in the order of TITLES.

    A number that is a table of its own (nats under three captions) gives one curve for each entry.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def add(chart: str, curve: str, step: float, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            curves.setdefault(chart, {}).setdefault(curve, []).append((step, value))

    for row in rows:
        of = "training" if row["kind"] == "train" else str(row.get("on", "evaluation")).replace("_", "-")
        for name, value in row.items():
            if name in NOT_CHARTED:
                continue
            if isinstance(value, dict):
                for part, number_of_part in value.items():
                    add(name, f"{of}, {part}", row["step"], number_of_part)
            else:
                add(name, of, row["step"], value)
    order = [name for name in TITLES if name in curves] + sorted(curves.keys() - TITLES.keys())
    charts = {}
    for name in order:
        title, good = TITLES.get(name, (name.replace("_", " "), ""))
        by_name = dict(sorted(curves[name].items(), key=lambda item: item[0] != "training"))
        charts[name] = Chart(title, by_name, good=good, marks=[mark for mark in marks if mark.chart == name])
    return charts
