"""Shards: how pair shards and token shards are written, committed and found. A shard exists iff its receipt exists.

    data/00012-<sha256[:16]>.tar|.parquet   content-addressed, so a late writer can never overwrite a committed file
    receipts/00012.g0.json                  the commit: written last, only if absent; names its files, sizes, digests

Readers start from receipts, take the highest generation and never glob data files. The same rows give the same bytes:
no times, no host names, no order of arrival. May not live here: what a row means (ops/ingest.py, ops/tokenize.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra.store import Store
from ops.errors import DamagedArtifact, StorageError
from ops.recipes import file_sha256, parse_sealed, seal, sha256

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
GRACE_S = 24 * 3600.0
"""Sweep leaves alone what is younger (INGEST.md §6); an attempt older than half of it must not commit any more."""

_SCRATCH = "armchair-shard-"
_RECEIPT = re.compile(r"receipts/(\d{5,})\.g(\d+)\.json")


@dataclass(frozen=True)
class FileRef:
    """One data file as its receipt names it."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """The commit of one generation of one shard.

    `made_from` holds digests of the inputs (a pair shard: `work_order`, and from generation 1 on `generation`, the
    receipt it grew out of; a token shard: `pairs`, `tokenizer`). `rows` = `kept` + the sum of `rejected`. `files` maps
    the file's extension (`tar`, `parquet`) to its reference. `row_groups` are the rows of each Parquet row group, for
    readers that count positions without opening the file.
    """

    stage: Literal["pairs", "tokens"]
    shard: int
    generation: int
    made_from: dict[str, str]
    rows: int
    kept: int
    rejected: dict[str, int] = field(default_factory=dict)
    files: dict[str, FileRef] = field(default_factory=dict)
    row_groups: tuple[int, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Equal receipts give equal bytes: sorted keys, no times.

        >>> receipt = Receipt("pairs", 3, 0, {"work_order": "ab"}, rows=2, kept=1, rejected={"aspect": 1})
        >>> Receipt.from_json(receipt.to_json()) == receipt
        True
        """
        return seal({"format": FORMAT, **asdict(self)})

    @property
    def digest(self) -> str:
        """What later stages name this receipt by: sha256 of its bytes."""
        return sha256(self.to_json())

    @property
    def key(self) -> str:
        """Where the receipt lies in its store."""
        return receipt_key(self.shard, self.generation)

    @classmethod
    def from_json(cls, data: bytes, where: str = "a receipt") -> Receipt:
        """The receipt of these bytes. Raises UnknownFormat, and DamagedArtifact if one of them is another."""
        found = parse_sealed(data, where, FORMAT)
        del found["format"]
        files = {name: FileRef(**ref) for name, ref in found.pop("files").items()}
        return cls(files=files, row_groups=tuple(found.pop("row_groups")), **found)


def receipt_key(shard: int, generation: int) -> str:
    """The name of a receipt.

    >>> receipt_key(12, 0)
    'receipts/00012.g0.json'
    """
    return f"receipts/{shard:05d}.g{generation}.json"


def parse_receipt_key(key: str) -> tuple[int, int] | None:
    """Shard and generation of a receipt's name; None for another name.

    >>> parse_receipt_key("receipts/00012.g0.json"), parse_receipt_key("receipts/notes.txt")
    ((12, 0), None)
    """
    match = _RECEIPT.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None


def committed_generations(store: Store) -> dict[int, int]:
    """Shard -> its highest committed generation, from the names of one listing alone."""
    return dict(_listed(store))  # in the order of generations: the last one stays


def _listed(store: Store, shard: int | None = None) -> list[tuple[int, int]]:
    """(shard, generation) of all receipts, or of those of one shard, sorted."""
    prefix = "receipts/" if shard is None else f"receipts/{shard:05d}.g"
    return sorted(at for entry in store.list(prefix) if (at := parse_receipt_key(entry.key)))


def list_receipts(store: Store, shard: int | None = None) -> list[Receipt]:
    """The receipts of all generations, of all shards or of one, sorted by shard and generation."""
    return _read_all(store, _listed(store, shard))


def read_receipt(store: Store, shard: int, generation: int) -> Receipt:
    """One receipt. Raises FileNotFoundError, DamagedArtifact, UnknownFormat."""
    key = receipt_key(shard, generation)
    return Receipt.from_json(store.read(key), f"{store.location}/{key}")


