"""The life of one pair: its line in a list, its shard, the attempts, its picture and codes, drops, and who learned it.

    list line → shard and row → attempts → status → picture → codes → drops → the snapshot of each trained stage

Each station is read from where it is recorded, and one that can't be read says so while the others go on. May not live
here: how a life is printed (pipelines/show.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.metrics import Tell, untold
from infra.store import Store, join, open_store
from ops.attempts import list_attempts, read_attempt
from ops.drops import list_drops, read_drop_list, url_hash
from ops.errors import DamagedArtifact, StorageError
from ops.find_pairs import Found, RowsFile, Stages, find_pairs, find_stages, read_row, rows_with
from ops.lists import list_format
from ops.order import Order, Place
from ops.pictures import decode_stored, transformer_crop
from ops.reader import JPEG_START, WINDOW_GROUPS
from ops.reasons import SUCCESS, Reason, reason_class
from ops.recipes import RECIPE, read_json
from ops.seeds import derived_seed, derived_share
from ops.shards import Receipt, list_receipts, read_table
from ops.sheets import Cell, Pixels, draw_sheet, png, to_pixels
from ops.snapshot import HELD_OUT, TRAIN, Group, PinnedShard, Snapshot, read_snapshot, selection
from ops.trained import latest_checkpoint, load_tokenizer

if TYPE_CHECKING:
    from models.dvae import Dvae

LIVES = 20
"""Pairs that are told of, at most: a URL may have many captions."""
EPOCHS_COUNTED = 10_000
"""Of a training of more epochs it is not counted how often it drew a pair."""
SHEET_CELL_PX = 192

_OF_PAIR = ("url", "caption", "key", "split", "weight")


def why(target: str, locations: Sequence[str], into: str | None = None, tell: Tell = untold) -> dict[str, Any]:
    """The life of each pair whose URL is `target`, or whose uid is, or begins with, `target`; as plain JSON values.

    `locations` are stages or runs. The pictures that were found, the reconstruction of each crop from its codes, and a
    sheet of both are written to `into` (default: `why-<12 digits of the uid>` here; with several pairs a directory
    each). `tell` counts the shards that were searched. Raises UsageError if nothing is found, or if several uids begin
    so; a part of a life that can't be read is a `problem` in its place.
    """
    stages = find_stages(locations)
    pairs, count = find_pairs(target, stages, LIVES, tell)
    drops = _drops([*stages.pairs, *stages.tokens], pairs)
    names = [pair.uid[:12] for pair in pairs]
    lives = []
    for pair, name in zip(pairs, names, strict=True):
        own = name if names.count(name) == 1 else f"{name}-{pair.key}"
        place = f"why-{own}" if into is None else into if len(pairs) == 1 else join(into, own)
        lives.append(_life(pair, stages, drops[pair.uid], place))
    return {"target": target, "in": list(locations), "pairs": lives, "more": count - len(pairs)}


def _life(pair: Found, stages: Stages, drops: list[dict[str, Any]], into: str) -> dict[str, Any]:
    pictures = _Pictures(into)
    told: dict[str, Any] = {"uid": pair.uid, **{name: pair.record.get(name) for name in _OF_PAIR}}
    told |= dict.fromkeys(("pairs", "list", "shard", "attempts", "status", "picture"))
    is_kept = True
    if pair.is_of_pairs:
        store, shard, status = pair.file.store, pair.file.shard, _status(pair)
        is_kept = status["status"] == SUCCESS
        told |= {
            "pairs": store.location,
            "list": _list_line(pair),
            "shard": {"shard": shard, "row": pair.row, "file": pair.file.key, "is_committed": bool(pair.receipts)},
            "attempts": _attempts(store, shard, pair.key),
            "status": status,
            "picture": _or_problem(_picture, pair, pictures) if is_kept else None,
        }
    coded = [tokens for tokens in stages.tokens if is_kept and (pair.is_of_pairs or tokens is pair.file.store)]
    prefixes = [f"tokens-{number}-" if len(coded) > 1 else "" for number in range(len(coded))]
    told["codes"] = [
        {"tokens": tokens.location, **_or_problem(_codes, pair, tokens, pictures, prefix)}
        for tokens, prefix in zip(coded, prefixes, strict=True)
    ]
    told["drops"] = drops
    told["models"] = [
        {"location": model.location, **_or_problem(_model, pair, stages, model, drops)} for model in stages.trained
    ]
    pictures.put_sheet(told["caption"] or pair.uid)
    told["files"] = pictures.files
    return told


def has_problem(told: Mapping[str, Any]) -> bool:
    """Whether a part of what `why` told could not be read."""
    lives = told["pairs"]
    parts = (part for life in lives for part in (life["status"], life["picture"], *life["codes"], *life["models"]))
    return any("problem" in part for part in parts if part)


def _or_problem(tell: Callable[..., dict[str, Any]], *of: Any) -> dict[str, Any]:
    try:
        return tell(*of)
    except StorageError as error:
        return {"problem": str(error)}


# --- telling ---------------------------------------------------------------------------------------------------------
def _list_line(pair: Found) -> dict[str, Any] | None:
    """Which line of which list; None where no plan names the shard, or one from before lines were recorded."""
    if pair.file.plan is None or "list_line" not in pair.record:
        return None
    instalment, _ = pair.file.plan
    planned = instalment.lists[pair.record["list_number"]]
    unit = "row" if list_format(Path(planned.label)) == "parquet" else "line"
    return {
        "list": planned.label,
        unit: pair.record["list_line"],
        "sha256": planned.sha256,
        "instalment": instalment.number,
    }


def _attempts(store: Store, shard: int, key: str) -> dict[str, Any]:
    """How often the shard was tried, how the last attempt ended, and the traceback if this pair met a bug of ours."""
    names = sorted(list_attempts(store, shard), key=lambda name: name.entry.modified_s)
    told: dict[str, Any] = {"count": len(names), "last": None}
    for name in names:
        try:
            record = read_attempt(store, name)
        except FileNotFoundError:
            continue  # swept meanwhile
        ended = datetime.fromtimestamp(name.entry.modified_s, UTC).isoformat(timespec="seconds")
        told["last"] = {"generation": name.generation, "state": record["state"], "at": ended}
        if record["state"] == "deferred":
            told["last"]["error"] = f"{record['transient']} of {record['asked']} rows failed for reasons that may pass"
        elif "error" in record:
            told["last"]["error"] = f"{record['error']}: {record.get('text', '')}".strip(": ")
        for trace in record.get("internal", ()):
            if trace.startswith(f"{key} "):
                told["traceback"] = trace
    return told


def _status(pair: Found) -> dict[str, Any]:
    """What the newest generation says of the row, and each generation before; without one, what the plan says."""
    if not pair.receipts:
        planned = pair.record.get("status")
        return {"generation": None, "status": None, "planned": planned, "detail": pair.record.get("detail") or None}
    told: dict[str, Any] = {}
    before: list[dict[str, Any]] = []
    for receipt in pair.receipts:
        if told:
            before.append({name: told.get(name) for name in ("generation", "status")})
        told = {"generation": receipt.generation, "status": None}
        read = _or_problem(_sidecar_row, pair, receipt)
        names = ("status", "detail", "http_status", "final_url", "problem")
        told |= {name: read[name] for name in names if read.get(name) not in (None, "")}
    if told["status"] not in (None, SUCCESS):
        told["class"] = str(reason_class(Reason(told["status"])))
    return told | {"before": before}


def _sidecar_row(pair: Found, receipt: Receipt) -> dict[str, Any]:
    key = receipt.files["parquet"].key
    record = read_row(pair.file.store, key, pair.row)
    if record["uid"] != pair.uid:
        place = f"{pair.file.store.location}/{key}, row {pair.row}"
        raise DamagedArtifact(place, f"uid {pair.uid}", f"uid {record['uid']}")
    return record


def _picture(pair: Found, pictures: _Pictures) -> dict[str, Any]:
    receipt = pair.receipts[-1]
    record, tar = _sidecar_row(pair, receipt), receipt.files["tar"]
    place = f"{pair.file.store.location}/{tar.key}"
    at, size = record["tar_offset"], record["jpg_size"]
    try:
        jpeg = pair.file.store.read_range(tar.key, at, size)
    except FileNotFoundError:
        raise DamagedArtifact(place, f"{tar.bytes} bytes", "no file") from None
    try:
        if len(jpeg) != size or not jpeg.startswith(JPEG_START):
            raise ValueError("something else")
        pictures.stored = decode_stored(jpeg)
    except ValueError as error:
        raise DamagedArtifact(place, f"a JPEG of {size} bytes at {at}", str(error)) from error
    height, width = pictures.stored.shape[:2]
    return {
        "sent": {
            "width": record["original_width"],
            "height": record["original_height"],
            "bytes": record["bytes_in"],
            "content_type": record["content_type"],
            "sha256": record["sha256"],
        },
        "stored": {"width": width, "height": height, "bytes": size},
        "tar": tar.key,
        "member": f"{record['key']}.jpg",
        "offset": at,
        "path": pictures.put("stored.jpg", jpeg),
    }


def _codes(pair: Found, tokens: Store, pictures: _Pictures, prefix: str) -> dict[str, Any]:
    """The codes of each crop, drawn again by the tokenizer that made them."""
    shard, made = pair.file.shard, _made_of(pair, tokens)
    if not made:
        return {"generation": None, "attempts": _attempts(tokens, shard, pair.key)}
    receipt = made[-1]
    told: dict[str, Any] = {"shard": shard, "generation": receipt.generation, "file": receipt.files["parquet"].key}
    if pair.is_of_pairs:
        generations = {of.digest: of.generation for of in pair.receipts}
        told["pairs_generation"] = generations[receipt.made_from["pairs"]]
        told["newest_pairs_generation"] = pair.receipts[-1].generation
    rows = rows_with(RowsFile(tokens, told["file"], receipt.shard, 0), "key", pair.key)
    records = [read_row(tokens, told["file"], row) for row in rows]
    made_by = receipt.made_from["tokenizer"]
    return told | {"crops": [pictures.put_crop(tokens, made_by, record, prefix) for record in records]}


def _made_of(pair: Found, tokens: Store) -> list[Receipt]:
    """The token receipts that were made of a generation of the pair's shard, the oldest first."""
    digests = {receipt.digest for receipt in pair.receipts}
    found = list_receipts(tokens, pair.file.shard)
    return [receipt for receipt in found if not pair.is_of_pairs or receipt.made_from["pairs"] in digests]


