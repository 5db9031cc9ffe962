"""Taking over a folder that img2dataset made (webdataset output): what is sound goes into PAIRS, without a request.

    look_at_folder   each tar against its parquet and each picture against its row; statistics are believed in nothing
    plan_adoption    two lists, PAIRS/adopted/sound-….parquet and missing-….parquet, and an instalment for each
    take_adopted     in the worker that does a shard (ops/ingest.py): the bytes of its adopted rows, checked again

Work orders of the sound rows are committed by the same command; those of the missing ones are ordinary work for the
next ingest. A row is sound if its tar holds KEY.jpg, a JPEG that decodes without a warning and has the size that its
row says, KEY.json of the same url and caption, and KEY.txt with that caption. Pictures are copied as they are, in
img2dataset's geometry: the columns `adopted_…` of the sidecar say from where. PAIRS' filters judge them by their
original size and their pixels. img2dataset's `sha256` is of the body that the server sent, as ours is. No digest of the
stored JPEG exists before it is taken here: damage from before that still decodes without a warning can't be seen.

The pairs of a parquet that is torn or gone are known from the JSON in the tar, where it holds them, and from the list.
Kill it anywhere and run it again: what an instalment names is planned, and a shard without a receipt is done again. An
ingest does those too, and asks the web for what it does not find in the folder any more. Memory grows with the folder,
by about half a kilobyte a pair.
"""

from __future__ import annotations

import json
import re
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.metrics import Tell, untold
from infra.store import ObjectPath, Store, absolute, join, open_store, parent
from ops.attempts import Attempt
from ops.errors import UsageError
from ops.filters import FilterSettings, judge_header, judge_pixels
from ops.img2dataset_engine import reason_of
from ops.lists import Columns, ListPath, Rows, find_lists, fingerprint, read_rows
from ops.pictures import Header, decode, dhash, read_header
from ops.plan import (
    Extension,
    Instalment,
    ListFile,
    PlanSettings,
    WorkOrder,
    extend_plan,
    pair_uid,
    read_instalments,
    read_work_order,
)
from ops.reasons import SUCCESS, Rejected
from ops.recipes import file_sha256, sha256
from ops.shards import scratch_directory
from ops.sidecar import Row, Spool

if TYPE_CHECKING:
    import pyarrow as pa

FROM = "adopted_from"
"""The column of a work order that names the tar a picture is taken from; null for a row that has none."""
PLACE = (FROM, "adopted_key", "adopted_at", "adopted_bytes", "adopted_sha256")
"""Tar, key there, offset and size of the JPEG in it, and sha256 of these bytes."""
ORIGINAL = ("sha256", "original_width", "original_height")
"""img2dataset's columns about the picture that the server sent; with `adopted_body_` before them in a work order."""
THEIRS = ("key", "status", "error_message", "width", "height", *ORIGINAL)
"""img2dataset's columns that are told by ours; its others (`exif`, the user's) are kept."""
SOUND_LIST = re.compile(r"(.*/)?adopted/sound-[0-9a-f]{16}\.parquet")
"""Name of the list of an instalment whose pictures lie in a folder. Columns of any other list lead to no file."""

_FILE = re.compile(r"(\d{5,})(\.tar|\.parquet|_stats\.json)")
_THREADS = 8


@dataclass
class Found:
    """One shard of a folder: the rows that are known of it, and what is wrong with it.

    `rows` hold url, caption, the kept columns, and `adopted_…` of a sound picture. `unknown` counts pairs of which no
    file tells more than that they were; None: not even how many.
    """

    shard: str
    rows: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    unknown: int | None = 0
    has_captions: bool = True
    failed: Counter[str] = field(default_factory=Counter)
    """Why rows failed there, as reasons of ours."""


# --- the folder ------------------------------------------------------------------------------------------------------
def look_at_folder(location: str, tell: Tell = untold) -> list[Found]:
    """Every shard of the folder, by number, looked at in as many threads as a core needs. Raises UsageError."""
    folder = open_store(absolute(location))
    shards: dict[str, dict[str, str]] = {}
    others = []
    for entry in folder.list():
        if match := _FILE.fullmatch(entry.key):
            shards.setdefault(match[1], {})[match[2]] = entry.key
        elif "/" not in entry.key:
            others.append(entry.key)
    if not any(".tar" in files for files in shards.values()):
        raise UsageError(
            f"{location} holds no shard of img2dataset's (00000.tar, 00000.parquet, 00000_stats.json).",
            "Name the output folder of a run with --output_format webdataset.",
        )
    found = []
    with ThreadPoolExecutor(2) as pool:
        for one in pool.map(partial(_look, folder), sorted(shards), (shards[name] for name in sorted(shards))):
            found.append(one)
            tell("shards looked at", len(found), len(shards))
    numbers = {int(name) for name in shards}
    width = len(min(shards))
    for gone in sorted(set(range(max(numbers))) - numbers):
        found.append(Found(f"{gone:0{width}d}", [], ["all its files are gone"], None))
    return found


