"""What the search for copies finds and what it takes for a copy: recall and false matches, through whole PAIRS.

    make bench STAGE=dedup
    python -m tests.bench.dedup --photographs FOLDER    (PNG and JPEG files; scikit-image's lie in skimage/data of its
                                                         wheel: pip download scikit-image --no-deps; unzip)

The pictures are OpenMoji's, those with different pixels, drawn photographs (tests/bench/photographs.py), and what the
folder holds. One PAIRS has each once, which shows false matches; then for each way to copy one PAIRS with each twice,
the second time as a JPEG made that way. Every picture goes through what ingestion does with a body. `ONE_DRAWING` are
no false matches. The exit status is 1 if recall at quality 50 is below 0.99 or a different picture matched.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra.cluster import Cluster, connect
from infra.metrics import Cost, timed
from infra.store import open_store
from ops.drops import read_drop_rows
from ops.openmoji import names, pixels, render_files
from ops.picture_duplicates import deduplicate
from ops.pictures import PictureSettings, decode, dhash, encode_jpeg, read_header, resize_short_side
from ops.plan import pair_uid
from ops.reasons import Rejected
from ops.recipes import sha256, start_stage
from ops.shards import Receipt, publish, scratch_directory, sidecar_schema, write_table, write_tar
from tests.bench.harness import device, print_last_line
from tests.bench.photographs import SIZES, draw_photograph

Pixels = np.ndarray[Any, Any]
PICTURE = PictureSettings()
ONE_DRAWING = {
    frozenset(pair.split())
    for pair in (
        "1F1E7-1F1FB 1F1F3-1F1F4",  # the flag of Norway, and of Bouvet Island
        "1F311 26AB",  # new moon, black circle
        "1F315 1F7E1",  # full moon, yellow circle
        "1F3FF 1F7EB",  # dark skin tone, brown square
        "1F468-1F3FC 1F471-1F3FC-200D-2642-FE0F",  # man, blond man
        "1F469-1F3FC 1F471-1F3FC-200D-2640-FE0F",
        "1F471-1F3FC 1F9D1-1F3FC",
        *(f"1F468{tone}-200D-1F9B2 1F469{tone}-200D-1F9B2" for tone in ("", *(f"-1F3F{x}" for x in "BCDEF"))),  # bald
    )
}
"""Drawings under two names that differ by shades of some pixels: looked at one by one, nobody can tell them apart."""
ROWS = 1000


def png(picture: Pixels) -> bytes:
    """Without loss."""
    import cv2

    return bytes(cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes())


def scaled(picture: Pixels, share: float) -> Pixels:
    """Area averaging."""
    import cv2

    height, width = picture.shape[:2]
    size = (max(1, round(share * width)), max(1, round(share * height)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def cropped(picture: Pixels, share: float) -> Pixels:
    """Without `share` of the short side at each edge."""
    cut = max(1, round(share * min(picture.shape[:2])))
    return picture[cut:-cut, cut:-cut]


WAYS: dict[str, Callable[[Pixels], bytes]] = {
    "quality 50": lambda picture: encode_jpeg(picture, 50),
    "quality 30": lambda picture: encode_jpeg(picture, 30),
    "x 0.75, quality 75": lambda picture: encode_jpeg(scaled(picture, 0.75), 75),
    "cut 2 %, quality 75": lambda picture: encode_jpeg(cropped(picture, 0.02), 75),
}


def write_pairs(location: Path, bodies: Iterable[tuple[str, bytes]], rows: int = ROWS, first_shard: int = 0) -> None:
    """Commits PAIRS of these (name, body), each as ingestion would store it; the URL is http://example.org/NAME."""
    store = open_store(str(location))
    start_stage(store, "pairs", {"picture": {"short_side_px": PICTURE.short_side_px}}, {}, "")
    waiting, shard = list(bodies), first_shard
    while waiting:
        some, waiting = waiting[:rows], waiting[rows:]
        with scratch_directory() as scratch:
            records, members = [], []
            for row, (name, body) in enumerate(some):
                header = read_header(body)
                assert not isinstance(header, Rejected), name
                picture = decode(body, header, PICTURE.short_side_px)
                assert not isinstance(picture, Rejected), name
                picture = resize_short_side(picture, PICTURE.short_side_px)
                key, url = f"{shard:05d}{row:04d}", f"http://example.org/{name}"
                jpeg = encode_jpeg(picture, PICTURE.jpeg_quality)
                members.append((f"{key}.jpg", jpeg))
                members.append((f"{key}.json", json.dumps({"uid": pair_uid(url.encode(), b"").hex()}).encode()))
                members.append((f"{key}.txt", b""))
                known = {"key": key, "uid": pair_uid(url.encode(), b"").hex(), "url": url, "final_url": url}
                known |= {"caption": "", "status": "success", "split": "train", "weight": 1.0}
                known |= {"sha256": sha256(body), "dhash": dhash(picture), "jpg_size": len(jpeg)}
                known |= {"bytes_in": len(body), "original_width": header.width, "original_height": header.height}
                known |= {"height": picture.shape[0], "width": picture.shape[1], "content_type": "image/png"}
                records.append(known)
            offsets = write_tar(scratch / "tar", members)
            for record in records:
                record["tar_offset"] = offsets[f"{record['key']}.jpg"]
            groups = write_table(scratch / "parquet", pa.Table.from_pylist(records, schema=sidecar_schema()))
            made_from, kept = {"work_order": f"{shard:064x}"}, len(records)
            receipt = Receipt("pairs", shard, 0, made_from, rows=kept, kept=kept, row_groups=groups)
            assert publish(store, receipt, {name: scratch / name for name in ("tar", "parquet")})
        shard += 1


