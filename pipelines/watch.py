"""A live table of a stage or a run: what `armchair status --watch` shows until Ctrl-C.

On a terminal it is drawn over itself every two seconds; elsewhere a block of plain lines is printed each time
something has changed. May not live here: what the numbers mean (ops/status.py).
"""

from __future__ import annotations

import json as json_module
import sys
import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra.store import open_store
from ops.errors import UsageError
from ops.status import Memory, status
from pipelines.show import (
    evaluation_of,
    next_of,
    pace_of,
    place_of,
    reasons_of,
    rows_of,
    show_status,
    states_of,
)

EVERY_S = 2.0
ROWS = 8
"""Of shards alive and of unfinished ones, at most so many lines; the rest is counted."""
CLASS_STYLE = {"policy": "blue", "permanent": "red", "transient": "yellow"}
STATE_STYLE = {
    "running": "green",
    "done": "green",
    "untried": "dim",
    "stopped": "yellow",
    "interrupted": "yellow",
    "deferred": "yellow",
    "failed": "red",
    "diverged": "red",
}


def watch(location: str, *, as_json: bool = False, console: Console | None = None) -> None:
    """Shows how far a place is until Ctrl-C, which is its good end: a last plain table stays on the screen."""
    store, memory = open_store(location), Memory()
    console = console or Console(file=sys.stdout)

    def look() -> dict[str, Any]:
        try:
            return status(store, memory)
        except UsageError as error:  # not begun: whoever starts both at once sees it begin
            return {"stage": "nothing", "location": location, "text": str(error)}

    told, shown = look(), ""
    try:
        if console.is_terminal and not as_json:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while True:
                    live.update(render(told), refresh=True)
                    time.sleep(EVERY_S)
                    told = look()
        while True:
            if (changed := _without_ages(told)) != shown:
                block = json_module.dumps(told, default=str) if as_json else f"{show_status(told)}\n"
                print(block, flush=True)
                shown = changed
            time.sleep(EVERY_S)
            told = look()
    except KeyboardInterrupt:
        if not as_json:
            print(show_status(told), flush=True)


def _without_ages(told: Any) -> str:
    """What must differ for something to have changed: all but the seconds that pass by themselves."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            passing = ("silent_s", "rates", "seconds_left")
            return {name: strip(item) for name, item in value.items() if name not in passing}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json_module.dumps(strip(told), default=str)


def render(told: dict[str, Any]) -> RenderableType:
    """The table of a stage, or of each stage of a run."""
    if told["stage"] == "run":
        return Group(*(render(stage) for stage in told["stages"].values()))
    if told["stage"] == "nothing":
        return Text(told["text"], "yellow")
    return _training(told) if "steps" in told else _sharded(told)


def _sharded(told: dict[str, Any]) -> RenderableType:
    shards, pairs = told["shards"], told["pairs"]
    judged = pairs["kept"] + sum(pairs["rejected"].values())
    grid = _grid()
    grid.add_row("shards", _bar(shards["committed"], shards["planned"], states_of(shards)))
    share = f" ({100 * pairs['kept'] / judged:.0f} %)" if judged else ""
    grid.add_row("pairs", _bar(judged, pairs["planned"], f"{pairs['kept']:,} kept{share}"))
    if line := pace_of(told):
        grid.add_row("rates", line)
    parts: list[RenderableType] = [_title(told), grid]
    if pairs["rejected"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name, justify in (("reason", "left"), ("class", "left"), ("pairs", "right"), ("of judged", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for reason, kind, count in reasons_of(pairs["rejected"]):
            table.add_row(reason, Text(kind, CLASS_STYLE.get(kind, "")), f"{count:,}", f"{100 * count / judged:.1f} %")
        parts.append(_indented(table))
    if told["alive"]:
        grid = _grid()
        for attempt in told["alive"][:ROWS]:
            grid.add_row("alive", f"shard {attempt['shard']}   {rows_of(attempt)} rows   {place_of(attempt)}")
        _rest(grid, len(told["alive"]))
        parts.append(grid)
    if told["unfinished"]:
        grid = _grid()
        for left in told["unfinished"][:ROWS]:
            state = Text(f"{left['state']:<12}", STATE_STYLE[left["state"]])
            why = " ".join(left["why"].split())
            about = f"shard {left['shard']}   attempts {left['attempts']}   {why}"
            grid.add_row("unfinished", Text.assemble(state, about, overflow="ellipsis", no_wrap=True))
        _rest(grid, len(told["unfinished"]))
        parts.append(grid)
    if line := next_of(told):
        parts.append(_next(line))
    return Group(*parts, "")


def _training(told: dict[str, Any]) -> RenderableType:
    grid = _grid()
    state = Text(told["state"], STATE_STYLE[told["state"]])
    grid.add_row("steps", _bar(told["step"], told["steps"], state))
    if told.get("loss") is not None:
        grid.add_row("loss", f"{told['loss']:.4f}")
    if line := pace_of(told):
        grid.add_row("rates", line)
    grid.add_row("checkpoint", "none yet" if told["checkpoint"] is None else f"step {told['checkpoint']}")
    if told.get("alive"):
        grid.add_row("alive", place_of(told))
    if line := evaluation_of(told):
        grid.add_row("evaluation", line)
    parts: list[RenderableType] = [_title(told), grid]
    if line := next_of(told):
        parts.append(_next(line))
    return Group(*parts, "")


def _title(told: dict[str, Any]) -> Text:
    return Text.assemble((told["stage"], "bold"), "  ", (told["location"], "dim"))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", width=12)
    grid.add_column()
    return grid


def _indented(table: RenderableType) -> Table:
    grid = _grid()
    grid.add_row("rejected", table)
    return grid


def _next(line: str) -> Table:
    grid = _grid()
    grid.add_row("next", Text(line, "bold"))
    return grid


def _rest(grid: Table, count: int) -> None:
    if count > ROWS:
        grid.add_row("", f"and {count - ROWS} more: --json lists them")


def _bar(done: int, total: int, more: str | Text) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_row(ProgressBar(total=max(total, 1), completed=done, width=32), f"{done:,} of {total:,}", more)
    return row
