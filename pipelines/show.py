"""Results as lines for people. May not live here: what the results mean, or where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ops.reasons import Reason, reason_class

TOLD = (
    "psnr_db",
    "bits_per_dim",
    "perplexity",
    "used_fraction",
    "text_nats_per_token",
    "information_gain_nats_per_code",
)
"""Of an evaluation, what fits on a line; all of it is in metrics/."""
REASONS = 12
"""Lines of reasons, at most; the rest is summed."""
LARGE = ("gathered", "scores", "cache")
"""Of the memory of a checkpoint's evaluation, what training does not hold."""


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(4.2), duration(95), duration(3 * 3600 + 120), duration(200_000)
    ('4 s', '1:35 min', '3:02 h', '2.3 days')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d} h"
    return f"{whole / 86400:.1f} days"


def size(count: float) -> str:
    """Bytes as people say them.

    >>> size(900), size(1_250_000), size(37.5e9)
    ('900 B', '1.2 MB', '37.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def show_status(told: dict[str, Any]) -> str:
    """Lines for `armchair status`, from `ops.status.status`: of a stage, or of all stages of a run."""
    if told["stage"] == "run":
        return "\n\n".join(show_status(stage) for stage in told["stages"].values())
    if told["stage"] == "nothing":
        return str(told["text"])
    rows = _training_rows(told) if "steps" in told else _sharded_rows(told)
    return "\n".join([told["location"], *(f"{label:<11}{text}" for label, text in rows)])


def _sharded_rows(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    shards, pairs = told["shards"], told["pairs"]
    yield "shards", f"{shards['planned']} planned: {states_of(shards)}"
    done = pairs["kept"] + sum(pairs["rejected"].values())
    yield "pairs", f"{pairs['planned']} planned, {done} judged, {pairs['kept']} kept"
    for reason, kind, count in reasons_of(pairs["rejected"]):
        yield "", f"{count:>8}  {reason:<20}{kind}"
    yield "bytes", size(told["bytes"])
    if line := pace_of(told):
        yield "rates", line
    for attempt in told["alive"]:
        yield "alive", f"shard {attempt['shard']} on {place_of(attempt)}: {rows_of(attempt)} rows done"
    for attempt in told["unfinished"]:
        tries = f"{attempt['attempts']} attempts" if attempt["attempts"] != 1 else "1 attempt"
        yield "unfinished", f"shard {attempt['shard']} {attempt['state']} after {tries}: {attempt['why']}".rstrip(": ")
    if (more := sum(shards[state] for state in ("deferred", "failed", "interrupted")) - len(told["unfinished"])) > 0:
        yield "", f"and {more} more"
    if line := next_of(told):
        yield "next", line


def _training_rows(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "training",
        f"{told['state']}, step {told['step']} of {told['steps']}"
        + (f" on {place_of(told)}" if told.get("alive") else ""),
    )
    yield "checkpoint", "none yet" if told["checkpoint"] is None else f"step {told['checkpoint']}"
    if told.get("loss") is not None:
        yield "loss", f"{told['loss']:.4f}"
    if line := pace_of(told):
        yield "rates", line
    if line := evaluation_of(told):
        yield "evaluation", line
    if line := next_of(told):
        yield "next", line


def states_of(shards: dict[str, int]) -> str:
    """The states that there are, with their counts."""
    return ", ".join(f"{count} {state}" for state, count in shards.items() if count and state != "planned") or "none"


def reasons_of(rejected: dict[str, int]) -> list[tuple[str, str, int]]:
    """(reason, its class, count), the largest first; more than `REASONS` are summed in the last one."""
    found = sorted(rejected.items(), key=_by_count)
    rows = [(reason, str(reason_class(Reason(reason))), count) for reason, count in found[:REASONS]]
    if rest := found[REASONS:]:
        rows.append((f"{len(rest)} other reasons", "", sum(count for _, count in rest)))
    return rows


def pace_of(told: dict[str, Any]) -> str:
    """Rates and the time left of a stage; empty where nothing moves."""
    left = f"{duration(told['seconds_left'])} left" if told.get("seconds_left") is not None else ""
    if "steps" in told:
        return "   ".join(filter(None, (f"{told['steps_per_s']:.3g} steps/s" if "steps_per_s" in told else "", left)))
    rates = told["rates"]
    if not any(rates.values()):
        return ""
    parts = (f"{rates['pairs_per_s']:,.4g} pairs/s", f"{rates['shards_per_s']:.3g} shards/s", left)
    return "   ".join(filter(None, parts)) + "   (over the last ten minutes)"


def place_of(told: dict[str, Any]) -> str:
    """Host and process of somebody who works."""
    return f"{told['host']} (pid {told['pid']}), sign of life {told['silent_s']:.0f} s ago"


def rows_of(attempt: dict[str, Any]) -> str:
    """Rows done, and of how many where that is known."""
    return f"{attempt['rows_done']} of {attempt['rows']}" if attempt.get("rows") else str(attempt["rows_done"])


def evaluation_of(told: dict[str, Any]) -> str:
    """The numbers of the last evaluation."""
    found = {name: value for name, value in told["evaluation"].items() if isinstance(value, (int, float))}
    return ", ".join(f"{name} {found[name]:.4g}" for name in TOLD if name in found)


def next_of(told: dict[str, Any]) -> str:
    """What to do about what is not done; empty where there is nothing to do, or somebody does it."""
    if told.get("alive"):
        return ""
    if "steps" not in told:
        verb = "ingest" if told["stage"] == "pairs" else "tokenize"
        left = told["unfinished"] or told["shards"]["untried"]
        return f"run the same {verb} again: it does only what is missing" if left else ""
    if told["state"] == "diverged":
        return "lower the learning rate, with another --into"
    return "" if told["state"] == "done" else "run the same command again: it goes on from the checkpoint"


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


def show_why(told: dict[str, Any]) -> str:
    """Lines for `armchair why`: one or two a station, for each pair that was found."""
    lives = ["\n".join(f"{label:<13}{text}" for label, text in _life_rows(life)) for life in told["pairs"]]
    if told["more"]:
        lives.append(f"and {told['more']} more pairs with this URL: name one by its uid")
    return "\n\n".join(lives)


def _life_rows(life: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "pair", f"{life['uid']}  " + ("no caption" if life["caption"] is None else repr(life["caption"]))
    if life["url"] is not None:
        yield "", life["url"]
    if life["pairs"] is None:
        yield "pairs", "not among --in: its list line, attempts and picture are not known here"
    else:
        yield from _way_to_shard(life)
        yield from _verdict(life)
    if not life["codes"] and (life["pairs"] is None or life["picture"]):
        yield "codes", "not known: no tokens are among --in"
    for codes in life["codes"]:
        yield from _code_rows(codes, life["pairs"] or "PAIRS")
    for drop in life["drops"]:
        what = {"takedown": "taken down", "filter": "filtered out"}.get(drop["kind"], f"a copy of {drop.get('stays')}")
        yield "drops", f"{what}, says {drop['stage']}/{drop['list']}"
    if not life["drops"]:
        yield "drops", "none"
    for model in life["models"]:
        yield model.get("stage", "model"), f"{model['location']}: {_model_text(model)}"
    for number, path in enumerate(life["files"]):
        yield "" if number else "pictures", path


def _way_to_shard(life: dict[str, Any]) -> Iterator[tuple[str, str]]:
    line, shard, tries = life["list"], life["shard"], life["attempts"]
    if line:
        place = f"line {line['line']}" if "line" in line else f"row {line['row']}"
        yield "list", f"{line['list']}, {place} (instalment {line['instalment']})"
    else:
        yield "list", "not recorded"
    split = f"{life['split']}, weight {life['weight']:g}"
    yield "shard", f"{shard['shard']}, row {shard['row']}, key {life['key']}, {split}: {life['pairs']}/{shard['file']}"
    last = tries["last"]
    text = f"{tries['count']}"
    if last:
        text += f"; the last {last['state']}, generation {last['generation']}, at {last['at']}"
        text += f": {last['error']}" if "error" in last else ""
    yield "attempts", text


def _verdict(life: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The status of the row, and its picture."""
    status, picture = life["status"], life["picture"]
    if "problem" in status:
        yield "status", status["problem"]
    elif status["status"] is None:
        planned = f"the plan rejects it, {status['planned']}" if status["planned"] else "not asked for yet"
        yield "status", f"{planned}; its shard is not committed: run the same ingest again"
    else:
        parts = [f"{old['status']} in generation {old['generation']}, then" for old in status["before"]]
        parts.append(f"{status['status']}{': ' + status['detail'] if 'detail' in status else ''}")
        parts += [f"({status['class']})"] if "class" in status else []
        parts.append(f"in generation {status['generation']}")
        parts += [f"http {status['http_status']}"] if "http_status" in status else []
        parts += [f"from {status['final_url']}"] if status.get("final_url", life["url"]) != life["url"] else []
        yield "status", " ".join(parts)
    for text in life["attempts"].get("traceback", "").splitlines()[1:]:
        yield "", text
    if picture is None:
        yield "picture", "none"
    elif "problem" in picture:
        yield "picture", picture["problem"]
    else:
        sent, stored = picture["sent"], picture["stored"]
        yield "picture", f"{picture['member']} at {picture['offset']:,} of {life['pairs']}/{picture['tar']}"
        yield "", f"stored {stored['width']}x{stored['height']}, {stored['bytes']:,} bytes"
        if sent["sha256"] is not None:
            size_px = f"{sent['width']}x{sent['height']}"
            yield "", f"sent {size_px}, {sent['bytes']:,} bytes, {sent['content_type']}, sha256 {sent['sha256']}"


