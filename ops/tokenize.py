"""Pictures to codes: one token shard for each pair shard, K recorded crops a picture, committed like any shard.

The crop's randomness comes from (seed, uid, k), so shards and rows may move. A pair shard that got a new generation
gives its token shard one too: codes of unchanged uids are copied, only new pictures are encoded. What is down (a drop
list of PAIRS or TOKENS names it) is not encoded. TOKENS carries the tokenizer that made it, and the drop lists. May
not live here: captions as tokens (the BPE belongs to the transformer).
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from infra.store import Store, absolute, open_store
from ops.attempts import Attempt
from ops.drops import Drops, copy_drops, read_drops
from ops.encoder import ENCODE_BATCH, Encoding, encode_batch, frozen_tokenizer
from ops.errors import DamagedArtifact, UsageError
from ops.pictures import decode_stored, transformer_crop
from ops.reasons import SUCCESS
from ops.recipes import sha256, start_stage, versions
from ops.seeds import derived_seed
from ops.shards import (
    Receipt,
    download,
    publish,
    read_receipt,
    read_receipts,
    read_verified,
    receipt_key,
    scratch_directory,
    sidecar_schema,
)
from ops.snapshot import source_fingerprint
from ops.trained import check_finished, freeze_tokenizer, tokenizer_digest
from ops.waves import Actors, ShardOutcome, Tick, drive, raise_if_cancelled

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

A = TypeVar("A")
B = TypeVar("B")

ROW_GROUP_ROWS = 1024
"""Rows of one crop that are read together: 2 MB at 1,024 codes a picture."""
AHEAD = 2 * ENCODE_BATCH
"""Crops that may be decoded and not yet encoded: 25 MB at 256 pixels."""
DECODE_TOGETHER = 8
"""Crops that a thread makes before it hands them over; a hand-over takes as long as decoding a thumbnail."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TokensSettings:
    """How pictures become codes. All of it bears identity."""

    crops: Annotated[int, Field(ge=1)] = 1
    """Crops of each picture that are encoded, K; epoch e of training reads crop e mod K."""
    random_crops: bool = True
    """Near-centre random crops (paper, App. A.2, listing 2); off: the central square, and crops must be 1."""
    seed: int = 0
    """Seed of the crops, together with the picture's uid and the crop's number."""

    @model_validator(mode="after")
    def _crops_differ(self) -> Self:
        if self.crops > 1 and not self.random_crops:
            raise ValueError("crops > 1 would repeat the central square: set random_crops = true, or crops = 1")
        return self


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Encoders:
    """The workers that encode, Ray actors that load the tokenizer once. None of it bears identity."""

    actors: Annotated[int, Field(ge=1)] | None = None
    """How many. Unset: one for each GPU of the cluster, or for each group of `threads` CPUs; never more than shards."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPUs of an actor, all of one node. Unset: a node's CPUs shared among its GPUs, at most 8; without GPUs at most 4,
    since each actor holds a model and a batch of pictures."""
    gpu: bool = False
    """One GPU for each actor, which then encodes in bfloat16 where that gives the codes of float32."""


@plain_dataclass(frozen=True)
class TokenizeTask:
    """One shard to do: everything a worker needs to know, and small. `pairs_receipt` is the digest of what is read."""

    pairs: str
    tokens: str
    shard: int
    generation: int
    pairs_generation: int
    pairs_receipt: str
    tokenizer: str
    settings: TokensSettings
    run: str = ""


def start_tokens(pairs: str, tokenizer: str, tokens: str, settings: TokensSettings) -> None:
    """Writes TOKENS/recipe.json, or checks that it says the same; freezes the tokenizer and takes over the drop lists.

    Raises RecipeChanged for other settings, other PAIRS or another tokenizer (one that was trained on, too), and
    UsageError for a tokenizer whose training has not ended: its codes would be worth nothing when it has.
    """
    into = open_store(tokens)
    check_finished(tokenizer)
    inputs = {"pairs": source_fingerprint(open_store(pairs)), "tokenizer": tokenizer_digest(tokenizer)}
    ways_out = "Codes of two tokenizers can't be mixed. Use another --into, or the old values."
    start_stage(into, "tokens", {"tokens": asdict(settings)}, inputs, ways_out, {"pairs": absolute(pairs)})
    freeze_tokenizer(tokenizer, into)
    copy_drops(open_store(pairs), into)