def _drops(stages: Sequence[Store], pairs: Sequence[Found]) -> dict[str, list[dict[str, Any]]]:
    """uid -> the drop lists that name it, or its URL: why, and which pair stays instead of a copy."""
    import pyarrow as pa
    import pyarrow.compute as pc

    urls = {pair.uid: _hashes_of_urls(pair) for pair in pairs}
    asked = pa.array([*urls, *(url for both in urls.values() for url in both)], pa.string())
    named: dict[str, list[dict[str, Any]]] = {uid: [] for uid in urls}
    for store in stages:
        for key in list_drops(store):
            rows = read_drop_list(store, key)
            rows = rows.filter(pc.is_in(pc.coalesce(rows["uid"], rows["url_hash"]), asked)).to_pylist()
            for uid, both in urls.items():
                own = [row for row in rows if row["uid"] == uid or (row["uid"] is None and row["url_hash"] in both)]
                for kind, stays in dict.fromkeys((row["kind"], row["stays"]) for row in own):
                    told = {"stage": store.location, "list": key, "kind": kind}
                    named[uid].append(told | ({"stays": stays} if stays else {}))
    return named


def _hashes_of_urls(pair: Found) -> set[str]:
    """Of the URL in the list, and of the one that it led to."""
    final_urls = [_or_problem(_sidecar_row, pair, pair.receipts[-1]).get("final_url")] if _has_sidecar(pair) else []
    return {url_hash(url).hex() for url in (pair.record.get("url"), *final_urls) if url}


