from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.sampling import SampleSettings
from ops.errors import UsageError
from ops.generate import decode_codes, draw_best_first, generate, load_model, sample_codes, scores
from ops.sheets import Cell, draw_sheet, to_pixels
from tests.ops.conftest import Learned


def _image(path: str) -> Image.Image:
    return Image.open(io.BytesIO(Path(path).read_bytes()))


def test_a_prompt_gives_a_sheet_its_pictures_and_what_made_them(learned: Learned, tmp_path: Path) -> None:
    told = generate(str(learned.model), ["a red square"], n=4, seed=3, into=str(tmp_path / "x.png"))
    assert told["sheets"] == [str(tmp_path / "x.png")]
    (one,) = told["prompts"]
    assert json.loads((tmp_path / "x.json").read_bytes()) == one
    assert one["prompt"] == "a red square"
    assert one["note"] == ""
    assert {name: told[name] for name in ("seed", "model", "tokenizer")} == {
        "seed": 3,
        "model": load_model(str(learned.model)).digest,
        "tokenizer": load_model(str(learned.model)).tokenizer_digest,
    }
    scored = [picture["score"] for picture in one["pictures"]]
    assert scored == sorted(scored, reverse=True)
    for picture in one["pictures"]:
        assert _image(picture["path"]).size == (16, 16)
    assert _image(told["sheets"][0]).size[0] > 2 * 96


def test_equal_seeds_give_equal_pictures_and_others_do_not(learned: Learned, tmp_path: Path) -> None:
    def pictures(seed: int) -> list[bytes]:
        told = generate(str(learned.model), ["a blue bar"], n=3, seed=seed, into=str(tmp_path / f"{seed}.png"))
        return [Path(picture["path"]).read_bytes() for picture in told["prompts"][0]["pictures"]]

    assert pictures(1) == pictures(1)
    assert pictures(1) != pictures(2)


def test_a_picture_does_not_depend_on_the_size_of_its_batch(learned: Learned) -> None:
    model = load_model(str(learned.model))
    prompts, seeds = ["a red square"] * 5, list(range(5))
    together = sample_codes(model, prompts, SampleSettings(), seeds)
    assert (sample_codes(model, prompts, SampleSettings(), seeds, batch=2) == together).all()
    assert (decode_codes(model, together, batch=2) == decode_codes(model, together)).all()


def test_the_score_is_the_gain_over_no_caption(learned: Learned) -> None:
    model = load_model(str(learned.model))
    drawn = draw_best_first(model, "a green pole", 3, SampleSettings(), [5, 6, 7])
    codes_BN = sample_codes(model, ["a green pole"] * 3, SampleSettings(), [one.seed for one in drawn])
    assert codes_BN.tolist() == [one.codes_N.tolist() for one in drawn]
    logits = {}
    for name, caption in (("right", "a green pole"), ("none", "")):
        text_BT = model.captions.encode([caption] * 3, 8)
        log_p = model.transformer.image_logits(text_BT, codes_BN).log_softmax(dim=-1)
        logits[name] = log_p.gather(2, codes_BN[:, :, None]).mean(dim=(1, 2))
    assert [one.score for one in drawn] == pytest.approx((logits["right"] - logits["none"]).tolist(), abs=1e-5)


def test_a_model_trained_without_dropped_captions_is_scored_by_log_probability(
    learned: Learned, tmp_path: Path
) -> None:
    model = load_model(str(learned.model))
    codes_BN = sample_codes(model, ["a red bar"] * 2, SampleSettings(), [0, 1])
    gain_B = scores(model, ["a red bar"] * 2, codes_BN)
    object.__setattr__(model.transformer.settings, "caption_dropout", 0.0)
    log_p_B = scores(model, ["a red bar"] * 2, codes_BN)
    none_B = scores(model, ["", ""], codes_BN)
    assert (log_p_B - none_B).tolist() == pytest.approx(gain_B.tolist(), abs=1e-5)
    assert (log_p_B < 0).all()


def test_a_prompt_that_is_too_long_is_cut_and_says_so(learned: Learned, tmp_path: Path) -> None:
    told = generate(str(learned.model), ["a red square " * 9], n=1, into=str(tmp_path / "x.png"))
    note = told["prompts"][0]["note"]
    assert "longer than 8 text positions" in note
    assert "a red square" in note


@pytest.mark.parametrize("prompts", [[], [""], ["  \n"]])
def test_an_empty_prompt_is_refused(learned: Learned, tmp_path: Path, prompts: list[str]) -> None:
    with pytest.raises(UsageError, match="prompt"):
        generate(str(learned.model), prompts, into=str(tmp_path / "x.png"))
    assert list(tmp_path.iterdir()) == []


def test_any_script_draws(learned: Learned, tmp_path: Path) -> None:
    told = generate(str(learned.model), ["красный квадрат", "赤"], n=1, into=str(tmp_path / "x.png"))
    assert [Path(sheet).name for sheet in told["sheets"]] == ["x-0.png", "x-1.png"]
    assert "do not hold 'красныйвдт'" in told["prompts"][0]["note"], "and the person hears that it means nothing"


def test_without_a_place_pictures_go_beside_the_model(learned: Learned, tmp_path: Path) -> None:
    model = shutil.copytree(learned.model, tmp_path / "run" / "model")
    told = generate(str(model), ["A red, red square!"], n=1)
    assert told["sheets"] == [str(tmp_path / "run" / "pictures" / "a-red-red-square.png")]


def test_another_tokenizer_is_refused(learned: Learned, tmp_path: Path) -> None:
    other = shutil.copytree(learned.tokenizer, tmp_path / "tokenizer")
    (other / "steps" / "0000020" / "receipt.json").unlink()
    with pytest.raises(UsageError, match="carries its own"):
        generate(str(learned.model), ["a red square"], tokenizer=str(other))


def test_a_sheet_shows_the_pixels_it_was_given() -> None:
    rng = np.random.default_rng(0)
    cells = [Cell(rng.integers(0, 256, (16, 16, 3), np.uint8), f"caption {n}") for n in range(3)]
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet([cells[:2], cells[2:]], "a title", cell_px=32))))
    for cell in cells:
        large = cell.pixels.repeat(2, axis=0).repeat(2, axis=1)
        places = np.lib.stride_tricks.sliding_window_view(sheet, large.shape)[:, :, 0]
        assert (places == large).all(axis=(2, 3, 4)).sum() == 1


def test_pictures_survive_the_way_to_pixels() -> None:
    import torch

    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert (to_pixels(images_BCHW) == pixels).all()
