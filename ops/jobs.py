"""What is to be trained and how: the settings of a training, a job, and one rank of its workers.

May not live here: how any of it is done (ops/training.py, ops/training_loop.py, ops/learning.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, GetJsonSchemaHandler
from pydantic.dataclasses import dataclass

from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.schedules import Shape
from models.transformer import TransformerSettings

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TrainSettings:
    """How a model is trained. The defaults are the paper's transformer (App. B.2)."""

    steps: Count = 430_000
    """Updates."""
    batch: Count = 1_024
    """Positions of an update over all workers; rows thinned by their weight make the batch smaller."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 4.5e-4
    """Peak of the learning rate, after the warm-up."""
    final_learning_rate: NotNegative = 1.4e-5
    """Learning rate that the schedule ends with (the paper halved it five times on plateaus)."""
    schedule: Shape = "half_cosine"
    """How the rate falls: half a cosine; not at all; "wsd", constant and then linear over the last fifth; or "plateau",
    halved whenever the mean loss between checkpoints stops falling (the paper's, App. B.2)."""
    plateau_patience: Count = 3
    """Checkpoints in a row without a lower mean loss after which "plateau" halves the rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5_000
    """Updates of linear warm-up."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the updates, warm-up included, after which the final rate is reached."""
    adam_beta1: Share = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Share = 0.96
    """Decay of AdamW's second moment."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's ε."""
    weight_decay: NotNegative = 4.5e-2
    """AdamW's decoupled weight decay, on matrices and kernels only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Numbers of the forward and backward pass; weights, sums over workers and optimizer stay fp32 in both."""
    clip: NotNegative = 4.0
    """Largest norm of the whole gradient; 0: unclipped."""
    ema: Share = 0.99
    """Decay of the averaged weights, which are what is evaluated and published; 0: no average."""
    ema_every: Count = 25
    """Updates from one averaging to the next."""
    ema_warmup: bool = False
    """Decay min(ema, (1 + t)/(10 + t)) at averaging t, for runs that are not much longer than 1/(1 − ema)."""
    checkpoint_every: Count = 5_000
    """Updates between checkpoints, each with an evaluation and a sheet of pictures. Written while training goes on."""
    keep_checkpoints: Count = 3
    """Checkpoints kept; older ones are removed when a new one is committed. Sheets and metrics stay."""
    log_every: Count = 10
    """Updates that one row of the metrics is the mean of."""
    evaluate_pictures: Annotated[int, Field(ge=0)] = 256
    """Held-out pictures of an evaluation, at most; 0: none."""
    seed: int = 0
    """Seed of the initial weights, the order of rows, crops, noise and dropout."""
    where: dict[str, str | list[str]] = Field(default_factory=dict)
    """Columns of the lists and the value, or values, that a pair must have to be trained on; empty: all pairs."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Prefect's form. pydantic reads docstrings in a class's own source; those of inherited fields stand here."""
        schema = handler(core)
        for name, shown in handler.resolve_ref_schema(schema)["properties"].items():
            known = [vars(owner).get("__pydantic_fields__", {}).get(name) for owner in cls.__mro__]
            told = [each.description for each in known if each is not None and each.description]
            shown |= {"description": told[0]} if told else {}
        return schema


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TokenizerTrainSettings(TrainSettings):
    """How the tokenizer is trained. The defaults are the paper's dVAE (App. A.2)."""

    steps: Count = 3_000_000
    """Updates."""
    batch: Count = 512
    """Positions of an update over all workers; rows thinned by their weight make the batch smaller."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak of the learning rate, after the warm-up."""
    final_learning_rate: NotNegative = 1.25e-6
    """Learning rate that the schedule ends with."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates of linear warm-up."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of the updates, warm-up included, after which the final rate is reached (1,200,000 of 3,000,000)."""
    adam_beta2: Share = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: NotNegative = 1e-4
    """AdamW's decoupled weight decay, on matrices and kernels only."""
    clip: NotNegative = 0.0
    """Largest norm of the whole gradient; 0: unclipped."""
    ema: Share = 0.999
    """Decay of the averaged weights, which are what is evaluated and published; 0: no average."""
    ema_every: Count = 1
    """Updates from one averaging to the next."""
    random_crops: bool = True
    """Train on random crops (App. A.2, listing 1); off: the central square, for pictures that fill their frame."""
    flips: bool = True
    """Mirror half of the pictures."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TransformerTrainSettings(TrainSettings):
    """How the transformer is trained. The defaults are the paper's (App. B.2)."""

    prompts: tuple[str, ...] = ()
    """Prompts drawn at each checkpoint. Empty: captions that are in the data, seen and held out."""


@plain_dataclass(frozen=True)
class Job:
    """What to train, from what, into where. `source` is PAIRS (tokenizer) or TOKENS (transformer).

    `sampling` is how the transformer's sheets are drawn at its checkpoints; it decides nothing else.
    """

    kind: Literal["tokenizer", "transformer"]
    source: str
    into: str
    model: DvaeSettings | TransformerSettings
    training: TrainSettings
    sampling: SampleSettings = field(default_factory=SampleSettings)


@plain_dataclass(frozen=True)
class Worker:
    """One rank of a run, and how it computes. None of it bears identity.

    `report` is told each checkpoint's step and metrics, on every rank; `tell` each row of the metrics, on rank 0.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    threads: int | None = None
    sharded: bool = False
    accumulate: int = 1
    recompute: bool = False
    compile: bool = False
    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    tell: Callable[[dict[str, Any]], None] = lambda row: None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def gather(self, mine: T) -> list[T]:
        """What each rank gave, in the order of ranks, on every rank. For small things: they are pickled."""
        if self.world == 1:
            return [mine]
        from torch import distributed

        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, mine)
        return parts

    def part(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """(first, stop) of this rank's contiguous part of `count` things; the last ranks may have less, or nothing.

        >>> [Worker(rank, 3).part(7) for rank in range(3)]
        [(0, 3), (3, 6), (6, 7)]
        """
        share, rank = -(-count // self.world), self.rank if rank is None else rank
        return min(rank * share, count), min((rank + 1) * share, count)
