from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from cyclopts import Parameter

from pipelines.cli import app, main

REPO = Path(__file__).parents[2]


def armchair(*arguments: str) -> int:
    """Runs the command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    return code if isinstance(code, int) else 0


def commands() -> list[str]:
    top = [name for name in app if not name.startswith("-") and name != "train"]
    return [*top, *(f"train {name}" for name in app["train"] if not name.startswith("-"))]


def test_readme_tells_every_command() -> None:
    readme = (REPO / "README.md").read_text()
    assert [name for name in commands() if f"`armchair {name}" not in readme] == []


@pytest.mark.parametrize("command", commands())
def test_every_command_and_every_parameter_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert armchair(*command.split(), "--help") == 0
    assert "Usage: armchair" in capsys.readouterr().out
    node = app
    for word in command.split():
        node = node[word]
    function = node.default_command
    assert function is not None
    assert function.__doc__
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        helps = [part.help for part in getattr(hint, "__metadata__", ()) if isinstance(part, Parameter)]
        assert name == "return" or any(helps), f"{command}: {name} has no help"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["build", "none.tsv", "--into", "{tmp}/run"], 2, r"none\.tsv"),
        (["build", "--into", "{tmp}/run"], 2, "no list was given"),
        (["build", "{list}", "--into", "{tmp}/run", "--preset", "demmo"], 2, r"Did you mean demo\?"),
        (["build", "{list}", "--into", "{tmp}/run", "--set", "dvae.vocab=3"], 2, r"did you mean dvae\.vocabulary\?"),
        (["build", "{list}", "--into", "{list}"], 3, "is a file"),
        (["build", "{list}", "--into", "s3://bucket/run"], 3, "only local paths"),
        (["status", "{tmp}/nothing"], 2, "nothing is planned"),
        (["generate", "{tmp}/nothing", "a cat"], 2, "holds no|does not exist"),
        (["rerun", "{tmp}/nothing", "--shards", "3-x"], 2, "no shard or range"),
        (["generate", "{tmp}/nothing", " "], 2, "the prompt is empty"),
        (["demo", "--into", "s3://bucket/demo"], 2, "Use a local --into"),
        (["settings", "--set", "fetch.retries=-1"], 2, r"fetch\.retries"),
    ],
)
def test_bad_input_ends_with_its_code_and_a_line_that_helps(
    arguments: list[str],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = tmp_path / "list.tsv"
    listed.write_text("url\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat\n")
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(tmp=tmp_path, list=listed) for argument in arguments]
    assert armchair(*filled) == code
    captured = capsys.readouterr()
    assert re.search(told, captured.err), captured.err
    assert "Traceback" not in captured.err


def test_settings_are_told_with_value_doc_and_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert armchair("settings", "--preset", "demo", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dvae.vocabulary"]["value"] == 256
    assert told["dvae.vocabulary"]["layer"] == "preset demo.toml"
    assert told["dvae.vocabulary"]["doc"]


def test_the_back_port_of_dataclasses_is_told_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """img2dataset asks for it; with it, Prefect's server dies and the client waits two minutes."""
    (tmp_path / "dataclasses-0.8.dist-info").mkdir()
    (tmp_path / "dataclasses-0.8.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dataclasses\nVersion: 0.8\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert armchair("settings") == 2
    assert "pip uninstall -y dataclasses" in capsys.readouterr().err


def test_prefect_is_given_the_time_its_first_start_needs_and_no_telemetry() -> None:
    code = (
        "import os, sys; from pipelines.cli import main\n"
        "try: main(['settings', '--json'])\n"
        "except SystemExit: pass\n"
        "from prefect.settings import get_current_settings as now\n"
        "print(now().server.ephemeral.startup_timeout_seconds, now().server.analytics_enabled, file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    told = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert told.stderr.split() == ["120", "False"], told.stderr


def test_ctrl_c_ends_with_a_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    """While Prefect's server starts: the signal reaches it too, as from a terminal."""
    listed = tmp_path / "list.tsv"
    listed.write_text("url\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat on a mat\n")
    command = [sys.executable, "-m", "pipelines", "ingest", str(listed), "--into", str(tmp_path / "pairs")]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    with subprocess.Popen(
        command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        for _ in range(600):
            if (tmp_path / "prefect").exists() or run.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(run.pid, signal.SIGINT)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 130, told
    assert told.strip().splitlines()[-1].startswith("armchair: stopped. Run the same command again")