def _look(folder: Store, shard: str, files: dict[str, str]) -> Found:
    found = Found(shard, [])
    records = _records(folder, files.get(".parquet"), found)
    pictures = _pictures(folder, files.get(".tar"), records, found)
    known = [*records.values(), *(meta for key, (meta, _) in pictures.items() if key not in records)]
    for record in known:
        place = pictures[record["key"]][1] if record["key"] in pictures else {}
        found.rows.append({name: value for name, value in record.items() if name not in THEIRS} | place)
        if not place and record.get("status") != SUCCESS:
            found.failed[reason_of(record.get("error_message")).reason] += 1
    found.has_captions = all("caption" in record for record in known)
    sound = len(pictures)
    if lost := sum(record.get("status") == SUCCESS and key not in pictures for key, record in records.items()):
        found.problems.append(f"{lost} pictures that its parquet calls a success are not there, or damaged")
    if known and not sound and sum(found.failed.values()) == len(known):
        found.problems.append(f"all of its {len(known)} pairs failed: an outage?")
    _count_unknown(folder, files.get("_stats.json"), [record["key"] for record in known], found)
    return found


def _records(folder: Store, key: str | None, found: Found) -> dict[str, dict[str, Any]]:
    """Key -> row of the parquet; empty where it can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if key is None:
        found.problems.append("its parquet is gone")
        return {}
    try:
        with ObjectPath(folder, key).open() as stream, pq.ParquetFile(stream) as file:
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        found.problems.append(f"its parquet can't be read ({type(error).__name__})")
        return {}
    records = {row["key"]: row for row in rows if str(row.get("key")).isdecimal() and "url" in row}
    if len(records) < len(rows):
        found.problems.append(f"{len(rows) - len(records)} rows of its parquet have no key of their own, or no url")
    return records


def _pictures(
    folder: Store, key: str | None, records: dict[str, dict[str, Any]], found: Found
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Key -> (the row as KEY.json has it, its PLACE), of the sound pictures of a tar."""
    if key is None:
        found.problems.append("its tar is gone")
        return {}
    place, path = join(folder.location, key), ObjectPath(folder, key)
    sound: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    seen: set[str] = set()
    size = path.entry().bytes
    parts: dict[str, tuple[int, bytes]] = {}
    name = ""

    def judge() -> None:
        if not name:
            return
        picture = None if name in seen else _sound(name, parts, records.get(name))
        seen.add(name)
        if picture is None:
            sound.pop(name, None)
            return
        at, jpeg = parts["jpg"]
        told = {f"adopted_body_{column}": picture.get(column) for column in ORIGINAL}
        told |= dict(zip(PLACE, (place, name, at, len(jpeg), sha256(jpeg)), strict=True))
        sound[name] = picture, told

    try:
        with path.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                start, _, ending = member.name.partition(".")
                if start != name:
                    judge()
                    name, parts = start, {}
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                stream_of = tar.extractfile(member)
                if stream_of is not None:
                    parts[ending] = member.offset_data, stream_of.read()
    except (tarfile.TarError, OSError) as error:
        found.problems.append(f"its tar can't be read to its end ({error})")
    judge()
    return sound