def _has_sidecar(pair: Found) -> bool:
    return pair.is_of_pairs and bool(pair.receipts)


def _model(pair: Found, stages: Stages, model: Store, drops: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the snapshot of a trained stage holds the pair, and how often it was drawn up to the last checkpoint."""
    recipe = read_json(model, RECIPE)
    told: dict[str, Any] = {"stage": recipe["stage"], "included": False}
    try:
        snapshot = read_snapshot(model)
    except FileNotFoundError:
        return told | {"reason": "it has no snapshot yet"}
    pinned = next((shard for shard in snapshot.shards if shard.shard == pair.file.shard), None)
    if pinned is None:
        reason = f"its snapshot has no shard {pair.file.shard}, which was committed later or is of other pairs"
        return told | {"reason": reason}
    source, receipt = _source(pair, stages, snapshot, pinned)
    if source is None or receipt is None:
        kind = "pairs" if snapshot.kind == "pictures" else "tokens"
        return told | {"reason": f"it was trained on {kind} that are none of those named with --in"}
    told |= {"generation": pinned.generation, "newest_generation": list_receipts(source, pinned.shard)[-1].generation}
    columns = ["key", "split", "weight", *snapshot.where] + (["status"] if snapshot.kind == "pictures" else [])
    table = read_table(source, receipt, list(dict.fromkeys(columns)))
    row = next((row for row, key in enumerate(table["key"].to_pylist()) if key == pair.key), None)
    if row is None:
        return told | {"reason": "it had no codes in that generation"}
    record = table.slice(row, 1).to_pylist()[0]
    masks = {split: selection(table, snapshot.where, split) for split in (TRAIN, HELD_OUT)}
    split = next((split for split, mask in masks.items() if mask[row]), None)
    if split is None:
        status = record.get("status", SUCCESS)
        values = ", ".join(f"{name} {record[name]!r}" for name in snapshot.where)
        reason = f"it was {status} in that generation" if status != SUCCESS else f"`where` does not select {values}"
        return told | {"reason": reason}
    told |= {"included": True, "split": split, "weight": record["weight"]}
    if split == TRAIN:
        told |= _drawn(model, recipe, snapshot, pinned, row, masks[TRAIN], pair.uid, record["weight"])
        lists = [drop["list"] for drop in drops if drop["stage"] == source.location]
        if set(lists) & set(snapshot.drops):
            told |= {"drawn": 0, "last_step": None}
        told["dropped"] = bool(lists)
    return told


def _source(
    pair: Found, stages: Stages, snapshot: Snapshot, pinned: PinnedShard
) -> tuple[Store, Receipt] | tuple[None, None]:
    """The stage that a snapshot was taken of, as far as this shard tells: the one with the receipt that it pins."""
    if snapshot.kind == "pictures":
        sources = [(pair.file.store, pair.receipts)] if pair.is_of_pairs else []
    else:
        sources = [(tokens, _made_of(pair, tokens)) for tokens in stages.tokens]
    found = ((store, receipt) for store, receipts in sources for receipt in receipts)
    return next(((store, receipt) for store, receipt in found if receipt.digest == pinned.receipt), (None, None))


def _drawn(
    model: Store,
    recipe: dict[str, Any],
    snapshot: Snapshot,
    pinned: PinnedShard,
    row: int,
    mask: Any,
    uid: str,
    weight: float,
) -> dict[str, Any]:
    """How often training met the row of the pinned file up to the latest checkpoint, as its order of rows says."""
    checkpoint = latest_checkpoint(model)
    training = recipe["identity"][f"{recipe['stage']}_training"]
    cursor = checkpoint.cursor if checkpoint else 0
    groups: list[tuple[int, Group]] = [(s.shard, g) for s in snapshot.shards for g in s.groups if g.crop == 0]
    order = Order([group.train for _, group in groups], training["seed"], WINDOW_GROUPS[snapshot.kind])
    index, group = next(
        (i, g) for i, (shard, g) in enumerate(groups) if shard == pinned.shard and g.first <= row < g.first + g.rows
    )
    within = int(mask[group.first : row].sum())
    told: dict[str, Any] = {"step": checkpoint.step if checkpoint else 0, "epochs": round(cursor / order.rows, 2)}
    epochs = -(-cursor // order.rows)
    if epochs > EPOCHS_COUNTED:
        return told | {"drawn": None, "last_step": None}
    at = [
        order.position(Place(epoch, index, within))
        for epoch in range(epochs)
        if derived_share("weight", uid, epoch) < weight
    ]
    at = [position for position in at if position < cursor]
    return told | {"drawn": len(at), "last_step": at[-1] // training["batch"] + 1 if at else None}


# --- pictures --------------------------------------------------------------------------------------------------------
class _Pictures:
    """What is written for one pair: the stored picture, each crop and what its codes say, and a sheet of all."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.stored: Pixels | None = None
        self.files: list[str] = []
        self._rows: list[list[Cell]] = []

    def put(self, name: str, data: bytes) -> str:
        """Writes a file; returns where it is."""
        open_store(self.location).put(name, data, if_absent=False)
        self.files.append(join(self.location, name))
        return self.files[-1]

    def put_crop(self, tokens: Store, made_by: str, record: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Draws the codes of one crop, beside the crop itself where the stored picture was found."""
        dvae = _tokenizer(tokens.location, made_by)
        k, crop, codes_N = record["k"], record["crop"], np.asarray(record["codes"], np.int64)
        told = {"k": k, **crop, "codes": len(codes_N)}
        cells = []
        if self.stored is not None:
            settings = read_json(tokens, RECIPE)["identity"]["tokens"]
            rng = np.random.default_rng(derived_seed("crop", settings["seed"], record["uid"], k))
            pixels, _ = transformer_crop(self.stored, dvae.image_size, rng, crop=settings["random_crops"])
            told["crop_path"] = self.put(f"{prefix}crop-{k}.png", png(pixels))
            cells.append(Cell(pixels, f"crop {k}"))
        drawn = _draw(dvae, codes_N)
        told["path"] = self.put(f"{prefix}codes-{k}.png", png(drawn))
        self._rows.append([*cells, Cell(drawn, f"what its {len(codes_N)} codes hold")])
        return told

    def put_sheet(self, title: str) -> None:
        """A row for each crop, the stored picture before the first."""
        if not self._rows:
            return
        sides = [cell.pixels.shape[0] for row in self._rows for cell in row]
        if self.stored is not None:
            side = max(-(-SHEET_CELL_PX // px) * px for px in sides)  # as draw_sheet enlarges the others
            blank = Cell(np.full((side, side, 3), 255, np.uint8))
            first = [Cell(_framed(self.stored, side), "as it is stored")] + [blank] * (len(self._rows) - 1)
            self._rows = [[cell, *row] for cell, row in zip(first, self._rows, strict=True)]
        self.put("sheet.png", draw_sheet(self._rows, title, SHEET_CELL_PX))


@lru_cache(maxsize=2)
def _tokenizer(tokens: str, digest: str) -> Dvae:
    dvae, found = load_tokenizer(tokens)
    if found != digest:
        raise DamagedArtifact(f"{tokens}/tokenizer", f"digest {digest}", f"digest {found}")
    return dvae


def _draw(dvae: Dvae, codes_N: np.ndarray[Any, np.dtype[np.int64]]) -> Pixels:
    import torch

    pixels: Pixels = to_pixels(dvae.decode(torch.from_numpy(codes_N)[None]))[0]
    return pixels


def _framed(pixels: Pixels, side: int) -> Pixels:
    """The whole picture in the middle of a white square."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    scale = side / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    frame = Image.new("RGB", (side, side), (255, 255, 255))
    frame.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(frame)
