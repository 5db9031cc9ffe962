from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import main
from tests.bench.dedup import WAYS, photographs, png, uid_of, write_pairs


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard output of the command line, run in this process."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0), capsys.readouterr().out


@pytest.mark.usefixtures("ray_cluster")
def test_dedup_and_drop_answer_in_words_and_as_json_and_why_tells_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, (one, other) = str(tmp_path / "pairs"), photographs(None, 2)
    write_pairs(tmp_path / "pairs", [("a", png(one[1])), ("b", WAYS["quality 50"](one[1])), ("c", png(other[1]))])
    code, told = ended(capsys, "dedup", pairs, "--json")
    assert (code, json.loads(told)) == (0, {"pairs": 3, "shards": 1, "duplicates": 1, "kept": 2})
    code, told = ended(capsys, "dedup", pairs)
    assert (code, told) == (0, f"{pairs}: no new copies among 3 kept pairs\n")
    (tmp_path / "gone").write_text("http://example.org/c\nhttp://example.org/d\n")
    code, told = ended(capsys, "drop", pairs, "--urls", str(tmp_path / "gone"))
    assert code == 5, "the takedown holds, but not all of it is of a pair"
    assert "found 1 pairs, 1 of them kept" in told
    assert "http://example.org/d" in told
    code, told = ended(capsys, "drop", pairs, "--urls", str(tmp_path / "gone"), "--json")
    assert (code, json.loads(told)["added"]) == (5, {pairs: 0})
    _, told = ended(capsys, "why", uid_of("b"), "--in", pairs, "--into", str(tmp_path / "b"))
    assert f"a copy of {uid_of('a')}" in told
    _, told = ended(capsys, "why", "http://example.org/c", "--in", pairs, "--into", str(tmp_path / "c"))
    assert "taken down, says" in told