def pending_tasks(pairs: str, tokens: str, settings: TokensSettings) -> list[TokenizeTask]:
    """The pair shards whose latest receipt is not named by our latest one, in the order of shards."""
    pairs, tokens = absolute(pairs), absolute(tokens)
    ours = read_receipts(open_store(tokens))
    tokenizer, run = tokenizer_digest(tokens), secrets.token_hex(6)
    tasks = []
    for shard, receipt in read_receipts(open_store(pairs)).items():
        done = ours.get(shard)
        if done is None or done.made_from["pairs"] != receipt.digest:
            generation = done.generation + 1 if done else 0
            tasks.append(
                TokenizeTask(
                    pairs, tokens, shard, generation, receipt.generation, receipt.digest, tokenizer, settings, run
                )
            )
    return tasks


def tokenize(
    tokens: str,
    tasks: Sequence[TokenizeTask],
    encoders: Encoders,
    tick: Tick = lambda in_flight: None,
) -> Iterator[ShardOutcome]:
    """Runs tasks of `pending_tasks` on actors of the connected Ray; one outcome each, in the order of their ends.

    Raises UsageError if GPUs are asked for and the cluster has none.
    """
    if not tasks:
        return
    count, threads = workers_for(encoders, len(tasks))
    work = partial(_tokenize_in_actor, threads=threads, gpu=encoders.gpu)
    with Actors(work, "tokenize", count, num_cpus=threads, num_gpus=int(encoders.gpu)) as actors:
        yield from drive(tasks, actors, open_store(tokens), "tokens", count, tick)


