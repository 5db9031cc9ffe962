"""What people type wrong and what their disks do: each ends with its exit code and a line that says what to do next."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.cluster import REPO
from pipelines.cli import main
from pipelines.show import show_tally
from tests.ops.conftest import Learned

LISTS = {
    "good.tsv": b"url\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat\n",
    "no_url.tsv": b"link\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat\n",
    "no_rows.tsv": b"url\tcaption\n",
    "empty.tsv": b"",
    "utf16.tsv": "url\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat\n".encode("utf-16"),
    "noise.parquet": b"PAR1 and then no Parquet",
    "noise.jsonl": b'{"url": "http://127.0.0.1:9/1.jpg", "caption": "a cat"}\n{"url": ',
    "pictures.zip": b"PK",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, learned: Learned) -> Path:
    """Lists, and a run of tiny models of which some copies are broken."""
    desk = tmp_path_factory.mktemp("desk")
    for name, content in LISTS.items():
        (desk / name).write_bytes(content)
    for stage in ("pairs", "tokenizer", "tokens", "model"):
        shutil.copytree(getattr(learned, stage), desk / stage)
    shutil.copytree(learned.model, desk / "bare_model")
    shutil.rmtree(desk / "bare_model" / "tokenizer")
    return desk


def _ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what was said of the command line, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr()
    assert "Traceback" not in told.err + told.out
    return int(ended.value.code or 0), told.err


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("ingest no_url.tsv --into new", 2, r"no column 'url'.*link, caption.*--url-col"),
        ("ingest no_rows.tsv --into new", 2, r"has no rows.*correct the list"),
        ("ingest empty.tsv --into new", 2, r"has no rows.*correct the list"),
        ("ingest none.tsv --into new", 2, r"no such file"),
        ("ingest utf16.tsv --into new", 2, r"UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("ingest noise.parquet --into new", 2, r"can't be read.*Parquet"),
        ("ingest noise.jsonl --into new", 2, r"line 2"),
        ("ingest pictures.zip --into new", 2, r"ends in one of \.parquet"),
        ("ingest good.tsv --into new --set fetch.retriez=3", 2, r"fetch\.retriez.*did you mean fetch\.retries\?"),
        ("ingest good.tsv --into new --set fetch.retries=-1", 2, r"fetch\.retries.*greater than or equal to 0"),
        ("ingest good.tsv --into new --set picture.jpeg_quality=high", 2, r"picture\.jpeg_quality.*integer"),
        ("ingest good.tsv --into new --preset laptob", 2, r"no preset 'laptob'.*Did you mean laptop\?"),
        ("adopt nowhere --into new", 2, r"nowhere holds no shard of img2dataset's.*--output_format webdataset"),
        ("adopt . none.tsv --into new", 2, r"holds no shard of img2dataset's"),
        ("adopt good.tsv --into new", 2, r"good\.tsv is a file.*a directory is needed"),
        ("ingest good.tsv --into good.tsv", 2, r"good\.tsv is a file.*Name another"),
        ("ingest good.tsv --into good.tsv/pairs", 2, r"good\.tsv is a file.*Name another"),
        (
            "train transformer tokens --into new --preset demo",
            2,
            r"transformer\.grid is 8.*has 4.*--set transformer\.grid=4",
        ),
        ("train transformer pairs --into new --preset tiny", 2, r"holds pairs, not tokens.*the other directory"),
        ("train tokenizer tokens --into new --preset tiny", 2, r"holds tokens, not pairs.*the other directory"),
        ("tokenize pairs --tokenizer model/nothing --into new", 2, r"holds no tokenizer.*armchair train tokenizer"),
        ("train tokenizer pairs --into new --preset tiny --workers 0", 2, r"--workers is 0.*1 or more"),
        ("train tokenizer pairs --into new --preset tiny --accumulate 2", 2, r"dvae\.usage is.*--accumulate"),
        ("generate bare_model cat", 2, r"lacks tokenizer/receipt\.json.*--tokenizer"),
        ("generate pairs cat", 2, r"is of the stage pairs, not transformer"),
        ("generate model  ", 2, r"armchair generate MODEL"),
        ("verify nowhere", 2, r"armchair ingest"),
        ("drop pairs", 2, r"nothing was named.*--urls FILE"),
        ("drop pairs --urls none.txt", 2, r"none\.txt does not exist"),
        ("drop pairs --uids good.tsv", 2, r"good\.tsv.*is no uid.*32 hex digits"),
        ("drop pairs --urls empty.tsv", 2, r"empty\.tsv names no url"),
        ("drop tokens --urls good.tsv", 2, r"codes have no URLs.*armchair drop PAIRS TOKENS"),
        ("drop model --urls good.tsv", 2, r"holds no pairs and no codes"),
        ("drop nowhere --urls good.tsv", 2, r"holds no stage and no run"),
        ("dedup tokens", 2, r"holds tokens, not pairs"),
        ("dedup nowhere", 2, r"holds no pairs and no tokens"),
        ("report nowhere", 2, r"holds no run.*armchair build"),
        ("forecast good.tsv --sample 0", 2, r"--sample 0.*at least 1"),
        ("forecast none.tsv", 2, r"no such file"),
        ("forecast", 2, r"no list was given.*armchair forecast LIST"),
        ("forecast no_url.tsv", 2, r"no column 'url'.*--url-col"),
        ("forecast good.tsv --preset tiny --preset papr", 2, r"no preset 'papr'.*Did you mean paper\?"),
    ],
)
def test_a_mistake_ends_with_its_code_and_the_next_step(
    command: str,
    code: int,
    told: str,
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(desk)
    ended, said = _ended(command.split(), capsys)
    assert ended == code, said
    assert re.search(told, said.replace("\n", " ")), said
    assert not (desk / "new" / "receipts").exists()


LONG = "a very long prompt about red squares, " * 270  # more than 10,000 characters


@pytest.mark.parametrize(
    ("prompt", "told"),
    [(LONG, r"longer than 8 text positions; what was read of it"), ("красный квадрат", r"do not hold 'красныйвдт'")],
)
def test_a_prompt_that_is_read_in_part_draws_and_says_so(
    prompt: str, told: str, desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, said = _ended(["generate", str(desk / "model"), prompt, "-n", "1", "--into", f"{tmp_path}/x.png"], capsys)
    assert ended == 0
    assert re.search(told, said), said
    assert len(said) < 400, "and not in ten thousand characters"
    assert (tmp_path / "x.png").stat().st_size > 0


def test_captions_in_another_encoding_are_told_with_the_cure() -> None:
    pairs = {"rows": 2, "kept": 1, "rejected": {"caption_encoding": 1}}
    told = show_tally("pairs", {"shards": {"planned": 1, "committed": 1}, "pairs": pairs, "unfinished": []})
    assert re.search(r"1 captions are not UTF-8.*iconv -f LATIN1 -t UTF-8", told)


def _flip(path: Path, at: float) -> None:
    """One bit of one byte, at this share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0.1, 0.35, 0.6, 0.85])
