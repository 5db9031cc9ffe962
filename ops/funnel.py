"""The funnel's examples: what pairs of each reason look like and which hosts fail, read from some shards of PAIRS.

The reading is bounded: at most `SHARDS_AT_MOST` sidecars, evenly over the shards, and one ranged read for each
thumbnail. The same shards give the same examples. Pictures that were rejected are not stored: there, captions and
addresses are all there is. May not live here: counts of all shards (ops/status.py), the page.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from infra.store import Store
from ops.drops import Drops, read_drops
from ops.errors import ArmchairError
from ops.reasons import SUCCESS, Reason, ReasonClass, reason_class
from ops.seeds import derived_seed
from ops.shards import Receipt, read_table

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

SHARDS_AT_MOST = 64
EXAMPLES = 10
HOSTS = 15
THUMBNAIL_PX = 96
_COLUMNS = ["url", "caption", "status", "detail", "http_status", "tar_offset", "jpg_size"]
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/?#:]*)"

MEANINGS = {
    Reason.CAPTION_MISSING: "there is no caption",
    Reason.CAPTION_SHORT: "the caption is too short",
    Reason.CAPTION_LONG: "the caption is too long",
    Reason.CAPTION_LANGUAGE: "the caption is in another language",
    Reason.CAPTION_BOILERPLATE: "the caption says nothing about the picture",
    Reason.CAPTION_ENCODING: "the caption is no sound text",
    Reason.URL_DUPLICATE: "the address is listed before",
    Reason.OPT_OUT: "its owner does not want it used",
    Reason.ROBOTS: "the host does not want it fetched",
    Reason.TOO_SMALL: "the picture is too small",
    Reason.ASPECT: "the picture is too narrow",
    Reason.PIXELS_TOO_MANY: "the picture has too many pixels",
    Reason.FLAT_IMAGE: "the picture shows one colour",
    Reason.NSFW: "the picture is not safe for work",
    Reason.URL_INVALID: "the address is none",
    Reason.URL_SCHEME: "the address is not http or https",
    Reason.ADDRESS_FORBIDDEN: "the host lies in a private network",
    Reason.DNS_NO_SUCH_HOST: "the host does not exist",
    Reason.HTTP_4XX: "the host says that it is not there",
    Reason.HTTP_STATUS: "the answer is none of a picture",
    Reason.REDIRECT_LIMIT: "it is passed on too often",
    Reason.REDIRECT_FORBIDDEN: "it is passed on to where we must not go",
    Reason.TOO_LARGE: "the answer is too large",
    Reason.EMPTY: "the answer is empty",
    Reason.CONTENT_TYPE: "the answer is of another type",
    Reason.NOT_AN_IMAGE: "the answer is no picture",
    Reason.DECODE: "the picture is broken",
    Reason.HASH_MISMATCH: "the picture is another than the list says",
    Reason.DNS_FAILURE: "the name server did not answer",
    Reason.CONNECT: "no connection",
    Reason.TLS: "no secure connection",
    Reason.TIMEOUT: "it took too long",
    Reason.HTTP_408: "the host says it took too long",
    Reason.HTTP_425: "the host says it is too early",
    Reason.HTTP_429: "the host wants fewer requests",
    Reason.HTTP_5XX: "the host has a fault",
    Reason.TRUNCATED: "the answer broke off",
    Reason.INTERNAL: "a fault of ours; the log of the shard tells more",
}
"""Reason -> what it means, in words for people who did not write the list."""


@dataclass(frozen=True)
class Example:
    """One pair as the page shows it: `jpeg` for a kept one, `told` (detail, HTTP status) for a rejected one."""

    caption: str
    url: str = ""
    told: str = ""
    jpeg: bytes | None = None


@dataclass(frozen=True)
class Host:
    """A host, what was asked of it in the shards that were read, how much of that failed, and mostly why."""

    name: str
    asked: int
    failed: int
    reason: str
    help: str


@dataclass(frozen=True)
class Sampled:
    """What was read: examples by status (`success` or a reason), hosts that fail, and of how many shards.

    `problems` are lines about shards that could not be read.
    """

    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    hosts: Sequence[Host] = ()
    shards: int = 0
    of: int = 0
    failed: int = 0
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class _Found:
    """A row of a sidecar that may be shown."""

    receipt: Receipt
    row: dict[str, object]


def read_funnel(
    store: Store, receipts: Mapping[int, Receipt], say: Callable[[str], None] = lambda what: None
) -> Sampled:
    """Examples and hosts from at most 64 shards, evenly spread, without pairs that are down. A shard that can't be read
    becomes a line; a drop list that can't, the only one: nobody knows what may be shown."""
    try:
        drops = read_drops(store)
    except (ArmchairError, OSError) as error:
        return Sampled(of=len(receipts), problems=(f"No pair is shown: {error}",))
    chosen = evenly(sorted(receipts), SHARDS_AT_MOST)
    candidates: dict[str, dict[int, list[_Found]]] = defaultdict(dict)
    hosts: Counter[tuple[str, str]] = Counter()
    problems, read = [], 0

    def look(shard: int) -> pa.Table | str:
        try:
            return read_table(store, receipts[shard], list(dict.fromkeys([*_COLUMNS, *drops.columns])))
        except (ArmchairError, OSError, ValueError) as error:
            return f"Shard {shard:05d} can't be read: {error}"

    with ThreadPoolExecutor(4) as pool:
        for shard, table in zip(chosen, pool.map(look, chosen), strict=True):
            say(f"pairs: shard {read + 1} of {len(chosen)}")
            if isinstance(table, str):
                problems.append(table)
                continue
            read += 1
            hosts.update(_hosts_of(table))
            for status, rows in _candidates_of(_up(table, drops), shard).items():
                candidates[status][shard] = [_Found(receipts[shard], row) for row in rows]
    examples: dict[str, list[Example]] = {}
    for status, by_shard in candidates.items():
        say(f"pairs: examples of {status}")
        examples[status] = []
        for found in dealt(list(by_shard.values()), EXAMPLES):
            try:
                examples[status].append(_example(store, found))
            except (ArmchairError, OSError, ValueError, KeyError) as error:
                problems.append(f"A picture of shard {found.receipt.shard:05d} can't be shown: {error}")
    worst, failed = _worst(hosts)
    return Sampled(examples, worst, read, len(receipts), failed, tuple(problems))