def _code_rows(codes: dict[str, Any], pairs: str) -> Iterator[tuple[str, str]]:
    if "problem" in codes:
        yield "codes", f"{codes['tokens']}: {codes['problem']}"
        return
    if codes["generation"] is None:
        last = codes["attempts"]["last"]
        tried = f"; the last attempt {last['state']} {last.get('error', '')}".rstrip() if last else ""
        yield "codes", f"{codes['tokens']} has none yet{tried}. `armchair tokenize {pairs}` makes them"
        return
    made_from = ""
    if "pairs_generation" in codes:
        made_from = f" made from generation {codes['pairs_generation']}"
        if codes["pairs_generation"] < codes["newest_pairs_generation"]:
            made_from += f" (the newest is {codes['newest_pairs_generation']}: `armchair tokenize {pairs}` follows)"
    yield "codes", f"{codes['tokens']}/{codes['file']}, generation {codes['generation']}{made_from}"
    for crop in codes["crops"]:
        box = f"the square of {crop['side']:.1f} px at ({crop['x']:.1f}, {crop['y']:.1f})"
        yield "", f"crop {crop['k']}: {crop['codes']} codes of {box}"


def _model_text(model: dict[str, Any]) -> str:
    if "problem" in model:
        return str(model["problem"])
    saw = ""
    if "generation" in model:
        saw = f" generation {model['generation']} of the shard"
        if model["newest_generation"] > model["generation"]:
            saw += f" (the newest is {model['newest_generation']})"
    if not model["included"]:
        return f"not in its snapshot{', which holds' + saw if saw else ''}: {model['reason']}"
    if model["split"] != "train":
        return f"in its snapshot, of{saw}; held out, never trained on"
    until = f"up to step {model['step']} ({model['epochs']:g} epochs)"
    if model["drawn"] is None:
        drawn = f"about once an epoch {until}"
    else:
        most = "at most " if model["dropped"] and model["drawn"] else ""
        last = f", last in update {model['last_step']}" if model["last_step"] else ""
        drawn = f"drawn {most}{model['drawn']} times {until}{last}"
    return f"in its snapshot, of{saw}; train, weight {model['weight']:g}, {drawn}"


