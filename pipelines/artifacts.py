"""What a flow run shows in Prefect's UI beside its state: progress, left shards, a report, links, pictures.

Artifacts are for people and decide nothing. They are written by a thread of their own with a client of its own, so a
server that is slow holds nobody up, and one that is gone costs one line of warning and never a shard. May not live
here: what is told (pipelines/waves.py, pipelines/train.py, pipelines/build.py).
"""

from __future__ import annotations

import base64
import contextvars
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext

from infra.store import absolute
from ops.errors import ArmchairError
from pipelines.dead_runs import SIGN_S, bury_dead_runs, give_sign

APART_S = 2.0
"""Updates of a progress artifact are at least that far apart."""
PATIENCE_S = 10.0
"""So long the end of a flow waits for its last artifacts to be written."""
TABLE_ROWS = 200


def artifact_key(stage: str, what: str, location: str) -> str:
    """The name under which Prefect keeps the artifacts of one place together, run after run.

    >>> artifact_key("ingest", "report", "s3://Bucket/My_run/pairs")
    'ingest-report-my-run-pairs'
    """
    place = "-".join(absolute(location).rstrip("/").split("/")[-2:])
    return re.sub(r"[^a-z0-9]+", "-", f"{stage}-{what}-{place}".lower()).strip("-")


def carried(data: bytes, text: str) -> str:
    """A PNG, JPEG or SVG in Markdown, whole: the browser can't reach the disk or bucket where it lies."""
    kind = "png" if data.startswith(b"\x89PNG") else "svg+xml" if data.startswith(b"<svg") else "jpeg"
    return f"![{text}](data:image/{kind};base64,{base64.b64encode(data).decode()})"


class Board:
    """The artifacts of one flow run, as a `with` block inside the flow. Outside of a flow run nothing is written.

    What is told again under the same name takes the place of what was told before. Leaving the block by an
    ArmchairError writes a report that says so.
    """

    def __init__(self, stage: str, location: str) -> None:
        self.stage, self.location = stage, location
        context = FlowRunContext.get()
        self._run: UUID | None = context.flow_run.id if context and context.flow_run else None
        self._waiting: list[ArtifactCreate] = []
        self._progress: ArtifactCreate | None = None
        self._ids: dict[str, UUID] = {}
        self._wake, self._lock, self._closing = threading.Event(), threading.Lock(), False
        self._has_warned = False
        context_here = contextvars.copy_context()  # Prefect's settings are there
        self._thread = threading.Thread(target=context_here.run, args=(self._write_all,), name="artifacts", daemon=True)

    def __enter__(self) -> Board:
        if self._run is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ArmchairError):
            self.markdown("report", f"# {self.stage} failed\n\n`{self.location}`\n\n{error}")
        self._closing = True
        self._wake.set()
        if self._run is not None:
            self._thread.join(PATIENCE_S if error is None or isinstance(error, Exception) else 1.0)

    def progress(self, share: float | None, line: str) -> None:
        """How far it is, 0 to 1; of updates that come faster than `APART_S` the last one is shown."""
        with self._lock:
            self._progress = self._made("progress", "progress", round(100 * min(1.0, share or 0.0), 2), line)
        self._wake.set()

    def table(self, what: str, rows: Sequence[dict[str, Any]], rest: str) -> None:
        """At most `TABLE_ROWS` rows; `rest` says where the others are."""
        more = f" {len(rows) - TABLE_ROWS} more: {rest}" if len(rows) > TABLE_ROWS else ""
        data = json.dumps(rows[:TABLE_ROWS], default=str)
        self._put(self._made(what, "table", data, f"{len(rows)} {what} in {self.location}.{more}"))

    def markdown(self, what: str, text: str) -> None:
        """A page."""
        self._put(self._made(what, "markdown", text, f"{self.stage} of {self.location}"))

    def link(self, what: str, address: str, text: str) -> None:
        """Something to open."""
        self._put(self._made(what, "markdown", f"[{text}]({address})\n\n`{address}`", text))

    def picture(self, what: str, data: bytes, text: str) -> None:
        """A PNG or JPEG.

        In a page of Markdown, because an image artifact prints its address, here some kilobytes of it, below.
        """
        self._put(self._made(what, "markdown", carried(data, text), text))

    def _made(self, what: str, kind: str, data: Any, description: str) -> ArtifactCreate:
        key = artifact_key(self.stage, what, self.location)
        return ArtifactCreate(key=key, type=kind, data=data, description=description, flow_run_id=self._run)

    def _put(self, artifact: ArtifactCreate) -> None:
        with self._lock:
            self._waiting.append(artifact)
        self._wake.set()

    def _write_all(self) -> None:
        assert self._run is not None
        run, shown_s, signed_s = self._run, -APART_S, time.monotonic()
        self._ask(lambda client: give_sign(client, run))
        self._ask(lambda client: bury_dead_runs(client, run, self.stage))
        while True:
            self._wake.wait(SIGN_S)
            self._wake.clear()
            if time.monotonic() - signed_s >= SIGN_S:
                self._ask(lambda client: give_sign(client, run))
                signed_s = time.monotonic()
            closing = self._closing
            with self._lock:
                waiting, self._waiting = self._waiting, []
            for artifact in waiting:
                self._ask(partial(self._send, artifact))
            if self._progress is not None:
                # A progress that waits for its time is woken by nobody: wait here.
                while not self._closing and time.monotonic() - shown_s < APART_S:
                    time.sleep(0.05)
                with self._lock:
                    latest, self._progress = self._progress, None
                if latest is not None:
                    self._ask(partial(self._send, latest))
                shown_s = time.monotonic()
            if closing:
                return

    def _ask(self, what: Callable[[SyncPrefectClient], None]) -> None:
        try:
            with get_client(sync_client=True, httpx_settings={"timeout": PATIENCE_S}) as client:
                what(client)
        except Exception as error:  # whatever Prefect or its server does, the work goes on
            if not self._has_warned:
                told = f"{type(error).__name__} {error}".strip()
                print(f"{self.stage:<11} Prefect shows less: {told[:200]}. The work goes on.", file=sys.stderr)
            self._has_warned = True

    def _send(self, artifact: ArtifactCreate, client: SyncPrefectClient) -> None:
        key = str(artifact.key)
        if key in self._ids:
            client.update_artifact(self._ids[key], ArtifactUpdate(data=artifact.data, description=artifact.description))
        else:
            self._ids[key] = client.create_artifact(artifact).id
