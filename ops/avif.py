"""What the boxes of an AVIF file say before anything is decoded: its size, its turn, and that its pixels keep to it.

The size stands in a box (`ispe`) and once more inside the AV1 data, which is what a decoder makes room for: a file of
1 kB that says 300 x 240 in its box and 16,384 x 16,384 inside would cost gigabytes. So both are read. Taken: one still
picture, with or without alpha. Not taken: sequences (`avis`), pictures made of tiles (`grid`), layers.

Boxes: ISO/IEC 14496-12 and 23008-12. Bits of AV1: its specification, sections 5.3 and 5.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

Box = tuple[bytes, bytes]
"""Name and content."""


@dataclass(frozen=True)
class AvifHeader:
    """Size of the stored rows, how EXIF would call their turn (1 to 8), and whether there is an alpha plane."""

    width: int
    height: int
    orientation: int
    has_alpha: bool


class _Broken(Exception):
    """The boxes do not say what we need to know."""


def is_avif(data: bytes) -> bool:
    """Whether the first box says that this is a still AVIF picture."""
    brands = data[8 : min(len(data), int.from_bytes(data[:4], "big"))]
    return data[4:8] == b"ftyp" and (brands[:4] == b"avif" or (brands[:4] == b"mif1" and b"avif" in brands))


def read_avif(data: bytes) -> AvifHeader | None:
    """The header, or None where it is broken or of a kind that is not taken."""
    try:
        meta = dict(_boxes(_box(dict(_boxes(data)), b"meta")[4:]))
        items = _items(_box(meta, b"iinf"))
        places = _places(_box(meta, b"iloc"))
        primary = int.from_bytes(_box(meta, b"pitm")[4:], "big")
        if items.get(primary) != b"av01":
            return None
        properties = _properties(_box(meta, b"iprp"), primary)
        width, height = next(struct.unpack_from(">II", box, 4) for name, box in properties if name == b"ispe")
        for item, kind in items.items():
            if kind != b"av01":
                continue
            for inside in _sizes_inside(_content(places[item], data, meta.get(b"idat", b""))):
                if inside[0] > width or inside[1] > height:
                    return None
        angle = next((box[0] & 3 for name, box in properties if name == b"irot"), 0)
        mirror = next((1 + (box[0] & 1) for name, box in properties if name == b"imir"), 0)
        orientation = ((1, 4, 2), (8, 5, 7), (3, 2, 4), (6, 7, 5))[angle][mirror]
        return AvifHeader(width, height, orientation, b"auxl" in meta.get(b"iref", b""))
    except (_Broken, struct.error, IndexError, KeyError, StopIteration):
        return None


# --- boxes -----------------------------------------------------------------------------------------------------------
def _boxes(data: bytes) -> Iterator[Box]:
    at = 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start)
            start += 8
        end = at + size if size else len(data)
        if not start <= end <= len(data):
            raise _Broken
        yield name, data[start:end]
        at = end


def _box(boxes: dict[bytes, bytes], name: bytes) -> bytes:
    if name not in boxes:
        raise _Broken
    return boxes[name]


def _items(iinf: bytes) -> dict[int, bytes]:
    """Item -> its type."""
    found = {}
    for name, box in _boxes(iinf[6 if iinf[0] == 0 else 8 :]):
        if name != b"infe" or box[0] not in (2, 3):
            raise _Broken
        wide = 2 if box[0] == 2 else 4
        found[int.from_bytes(box[4 : 4 + wide], "big")] = box[6 + wide : 10 + wide]
    return found


def _places(iloc: bytes) -> dict[int, tuple[int, list[tuple[int, int]]]]:
    """Item -> (0: in the file, 1: in `idat`; its extents as offset and length)."""
    version, at = iloc[0], 4

    def number(n: int) -> int:
        nonlocal at
        at += n
        if at > len(iloc):
            raise _Broken
        return int.from_bytes(iloc[at - n : at], "big")

    sizes = number(2)
    n_offset, n_length, n_base, n_index = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15, sizes & 15 if version else 0
    wide = 2 if version < 2 else 4
    found = {}
    for _ in range(number(wide)):
        item = number(wide)
        method = number(2) & 15 if version else 0
        number(2)  # which file: ours
        base = number(n_base)
        extents = []
        for _ in range(number(2)):
            number(n_index)
            extents.append((base + number(n_offset), number(n_length)))
        found[item] = (method, extents)
    return found


def _content(place: tuple[int, list[tuple[int, int]]], data: bytes, idat: bytes) -> bytes:
    method, extents = place
    source = {0: data, 1: idat}[method]
    if any(at + length > len(source) for at, length in extents):
        raise _Broken
    return b"".join(source[at : at + length] if length else source[at:] for at, length in extents)


def _properties(iprp: bytes, item: int) -> list[Box]:
    """The properties of one item, in their order."""
    parts = list(_boxes(iprp))
    every = [box for name, content in parts if name == b"ipco" for box in _boxes(content)]
    for name, ipma in parts:
        if name != b"ipma":
            continue
        wide, long = (2 if ipma[0] == 0 else 4), (2 if ipma[3] & 1 else 1)
        (entries,) = struct.unpack_from(">I", ipma, 4)
        at = 8
        for _ in range(entries):
            of, count = int.from_bytes(ipma[at : at + wide], "big"), ipma[at + wide]
            at += wide + 1
            if of == item:
                mask = (1 << 8 * long - 1) - 1
                places = [int.from_bytes(ipma[at + long * i : at + long * (i + 1)], "big") & mask for i in range(count)]
                return [every[place - 1] for place in places if place]
            at += long * count
    raise _Broken


# --- AV1 -------------------------------------------------------------------------------------------------------------
def _sizes_inside(data: bytes) -> list[tuple[int, int]]:
    """The largest frame of each sequence header; there must be one."""
    found, at = [], 0
    while at < len(data):
        head = data[at]
        at += 2 if head & 4 else 1
        size = len(data) - at
        if head & 2:
            size, shift = 0, 0
            while True:
                size |= (data[at] & 0x7F) << shift
                shift += 7
                at += 1
                if not data[at - 1] & 0x80:
                    break
                if shift > 28:
                    raise _Broken
        if at + size > len(data):
            raise _Broken
        if head >> 3 & 15 == 1:
            found.append(_size_of_sequence(data[at : at + min(size, 64)]))
        at += size
    if not found:
        raise _Broken
    return found


def _size_of_sequence(header: bytes) -> tuple[int, int]:
    bits, left = int.from_bytes(header, "big"), 8 * len(header)

    def read(n: int) -> int:
        nonlocal left
        left -= n
        if left < 0:
            raise _Broken
        return bits >> left & (1 << n) - 1

    read(4)  # profile, still picture
    if read(1):  # the short header of a still picture
        read(5)
    else:
        if read(1):  # timing: no still picture needs it
            raise _Broken
        has_delay = read(1)
        for _ in range(read(5) + 1):
            read(12)
            if read(5) > 7:
                read(1)
            if has_delay and read(1):
                read(4)
    n_width, n_height = read(4) + 1, read(4) + 1
    return read(n_width) + 1, read(n_height) + 1