def _sound(key: str, parts: dict[str, tuple[int, bytes]], record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The row that KEY.json holds, if the parts of this key agree with each other and with the parquet's row."""
    if not {"jpg", "json"} <= parts.keys():
        return None
    try:
        meta = json.loads(parts["json"][1])
        text = parts["txt"][1].decode() if "txt" in parts else None
    except ValueError:
        return None
    if not isinstance(meta, dict) or meta.get("key") != key or not meta.get("url") or meta.get("status") != SUCCESS:
        return None
    if record is not None and any(record.get(name) != meta.get(name) for name in ("url", "caption", "status")):
        return None
    # `--caption_col` alone writes KEY.txt; without it neither side has a caption.
    if (meta.get("caption") or "") != (text or "") or ("caption" in meta and text is None):
        return None
    jpeg = parts["jpg"][1]
    header = read_header(jpeg)
    if isinstance(header, Rejected) or header.format != "jpeg" or header.stored_size != (meta["width"], meta["height"]):
        return None
    return None if isinstance(decode(jpeg, header, min(header.stored_size)), Rejected) else meta


def _count_unknown(folder: Store, key: str | None, keys: list[str], found: Found) -> None:
    """How many pairs there were, by the statistics, else by the gaps that lost ones leave among the keys."""
    count: int | None = None
    try:
        count = int(json.loads(folder.read(key))["count"]) if key else None
    except (ValueError, KeyError, TypeError):
        found.problems.append("its statistics can't be read")
    if count is None and keys:
        first = int(found.shard) * 10 ** (len(keys[0]) - len(found.shard))
        count = max(map(int, keys)) - first + 1
    found.unknown = None if count is None else max(0, count - len(keys))
    if found.unknown or count is None:
        number = "some" if count is None else found.unknown
        found.problems.append(f"{number} pairs are in none of its files: only the list knows them")


# --- the plan --------------------------------------------------------------------------------------------------------
@dataclass
class Adoption:
    """What was planned."""

    extension: Extension
    adopted: int = 0
    missing: int = 0
    already: int = 0
    """Pairs of the folder or of the lists that PAIRS has planned before."""


def plan_adoption(
    store: Store,
    found: Sequence[Found],
    lists: Sequence[str],
    settings: PlanSettings,
    filters: FilterSettings,
    columns: Columns,
    tell: Tell = untold,
) -> Adoption:
    """Plans each pair of the folder and of the lists that is not planned yet: the sound ones in an instalment of their
    own, the others in the next one, which covers the lists. Raises BadList before anything is written."""
    adoption = Adoption(Extension(None, ()))
    planned = Counter(uid for order in _work_orders(store) for uid in read_work_order(store, order)["uid"].to_pylist())
    rows = [(one.has_captions, row) for one in found for row in one.rows]
    rows.sort(key=lambda row: FROM not in row[1])  # stable: of equal pairs the sound one is taken first
    left: dict[bytes, deque[dict[str, Any]]] = {}
    for has_captions, known in rows:
        by_url = b"url " + (_bytes(known["url"]) or b"")
        left.setdefault(_match(known["url"], known.get("caption")) if has_captions else by_url, deque()).append(known)
    taken: set[int] = set()
    sound: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []

    def take(url: bytes | None, caption: bytes | None, listed: dict[str, Any], row: dict[str, Any] | None) -> None:
        uid = pair_uid(url, caption).hex()
        if planned[uid]:
            planned[uid] -= 1
            adoption.already += 1
            return
        own = {name: value for name, value in (row or {}).items() if name not in ("url", "caption")}
        (sound if FROM in own else missing).append(own | listed | {"url": url, "caption": caption})

    covered = []
    with scratch_directory() as scratch:
        for path, file in _list_files(lists, columns):
            count = 0
            for batch in read_rows(path, columns, caption_required=filters.caption_required, scratch=scratch):
                for url, caption, listed in _pairs(batch):
                    waiting = left.get(_match(url, caption)) or left.get(b"url " + (url or b""))
                    row = waiting.popleft() if waiting else None
                    if row is not None:
                        taken.add(id(row))
                    take(url, caption, listed, row)
                count += len(batch.urls)
                tell("rows read", count, None)
            covered.append(ListFile(file.sha256, file.label, count, file.bytes, columns))
        for _, known in rows:
            if id(known) not in taken:
                take(_bytes(known["url"]), _bytes(known.get("caption")), {}, known)
        parts = [(name, part) for name, part in (("sound", sound), ("missing", missing)) if part]
        adoption.adopted, adoption.missing = len(sound), len(missing)
        paths = [_write_list(store, name, part, scratch) for name, part in parts]
    for number, made in enumerate(paths, 1):
        also = tuple(covered) if number == len(paths) else ()
        adoption.extension = extend_plan(store, [made], settings, filters, Columns(), tell, also=also)
    return adoption


def is_adoption(instalment: Instalment) -> bool:
    """Whether the pictures of its work orders lie in a folder that was adopted."""
    return any(SOUND_LIST.fullmatch(file.label) for file in instalment.lists)


def _work_orders(store: Store) -> list[WorkOrder]:
    return [order for instalment in read_instalments(store) for order in instalment.work_orders]


def _list_files(lists: Sequence[str], columns: Columns) -> Iterator[tuple[ListPath, ListFile]]:
    """Each list once, whatever its names."""
    seen = set()
    for path in find_lists(lists)[0] if lists else []:
        digest, size, _ = fingerprint(path.path)
        if digest not in seen:
            seen.add(digest)
            yield path, ListFile(digest, path.label, 0, size, columns)


def _pairs(batch: Rows) -> Iterator[tuple[bytes | None, bytes | None, dict[str, Any]]]:
    extra = batch.extra.to_pylist() if batch.extra.column_names else [{} for _ in batch.urls]
    for i, (url, caption) in enumerate(zip(batch.urls, batch.captions, strict=True)):
        listed = {name: value for name, value in extra[i].items() if not name.startswith("adopted_")}
        if batch.splits is not None:
            listed["split"] = batch.splits[i]
        if batch.weights is not None:
            listed["weight"] = batch.weights[i]
        yield url, caption, listed


def _match(url: str | bytes | None, caption: str | bytes | None) -> bytes:
    """What a row of a list and one of the folder are compared by: on its way through img2dataset a missing caption
    may have become an empty one."""
    return pair_uid(_bytes(url), _bytes(caption) or None)


def _bytes(text: str | bytes | None) -> bytes | None:
    return text.encode() if isinstance(text, str) else text


def _write_list(store: Store, name: str, rows: list[dict[str, Any]], scratch: Path) -> str:
    """Publishes a list of these rows; its path. Equal rows give an equal list, which is planned once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    names = dict.fromkeys(("url", "caption", *(f"adopted_body_{n}" for n in ORIGINAL if name == "sound"), *told))
    types = {"url": pa.binary(), "caption": pa.binary(), "split": pa.string(), "weight": pa.float64()}
    table = pa.table({name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names})
    file = scratch / f"{name}.parquet"
    pq.write_table(table, file, compression="zstd")
    key = f"adopted/{name}-{file_sha256(file)[:16]}.parquet"
    store.put(key, file)
    return join(store.location, key)


# --- the shard -------------------------------------------------------------------------------------------------------
def take_adopted(
    table: pa.Table, asked: Sequence[int], filters: FilterSettings, spool: Spool, attempt: Attempt
) -> dict[int, Row]:
    """Row number -> what becomes of it, of the `asked` rows of a work order of an adoption. A row whose picture is not
    in the folder any more, with the bytes that were looked at, is left out."""
    records = table.select([name for name in table.column_names if name.startswith("adopted_")]).to_pylist()
    folders = {place: open_store(place) for place in {parent(record[FROM]) for record in records}}
    turn = threading.Lock()

    def one(i: int) -> tuple[int, Row | None]:
        record = records[i]
        folder, tar = folders[parent(record[FROM])], record[FROM].rpartition("/")[2]
        try:
            jpeg = folder.read_range(tar, record["adopted_at"], record["adopted_bytes"])
        except FileNotFoundError:
            return i, None
        if sha256(jpeg) != record["adopted_sha256"]:
            return i, None
        with turn:
            row = _judged(jpeg, record, filters)
        if row.status == SUCCESS:
            row.spooled_at, row.jpg_size = spool.append(jpeg), len(jpeg)
        attempt.rows_done += 1
        return i, row

    with ThreadPoolExecutor(_THREADS, "adopt") as pool:
        return {i: row for i, row in pool.map(one, asked) if row is not None}


def _judged(jpeg: bytes, record: dict[str, Any], filters: FilterSettings) -> Row:
    digest, width, height = (record[f"adopted_body_{name}"] for name in ORIGINAL)
    row = Row(sha256=digest, original_width=width, original_height=height)
    header = read_header(jpeg)
    if isinstance(header, Rejected):
        return row.reject(header)
    original = Header("jpeg", width or header.width, height or header.height)
    if rejected := judge_header(original, filters):
        return row.reject(rejected)
    pixels = decode(jpeg, header, min(header.width, header.height))
    if isinstance(pixels, Rejected):
        return row.reject(pixels)
    if rejected := judge_pixels(pixels, filters):
        return row.reject(rejected)
    row.height, row.width = pixels.shape[:2]
    row.dhash, row.status = dhash(pixels), SUCCESS
    return row
