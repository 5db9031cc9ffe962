"""A contact sheet: the first kept pictures of some pair shards as one small JPEG, to see at a glance what came in."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from infra.store import Store
from ops.drops import read_drops
from ops.reasons import SUCCESS
from ops.shards import Receipt, read_table

if TYPE_CHECKING:
    from PIL import Image

COLUMNS, ROWS = 12, 3
CELL_PX, GAP_PX = 72, 3


def contact_sheet(store: Store, receipts: Iterable[Receipt], pictures: int = COLUMNS * ROWS) -> bytes | None:
    """A JPEG of central squares, in the order of shards and rows; None if no shard kept a picture.

    Reads the sidecar of each shard that is needed and these pictures only, whatever the size of a shard.
    """
    from PIL import Image

    squares: list[Image.Image] = []
    drops = read_drops(store)
    for receipt in receipts:
        table = read_table(store, receipt, ["status", "tar_offset", "jpg_size", *drops.columns])
        for row, is_down in zip(table.to_pylist(), drops.mask(table), strict=True):
            if row["status"] == SUCCESS and not is_down and len(squares) < pictures:
                data = store.read_range(receipt.files["tar"].key, row["tar_offset"], row["jpg_size"])
                squares.append(_square(Image.open(io.BytesIO(data))))
        if len(squares) >= pictures:
            break
    if not squares:
        return None
    step = CELL_PX + GAP_PX
    columns = min(COLUMNS, len(squares))
    sheet = Image.new("RGB", (columns * step + GAP_PX, -(-len(squares) // columns) * step + GAP_PX), "white")
    for i, square in enumerate(squares):
        sheet.paste(square, (GAP_PX + i % columns * step, GAP_PX + i // columns * step))
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=85)
    return out.getvalue()


def _square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.convert("RGB").resize((CELL_PX, CELL_PX), box=(left, top, left + side, top + side))
