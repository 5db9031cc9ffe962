"""What training a preset's two models takes, before anything is rented: parameters, FLOPs, memory of a GPU, days.

Weights, gradients, moments and averages are arithmetic. What passes forward and backward need is *counted*: the model
itself runs on tensors without memory (torch's FakeTensorMode), as in a part of an update, and the bytes of all tensors
alive at once are added up. A model of 12 billion parameters takes seconds on a laptop.

Not counted: what a kernel allocates inside (cuDNN's workspace), the caching allocator's fragments, CUDA's own context,
the network's buffers. A GPU's memory is its vendor's GB of 10⁹ bytes; the 5 to 7 % that a card has above are for these.
"""

from __future__ import annotations

import difflib
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from models import blocks
from models.attention import layer_kinds, mask
from models.dvae import Dvae, DvaeSettings
from models.transformer import Transformer, TransformerSettings
from ops.errors import UsageError
from ops.jobs import TokenizerTrainSettings, TrainSettings, TransformerTrainSettings
from ops.learning import EVALUATION_BATCH, SHEET_PICTURES

MFU = 0.35
"""Share of a GPU's dense bf16 rate that a training reaches. By their own reports, nanoGPT 0.37 (A100) and torchtitan's
Llama 3 8B 0.33 to 0.39 (H100). Nothing was measured here."""
Precision = Literal["fp32", "bf16"]
ModelSettings = DvaeSettings | TransformerSettings
SECONDS_A_DAY = 86_400
MOST_GPUS = 4096
"""Advice looks no further."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a kind."""

    memory_bytes: float
    bf16_flops: float
    """FLOP/s of the tensor cores, dense."""
    about: str


GPUS = {
    "V100": Gpu(16e9, 125e12, "SXM2, the paper's; the rate is fp16's: it has no bf16"),
    "A100": Gpu(80e9, 312e12, "SXM, 80 GB"),
    "H100": Gpu(80e9, 989e12, "SXM"),
    "H200": Gpu(141e9, 989e12, "SXM"),
    "B200": Gpu(180e9, 2250e12, "of a DGX B200"),
}
"""By NVIDIA's data sheets, their rates without sparsity (half of those "with sparsity")."""


def gpu(kind: str) -> tuple[str, Gpu]:
    """The kind's name as the table has it, and its figures. Raises UsageError with the nearest name."""
    name = kind.upper()
    if name in GPUS:
        return name, GPUS[name]
    near = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UsageError(f"there is no kind of GPU {kind!r}.", f"{hint}Kinds: {', '.join(GPUS)}.")


