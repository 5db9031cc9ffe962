"""The stages of a run: where each lies, what it is made with, and which still have work.

No Prefect and no Ray here: a finished run answers before either starts, and a changed setting is refused as early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infra.store import Store, join, open_store, parent
from ops.errors import RecipeChanged, UsageError
from ops.filters import FilterSettings
from ops.ingest import start_pairs
from ops.jobs import Job
from ops.lists import find_lists
from ops.pictures import PictureSettings
from ops.plan import Columns, PlanSettings, read_instalments, would_grow
from ops.recipes import RECIPE
from ops.shards import committed_generations
from ops.tokenize import pending_tasks as pending_tokens
from ops.tokenize import start_tokens
from ops.trained import latest_checkpoint
from ops.training import prepare
from pipelines.settings import Settings, to_toml

SETTINGS = "settings.toml"


@dataclass(frozen=True)
class Run:
    """The directories of one run."""

    location: str

    @property
    def pairs(self) -> str:
        """Pictures and captions."""
        return join(self.location, "pairs")

    @property
    def tokenizer(self) -> str:
        """The discrete VAE."""
        return join(self.location, "tokenizer")

    @property
    def tokens(self) -> str:
        """Captions and codes."""
        return join(self.location, "tokens")

    @property
    def model(self) -> str:
        """The transformer."""
        return join(self.location, "model")

    def tokenizer_job(self, settings: Settings) -> Job:
        """How this run trains its tokenizer."""
        return Job("tokenizer", self.pairs, self.tokenizer, settings.dvae, settings.tokenizer_training)

    def transformer_job(self, settings: Settings) -> Job:
        """How this run trains its transformer."""
        training, sampling = settings.transformer_training, settings.sampling
        return Job("transformer", self.tokens, self.model, settings.transformer, training, sampling)


def missing_stages(lists: Sequence[str], run: Run, settings: Settings, columns: Columns = Columns()) -> list[str]:
    """Names of the stages that still have work, in order; empty for a finished run.

    Raises RecipeChanged if a stage that was begun was made with other settings, UsageError for lists that are none or
    were planned with other columns, and for sizes of the two models that do not fit each other.
    """
    if not lists:
        raise UsageError("no list was given.", "Name at least one list file or folder: armchair build LIST --into RUN")
    find_lists(lists)
    _check_fit(settings)
    missing = []
    if not _begun(run.pairs):
        return ["ingest", "train tokenizer", "tokenize", "train transformer", "report"]
    pairs = open_store(run.pairs)
    begin_pairs(pairs, settings.plan, settings.filters, settings.picture)
    instalments = read_instalments(pairs)
    planned = {order.shard for instalment in instalments for order in instalment.work_orders}
    if would_grow(pairs, lists, instalments, columns) or planned - committed_generations(pairs).keys():
        missing.append("ingest")
    if not _is_trained(run.tokenizer_job(settings)):
        missing.append("train tokenizer")
    if not _begun(run.tokens):
        missing.append("tokenize")
    elif "train tokenizer" not in missing:
        start_tokens(run.pairs, run.tokenizer, run.tokens, settings.tokens)
        if pending_tokens(run.pairs, run.tokens, settings.tokens):
            missing.append("tokenize")
    if not _is_trained(run.transformer_job(settings)):
        missing.append("train transformer")
    if not missing and _is_report_old(run):
        missing.append("report")
    return missing


def _check_fit(settings: Settings) -> None:
    """Before anything is fetched or trained: the transformer must have the codes of the tokenizer."""
    for name, mine, its in (
        ("grid", settings.transformer.grid, settings.dvae.grid),
        ("image_vocabulary", settings.transformer.image_vocabulary, settings.dvae.vocabulary),
    ):
        if mine != its:
            raise UsageError(
                f"transformer.{name} is {mine}, but the tokenizer of these settings has {its}.",
                f"Add --set transformer.{name}={its}",
            )


def begin_pairs(store: Store, plan: PlanSettings, filters: FilterSettings, picture: PictureSettings) -> None:
    """`start_pairs`; other settings than a recipe's are taken while nothing is planned, as after a bad list."""
    try:
        start_pairs(store, plan, filters, picture)
    except RecipeChanged:
        if read_instalments(store):
            raise
        store.delete(RECIPE)
        start_pairs(store, plan, filters, picture)


def _is_report_old(run: Run) -> bool:
    """Whether there is no report, or one from before the last commit of a shard or a checkpoint."""
    written = open_store(run.location).stat("report.html")
    commits = [(run.pairs, "receipts/"), (run.tokenizer, "steps/"), (run.tokens, "receipts/"), (run.model, "steps/")]
    newest = max(entry.modified_s for stage, prefix in commits for entry in open_store(stage).list(prefix))
    return written is None or written.modified_s < newest


def _begun(stage: str) -> bool:
    return open_store(stage).stat(RECIPE) is not None


def _is_trained(job: Job) -> bool:
    if not _begun(job.into):
        return False
    prepare(job)
    latest = latest_checkpoint(open_store(job.into))
    return latest is not None and latest.step >= job.training.steps


def record_settings(run: Run, settings: Settings) -> None:
    """Writes RUN/settings.toml: `--preset RUN/settings.toml` repeats the run."""
    open_store(run.location).put(SETTINGS, to_toml(settings).encode(), if_absent=False)


def settings_beside(stage: str) -> str | None:
    """The settings.toml of the run that a stage lies in, for commands on that stage; None where there is none."""
    run = parent(stage)
    return join(run, SETTINGS) if open_store(run).stat(SETTINGS) is not None else None