def read_receipts(store: Store) -> dict[int, Receipt]:
    """Shard -> its receipt of the highest generation, in the order of shards. One listing, then one read a shard."""
    return {receipt.shard: receipt for receipt in _read_all(store, sorted(committed_generations(store).items()))}


def _read_all(store: Store, places: list[tuple[int, int]]) -> list[Receipt]:
    with ThreadPoolExecutor(16) as pool:  # a bucket answers one read in tens of milliseconds, and there are thousands
        return list(pool.map(lambda at: read_receipt(store, *at), places))


def publish(
    store: Store, receipt: Receipt, scratch: Mapping[str, Path], *, started_s: float | None = None
) -> Receipt | None:
    """Commits a shard: its data files first, then its receipt, only if absent.

    `scratch` maps the extension of each data file to a local file; `receipt.files` is filled in here. `started_s` is
    when the attempt began, by the store's clock. Returns the receipt as it stands in the store, or None if another
    attempt committed other bytes first (a lost race is no error: the shard is there). Equal bytes count as ours.
    Raises StorageError if the attempt is older than half the grace of `sweep`, or its files vanish under it.
    """
    files = {}
    for extension, path in scratch.items():
        digest = file_sha256(path)
        key = f"data/{receipt.shard:05d}-{digest[:16]}.{extension}"
        files[extension] = FileRef(key, path.stat().st_size, digest)
    receipt = replace(receipt, files=files)
    wanted = receipt.to_json()
    if store.stat(receipt.key):  # looked up before the upload: hundreds of megabytes saved in a lost race
        return receipt if store.read(receipt.key) == wanted else None
    for extension, path in scratch.items():
        if not store.put(files[extension].key, path):
            # There already, from an attempt that died: written again, so that a sweep sees a young file.
            store.put(files[extension].key, path, if_absent=False)
    if started_s is not None and store.clock_s() - started_s > GRACE_S / 2:
        raise StorageError(
            f"{store.location}: shard {receipt.shard:05d} took {(store.clock_s() - started_s) / 3600:.1f} h, and a "
            "sweep may already have removed its files.",
            "Run the same command again, with fewer pairs in a shard (plan.pairs_per_shard) for a new --into.",
        )
    for ref in files.values():
        found = store.stat(ref.key)
        if found is None or found.bytes != ref.bytes:
            raise StorageError(
                f"{store.location}/{ref.key} vanished before its receipt.", "Run the same command again."
            )
    if not store.put(receipt.key, wanted) and store.read(receipt.key) != wanted:
        return None
    written = store.stat(receipt.key)
    if written is None or written.bytes != len(wanted):
        store.delete(receipt.key)  # a torn receipt stands in the way of every later attempt
        raise StorageError(f"{store.location}/{receipt.key} was cut.", "Look at the disk; run the same command again.")
    for extension, path in scratch.items():
        # A sweep that looked at an old file just before it was renewed may have deleted it after the look above.
        if store.stat(files[extension].key) is None:
            store.put(files[extension].key, path)
    return receipt


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> dict[str, int]:
    """Writes (name, bytes) in the given order as a ustar whose bytes depend on nothing else.

    Returns name -> offset of the member's bytes in the file, for random access. Order is the caller's duty: readers
    of webdataset want the files of one key side by side, and keys sorted.
    """
    offsets = {}
    with path.open("wb") as file:
        for name, data in members:
            header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, names are empty, mode is 0644
            header.size = len(data)
            file.write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
            offsets[name] = file.tell()
            file.write(data)
            file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    return offsets


def write_table(path: Path, table: pa.Table, row_group_rows: int = 10_000) -> tuple[int, ...]:
    """Writes Parquet (zstd) whose bytes depend on the table, `row_group_rows` and pyarrow's version only.

    Returns the rows of each row group, for `Receipt.row_groups`.
    """
    import pyarrow.parquet as pq

    table = table.combine_chunks()  # chunk borders of the input would show in the pages
    pq.write_table(table, path, compression="zstd", row_group_size=row_group_rows)
    rows: int = table.num_rows
    full, rest = divmod(rows, row_group_rows)
    return (row_group_rows,) * full + ((rest,) if rest else ())