def workers_for(encoders: Encoders, shards: int) -> tuple[int, int]:
    """(actors, CPUs of each) on the nodes of the connected Ray. Raises UsageError if it can hold none."""
    import ray

    kind, most = ("GPU", 8) if encoders.gpu else ("CPU", 4)
    nodes = [
        (node.get("CPU", 0.0), node.get(kind, 0.0)) for node in (n["Resources"] for n in ray.nodes() if n["Alive"])
    ]
    nodes = [(cpus, kinds) for cpus, kinds in nodes if cpus >= 1 and kinds >= 1]
    shares = [int(cpus // (kinds if encoders.gpu else 1)) for cpus, kinds in nodes]
    threads = encoders.threads or max(1, min([most, *shares]))
    fit = sum(int(min(cpus // threads, kinds)) for cpus, kinds in nodes)
    if not fit and not encoders.actors:  # with a number, a cluster that grows may yet find room for them
        what = f"No node of the connected Ray has a {kind} and {threads} CPUs for an actor that encodes."
        raise UsageError(what, "Tokenize without --gpu, or with fewer threads, or add a node.")
    return min(encoders.actors or fit, shards), threads


def _tokenize_in_actor(task: TokenizeTask, threads: int, gpu: bool) -> ShardOutcome:
    import torch

    torch.set_num_threads(threads)
    if gpu:
        return tokenize_shard(task, threads, "cuda", half=True)
    # Decoding is the smaller part, and more threads than CPUs keep the encoder's waiting for each other.
    return tokenize_shard(task, max(1, threads // 4))


def tokenize_shard(task: TokenizeTask, threads: int = 1, device: str = "cpu", half: bool = False) -> ShardOutcome:
    """Encodes one pair shard and commits it. The same pictures and tokenizer give the same bytes on one kind of device.

    `threads` decode ahead of the encoder; `half` lets it use bfloat16 where that changes next to nothing.

    Raises DamagedArtifact for a pair shard whose bytes are not those of its receipt.
    """
    import torch

    started_s = time.monotonic()
    store, source = open_store(task.tokens), open_store(task.pairs)
    if store.stat(receipt_key(task.shard, task.generation)):
        there = read_receipt(store, task.shard, task.generation)
        return ShardOutcome(task.shard, task.generation, "already", there.rows, there.kept)
    with Attempt(store, "tokens", task.shard, task.generation, task.run) as attempt, scratch_directory() as scratch:
        pairs = read_receipt(source, task.shard, task.pairs_generation)
        if pairs.digest != task.pairs_receipt:
            place = f"{task.pairs}/{pairs.key}"
            raise DamagedArtifact(place, f"sha256 {task.pairs_receipt}", f"sha256 {pairs.digest}")
        for extension, ref in pairs.files.items():
            download(source, ref, scratch / extension)
        rows, left_out = _rows_to_encode(scratch / "parquet", read_drops(source) | read_drops(store))
        dvae = frozen_tokenizer(task.tokens, task.tokenizer, device)
        encoding = Encoding(dvae, torch.bfloat16 if half else None)
        earlier = _earlier(store, task)
        crops, codes = _codes_of_shard(task, rows, scratch / "tar", earlier, attempt, encoding, threads)
        row_groups = _write(scratch / "codes.parquet", rows, crops, codes)
        receipt = Receipt(
            "tokens",
            task.shard,
            task.generation,
            {"pairs": task.pairs_receipt, "tokenizer": task.tokenizer, **left_out},
            rows=rows.num_rows,
            kept=rows.num_rows,
            row_groups=row_groups,
            versions=versions() | _encoder_of(encoding, device),
        )
        won = publish(store, receipt, {"parquet": scratch / "codes.parquet"}, started_s=attempt.started_s)
        state: Literal["committed", "already"] = "committed" if won else "already"
        agreement = encoding.agreement
        attempt.end(state, rows=rows.num_rows, **({"agreement": agreement} if half else {}))
    seconds, n = round(time.monotonic() - started_s, 3), rows.num_rows
    return ShardOutcome(task.shard, task.generation, state, n, n, seconds=seconds, agreement=agreement)


def _encoder_of(encoding: Encoding, device: str) -> dict[str, str]:
    """For the receipt: what rounds otherwise than float32 on a CPU."""
    if device == "cpu" and encoding.agreement is None:
        return {}
    return {"encoder": f"{device}, {'bfloat16' if encoding.half else 'float32'}"}


Crop = tuple[float, float, float]
Codes = np.ndarray[Any, np.dtype[np.uint16]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Earlier = dict[tuple[str, int], tuple[Crop, Codes]]


def _rows_to_encode(sidecar: Path, drops: Drops) -> tuple[pa.Table, dict[str, str]]:
    """(rows that are kept and not down; the digest of the uids that are, for the receipt: why there are fewer)."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(sidecar) as file:
        table = file.read()
    table = table.filter(pc.equal(table["status"], SUCCESS))
    is_down = pa.array(drops.mask(table))
    down = table.filter(is_down)["uid"].to_pylist()
    return table.filter(pc.invert(is_down)), {"without": sha256("\n".join(down).encode())} if down else {}


def _earlier(store: Store, task: TokenizeTask) -> Earlier:
    """(uid, k) -> (crop, codes) of the generation before, if the same tokenizer made it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if task.generation == 0:
        return {}
    before = read_receipt(store, task.shard, task.generation - 1)
    if before.made_from["tokenizer"] != task.tokenizer:
        return {}
    with pq.ParquetFile(pa.BufferReader(read_verified(store, before.files["parquet"]))) as file:
        table = file.read(columns=["uid", "k", "crop", "codes"])
    codes_MN = _matrix(table["codes"], table.num_rows)
    crops = [(crop["x"], crop["y"], crop["side"]) for crop in table["crop"].to_pylist()]
    keys = zip(table["uid"].to_pylist(), table["k"].to_pylist(), strict=True)
    return {key: (crops[i], codes_MN[i]) for i, key in enumerate(keys)}


def _matrix(column: pa.ChunkedArray, rows: int) -> Codes:
    matrix: Codes = column.combine_chunks().flatten().to_numpy().reshape(rows, column.type.list_size)
    return matrix


def _codes_of_shard(
    task: TokenizeTask,
    rows: pa.Table,
    tar: Path,
    earlier: Earlier,
    attempt: Attempt,
    encoding: Encoding,
    threads: int,
) -> tuple[list[list[Crop]], list[Codes]]:
    """For each k: the crops of all rows, and their codes [rows, N] (uint16). Threads decode what is encoded next."""
    dvae, settings = encoding.dvae, task.settings
    uids = rows["uid"].to_pylist()
    places = list(zip(rows["tar_offset"].to_pylist(), rows["jpg_size"].to_pylist(), strict=True))
    crops: list[list[Crop]] = [[(0.0, 0.0, 0.0)] * len(uids) for _ in range(settings.crops)]
    codes = [np.zeros((len(uids), dvae.grid**2), np.uint16) for _ in range(settings.crops)]
    new = []
    for row, uid in enumerate(uids):
        if all((uid, k) in earlier for k in range(settings.crops)):
            for k in range(settings.crops):
                crops[k][row], codes[k][row] = earlier[uid, k]
        else:
            new.append(row)

    def decode(some: Sequence[int]) -> list[tuple[int, int, Pixels, Crop]]:
        made = []
        for row in some:
            offset, size = places[row]
            try:
                picture = decode_stored(os.pread(file.fileno(), size, offset))
            except ValueError as error:
                raise DamagedArtifact(f"{task.pairs}, picture {uids[row]}", "a sound JPEG", str(error)) from error
            for k in range(settings.crops):
                rng = np.random.default_rng(derived_seed("crop", settings.seed, uids[row], k))
                made.append((row, k, *transformer_crop(picture, dvae.image_size, rng, crop=settings.random_crops)))
        return made

    def keep(batch: list[tuple[int, int, Pixels, Crop]], codes_BN: Tensor) -> None:
        for (row, k, _, crop), codes_N in zip(batch, codes_BN.cpu().numpy().astype(np.uint16), strict=True):
            crops[k][row], codes[k][row] = crop, codes_N
        attempt.rows_done = batch[-1][0]

    together = max(1, DECODE_TOGETHER // settings.crops)
    before: tuple[list[tuple[int, int, Pixels, Crop]], Tensor] | None = None
    size = encode_batch(dvae.settings, next(dvae.parameters()).device.type)
    limit = max(1, AHEAD // (together * settings.crops))
    with tar.open("rb") as file, closing(ahead(decode, _groups(new, together), threads, limit)) as decoded:
        for batch in _groups(chain.from_iterable(decoded), size):
            raise_if_cancelled()
            under_way = encoding(np.stack([pixels for _, _, pixels, _ in batch]))
            if before:  # what the device did while this batch was put together
                keep(*before)
            before = batch, under_way
    if before:
        keep(*before)
    return crops, codes


def ahead(work: Callable[[A], B], items: Iterable[A], threads: int, limit: int) -> Generator[B, None, None]:
    """`work` of each item, in their order, done by threads before it is asked for: at most `limit` at a time are begun
    and not taken. What `work` raises is raised where its result would be."""
    waiting = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        begun = deque(pool.submit(work, item) for item in islice(waiting, limit))
        try:
            while begun:
                done = begun.popleft().result()
                begun.extend(pool.submit(work, item) for item in islice(waiting, 1))
                yield done
        finally:
            for future in begun:
                future.cancel()


def _groups(items: Iterable[A], size: int) -> Iterator[list[A]]:
    waiting = iter(items)
    while group := list(islice(waiting, size)):
        yield group


def _write(path: Path, rows: pa.Table, crops: list[list[Crop]], codes: list[Codes]) -> tuple[int, ...]:
    """The token shard: all rows of crop 0, then of crop 1, …; each row group holds one k. Returns rows a group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    own = ["uid", "key", "caption"]
    users = [name for name in rows.column_names if name not in sidecar_schema().names]
    crop_type = pa.struct([("x", pa.float32()), ("y", pa.float32()), ("side", pa.float32())])
    positions = codes[0].shape[1]
    tables = []
    for k in range(len(codes)):
        columns = {name: rows[name] for name in own}
        columns["crop"] = pa.array([dict(zip("xy", c[:2], strict=True), side=c[2]) for c in crops[k]], crop_type)
        columns["k"] = pa.array(np.full(rows.num_rows, k, np.int32))
        columns["codes"] = pa.FixedSizeListArray.from_arrays(pa.array(codes[k].reshape(-1)), positions)
        columns |= {name: rows[name] for name in ["split", "weight", *users]}
        tables.append(pa.table(columns))
    groups = []
    with pq.ParquetWriter(path, tables[0].schema, compression="zstd") as writer:
        for table in tables:
            for first in range(0, table.num_rows, ROW_GROUP_ROWS):
                part = table.slice(first, ROW_GROUP_ROWS).combine_chunks()
                writer.write_table(part, row_group_size=ROW_GROUP_ROWS)
                groups.append(part.num_rows)
    return tuple(groups)