def evenly(items: Sequence[T], at_most: int) -> list[T]:
    """At most so many of them, evenly spread, the first and the last among them.

    >>> evenly(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= at_most or at_most < 2:
        return list(items[:at_most]) if at_most < 2 else list(items)
    return [items[round(place * (len(items) - 1) / (at_most - 1))] for place in range(at_most)]


def dealt(hands: Sequence[Sequence[T]], at_most: int) -> list[T]:
    """At most so many, one of each hand in turn; of more hands than that, hands evenly spread.

    >>> dealt(["ab", "c", "def"], 5)
    ['a', 'c', 'd', 'b', 'e']
    """
    hands = evenly([hand for hand in hands if len(hand)], at_most)
    rounds = max((len(hand) for hand in hands), default=0)
    return [hand[turn] for turn in range(rounds) for hand in hands if turn < len(hand)][:at_most]


def _up(table: pa.Table, drops: Drops) -> pa.Table:
    import pyarrow as pa

    return table.filter(pa.array(~drops.mask(table)))


def _candidates_of(table: pa.Table, shard: int) -> dict[str, list[dict[str, object]]]:
    """Status -> at most ten of the shard's rows, drawn by the shard's number alone."""
    statuses = np.asarray(table["status"].to_pylist(), dtype=object)
    order = np.random.default_rng(derived_seed("report", shard)).permutation(len(statuses))
    chosen = {status: order[statuses[order] == status][:EXAMPLES] for status in sorted(set(statuses))}
    return {status: table.take(places).to_pylist() for status, places in chosen.items()}


def _example(store: Store, found: _Found) -> Example:
    row = found.row
    caption, url = str(row["caption"] or ""), str(row["url"] or "")
    if row["status"] == SUCCESS:
        tar = found.receipt.files["tar"].key
        jpeg = store.read_range(tar, int(str(row["tar_offset"])), int(str(row["jpg_size"])))
        return Example(caption, url, jpeg=thumbnail(jpeg))
    http = f"HTTP {row['http_status']}" if row["http_status"] else ""
    return Example(caption, url, " · ".join(part for part in (http, str(row["detail"] or "")) if part))


def thumbnail(picture: bytes) -> bytes:
    """A JPEG of at most 96 px a side. Raises OSError for bytes that are no picture."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _hosts_of(table: pa.Table) -> Counter[tuple[str, str]]:
    """(host, status) -> rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    host = pc.utf8_lower(pc.struct_field(pc.extract_regex(table["url"], _HOST), "host"))
    counted = (
        pa.table({"host": host, "status": table["status"]}).group_by(["host", "status"]).aggregate([([], "count_all")])
    )
    rows = zip(*(counted[name].to_pylist() for name in ("host", "status", "count_all")), strict=True)
    return Counter({(name or "no host", status): count for name, status, count in rows})


def _worst(counts: Counter[tuple[str, str]]) -> tuple[list[Host], int]:
    """The hosts with most failures, and the failures of all. What we did not want ourselves is no host's failure."""
    asked: Counter[str] = Counter()
    failed: dict[str, Counter[str]] = defaultdict(Counter)
    for (host, status), count in counts.items():
        asked[host] += count
        if status != SUCCESS and reason_class(Reason(status)) is not ReasonClass.POLICY:
            failed[host][status] += count
    worst = sorted(failed, key=lambda host: (-failed[host].total(), host))[:HOSTS]
    hosts = []
    for host in worst:
        reason = min(failed[host], key=lambda name: (-failed[host][name], name))
        hosts.append(Host(host, asked[host], failed[host].total(), reason, what_helps(Reason(reason))))
    return hosts, sum(reasons.total() for reasons in failed.values())


def what_helps(reason: Reason) -> str:
    """The next step for a host that mostly fails for this reason.

    >>> what_helps(Reason.HTTP_429)
    'rerun, with fewer at once: fetch.connections_per_host'
    """
    helps = {
        Reason.HTTP_429: "rerun, with fewer at once: fetch.connections_per_host",
        Reason.TIMEOUT: "rerun, with more patience: fetch.deadline_s",
        Reason.CONNECT: "rerun, with fewer at once: fetch.connections_per_host",
        Reason.DNS_FAILURE: "rerun, when the name server answers",
        Reason.TLS: "rerun; if it stays, the host's certificate is bad",
        Reason.INTERNAL: "rerun; if it stays, read the shard's attempt record",
        Reason.ADDRESS_FORBIDDEN: "if it is your own network: fetch.allow_private",
        Reason.REDIRECT_FORBIDDEN: "if it is your own network: fetch.allow_private",
        Reason.REDIRECT_LIMIT: "fetch.max_redirects, if they lead to a picture",
        Reason.TOO_LARGE: "fetch.max_bytes, if you want pictures of this size",
    }
    if reason in helps:
        return helps[reason]
    return "rerun" if reason_class(reason) is ReasonClass.TRANSIENT else "nothing: take it off the list"
