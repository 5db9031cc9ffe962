"""Lines for people of `armchair estimate`: both models, and what would help where nothing fits; the same as JSON."""

from __future__ import annotations

import json

import pytest

from ops.estimate import GPUS
from pipelines.cli import main


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code in (0, None), captured.err
    return captured.out


def test_both_models_of_a_preset_are_told_as_lines_or_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "tiny", "--gpus", "2", "--kind", "h200", "--mfu", "0.5").splitlines()
    found = json.loads(told(capsys, "tiny", "--gpus", "2", "--kind", "h200", "--mfu", "0.5", "--json"))
    assert lines[0].startswith("2 × H200 (SXM), each 141.0 GB and 989 TFLOP/s")
    assert "50.0 % (MFU" in lines[0]
    assert [line for line in lines if line in found["models"]] == ["tokenizer", "transformer"]
    ways = [line for line in lines if line.startswith(" " * 11)]
    # Of each model copies and shares, kept and recomputed.
    assert [line.split("  ")[0] for line in map(str.strip, ways)] == 2 * [
        "copies (DDP)",
        "copies (DDP), recomputed",
        "shares (FSDP2)",
        "shares (FSDP2), recomputed",
    ]
    transformer = found["models"]["transformer"]
    assert transformer["tokens"] == 40 * 8 * (12 + 16)
    assert f"run        40 updates of 8: 320 pictures, {transformer['tokens'] / 1000:.3g} k tokens" in lines
    assert not any(line.startswith("next") for line in lines)
    assert found["mfu"] == 0.5
    # A setting goes over the preset.
    more = json.loads(told(capsys, "tiny", "--set", "transformer_training.steps=80", "--json"))
    assert more["models"]["transformer"]["tokens"] == 2 * transformer["tokens"]


def test_what_does_not_fit_is_said_with_what_would_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def help_of(memory_mb: float) -> list[str]:
        monkeypatch.setitem(GPUS, "SMALL", type(GPUS["A100"])(1e6 * memory_mb, 1e12, "for this test"))
        large = ("--set", "transformer.width=256", "--set", "transformer_training.evaluate_pictures=0")
        lines = told(capsys, "tiny", *large, "--kind", "small", "--gpus", "2").splitlines()
        transformer = lines[lines.index("transformer") :]
        assert sum("DOES NOT FIT" in line for line in transformer) == (0 if memory_mb > 100 else 6)
        return [line for line in transformer if line.startswith("next")]

    assert help_of(200) == []
    (enough,) = help_of(25)
    assert "take 4 × SMALL or more, with shares and recomputing" in enough
    (none,) = help_of(1)
    assert "no number of SMALL is enough for one picture" in none


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "tiny", "--kind", "H10"])
    assert ended.value.code == 2
    assert "Did you mean H100?" in capsys.readouterr().err
