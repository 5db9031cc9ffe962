"""Snapshots: what a training run reads, pinned when it starts. PAIRS and TOKENS grow, a run's data does not.

A snapshot names the receipts by digest, their data files, and the groups of rows that the reader (ops/reader.py)
permutes, with the number of rows selected in each. It is written once, only if absent; a resume reads it again, so
shards that came later change nothing. May not live here: the order of rows, and what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from infra.store import Store
from ops.drops import list_drops
from ops.errors import StorageError, UsageError
from ops.reasons import SUCCESS
from ops.recipes import RECIPE, canonical_json, parse_json, read_json, sha256
from ops.shards import FileRef, Receipt, read_receipts, read_table

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
SNAPSHOT = "snapshot.json"
TRAIN, HELD_OUT = "train", "held_out"
PICTURE_GROUP_ROWS = 256
"""Rows of a pair shard that are read together, about 10 MB of JPEGs at 384 px: many such groups fit in a window."""

Kind = Literal["pictures", "codes"]
Where = Mapping[str, str | list[str]]


class Group(NamedTuple):
    """Consecutive rows of one shard's Parquet file, read together.

    `first` and `rows` count rows of the file; `train` and `held_out` are how many of them are selected. `crop` is the
    k that all codes of the group have (0 for pictures).
    """

    first: int
    rows: int
    train: int
    held_out: int
    crop: int = 0


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a shard, packed: a large snapshot has a million of them.

    >>> list(Groups.of([Group(0, 256, 250, 6), Group(256, 100, 99, 1)]))[1]
    Group(first=256, rows=100, train=99, held_out=1, crop=0)
    """

    packed: bytes = field(repr=False)

    @classmethod
    def of(cls, groups: Iterable[Iterable[int]]) -> Groups:
        """The numbers of each, in the order of the fields of `Group`."""
        return cls(np.array([*groups], np.int32).tobytes())

    @property
    def table(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """int32 [groups, fields of Group]."""
        return np.frombuffer(self.packed, np.int32).reshape(-1, len(Group._fields))

    def __iter__(self) -> Iterator[Group]:
        return map(Group._make, self.table.tolist())

    def __len__(self) -> int:
        return len(self.packed) // (4 * len(Group._fields))


@dataclass(frozen=True, slots=True)
class PinnedShard:
    """One shard as it stood when the snapshot was taken."""

    shard: int
    generation: int
    receipt: str
    files: dict[str, FileRef]
    groups: Groups

    def as_dict(self) -> dict[str, Any]:
        """What `of_dict` reads."""
        return {
            "shard": self.shard,
            "generation": self.generation,
            "receipt": self.receipt,
            "files": {name: vars(ref) for name, ref in self.files.items()},
            "groups": [group._asdict() for group in self.groups],
        }

    @classmethod
    def of_dict(cls, found: Mapping[str, Any]) -> PinnedShard:
        """The shard that `as_dict` told of."""
        files = {name: FileRef(**ref) for name, ref in found["files"].items()}
        groups = Groups.of([group[name] for name in Group._fields] for group in found["groups"])
        return cls(found["shard"], found["generation"], found["receipt"], files, groups)


@dataclass(frozen=True)
class Snapshot:
    """The data of one run: pinned shards, the selection, and the drop lists that were known.

    `where` maps columns of the lists to the value, or values, that a row must have. `crops` is K, the crops a picture
    has in a token shard (1 for pictures). `tokenizer` is the digest of the one that made the codes. `drops` are the
    keys of the drop lists at that time: a record only, since a reader honours later ones too.
    """

    kind: Kind
    where: dict[str, str | list[str]]
    crops: int
    tokenizer: str | None
    shards: tuple[PinnedShard, ...]
    drops: tuple[str, ...]

    def to_json(self) -> bytes:
        """Equal snapshots give equal bytes."""
        told = {name: getattr(self, name) for name in ("kind", "where", "crops", "tokenizer", "drops")}
        # Shard by shard, for as objects of Python the groups of all shards take ten times the memory of their text.
        # Keys are sorted, so the first "shards":[] is ours; within a string its quotes would be escaped.
        before, empty, after = canonical_json({"format": FORMAT, **told, "shards": []}).partition(b'"shards":[]')
        return b"".join([before, empty[:-1], b",".join(canonical_json(s.as_dict()) for s in self.shards), b"]", after])

    @property
    def digest(self) -> str:
        """sha256 of the snapshot's bytes."""
        return sha256(self.to_json())

    def rows(self, split: str = TRAIN) -> int:
        """Selected rows of a split, each picture counted once however many crops it has."""
        at, crop = Group._fields.index(split), Group._fields.index("crop")
        return sum(int(table[table[:, crop] == 0, at].sum()) for table in (shard.groups.table for shard in self.shards))


def source_fingerprint(source: Store, stage: str | None = None) -> str:
    """What a growing stage is made with, as one digest. Stays the same while the stage grows.

    Raises UsageError if there is no such stage, or it is not of the `stage` that is asked for.
    """
    if source.stat(RECIPE) is None:
        raise UsageError(f"{source.location} holds no pairs and no tokens.", "Ingest, or tokenize, into it first.")
    recipe = read_json(source, RECIPE)
    if stage not in (None, recipe["stage"]):
        raise UsageError(
            f"{source.location} holds {recipe['stage']}, not {stage}.",
            "The tokenizer is trained on pairs, the transformer on tokens: name the other directory.",
        )
    return sha256(canonical_json({"stage": recipe["stage"], **recipe["identity"], **recipe["inputs"]}))


def read_snapshot(into: Store) -> Snapshot:
    """The pinned snapshot of a trained stage. Raises FileNotFoundError, UnknownFormat."""
    place = f"{into.location}/{SNAPSHOT}"
    found = parse_json(into.read(SNAPSHOT), place, FORMAT, _pinned)
    shards = tuple(found["shards"])
    return Snapshot(found["kind"], found["where"], found["crops"], found["tokenizer"], shards, tuple(found["drops"]))


def _pinned(part: dict[str, Any]) -> PinnedShard | dict[str, Any]:
    # While the text is parsed: of one shard at a time the groups are objects of Python.
    return PinnedShard.of_dict(part) if part.keys() == _SHARD_KEYS else part


_SHARD_KEYS = {"shard", "generation", "receipt", "files", "groups"}


def take_snapshot(source: Store, kind: Kind, where: Where) -> Snapshot:
    """Looks at every committed shard of `source` and counts what `where` selects.

    Raises UsageError for a column that `where` names and the lists did not have, or if nothing is selected;
    StorageError for a shard whose codes another tokenizer made.
    """
    receipts = read_receipts(source)
    recipe = read_json(source, RECIPE)
    crops, tokenizer = 1, None
    if kind == "codes":
        crops, tokenizer = recipe["identity"]["tokens"]["crops"], recipe["inputs"]["tokenizer"]
        check_tokenizer(source, receipts, tokenizer)
    with ThreadPoolExecutor(16) as pool:
        shards = tuple(pool.map(lambda receipt: _pin(source, receipt, kind, where, crops), receipts.values()))
    drops = tuple(list_drops(source))
    snapshot = Snapshot(kind, dict(where), crops, tokenizer, shards, drops)
    if not snapshot.rows():
        narrowed = f" where {dict(where)}" if where else ""
        raise UsageError(
            f"{source.location} has no {kind} to train on{narrowed}.",
            "Look at `armchair status`: are shards committed, and pairs kept? Check `where` and the column split.",
        )
    return snapshot


def check_tokenizer(source: Store, receipts: Mapping[int, Receipt], tokenizer: str) -> None:
    """Raises StorageError for a token shard whose codes were made by another tokenizer than `tokenizer` (digest)."""
    for receipt in receipts.values():
        made_by = receipt.made_from["tokenizer"]
        if made_by != tokenizer:
            raise StorageError(
                f"{source.location}: the codes of shard {receipt.shard:05d} were made by tokenizer {made_by[:16]}, "
                f"not by {tokenizer[:16]}.",
                "Codes mean nothing to another tokenizer: tokenize the pairs again into another directory.",
            )


def _pin(source: Store, receipt: Receipt, kind: Kind, where: Where, crops: int) -> PinnedShard:
    columns = ["split", *where] + (["status"] if kind == "pictures" else [])
    known = read_schema_names(source, receipt)
    if missing := [name for name in where if name not in known]:
        raise UsageError(f"where: the lists had no column {missing[0]!r}.", f"Columns: {', '.join(sorted(known))}.")
    table = read_table(source, receipt, columns=columns)
    masks = {split: selection(table, where, split) for split in (TRAIN, HELD_OUT)}
    if kind == "pictures":
        sizes = [min(PICTURE_GROUP_ROWS, receipt.rows - at) for at in range(0, receipt.rows, PICTURE_GROUP_ROWS)]
    else:
        sizes = list(receipt.row_groups)
    groups, first = [], 0
    per_crop = len(sizes) // crops
    for number, rows in enumerate(sizes):
        train, held_out = (int(masks[split][first : first + rows].sum()) for split in (TRAIN, HELD_OUT))
        groups.append(Group(first, rows, train, held_out, number // per_crop if kind == "codes" else 0))
        first += rows
    return PinnedShard(receipt.shard, receipt.generation, receipt.digest, dict(receipt.files), Groups.of(groups))


def read_schema_names(source: Store, receipt: Receipt) -> set[str]:
    """The columns of a shard's Parquet file."""
    import pyarrow.parquet as pq

    filesystem, root = source.arrow()
    with filesystem.open_input_file(f"{root}/{receipt.files['parquet'].key}") as file:
        return set(pq.read_schema(file).names)


def selection(table: pa.Table, where: Where, split: str) -> Any:
    """bool [rows]: kept, of this split, and with the values that `where` asks for (compared as text)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    mask = pc.equal(table["split"], split)
    if "status" in table.column_names:
        mask = pc.and_(mask, pc.equal(table["status"], SUCCESS))
    for name, wanted in where.items():
        values = [wanted] if isinstance(wanted, str) else list(wanted)
        column = pc.cast(table[name], pa.string())
        mask = pc.and_(mask, pc.is_in(column, value_set=pa.array(values, pa.string())))
    return pc.fill_null(mask, False).to_numpy()