def show_tally(into: str, told: dict[str, Any]) -> str:
    """Lines at the end of a sharded stage."""
    shards, pairs = told["shards"], told["pairs"]
    if "adoption" in told:
        return "\n".join(_adoption(into, told["adoption"], pairs))
    if not shards["planned"]:
        return f"{into}: nothing was missing"
    ended = ", ".join(f"{count} {state}" for state, count in shards.items() if count and state != "planned")
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(pairs["rejected"].items(), key=_by_count))
    lines = [f"{into}: {ended} shards; {pairs['kept']} of {pairs['rows']} pairs kept"]
    lines[0] += f"; {reasons}" if reasons else ""
    if wrong := pairs["rejected"].get("caption_encoding"):
        lines.append(
            f"{wrong} captions are not UTF-8. If that is the whole list's encoding, convert it (iconv -f LATIN1 -t "
            "UTF-8 LIST) and ingest it into another directory."
        )
    return "\n".join(lines)


def show_drop(told: dict[str, Any]) -> str:
    """Lines for `armchair drop`."""
    pairs, missing = told["found"], told["not_found"]
    lines = [f"found {pairs['pairs']:,} pairs, {pairs['kept']:,} of them kept"]
    lines += [f"{place}: {count:,} rows more in its drop lists" for place, count in told["added"].items()]
    if missing:
        lines.append(
            f"{len(missing):,} of {told['asked']:,} are of no committed pair; they will be left out if they come:"
        )
        lines += [f"  {name}" for name in missing[:20]]
        lines += [f"  and {len(missing) - 20:,} more: --json names them all"] if len(missing) > 20 else []
    return "\n".join(lines)


