"""Storage: every byte that is published goes through a `Store`. Keys are relative, '/'-separated names below one root.

Lives here: read, ranged read, put (create-if-absent or replace), list, delete, and a pyarrow filesystem for Parquet;
the form on local disk. The form in a bucket is infra/bucket.py. Failures are the built-in `OSError` family.
May not live here: what the bytes mean (ops/shards.py, ops/plan.py).
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

TEMPORARY = ".tmp-"
"""Prefix of a file that is being written: never listed, swept when old."""


class StoreError(OSError):
    """StoreError(text): what happened, where, and the next step, in whole sentences. Nothing is to be added."""


@dataclass(frozen=True)
class Entry:
    """One object of a listing: its key, its size, and when the store's clock says it was last written."""

    key: str
    bytes: int
    modified_s: float


class Store(Protocol):
    """What a stage needs of its place. Two forms: a local directory here, and a bucket behind the same methods."""

    location: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer only at the object's end. Raises FileNotFoundError."""

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
        """Publishes bytes or a local file, whole or not at all. False: `if_absent` and the key exists already."""

    def stat(self, key: str) -> Entry | None:
        """Size and time of one object, or None where there is none."""

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, in key order; with `temporary` only half-written leftovers."""

    def delete(self, key: str) -> None:
        """Removes an object; one that is gone already is no error."""

    def clock_s(self) -> float:
        """Now, by the clock that stamps `Entry.modified_s` (grace times are measured on this one)."""

    def arrow(self) -> tuple[FileSystem, str]:
        """A pyarrow filesystem and the path of the root in it."""


class LocalStore:
    """A directory. A put is a temporary file, fsync, `os.link` (or `os.replace`), and fsync of the directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.location = str(root)

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root.joinpath(*key.split("/"))

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
        path = self._path(key)
        if if_absent and path.exists():
            _fsync_directory(path.parent)  # its writer may have been killed between the link and this
            return False
        _make_directory(path.parent)
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{path.name}")
        try:
            with temporary.open("wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        while block := source.read(1 << 20):
                            file.write(block)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                try:
                    os.link(temporary, path)  # atomic, and refuses a second writer: os.replace would not
                    is_ours = True
                except FileExistsError:
                    is_ours = False
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    what = "this filesystem has no hard links, so two writers could not be kept apart; use another"
                    raise OSError(error.errno, what, str(path)) from error
            else:
                temporary.replace(path)
                is_ours = True
            _fsync_directory(path.parent)
        except OSError as error:
            error.filename = error.filename or str(path)  # a write to a full disk names no file
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return is_ours

    def stat(self, key: str) -> Entry | None:
        try:
            found = self._path(key).stat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None  # a directory is no object: a bucket has none
        return Entry(key, found.st_size, found.st_mtime)

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        # Walk only the directory that the prefix names: a listing of receipts must not walk the data.
        above = "".join(f"{name}/" for name in prefix.split("/")[:-1])
        found = [
            (key, file)
            for key, file in _walk(self.root / above, above)
            if key.startswith(prefix) and is_temporary(key) is temporary
        ]
        for key, file in sorted(found, key=lambda item: item[0]):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # swept or replaced between the listing and the look
            yield Entry(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def clock_s(self) -> float:
        return time.time()

    def arrow(self) -> tuple[FileSystem, str]:
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(self.root)


@dataclass(frozen=True)
class ObjectPath:
    """An object as a file to read in pieces: the part of `Path` that readers of files use."""

    store: Store
    key: str

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last ending of the name, with its dot."""
        return Path(self.name).suffix

    def __str__(self) -> str:
        return f"{self.store.location}/{self.key}"

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self.key != "" and self.store.stat(self.key) is not None

    def read_text(self) -> str:
        """The whole object as UTF-8. Raises FileNotFoundError."""
        return self.store.read(self.key).decode()

    def entry(self) -> Entry:
        """Its size and time. Raises FileNotFoundError."""
        entry = self.store.stat(self.key)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return entry

    def open(self, mode: Literal["rb"] = "rb", buffering: int = 8 << 20) -> io.BufferedReader:
        """A stream that can seek. Each fill of its buffer is one ranged read; with 1, each call is one."""
        return io.BufferedReader(_Ranges(self.store, self.entry()), buffering)


class _Ranges(io.RawIOBase):
    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry, self._at = store, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._entry.bytes - self._at)
        if length <= 0:
            return 0
        data = self._store.read_range(self._entry.key, self._at, length)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def check_key(key: str) -> None:
    """Raises ValueError for a name that could leave the root or has two spellings."""
    if {"", ".", ".."} & set(key.split("/")):
        raise ValueError(f"not a key of a store: {key!r}")


def is_temporary(key: str) -> bool:
    """Whether a key names something half-written."""
    return key.rpartition("/")[2].startswith(TEMPORARY)


def _walk(directory: Path | str, above: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files below a directory, with their keys. Of 50,000 names a `Path` each would take most of the time."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_dir():
                    yield above + entry.name, entry
                elif not entry.is_symlink():
                    yield from _walk(entry.path, f"{above}{entry.name}/")
    except FileNotFoundError:
        pass  # not there yet; whatever else can't be read is an error, or receipts would seem to be missing


def _make_directory(directory: Path) -> None:
    """mkdir -p that a power cut can't undo: each new name is synced in the directory above it."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    _fsync_directory(directory.parent)


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_store(location: str) -> Store:
    """The store at a local path or at s3://bucket/prefix. Nothing is created, or asked for, until the first use.

    >>> open_store("runs/demo/pairs").location, open_store("s3://bucket/demo/pairs/").location
    ('runs/demo/pairs', 's3://bucket/demo/pairs')
    """
    scheme, separator, _ = location.partition("://")
    if separator:
        if scheme != "s3":
            raise StoreError(f"{location}: {scheme}:// is not known here. Use a local path or s3://bucket/prefix.")
        from infra.bucket import S3Store  # boto3 takes 0.3 s to import

        return S3Store(location)
    path = Path(location)
    nearest = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if nearest.exists() and not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file; a directory is needed")
    return LocalStore(path)


def parent(location: str) -> str:
    """The place that a place lies in.

    >>> parent("runs/demo/pairs/"), parent("s3://bucket/demo/pairs"), parent("pairs"), parent("s3://bucket/pairs")
    ('runs/demo', 's3://bucket/demo', '.', 's3://bucket')
    """
    if "://" in location:
        scheme, _, path = location.rstrip("/").partition("://")
        return f"{scheme}://{path.rpartition('/')[0] or path}"
    return str(Path(location).parent)


def object_path(location: str) -> ObjectPath:
    """The object of this name, as a file.

    >>> object_path("s3://bucket/lists/a.tsv").key, object_path("s3://bucket").key
    ('a.tsv', '')
    """
    store, above = open_store(location), open_store(parent(location))
    return ObjectPath(above, store.location.removeprefix(above.location).lstrip("/"))


def absolute(location: str) -> str:
    """The same place for a process with another working directory, such as a Ray worker; a URL is that already.

    >>> absolute("/runs/demo"), absolute("s3://bucket/demo")
    ('/runs/demo', 's3://bucket/demo')
    """
    return location if "://" in location else str(Path(location).absolute())


def join(location: str, *names: str) -> str:
    """A place below another, for local paths and URLs alike.

    >>> join("runs/demo", "pairs")
    'runs/demo/pairs'
    """
    return "/".join([location.rstrip("/") or "/", *names])
