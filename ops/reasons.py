"""Why a pair was not kept: a closed list, and the class that says whether asking again can help.

A pair that fails is data: its reason stands in its row of the sidecar, and its shard goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SUCCESS = "success"
"""The `status` of a kept pair (img2dataset's word)."""


class ReasonClass(StrEnum):
    """Policy: we did not want it. Permanent: it will not come. Transient: it may come when asked again."""

    POLICY = "policy"
    PERMANENT = "permanent"
    TRANSIENT = "transient"


class Reason(StrEnum):
    """The closed list. The value is what stands in `status`."""

    CAPTION_MISSING = "caption_missing"
    CAPTION_SHORT = "caption_short"
    CAPTION_LONG = "caption_long"
    CAPTION_LANGUAGE = "caption_language"
    CAPTION_BOILERPLATE = "caption_boilerplate"
    CAPTION_ENCODING = "caption_encoding"
    URL_DUPLICATE = "url_duplicate"
    OPT_OUT = "opt_out"
    ROBOTS = "robots"
    TOO_SMALL = "too_small"
    ASPECT = "aspect"
    PIXELS_TOO_MANY = "pixels_too_many"
    FLAT_IMAGE = "flat_image"
    NSFW = "nsfw"

    URL_INVALID = "url_invalid"
    URL_SCHEME = "url_scheme"
    ADDRESS_FORBIDDEN = "address_forbidden"
    DNS_NO_SUCH_HOST = "dns_no_such_host"
    HTTP_4XX = "http_4xx"
    HTTP_STATUS = "http_status"
    REDIRECT_LIMIT = "redirect_limit"
    REDIRECT_FORBIDDEN = "redirect_forbidden"
    TOO_LARGE = "too_large"
    EMPTY = "empty"
    CONTENT_TYPE = "content_type"
    NOT_AN_IMAGE = "not_an_image"
    DECODE = "decode"
    HASH_MISMATCH = "hash_mismatch"

    DNS_FAILURE = "dns_failure"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    HTTP_408 = "http_408"
    HTTP_425 = "http_425"
    HTTP_429 = "http_429"
    HTTP_5XX = "http_5xx"
    TRUNCATED = "truncated"
    INTERNAL = "internal"


_ORDER = list(Reason)


def reason_class(reason: Reason) -> ReasonClass:
    """The class of a reason.

    >>> str(reason_class(Reason.HTTP_5XX)), str(reason_class(Reason.HTTP_4XX)), str(reason_class(Reason.ASPECT))
    ('transient', 'permanent', 'policy')
    """
    place = _ORDER.index(reason)
    if place < _ORDER.index(Reason.URL_INVALID):
        return ReasonClass.POLICY
    if place < _ORDER.index(Reason.DNS_FAILURE):
        return ReasonClass.PERMANENT
    return ReasonClass.TRANSIENT


def is_transient(status: str) -> bool:
    """Whether a row with this `status` is worth asking for again."""
    return status != SUCCESS and reason_class(Reason(status)) is ReasonClass.TRANSIENT


@dataclass(frozen=True)
class Rejected:
    """One pair's reason. `detail` is a fixed text, never an exception's: bytes must be equal from run to run."""

    reason: Reason
    detail: str = ""
    http_status: int | None = None
