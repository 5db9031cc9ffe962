from __future__ import annotations

import tomllib

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ops.boilerplate import FILE, VERSION, Pattern, find_boilerplate, patterns
from ops.filters import FilterSettings

ORDINARY = (
    """a red apple on a wooden table|Nike Air Max 90 white|iPhone 12 Pro Max silicone case|Boeing 747-8 in flight
Huawei P30 Pro|P-51 Mustang over Duxford, 2014|1965 Ford Mustang|MG B GT 1972|Canon EOS R5 mirrorless camera
a calendar for May 2014 with kittens|view of the old town|view from the window|See the northern lights in Norway
a photo of a dog|photograph of two children on a beach, 1952|a picture frame on a white wall|an image of the moon
stock market chart|a stock pot on a stove|livestock in a barn|royalty free of all pomp: the queen at home
a button to click|a man clicks a stopwatch|zoom lens|the enlarged heart of a bird|an open book|save the whales poster
Photo booth at a wedding|photographer in the snow|logo of a coffee shop|company logo with a blue whale|a blank page
map of Europe 1914|World Cup 2014 final|12 angry men|10 Downing Street|7 samurai|100 years of solitude book cover
sign in a shop window|a sign up a steep hill|menu of a restaurant|search party in the fog|closed gate|loading dock
the copyright sign|a source of light|via Appia near Rome|a courtesy car|Next Generation star ship|Previous owner's car
portrait of Jane Doe, taken in her garden in spring|the May queen|April showers|a march in June|Friday market
Image Comics issue 12, the cover with a dragon|figure skater|figure 8 knot|slide in a playground|alt rock band on stage
old stone bridge over a quiet river at dawn - click to enlarge|a red kite over the hills of Wales, stock photo
Young woman in a red coat crossing the road © Jane Doe|sunset over the harbour of Hamburg, uploaded on 12 May 2014
a shy picture 10
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


@pytest.mark.parametrize("pattern", patterns(), ids=lambda pattern: pattern.name)
def test_each_pattern_matches_its_examples_and_they_are_boilerplate(pattern: Pattern) -> None:
    examples = pa.array(pattern.examples)
    assert pattern.examples
    assert pc.all(pc.match_substring_regex(examples, pattern.pattern)).as_py()
    assert sorted(find_boilerplate(examples)) == list(range(len(examples)))


def test_no_ordinary_caption_is_boilerplate() -> None:
    assert {ORDINARY[row]: name for row, name in find_boilerplate(pa.array(ORDINARY)).items()} == {}


def test_no_caption_of_openmoji_is_boilerplate() -> None:
    openmoji = pytest.importorskip("ops.openmoji")
    captions = [described.caption for described in openmoji.describe(openmoji.names())]
    assert {captions[row]: name for row, name in find_boilerplate(pa.array(captions)).items()} == {}


def test_boilerplate_behind_a_caption_costs_nothing_and_boilerplate_alone_says_which() -> None:
    captions = ["a red kite over Wales - stock photo", "kite, photographed on 12 May 2014", "IMG_1234 stock photo", ""]
    assert find_boilerplate(pa.array(captions)) == {1: "taken on a date", 2: "a camera's file name"}


def test_the_version_of_the_file_is_the_one_that_bears_identity() -> None:
    assert tomllib.loads(FILE.read_text())["version"] == VERSION == FilterSettings().boilerplate
