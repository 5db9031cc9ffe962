"""What is learned: the tokenizer from pictures, the transformer from captions and codes. One function for each.

Each gives a `Learning`: the model, how a batch is made of positions, what is measured of it, how it is evaluated and
drawn. The loop (ops/training.py) knows nothing else of either. Randomness comes from (seed, position), so a batch may
be split over workers. May not live here: optimizers, checkpoints, Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from infra.store import Store, open_store
from models.dvae import Dvae, DvaeEvaluation, DvaeSettings, evaluate_batch, perplexity_and_used, psnr_db
from models.sampling import sample
from models.schedules import half_cosine
from models.text import PAD, CaptionTokenizer, train_bpe
from models.transformer import Transformer, TransformerSettings
from ops.decoding import Decoders, Stored
from ops.errors import UsageError
from ops.jobs import Job, TokenizerTrainSettings, TransformerTrainSettings, Worker
from ops.reader import Codes, Reader, Row, Share, codes_reader, pictures_reader
from ops.recipes import sha256
from ops.seeds import derived_seed, derived_share
from ops.sheets import Cell, draw_sheet, to_pixels
from ops.snapshot import HELD_OUT, TRAIN, Snapshot
from ops.trained import BPE, load_tokenizer, tokenizer_digest

T = TypeVar("T")

EVALUATION_BATCH = 64
INITIALISE_PICTURES = 200
"""Pictures that the encoder's logits are standardised on (`dvae.logit_std`)."""
SHEET_PICTURES = 16
BPE_CAPTIONS = 1_000_000
"""Captions that the BPE is trained on, at most: more change no merge that matters and cost minutes."""

Totals = dict[str, Tensor]
"""Name -> a sum over one part of a batch. Divided by the sum of its counts over all parts, it is what is measured."""


@dataclass(frozen=True)
class Batch:
    """A part of a batch: what `measure` reads, and what its totals will be sums of. A filler counts for nothing: it
    goes through the model where a rank has holes only, since the ranks sum their gradients together."""

    inputs: tuple[Any, ...]
    counts: dict[str, float]
    is_filler: bool = False


@dataclass(frozen=True)
class Learning:
    """One model, ready to be trained.

    `build` makes its structure, `initial` with the weights of step 0 (once, on rank 0's CPU). `batch(start, stop)`
    reads the positions from start up to stop without holes; None if only holes are left. It runs in another thread,
    ahead of the step. `measure(forward, batch, step)` gives the totals named in `measures`; the objective is the sum of
    weight · mean over `objective`. `evaluate(model, step)` and `sheet(model)` get the weights that are published, and
    are called on all ranks together: each does its part of the work; the sheet is rank 0's.
    """

    build: Callable[[], nn.Module]
    initial: Callable[[], nn.Module]
    about: dict[str, Any]
    tokens: int
    """Of one position: the codes of a picture, or the positions of a caption and its codes."""
    measures: tuple[str, ...]
    objective: dict[str, float]
    batch: Callable[[int, int], Batch | None]
    filler: Callable[[], Batch]
    measure: Callable[[Callable[..., Any], Batch, int], Totals]
    evaluate: Callable[[Any, int], dict[str, Any]]
    sheet: Callable[[Any], bytes | None]


