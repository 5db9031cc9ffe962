"""Prefect hears how a flow ended, also after Ctrl-C; and a server that does not answer is told in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops.demo_web import serve
from tests.pairs import generated

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REPO = Path(__file__).parents[2]
READ_BACK = """
import json
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(json.dumps([run.state.type.value for run in client.read_flow_runs()]))
"""


def test_after_ctrl_c_no_flow_run_is_left_running(tmp_path: Path) -> None:
    """The signal reaches the whole group, as from a terminal."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment |= {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    listed = tmp_path / "list.tsv"
    with serve(tmp_path) as web:
        pairs = [("url", "caption"), *generated(web.url, range(400), delay_ms=500)]
        listed.write_text("".join(f"{url}\t{caption}\n" for url, caption in pairs))
        command = [sys.executable, "-m", "pipelines", "ingest", str(listed), "--into", str(tmp_path / "pairs")]
        command += ["--set", 'fetch.allow_private=["127.0.0.0/8"]', "--cpus", "1"]
        with subprocess.Popen(
            command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as run:
            began_s = time.monotonic()
            while not list((tmp_path / "pairs").glob("attempts/*")):
                assert time.monotonic() - began_s < 200
                assert run.poll() is None
                time.sleep(0.2)
            os.killpg(run.pid, signal.SIGINT)
            assert run.wait(60) == 130
    told = subprocess.run([sys.executable, "-c", READ_BACK], env=environment, capture_output=True, text=True)
    assert json.loads(told.stdout) == ["CRASHED"], told.stderr


def test_a_server_that_does_not_answer_is_told_with_the_next_step(tmp_path: Path) -> None:
    listed = tmp_path / "list.tsv"
    listed.write_text("url\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat on a mat\n")
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = [sys.executable, "-m", "pipelines", "ingest", str(listed), "--into", str(tmp_path / "pairs")]
    ended = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert "Prefect's server http://127.0.0.1:9/api does not answer" in ended.stderr
    assert "Traceback" not in ended.stderr
