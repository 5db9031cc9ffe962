from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from cyclopts import Parameter

from ops import demo_web
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
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Usage: armchair" in shown
    node = app
    for word in command.split():
        node = node[word]
    function = node.default_command
    assert function is not None
    assert function.__doc__
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        if is_dataclass(typing.get_args(hint)[:1] and typing.get_args(hint)[0]):  # a flag for each of its fields
            for field in fields(typing.get_args(hint)[0]):
                flag = field.name.replace("_", "-")
                assert re.search(rf"--{flag} (INT )?[A-Z]", shown), f"{command}: --{flag} has no help"
            continue
        helps = [part.help for part in getattr(hint, "__metadata__", ()) if isinstance(part, Parameter)]
        assert name == "return" or any(helps), f"{command}: {name} has no help"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["build", "none.tsv", "--into", "{tmp}/run"], 2, r"none\.tsv"),
        (["build", "--into", "{tmp}/run"], 2, "no list was given"),
        (["build", "{list}", "--into", "{tmp}/run", "--preset", "demmo"], 2, r"Did you mean demo\?"),
        (["build", "{list}", "--into", "{tmp}/run", "--set", "dvae.vocab=3"], 2, r"did you mean dvae\.vocabulary\?"),
        (["build", "{list}", "--into", "{list}"], 2, "is a file"),
        (["build", "{list}", "--into", "gopher://bucket/run"], 3, "Use a local path or s3://bucket/prefix"),
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


def functions() -> dict[str, Callable[..., Any]]:
    found = {}
    for command in commands():
        node = app
        for word in command.split():
            node = node[word]
        assert node.default_command is not None
        found[command] = node.default_command
    return found


def test_every_command_can_answer_as_json() -> None:
    assert [name for name, function in functions().items() if "json" not in typing.get_type_hints(function)] == []


def test_every_json_is_used() -> None:
    """A parameter that nobody looks at would print lines for people to a script."""
    unused = [
        name for name, function in functions().items() if not re.search(r"\bjson\b", _body(inspect.getsource(function)))
    ]
    assert unused == []


def _body(source: str) -> str:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    return "\n".join(ast.unparse(statement) for statement in function.body)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert armchair("--version") == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("armchair")


def test_help_answers_without_torch_ray_prefect_or_pyarrow() -> None:
    code = (
        "import sys; from pipelines.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'prefect', 'pyarrow', 'cv2') if m in sys.modules], file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert "Usage: armchair" in told.stdout
    assert told.stderr.strip() == "[]"


COMPLETE = """
source "$1"; shift
COMP_WORDS=(armchair "$@"); COMP_CWORD=$#
_armchair
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["sta"], ["status"]),
        (["train", "tok"], ["tokenizer"]),
        (["status", "--wa"], ["--watch"]),
        (["build", "--preset", "ti"], ["tiny"]),
        (["ingest", "--set", "fetch.retr"], ["fetch.retries="]),
    ],
)
def test_tab_completes_commands_options_presets_and_settings(
    words: list[str], completed: list[str], tmp_path: Path
) -> None:
    """By bash itself, with the script that `armchair --install-completion` writes."""
    script = tmp_path / "armchair.bash"
    script.write_text(app.generate_completion(prog_name="armchair", shell="bash"))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", COMPLETE, "bash", str(script), *words]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert told.stdout.split() == completed, told.stderr


def test_every_usage_and_storage_error_is_given_a_next_step() -> None:
    """Two values: what happened, and what to do about it."""
    without = [
        f"{path.name}:{call.lineno}"
        for room in ("pipelines", "ops", "infra")
        for path in (REPO / room).glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("UsageError", "StorageError")
        and len(call.args) != 2
    ]
    assert without == []


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


def test_forecast_tells_each_number_with_its_interval_as_lines_or_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with demo_web.serve(tmp_path) as web:
        rows = [f"{web.url}/generated/{i}.jpg\ta generated picture, number {i}" for i in range(12)]
        rows += [f"{web.url}/generated/{i}.jpg\tIMG_{i:04d}" for i in range(12, 20)]
        (tmp_path / "list.tsv").write_text("\n".join(["url\tcaption", *rows, ""]))
        asked = ["forecast", str(tmp_path / "list.tsv"), "--cores", "8", "--preset", "tiny", "--sample"]
        private = ["--set", 'fetch.allow_private=["127.0.0.0/8"]']
        assert armchair(*asked, "10", *private) == 0
        text = capsys.readouterr().out
        assert armchair(*asked, "20", *private, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert re.search(r"kept +\d+\.\d % \[\d+\.\d % – \d+\.\d %\]", text)
    assert re.search(r"reasons +caption_boilerplate +\d+\.\d %", text)
    assert "on 8 cores" in text
    assert told["yield"] == {"value": 0.6, "low": 0.6, "high": 0.6}
    assert told["reasons"]["caption_boilerplate"]["value"] == 0.4
