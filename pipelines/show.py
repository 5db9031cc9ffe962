"""Results as lines for people. May not live here: what the results mean, or where they come from."""

from __future__ import annotations

from typing import Any


def show_status(told: dict[str, Any]) -> str:
    """Lines for `armchair status`, from `ops.status.status`."""
    shards, pairs = told["shards"], told["pairs"]
    states = ", ".join(f"{count} {state}" for state, count in shards.items() if count and state != "planned")
    done = pairs["kept"] + sum(pairs["rejected"].values())
    lines = [
        f"{told['location']}",
        f"shards     {shards['planned']} planned: {states}",
        f"pairs      {pairs['planned']} planned, {done} judged, {pairs['kept']} kept",
        *(f"           {count:>8}  {reason}" for reason, count in sorted(pairs["rejected"].items(), key=_by_count)),
        f"bytes      {told['bytes']:,}",
    ]
    if any(told["rates"].values()):
        lines.append(f"rates      {told['rates']['pairs_per_s']} pairs/s over the last ten minutes")
    for attempt in told["alive"]:
        place = f"{attempt['host']} (pid {attempt['pid']})"
        lines.append(f"alive      shard {attempt['shard']} on {place}: {attempt['rows_done']} rows asked")
    for attempt in told["unfinished"]:
        tries = f"{attempt['attempts']} attempts" if attempt["attempts"] != 1 else "1 attempt"
        lines.append(f"unfinished shard {attempt['shard']} {attempt['state']} after {tries}: {attempt['why']}")
    if told["unfinished"]:
        lines.append("next       run the same ingest again: it does only what is missing")
    return "\n".join(lines)


def _by_count(item: tuple[str, int]) -> int:
    return -item[1]


def show_proof(directory: str, ok: bool, pairs: int, problems: list[dict[str, Any]]) -> str:
    """Lines for `armchair verify`."""
    if ok:
        return f"{directory}: every one of {pairs} pairs is accounted for once"
    lines = [f"{directory}: {len(problems)} problems"]
    lines += [f"  shard {problem['shard']}: {problem['what']}" for problem in problems[:50]]
    if len(problems) > 50:
        lines.append(f"  and {len(problems) - 50} more: --json lists them all")
    return "\n".join(lines)


def show_tally(into: str, told: dict[str, Any]) -> str:
    """Lines at the end of a sharded stage."""
    shards, pairs = told["shards"], told["pairs"]
    if not shards["planned"]:
        return f"{into}: nothing was missing"
    ended = ", ".join(f"{count} {state}" for state, count in shards.items() if count and state != "planned")
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(pairs["rejected"].items(), key=_by_count))
    return f"{into}: {ended} shards; {pairs['kept']} of {pairs['rows']} pairs kept" + (
        f"; {reasons}" if reasons else ""
    )


def show_trained(told: dict[str, Any]) -> str:
    """Lines at the end of a training."""
    how = "was finished already" if told["was_done"] else "trained"
    return f"{told['location']}: {how}, step {told['step']}, model {told['digest'][:12]}"