def learn_tokenizer(job: Job, into: Store, snapshot: Snapshot, worker: Worker) -> Learning:
    """The discrete VAE on pictures of PAIRS (paper, §2.1)."""
    assert isinstance(job.model, DvaeSettings)
    settings, training = job.model, _tokenizer_training(job)
    share = Share.of_rank(training.batch, worker.rank, worker.world)  # as the loop cuts a batch
    reader = pictures_reader(open_store(job.source), snapshot, training.seed, share=share)
    decoders = Decoders.of_rank(job.source, settings.image_size, worker.world)

    def images(rows: Sequence[Row[bytes]], *, crop: bool, flip: bool) -> Tensor:
        pictures = [Stored(row.uid, row.payload, derived_seed("crop", training.seed, row.position)) for row in rows]
        return images_of(decoders.crops(pictures, crop=crop, flip=flip))

    def prepared(pixels_BCHW: Tensor, seeds: list[int], *, is_filler: bool = False) -> Batch:
        B, codes = len(seeds), len(seeds) * settings.grid**2
        counts = {"nats_per_dim": B, "distortion_nats": B, "kl_nats": B, "usage": codes}
        return Batch((pixels_BCHW, seeds), _counts(counts, is_filler), is_filler)

    def batch(start: int, stop: int) -> Batch | None:
        rows = list(reader.rows(start, stop))
        if not rows:
            return None
        seeds = [derived_seed("gumbel", training.seed, row.position) for row in rows]
        return prepared(images(rows, crop=training.random_crops, flip=training.flips), seeds)

    def filler() -> Batch:
        return prepared(torch.zeros(1, 3, settings.image_size, settings.image_size), [0], is_filler=True)

    def measure(forward: Callable[..., Any], of: Batch, step: int) -> Totals:
        images_BCHW, seeds_B = of.inputs[0].to(worker.device, non_blocking=True), of.inputs[1]
        loss = forward(images_BCHW, seeds_B, step)
        codes = 0 if of.is_filler else len(seeds_B) * settings.grid**2
        q_sum_V = loss.mean_q_V * codes
        return {
            "nats_per_dim": loss.loss_B.sum(),
            "distortion_nats": loss.distortion_B.sum(),
            "kl_nats": loss.kl_B.sum(),
            # Σ q·ln(m·V) with m, the mean q of *all* workers, held constant: the value is KL(m ‖ uniform), and so is
            # the gradient, for the rest of it, Σ q·∂ln m, is the gradient of Σ m = 1.
            "usage": (q_sum_V * log_ratio_to_uniform(q_sum_V.detach(), codes)).sum(),
        }

    def log_ratio_to_uniform(q_sum_V: Tensor, codes: int) -> Tensor:
        summed = worker.sum(torch.cat([q_sum_V, q_sum_V.new_tensor([float(codes)])]))
        return (settings.vocabulary * summed[:-1] / summed[-1].clamp(min=1.0)).clamp(min=1e-12).log()

    def initial() -> nn.Module:
        dvae = _seeded(lambda: Dvae(settings), training.seed)
        # Rows thinned by their weight are holes: look further for as many pictures.
        within = (0, 20 * INITIALISE_PICTURES)
        rows = list(islice(reader.rows(*within), INITIALISE_PICTURES)) if settings.logit_std is not None else []
        if rows:
            dvae.initialise_on(images(rows, crop=training.random_crops, flip=training.flips))
        return dvae

    shown_rows, on = _fixed_rows(reader, max(training.evaluate_pictures, SHEET_PICTURES))
    shown_BCHW = images(shown_rows, crop=False, flip=False)

    def evaluate(model: Dvae, step: int) -> dict[str, Any]:
        tau = half_cosine(step, settings.tau_start, settings.tau_end, settings.tau_steps)
        begin, end = worker.part(min(training.evaluate_pictures, len(shown_BCHW)))
        mine: list[DvaeEvaluation] = []
        for first in range(begin, end, EVALUATION_BATCH):
            some_BCHW = shown_BCHW[first : min(first + EVALUATION_BATCH, end)].to(worker.device)
            seeds = [derived_seed("evaluate", training.seed, first + i) for i in range(len(some_BCHW))]
            mine.append(_on_cpu(evaluate_batch(model, some_BCHW, tau, seeds)))
        parts = [part for of_rank in worker.gather(mine) for part in of_rank]
        if not parts:
            return {}
        perplexity, used = perplexity_and_used(torch.cat([part.codes_BN for part in parts]), settings.vocabulary)
        hard = _mean([part.hard_nats_per_dim_B for part in parts])
        relaxed = _mean([part.relaxed_nats_per_dim_B for part in parts])
        return {
            "on": on,
            "pictures": sum(len(part.codes_BN) for part in parts),
            "psnr_db": _mean([psnr_db(part.mse_B) for part in parts]),
            "bits_per_dim": _mean([part.hard_bits_per_dim_B for part in parts]),
            "hard_nats_per_dim": hard,
            "relaxed_nats_per_dim": relaxed,
            "hard_minus_relaxed_nats_per_dim": hard - relaxed,
            "kl_nats_per_picture": _mean([part.kl_B for part in parts]),
            "perplexity": perplexity,
            "used_fraction": used,
            "tau": tau,
        }

    def sheet(model: Dvae) -> bytes | None:
        begin, end = worker.part(len(shown_BCHW[:SHEET_PICTURES]))
        some_BCHW = shown_BCHW[begin:end].to(worker.device)
        mine: Any = to_pixels(model.decode(model.encode(some_BCHW))) if len(some_BCHW) else []
        drawn = [pixels for of_rank in worker.gather(mine) for pixels in of_rank]
        if worker.rank:
            return None
        rows = [[Cell(pixels) for pixels in to_pixels(shown_BCHW[:SHEET_PICTURES])], [Cell(pixels) for pixels in drawn]]
        return draw_sheet(rows, f"{on.replace('_', ' ')} pictures, and below them what is left of them in codes")

    return Learning(
        build=lambda: Dvae(settings),
        initial=initial,
        about={"kind": "dvae", "settings": asdict(settings)},
        tokens=settings.grid**2,
        measures=("nats_per_dim", "distortion_nats", "kl_nats", "usage"),
        objective={"nats_per_dim": 1.0, "usage": settings.usage},
        batch=batch,
        filler=filler,
        measure=measure,
        evaluate=evaluate,
        sheet=sheet,
    )