def show_dedup(pairs: str, told: dict[str, Any]) -> str:
    """A line at the end of `armchair dedup`."""
    if not told["duplicates"]:
        return f"{pairs}: no new copies among {told['pairs']:,} kept pairs"
    return (
        f"{pairs}: {told['duplicates']:,} of {told['pairs']:,} kept pairs are copies of others, left out from now on. "
        f"Where codes were made of them before: armchair drop {pairs} TOKENS"
    )


def _adoption(into: str, told: dict[str, Any], pairs: dict[str, Any]) -> Iterator[str]:
    for problem in told["problems"]:
        yield f"{told['folder']}/{problem['shard']}: {problem['what']}"
    known = f"; {told['already']} were planned before" if told["already"] else ""
    yield f"{told['folder']}: {told['adopted']} sound pairs adopted, {told['missing']} left to fetch{known}"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(pairs["rejected"].items(), key=_by_count))
    yield f"{into}: {pairs['kept']} pairs kept without a request" + (f"; {reasons}" if reasons else "")
    if told["unknown"] != 0 and not told["with_lists"]:
        number = "An unknown number of" if told["unknown"] is None else told["unknown"]
        yield f"{number} pairs are lost to the folder. Run it again with the list: armchair adopt FOLDER LIST --into …"
    if told["missing"]:
        yield f"`armchair ingest --into {into}` fetches what is left"


def show_trained(told: dict[str, Any]) -> str:
    """Lines at the end of a training."""
    how = "was finished already" if told["was_done"] else "trained"
    return f"{told['location']}: {how}, step {told['step']}, model {told['digest'][:12]}"


def show_forecast(told: dict[str, Any]) -> str:
    """Lines for `armchair forecast`: each number with its 95 % interval."""
    return "\n".join(f"{label:<15}{text}" for label, text in _forecast_rows(told))