@pytest.mark.parametrize(
    ("files", "command"),
    [
        ("pairs/receipts/*.json", "verify pairs"),
        ("tokens/receipts/*.json", "verify tokens"),
        ("tokens/data/*.parquet", "verify tokens --deep"),
        ("model/steps/*/receipt.json", "generate model cat"),
        ("model/steps/*/model-*.safetensors", "generate model cat"),
        ("model/tokenizer/*.safetensors", "generate model cat"),
    ],
)
def test_one_flipped_bit_is_found_and_the_file_named(
    files: str,
    command: str,
    at: float,
    desk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = files.partition("/")[0]
    shutil.copytree(desk / stage, tmp_path / stage)
    flipped = sorted(tmp_path.glob(files))[-1]
    _flip(flipped, at)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    told = capsys.readouterr()
    assert ended.value.code == 3
    assert flipped.name in told.out + told.err
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("pairs/receipts/00000.g0.json", "status pairs"),
        ("pairs/recipe.json", "train tokenizer pairs --into new --preset tiny"),
        ("tokens/recipe.json", "train transformer tokens --into new --preset tiny"),
        ("tokens/tokenizer/receipt.json", "train transformer tokens --into new --preset tiny"),
        ("model/recipe.json", "generate model cat"),
        ("model/tokenizer/receipt.json", "generate model cat"),
    ],
)
def test_a_file_of_a_later_version_is_refused_with_the_cure(
    file: str,
    command: str,
    desk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = file.partition("/")[0]
    shutil.copytree(desk / stage, tmp_path / stage)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": 99}))
    monkeypatch.chdir(tmp_path)
    ended, said = _ended(command.split(), capsys)
    assert ended == 3, said
    assert re.search(r"has format 99.*Use a newer armchair", said), said
    assert path.name in said


# Disks ----------------------------------------------------------------------------------------------------------------

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
"""A mount of our own, which ends with the process that made it."""


def _on_a_disk(options: str, command: str, desk: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process that sees a tmpfs at disk/. Skips where no such mount may be made."""
    disk = desk / "disk"
    disk.mkdir(exist_ok=True)
    script = f"mount -t tmpfs -o {options} tmpfs disk && "
    if subprocess.run([*UNSHARE, "sh", "-c", f"{script} true"], cwd=desk, capture_output=True).returncode:
        pytest.skip("this user may mount nothing, not even in a namespace of its own")
    script += f"{sys.executable} -m pipelines {command}"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [*UNSHARE, "sh", "-c", script], cwd=desk, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [("ro", r"Read-only file system.*disk.*rights"), ("size=4k", r"No space left on device.*disk.*space left")],
)
def test_a_disk_that_can_not_be_written_is_told(options: str, told: str, desk: Path) -> None:
    ended = _on_a_disk(options, "ingest good.tsv --into disk/pairs --preset tiny", desk)
    assert ended.returncode == 3, ended.stderr
    assert re.search(told, ended.stderr.replace("\n", " ")), ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_disk_that_fills_up_while_pictures_are_drawn_is_told(desk: Path) -> None:
    ended = _on_a_disk("size=8k", "generate model cat -n 4 --into disk/x.png", desk)
    assert ended.returncode == 3, ended.stderr
    assert re.search(r"No space left on device.*space left", ended.stderr), ended.stderr