def learn_transformer(job: Job, into: Store, snapshot: Snapshot, worker: Worker) -> Learning:
    """The transformer on captions and codes of TOKENS (paper, §2.2)."""
    assert isinstance(job.model, TransformerSettings)
    assert isinstance(job.training, TransformerTrainSettings)
    settings, training = job.model, job.training
    dvae, tokenizer = load_tokenizer(into.location)
    dvae.to(worker.device)
    bpe = into.read(BPE)
    captions = CaptionTokenizer.from_json(bpe.decode())
    reader = codes_reader(open_store(job.source), snapshot, training.seed, tokenizer)
    T = settings.text_positions

    def prepared(text_BT: Tensor, codes_BN: Tensor, *, is_filler: bool = False) -> Batch:
        counts = {"text_nats_per_token": int((text_BT[:, 1:] != PAD).sum()), "image_nats_per_code": codes_BN.numel()}
        return Batch((text_BT, codes_BN), _counts(counts, is_filler), is_filler)

    def batch(start: int, stop: int) -> Batch | None:
        rows = list(reader.rows(start, stop))
        if not rows:
            return None
        texts = []
        for row in rows:
            is_dropped = derived_share("caption", training.seed, row.position) < settings.caption_dropout
            texts.append("" if is_dropped else row.caption)
        seeds = [derived_seed("bpe", training.seed, row.position) for row in rows]
        return prepared(captions.encode(texts, T, dropout=settings.bpe_dropout, seeds=seeds), codes_of(rows))

    def filler() -> Batch:
        codes_BN = torch.zeros(1, settings.image_positions, dtype=torch.int64)
        return prepared(captions.encode([""], T), codes_BN, is_filler=True)

    def measure(forward: Callable[..., Any], of: Batch, step: int) -> Totals:
        text_BT, codes_BN = (part.to(worker.device, non_blocking=True) for part in of.inputs)
        loss = forward(text_BT, codes_BN)
        return {"text_nats_per_token": loss.text_nats_B.sum(), "image_nats_per_code": loss.image_nats_B.sum()}

    shown_rows, on = _fixed_rows(reader, training.evaluate_pictures)
    prompts = list(training.prompts) or _fixed_prompts(reader)

    def evaluate(model: Transformer, step: int) -> dict[str, Any]:
        if not shown_rows:
            return {}
        texts = [row.caption for row in shown_rows]
        scored = {
            "right": _score(model, captions, texts, shown_rows, worker),
            "shuffled": _score(model, captions, texts[1:] + texts[:1], shown_rows, worker),
            "none": _score(model, captions, [""] * len(texts), shown_rows, worker),
        }
        image = {name: nats for name, (nats, _) in scored.items()}
        return {
            "on": on,
            "pictures": len(shown_rows),
            "image_nats_per_code": image,
            "information_gain_nats_per_code": image["shuffled"] - image["right"],
            "text_nats_per_token": scored["right"][1],
        }

    def sheet(model: Transformer) -> bytes | None:
        begin, end = worker.part(len(prompts))
        mine: Any = []
        if end > begin:
            text_BT = captions.encode(prompts[begin:end], T).to(worker.device)
            seeds = [derived_seed("sheet", training.seed, number) for number in range(begin, end)]
            mine = to_pixels(dvae.decode(sample(model, text_BT, job.sampling, seeds)))
        drawn = [pixels for of_rank in worker.gather(mine) for pixels in of_rank]
        if worker.rank:
            return None
        cells = [Cell(pixels, prompt) for pixels, prompt in zip(drawn, prompts, strict=True)]
        half = -(-len(cells) // 2)
        return draw_sheet(
            [cells[:half], cells[half:]],
            f"the same prompts and seeds at every checkpoint, temperature {job.sampling.temperature}",
        )

    objective = {
        "text_nats_per_token": settings.text_loss_share,
        "image_nats_per_code": 1.0 - settings.text_loss_share,
    }
    return Learning(
        build=lambda: Transformer(settings),
        initial=lambda: _seeded(lambda: Transformer(settings), training.seed),
        about={"kind": "transformer", "settings": asdict(settings), "bpe": sha256(bpe), "tokenizer": tokenizer},
        tokens=settings.text_positions + settings.image_positions,
        measures=tuple(objective),
        objective=objective,
        batch=batch,
        filler=filler,
        measure=measure,
        evaluate=evaluate,
        sheet=sheet,
    )


LEARN = {"tokenizer": learn_tokenizer, "transformer": learn_transformer}


def check_fit(job: Job) -> None:
    """Raises UsageError if the transformer's sizes are not those of the tokenizer that made the codes."""
    assert isinstance(job.model, TransformerSettings)
    dvae, _ = load_tokenizer(job.source)
    for name, mine, its in (
        ("grid", job.model.grid, dvae.grid),
        ("image_vocabulary", job.model.image_vocabulary, dvae.vocabulary),
    ):
        if mine != its:
            raise UsageError(
                f"transformer.{name} is {mine}, but the tokenizer that made {job.source} has {its}.",
                f"Add --set transformer.{name}={its}, or tokenize the pairs with a tokenizer of that size.",
            )


def make_bpe(job: Job, into: Store, snapshot: Snapshot) -> None:
    """Trains the BPE on the captions that are trained on, once: bpe.json, if absent."""
    assert isinstance(job.model, TransformerSettings)
    if into.stat(BPE) is None:
        reader = codes_reader(open_store(job.source), snapshot, job.training.seed, tokenizer_digest(into.location))
        captions = (row.caption for row in reader.in_file_order(TRAIN, BPE_CAPTIONS))
        into.put(BPE, train_bpe(captions, job.model.text_vocabulary).to_json().encode())


def images_of(pixels_BHWC: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """images_BCHW, float32 in [0, 1]."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float().div_(255.0)


def codes_of(rows: Sequence[Row[Codes]]) -> Tensor:
    """codes_BN, int64."""
    return torch.from_numpy(np.stack([row.payload for row in rows]).astype(np.int64))


def _tokenizer_training(job: Job) -> TokenizerTrainSettings:
    assert isinstance(job.training, TokenizerTrainSettings)
    return job.training


def _seeded(make: Callable[[], T], seed: int) -> T:
    # The initial weights' generator is torch's global one: borrowed, and given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("weights", seed))
        return make()


def _fixed_rows(reader: Reader[T], count: int) -> tuple[list[Row[T]], str]:
    rows = list(reader.held_out(count))
    if rows:
        return rows, HELD_OUT
    return list(reader.in_file_order(TRAIN, count)), TRAIN  # too few pictures for the split by hash


def _fixed_prompts(reader: Reader[Codes]) -> list[str]:
    held_out = [row.caption for row in reader.held_out(SHEET_PICTURES // 2)]
    trained = [row.caption for row in reader.in_file_order(TRAIN, SHEET_PICTURES - len(held_out))]
    return trained + held_out


def _mean(parts_B: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts_B)).double().mean())


def _counts(counts: dict[str, int], is_filler: bool) -> dict[str, float]:
    return {name: 0.0 if is_filler else float(count) for name, count in counts.items()}


def _on_cpu(evaluation: DvaeEvaluation) -> DvaeEvaluation:
    return DvaeEvaluation(**{name: value.cpu() for name, value in vars(evaluation).items()})


@torch.no_grad()
def _score(
    model: Transformer, captions: CaptionTokenizer, texts: Sequence[str], rows: Sequence[Row[Codes]], worker: Worker
) -> tuple[float, float]:
    """(nats a code, nats a text token) of the rows' codes under other texts; each rank scores a part of them."""
    totals = torch.zeros(4, dtype=torch.float64, device=worker.device)
    begin, end = worker.part(len(rows))
    for first in range(begin, end, EVALUATION_BATCH):
        some = slice(first, min(first + EVALUATION_BATCH, end))
        codes_BN = codes_of(rows[some]).to(worker.device)
        text_BT = captions.encode(texts[some], model.settings.text_positions).to(worker.device)
        loss = model(text_BT, codes_BN)
        counts = (codes_BN.numel(), loss.text_tokens_B.sum())
        sums = (loss.image_nats_B.double().sum(), loss.text_nats_B.double().sum())
        totals += torch.stack([torch.as_tensor(number, device=worker.device).double() for number in (*sums, *counts)])
    image_nats, text_nats, codes, tokens = worker.sum(totals).tolist()
    return image_nats / codes, text_nats / tokens