def _forecast_rows(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "rows", f"{told['rows']:,}, of which {told['sample']:,} were fetched; in brackets 95 % intervals"
    if told["transient"] > 0.5:
        share = percent(told["transient"])
        yield "beware", f"{share} failed for a passing reason: is the network up? Try again before you believe this"
    yield "kept", _between(told["yield"], percent)
    yield "", _between(told["pairs"], lambda count: f"{count:,.0f}") + " pairs"
    for title in ("reasons", "languages"):
        for row, (name, interval) in enumerate(list(told[title].items())[:REASONS]):
            yield "" if row else title, f"{name:<21}{_between(interval, percent)}"
    yield "bytes in", _between(told["bytes_in"], size)
    stored = _between(told["bytes_stored"], size)
    yield "bytes stored", f"{stored}, short side {told['short_side_px']} px"
    yield "CPU", _between(told["cpu_hours"], lambda hours: duration(3600 * hours))
    time = _between(told["hours"], lambda hours: duration(3600 * hours))
    yield "", f"{time} on {told['cores']} cores like these, if network and sites keep up"
    yield "sites", f"{_between(told['hosts'], '{:,.0f}'.format)}; {told['robots_requests']['value']:,.0f} robots.txt"


def show_estimate(told: dict[str, Any]) -> str:
    """Lines for `armchair estimate`, from `ops.estimate.estimate`: of each model, what it takes and what fits."""
    memory, rate = size(told["memory_bytes"]), amount(told["bf16_flops"], "G")
    card = f"{told['gpus']} × {told['kind']} ({told['about']}), each {memory} and {rate}FLOP/s of bf16"
    out = [f"{card}; used at {percent(told['mfu'])} (MFU, assumed)"]
    for name, model in told["models"].items():
        out += ["", name, *(f"{label:<11}{text}" for label, text in _estimate_rows(told, model))]
    return "\n".join(out)


def _estimate_rows(told: dict[str, Any], model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    counts = {item: count for item, count in model["parameters"].items() if item != "total"}
    items = ", ".join(f"{item} {amount(count)}" for item, count in sorted(counts.items(), key=_by_count))
    yield "parameters", f"{amount(model['parameters']['total'])}: {items}"
    positions, each = model["positions_a_picture"], model["flops_a_picture"]
    tokens = f", {amount(model['tokens'])} tokens" if positions > 1 else ""
    yield "run", f"{model['steps']:,} updates of {model['batch']:,}: {amount(model['pictures'])} pictures{tokens}"
    aware = f" a token; {amount(each['mask_aware'] / positions, 'G')} by what the masks show"
    ends = aware if positions > 1 else " a picture"
    yield "FLOPs", f"{model['flops']:.2g}, {amount(each['conventional'] / positions, 'G')}{ends}"
    yield "memory", f"{'of each GPU':<30}{'fixed':>10}{'pass over':>24}{'peak':>10}"
    for way in model["ways"]:
        fixed, pictures = size(sum(way["bytes"].values())), max(1, way["pictures_at_once"])
        over = f"{pictures:,} picture{'s' * (pictures > 1)} {size(way['pass_bytes']):>8}"
        parts = f", a batch in {way['parts_of_a_batch']} parts" if way["parts_of_a_batch"] > 1 else ""
        end = f"{duration(86400 * way['days'])}{parts}" if way["fits"] else "DOES NOT FIT"
        yield "", f"{_way(way):<30}{fixed:>10}{over:>24}{size(way['peak_bytes']):>10}   {end}"
    for sharded, bytes_of in {way["sharded"]: way["bytes"] for way in model["ways"]}.items():
        held = ", ".join(f"{item} {size(count)}" for item, count in bytes_of.items())
        yield "fixed", f"{_way({'sharded': sharded})}: {held}"
    for way in model["evaluation"]:
        held = ", ".join(f"{item} {size(way['bytes'][item])}" for item in LARGE if item in way["bytes"])
        end = "" if way["fits"] else "   DOES NOT FIT"
        yield "checkpoint", f"{_way(way)}: {size(way['peak_bytes'])}, of which {held}{end}"
    if told["gpus"] > model["batch"]:
        yield "beware", f"a batch of {model['batch']} keeps {model['batch']} GPUs busy: the others have no picture"
    if not model["fits"]:
        yield "next", _what_would_help(told["kind"], model["least_gpus"])


def _what_would_help(kind: str, least: dict[str, int | None]) -> str:
    if least["all"] is not None:
        return f"take {least['all']} × {kind} or more, with shares and recomputing; or GPUs of more memory"
    if least["training"] is not None:
        train = f"{least['training']} × {kind} can train it, with shares and recomputing, but no number can score"
        return f"{train} its checkpoints, for which each gathers the whole model: take GPUs of more memory"
    return f"no number of {kind} is enough for one picture: take GPUs of more memory, or a smaller model"


def _way(way: dict[str, Any]) -> str:
    return ("shares (FSDP2)" if way["sharded"] else "copies (DDP)") + (", recomputed" if way.get("recompute") else "")


def amount(count: float, billion: str = "B") -> str:
    """A large number as people say it.

    >>> amount(7936), amount(65_011_712), amount(12_292_808_448), amount(9.89e14, "G")
    ('7.94 k', '65 M', '12.3 B', '989 T')
    """
    for unit in ("", "k", "M", billion, "T"):
        if count < 999.5:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:.3g} P"


def percent(share: float) -> str:
    """A share as people say it.

    >>> percent(0.7), percent(0.0123), percent(1)
    ('70.0 %', '1.2 %', '100 %')
    """
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def _between(interval: dict[str, float], say: Callable[[float], str]) -> str:
    value, low, high = (say(interval[name]) for name in ("value", "low", "high"))
    return value if low == high else f"{value} [{low} – {high}]"