# Counted on tensors without memory ------------------------------------------------------------------------------------


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, `now` and `most` are the bytes of tensors made within it and alive. Views, and `given`, are free."""

    now: int
    most: int

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._given = [tensor.untyped_storage() for tensor in given]  # kept, so that their keys stay theirs
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._given}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Runs an operation and looks at what it made."""
        if function is torch.ops.aten.exponential_.default:  # noise of a generator: fake tensors hold no numbers
            return arguments[0]
        made = function(*arguments, **(named or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        count = storage.nbytes()
        gone = weakref.finalize(storage, self._gone, key, count)
        gone.atexit = False
        self._known[key] = gone
        self.now += count
        self.most = max(self.most, self.now)

    def _gone(self, key: int, count: int) -> None:
        del self._known[key]
        self.now -= count


def pass_bytes(
    settings: ModelSettings,
    pictures: int,
    *,
    recompute: bool = False,
    precision: Precision = "bf16",
    flex: bool = True,
    backward: bool = True,
) -> int:
    """Most bytes alive at once in a forward and backward pass over `pictures`, besides weights and their gradients.

    Activations, logits in their chunks, and the gradient that a weight gets before it is added to its sum. `flex`: as
    on a GPU; without, as masked SDPA, which makes numbers of the mask in each layer. Without `backward`: an evaluation.
    """
    if isinstance(settings, TransformerSettings) and flex:
        # FlexAttention keeps what the causal kernel keeps, and can't be run without memory. Masks change no size.
        settings = replace(settings, attention="dense")
    with FakeTensorMode():
        model = _model(settings)
        if recompute:
            blocks.recompute(model.blocks)
        if precision == "bf16":
            # The copies of weights that autocast makes are counted apart: where weights are sharded there are none.
            for part in model.modules():
                if isinstance(part, nn.Linear | nn.Conv2d):
                    for name, weight in list(part.named_parameters(recurse=False)):
                        setattr(part, name, nn.Parameter(weight.detach().bfloat16()))
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
        batch = _batch(settings, pictures)
        is_bf16 = precision == "bf16"
        given = (*model.parameters(), *model.buffers(), *(part for part in batch if isinstance(part, Tensor)))
        with AliveBytes(given) as alive, torch.set_grad_enabled(backward):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                objective = _objective(model, batch)
            if backward:
                objective.backward()  # type: ignore[no-untyped-call]
        return int(alive.most)


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None  # it is added to a gradient that is counted among the gradients


def _model(settings: ModelSettings) -> Dvae | Transformer:
    return Dvae(settings) if isinstance(settings, DvaeSettings) else Transformer(settings)


def _batch(settings: ModelSettings, pictures: int) -> tuple[Any, ...]:
    if isinstance(settings, DvaeSettings):
        return torch.zeros(pictures, 3, settings.image_size, settings.image_size), [0] * pictures, 0
    text_BT = torch.zeros(pictures, settings.text_positions, dtype=torch.int64)
    return text_BT, torch.zeros(pictures, settings.image_positions, dtype=torch.int64)


def _objective(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    loss = model(*batch)
    summed: Tensor = loss.loss_B.sum() if isinstance(model, Dvae) else loss.objective(0.5, 1, 1)
    return summed


def counted_flops(settings: ModelSettings, *, backward: bool = True) -> int:
    """FLOPs of linear layers and convolutions in a pass over one picture, as torch counts them; attention is not in."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, AliveBytes(), torch.set_grad_enabled(backward):
        objective = _objective(_model(settings), _batch(settings, 1))
        if backward:
            objective.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


# Parameters and FLOPs -------------------------------------------------------------------------------------------------


def parameters(settings: ModelSettings) -> dict[str, int]:
    """Parameters by item, without the model's memory."""
    with torch.device("meta"):
        model = _model(settings)
    items: dict[str, int] = {}
    for name, weight in model.named_parameters():
        item = _item_of(name)
        items[item] = items.get(item, 0) + weight.numel()
    return items


def _item_of(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in ("encoder", "decoder"):
        return f"{first} {rest.partition('.')[0]}"
    return {
        "tokens": "text embedding",
        "codes": "code embedding",
        "pads_TD": "pads",
        "text_positions_TD": "text positions",
        "rows_hD": "rows and columns",
        "columns_wD": "rows and columns",
        "text_head": "text head",
        "image_head": "code head",
    }.get(first, first)


EMBEDDINGS = ("text embedding", "code embedding", "pads", "text positions", "rows and columns")
"""Items of the transformer that nothing is multiplied with."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and backward pass, a multiplication and an addition each one."""

    conventional: float
    """Of a picture: 6N + 12·L·H·Q·T for each position (PaLM, App. B), of which an MFU is a share by convention; N are
    the parameters without embeddings, T all positions. Of the dVAE: what its convolutions do."""
    mask_aware: float
    """Of a picture, with the keys that the masks show and each position's own head."""


def flops(settings: ModelSettings) -> Flops:
    """FLOPs of one picture with its caption."""
    if isinstance(settings, DvaeSettings):
        counted = float(counted_flops(settings))
        return Flops(counted, counted)
    items = parameters(settings)
    L, D, T, N = settings.layers, settings.width, settings.text_positions, settings.image_positions
    S = T + N
    used = sum(count for item, count in items.items() if item not in EMBEDDINGS)
    conventional = S * (6.0 * used + 12.0 * L * D * S)
    kinds = Counter(layer_kinds(L, settings.attention))
    shown = sum(n * int(mask(kind, T, settings.grid, settings.conv_kernel).sum()) for kind, n in kinds.items())
    heads = D * ((T - 1) * settings.text_vocabulary + N * settings.image_vocabulary)
    return Flops(conventional, 6.0 * items["blocks"] * S + 6.0 * heads + 12.0 * D * shown)


# Memory of a GPU ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU by item, in one way to spread a model: a copy on each GPU (DDP), or a share (FSDP2)."""

    sharded: bool
    recompute: bool
    items: Mapping[str, float]
    """All but what grows with the pictures of a pass."""
    pictures: int
    """Pictures of a pass; 0: not even one fits."""
    parts: int
    """Passes of an update on each GPU, whose gradients add up."""
    passes: float
    """What a forward and backward pass over them needs; over one, where none fits."""

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(self.items.values()) + self.passes


@dataclass(frozen=True)
class Sizes:
    """A model, how it is trained, and what it needs."""

    settings: ModelSettings
    training: TrainSettings
    frozen_bytes: float = 0.0
    """Of a model that lies beside it: the tokenizer whose codes the transformer learns, for its sheets."""

    @cached_property
    def counts(self) -> dict[str, int]:
        """Parameters by item."""
        return parameters(self.settings)

    @cached_property
    def total(self) -> int:
        """All parameters."""
        return sum(self.counts.values())

    @cached_property
    def _structure(self) -> tuple[int, list[int]]:
        """(parameters of matrices and kernels, which autocast copies; parameters of each block)."""
        with torch.device("meta"):
            model = _model(self.settings)
        copied = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d))
        return copied, [sum(weight.numel() for weight in block.parameters()) for block in model.blocks]

    @cached_property
    def _passes(self) -> dict[tuple[int, bool, bool], int]:
        return {}

    def pass_bytes(self, pictures: int, *, recompute: bool = False, backward: bool = True) -> int:
        """Of the function of the same name, in bf16 on a GPU, each asked for once."""
        asked = (pictures, recompute, backward)
        if asked not in self._passes:
            self._passes[asked] = pass_bytes(self.settings, pictures, recompute=recompute, backward=backward)
        return self._passes[asked]

    def items(self, gpus: int, *, sharded: bool) -> dict[str, float]:
        """Bytes of a GPU that do not grow with the pictures of a pass."""
        share = self.total / gpus if sharded else self.total
        copied, blocks = self._structure
        items = {"weights": 4.0 * share, "gradients": 4.0 * share, "AdamW": 8.0 * share}
        if self.training.ema:
            items["average"] = 4.0 * share
        if sharded:
            # Whole, bf16: all outside the blocks; of blocks the one at work and the next. Of one, its gradient: bf16,
            # and fp32 on its way into the sum over GPUs.
            items["gathered"] = 2.0 * (self.total - sum(blocks)) + (2 * 2.0 + 2.0 + 4.0) * max(blocks)
        else:
            items["bf16 copies"] = 2.0 * copied
        if self.frozen_bytes:
            items["tokenizer"] = self.frozen_bytes
        return items

    def memory(self, gpus: int, limit: float, *, sharded: bool, recompute: bool) -> Memory:
        """With a GPU's share of the batch in as few parts (1, 2, 4, …) as stay within `limit` bytes."""
        items = self.items(gpus, sharded=sharded)
        left, share = limit - sum(items.values()), math.ceil(self.training.batch / gpus)
        one = self.pass_bytes(1, recompute=recompute)
        if left < one:
            return Memory(sharded, recompute, items, 0, 0, one)
        parts = 1
        while self.pass_bytes(-(-share // parts), recompute=recompute) > left:
            parts *= 2
        pictures = -(-share // parts)
        return Memory(sharded, recompute, items, pictures, parts, self.pass_bytes(pictures, recompute=recompute))

    def evaluation(self, gpus: int, *, sharded: bool) -> dict[str, float]:
        """Bytes of a GPU while a checkpoint's model is scored and drawn: a whole model, and the dearest of the two."""
        items = self.items(gpus, sharded=sharded)
        items.pop("bf16 copies", None)
        if sharded:
            items["gathered"] = 2.0 * self.total  # a bf16 copy of all of it, to be called without the others
        # Each GPU scores and draws its part of the pictures.
        pictures = min(EVALUATION_BATCH, math.ceil(self.training.evaluate_pictures / gpus))
        scored = float(self.pass_bytes(pictures, backward=False)) if pictures else 0.0
        if isinstance(self.settings, TransformerSettings):
            positions = self.settings.text_positions + self.settings.image_positions
            cache = math.ceil(SHEET_PICTURES / gpus) * 2 * 2.0 * positions * self.settings.width * self.settings.layers
            items["scores" if scored > cache else "cache"] = max(scored, cache)
        else:
            items["scores"] = scored
        return items

    def least_gpus(self, limit: float) -> dict[str, int | None]:
        """The smallest power of two of GPUs that train it, sharded, recomputed and one picture at a time; and that also
        score its checkpoints. None: no number does, for what each of them holds whole does not fit."""
        one = self.pass_bytes(1, recompute=True)
        numbers = [1 << n for n in range(MOST_GPUS.bit_length())]
        trains = [n for n in numbers if sum(self.items(n, sharded=True).values()) + one <= limit]
        scores = [n for n in trains if sum(self.evaluation(n, sharded=True).values()) <= limit]
        return {"training": min(trains, default=None), "all": min(scores, default=None)}

    def ways(self, gpus: int, limit: float) -> Iterator[Memory]:
        """Each way to train it on so many GPUs, the quickest first."""
        for sharded in (False, True) if gpus > 1 else (False,):
            for recompute in (False, True):
                yield self.memory(gpus, limit, sharded=sharded, recompute=recompute)


# What is told --------------------------------------------------------------------------------------------------------


def estimate(
    dvae: DvaeSettings,
    tokenizer_training: TokenizerTrainSettings,
    transformer: TransformerSettings,
    transformer_training: TransformerTrainSettings,
    gpus: int,
    kind: str,
    mfu: float | None = None,
) -> dict[str, Any]:
    """Both trainings on `gpus` GPUs of a kind (a key of `GPUS`, in any case); `mfu` is `MFU` unless given.

    Raises UsageError for another kind, with the nearest name.
    """
    (name, card), mfu = gpu(kind), MFU if mfu is None else mfu
    if gpus < 1 or not 0.0 < mfu <= 1.0:
        raise UsageError(f"{gpus} GPUs at an MFU of {mfu:g}:", "at least one GPU, and an MFU above 0, at most 1.")
    tokenizer = Sizes(dvae, tokenizer_training)
    sizes = {
        "tokenizer": tokenizer,
        "transformer": Sizes(transformer, transformer_training, frozen_bytes=4.0 * tokenizer.total),
    }
    return {
        "gpus": gpus,
        "kind": name,
        "about": card.about,
        "memory_bytes": card.memory_bytes,
        "bf16_flops": card.bf16_flops,
        "mfu": mfu,
        "models": {which: _told(one, gpus, card, mfu) for which, one in sizes.items()},
    }


def _told(sizes: Sizes, gpus: int, card: Gpu, mfu: float) -> dict[str, Any]:
    settings, training, limit = sizes.settings, sizes.training, card.memory_bytes
    positions = 1
    if isinstance(settings, TransformerSettings):
        positions = settings.text_positions + settings.image_positions
    each, pictures = flops(settings), training.steps * training.batch
    # GPUs beyond the pictures of a batch have nothing to do.
    seconds = pictures * each.conventional / (min(gpus, training.batch) * card.bf16_flops * mfu)
    ways = [
        {
            "sharded": way.sharded,
            "recompute": way.recompute,
            "bytes": dict(way.items),
            "pictures_at_once": way.pictures,
            "parts_of_a_batch": way.parts,
            "pass_bytes": way.passes,
            "peak_bytes": way.peak,
            "fits": way.pictures > 0,
            # The forward pass again is a third of a forward and backward pass more.
            "days": seconds / SECONDS_A_DAY * (4 / 3 if way.recompute else 1.0),
        }
        for way in sizes.ways(gpus, limit)
    ]
    evaluations = []
    for sharded in sorted({bool(way["sharded"]) for way in ways}):
        items = sizes.evaluation(gpus, sharded=sharded)
        peak = sum(items.values())
        evaluations.append({"sharded": sharded, "bytes": items, "peak_bytes": peak, "fits": peak <= limit})
    fits = any(way["fits"] and _evaluation_of(way, evaluations)["fits"] for way in ways)
    return {
        "parameters": sizes.counts | {"total": sizes.total},
        "flops_a_picture": {"conventional": each.conventional, "mask_aware": each.mask_aware},
        "positions_a_picture": positions,
        "steps": training.steps,
        "batch": training.batch,
        "pictures": pictures,
        "tokens": pictures * positions,
        "flops": pictures * each.conventional,
        "ways": ways,
        "evaluation": evaluations,
        "fits": fits,
        "least_gpus": sizes.least_gpus(limit),
    }


def _evaluation_of(way: Mapping[str, Any], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    return next(one for one in evaluations if one["sharded"] == way["sharded"])
