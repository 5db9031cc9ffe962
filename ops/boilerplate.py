"""Captions that say nothing about their picture, by the patterns of ops/boilerplate.toml.

One pass of all patterns at once over all captions (RE2, linear in their length), and a closer look at the few that
match. May not live here: what is done about it (ops/filters.py).
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

FILE = Path(__file__).with_suffix(".toml")
VERSION: Final = 1
"""Of the patterns; FILE says the same (tested). It bears identity through FilterSettings."""


class Pattern(NamedTuple):
    """One kind of boilerplate: its name, its RE2 pattern, and captions that it must match."""

    name: str
    pattern: str
    examples: tuple[str, ...]


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """The patterns of the file, in its order, with the dates filled in."""
    read = tomllib.loads(FILE.read_text())
    date = "(?:" + "|".join(read["dates"]).replace("{month}", read["month"]) + ")"
    return tuple(
        Pattern(one["name"], f"(?i:{one['pattern'].replace('{date}', date)})", tuple(one["examples"]))
        for one in read["patterns"]
    )


def find_boilerplate(captions: pa.StringArray) -> dict[int, str]:
    """Rows of the captions that consist primarily of boilerplate, and the name of the first pattern that matches.

    >>> find_boilerplate(pa.array(["Photo taken on 12 May 2014", "a stone bridge over a river, May 2014"]))
    {0: 'taken on a date'}
    """
    every = "|".join(pattern.pattern for pattern in patterns())
    suspects = pc.indices_nonzero(pc.match_substring_regex(captions, every))
    texts = captions.take(suspects)
    left = texts
    for pattern in patterns():
        left = pc.replace_substring_regex(left, pattern.pattern, " ")
    is_boilerplate = pc.less(pc.multiply(_signs(left), 2), _signs(texts)).to_numpy(zero_copy_only=False)
    found = {}
    for row, text, yes in zip(suspects.to_pylist(), texts.to_pylist(), is_boilerplate.tolist(), strict=True):
        if yes or not any(c.isalnum() for c in text):
            found[row] = _name(text)
    return found


def _signs(texts: pa.StringArray) -> pa.Array:
    """Letters and digits of each text."""
    return pc.count_substring_regex(texts, r"[\pL\pN]")


def _name(text: str) -> str:
    alone = pa.array([text])
    return next(p.name for p in patterns() if pc.match_substring_regex(alone, p.pattern)[0].as_py())