def copies_of(location: Path) -> dict[str, str]:
    """uid that went -> uid that stays."""
    rows = read_drop_rows(open_store(str(location)))
    return dict(zip(rows["uid"].to_pylist(), rows["stays"].to_pylist(), strict=True))


def uid_of(name: str) -> str:
    """The uid that `write_pairs` gives."""
    return pair_uid(f"http://example.org/{name}".encode(), b"").hex()


def emoji(cache: Path, count: int | None = None, only: Sequence[str] = ()) -> list[tuple[str, Pixels]]:
    """OpenMoji's drawings, one for each raster, in the order of their codes: the first, or `only` these."""
    codes = list(only) or sorted(names())[:count]
    index = render_files(cache, codes)
    first: dict[str, str] = {}
    for code in codes:
        first.setdefault(index[code]["raster"], code)
    return [(code, pixels((cache / f"{code}.png").read_bytes())) for code in first.values()]


def photographs(folder: Path | None, drawn: int) -> list[tuple[str, Pixels]]:
    """`drawn` ones, and the files of a folder."""
    from PIL import Image

    found = [(f"drawn-{number}", draw_photograph(number, *SIZES[number % len(SIZES)])) for number in range(drawn)]
    for path in sorted(folder.iterdir()) if folder else ():
        if path.suffix in (".png", ".jpg", ".jpeg"):
            found.append((path.name, np.asarray(Image.open(path).convert("RGB"))))
    return found


def judged(
    pictures: Sequence[tuple[str, Pixels]], way: Callable[[Pixels], bytes] | None, place: Path
) -> tuple[set[str], list[tuple[str, str]], Cost]:
    """(names whose copy was found, (name, name) of pictures under two names that matched, what it cost)."""
    bodies = [(name, png(picture)) for name, picture in pictures]
    if way:
        bodies += [(f"copy-{name}", way(picture)) for name, picture in pictures]
    name_of = {uid_of(name): name for name, _ in bodies}
    write_pairs(place, bodies)
    costs: dict[str, Cost] = {}
    with timed("dedup", costs):
        deduplicate(str(place))
    matched = [(name_of[gone], name_of[stays]) for gone, stays in copies_of(place).items()]
    origin = [(gone.removeprefix("copy-"), stays.removeprefix("copy-")) for gone, stays in matched]
    own = {
        name
        for (gone, _), (name, of) in zip(matched, origin, strict=True)
        if gone == f"copy-{name}" and (name == of or is_one_drawing(name, of, dict(pictures)))
    }
    return own, [(a, b) for a, b in origin if a != b], costs["dedup"]


def is_one_drawing(a: str, b: str, pixels_of: Mapping[str, Pixels]) -> bool:
    """Equal pixels, or shades of some pixels apart."""
    return {a, b} in ONE_DRAWING or np.array_equal(pixels_of[a], pixels_of[b])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--emoji", type=int, default=None, help="so many drawings; default: all")
    parser.add_argument("--drawn", type=int, default=100, help="drawn photographs")
    parser.add_argument("--photographs", type=Path, default=None, help="folder of PNG and JPEG files")
    parser.add_argument("--cpus", type=int, default=2)
    arguments = parser.parse_args()
    where, ratios = device("numpy", "opencv-python-headless", "simplejpeg", "ray"), {}
    print(where)
    with tempfile.TemporaryDirectory() as scratch, connect(Cluster(address=None, cpus=arguments.cpus)):
        room = Path(scratch)
        began_s = time.monotonic()
        kinds = {"emoji": emoji(room / "emoji", arguments.emoji)}
        kinds["photograph"] = photographs(arguments.photographs, arguments.drawn)
        every = [*kinds["emoji"], *kinds["photograph"]]
        pixels_of = dict(every)
        print(
            ", ".join(f"{len(some)} {kind}s" for kind, some in kinds.items()), f"in {time.monotonic() - began_s:.0f} s"
        )
        false_matches: list[tuple[str, str]] = []
        for number, (name, way) in enumerate({"each once": None, **WAYS}.items()):
            found, others, cost = judged(every, way, room / f"pairs-{number}")
            alike = [pair for pair in others if is_one_drawing(*pair, pixels_of)]
            wrong = sorted(set(others) - set(alike))
            shares = {kind: np.mean([one in found for one, _ in some]) for kind, some in kinds.items() if way and some}
            if name == "each once":
                false_matches = wrong
                print("one drawing under two names:", ", ".join(f"{a} = {b}" for a, b in sorted(alike)))
            recalls = ", ".join(f"{share:.4f} of {kind}s" for kind, share in shares.items())
            print(
                f"{name:20} found {recalls or '-'}; {len(wrong)} false {wrong[:5]}; {cost['cpu']:.0f} CPU-s", flush=True
            )
            ratios |= {f"recall {name} {kind}": float(share) for kind, share in shares.items()}
    print_last_line("dedup", where, ratios, false_matches=len(false_matches))
    good = all(share >= 0.99 for name, share in ratios.items() if "quality 50" in name)
    sys.exit(0 if good and not false_matches else 1)


if __name__ == "__main__":
    main()