def read_table(store: Store, receipt: Receipt, columns: list[str] | None = None) -> pa.Table:
    """The sidecar (pairs) or the codes (tokens) of a shard; `columns` limits what is read from a bucket."""
    import pyarrow.parquet as pq

    filesystem, root = store.arrow()
    ref = receipt.files["parquet"]
    try:
        # ParquetFile and not read_table: that one guesses partitions from directory names.
        with filesystem.open_input_file(f"{root}/{ref.key}") as file:
            return pq.ParquetFile(file).read(columns=columns)
    except FileNotFoundError:
        raise DamagedArtifact(f"{store.location}/{ref.key}", f"{ref.bytes} bytes", "no file") from None


def read_verified(store: Store, ref: FileRef) -> bytes:
    """The whole data file, checked against its receipt. Raises DamagedArtifact."""
    try:
        data = store.read(ref.key)
    except FileNotFoundError:
        raise DamagedArtifact(f"{store.location}/{ref.key}", f"{ref.bytes} bytes", "no file") from None
    if sha256(data) != ref.sha256:
        raise DamagedArtifact(f"{store.location}/{ref.key}", f"sha256 {ref.sha256}", f"sha256 {sha256(data)}")
    return data


def download(store: Store, ref: FileRef, path: Path) -> None:
    """Copies a data file to scratch in pieces, checked against its receipt. Raises DamagedArtifact."""
    place = f"{store.location}/{ref.key}"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, ref.bytes, 8 << 20):
            try:
                piece = store.read_range(ref.key, start, 8 << 20)
            except FileNotFoundError:
                raise DamagedArtifact(place, f"{ref.bytes} bytes", "no file") from None
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != ref.sha256:
        raise DamagedArtifact(place, f"sha256 {ref.sha256}", f"sha256 {digest.hexdigest()}")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for the files of one attempt, below TMPDIR; those of attempts that were killed are removed first.

    A living attempt holds the lock beside its directory (NAME.lock), and the kernel drops the lock of a killed process:
    no process id is trusted, which another container could use as well. The lock is there before the directory and
    goes after it, so a kill at any moment leaves nothing that is not found.
    """
    with os.scandir(tempfile.gettempdir()) as names:  # Path.glob takes a millisecond for a thousand of them
        locks = [
            Path(entry.path) for entry in names if entry.name.startswith(_SCRATCH) and entry.name.endswith(".lock")
        ]
    for left in locks:
        with contextlib.suppress(OSError), left.open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held: BlockingIOError
            if time.time() - os.fstat(other.fileno()).st_mtime > 60:  # younger: perhaps made and not locked yet
                _remove_scratch(left)
    handle, name = tempfile.mkstemp(prefix=_SCRATCH, suffix=".lock")
    with os.fdopen(handle, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        directory = Path(name).with_suffix("")
        try:
            directory.mkdir(0o700)
            yield directory
        finally:
            _remove_scratch(Path(name))


def _remove_scratch(lock: Path) -> None:
    """The directory, then its lock; what can't be removed is left to the next attempt, for it fails no shard."""
    directory = lock.with_suffix("")
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
        lock.unlink(missing_ok=True)


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the members of a local tar, in its order. Raises tarfile.TarError for what is no tar."""
    with tarfile.open(path, mode="r:") as tar:
        for member in tar:
            yield member.name, member.offset_data, member.size


def sidecar_schema() -> pa.Schema:
    """The columns of a pair shard's Parquet file, before the user's own; img2dataset's names where they exist.

    `status` is `success` or a reason. `tar_offset` and `jpg_size` locate the JPEG in the tar. `original_*` are as the
    server sent it (upright), `width` and `height` as stored; null where the row never came so far.
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            ("uid", pa.string()),
            ("url", pa.string()),
            ("final_url", pa.string()),
            ("caption", pa.string()),
            ("status", pa.string()),
            ("detail", pa.string()),
            ("http_status", pa.int32()),
            ("bytes_in", pa.int64()),
            ("content_type", pa.string()),
            ("sha256", pa.string()),
            ("dhash", pa.string()),
            ("original_width", pa.int32()),
            ("original_height", pa.int32()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("exif_orientation", pa.int32()),
            ("language", pa.string()),
            ("language_probability", pa.float32()),
            ("split", pa.string()),
            ("weight", pa.float64()),
            ("tar_offset", pa.int64()),
            ("jpg_size", pa.int64()),
        ]
    )
