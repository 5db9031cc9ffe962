"""The closed list of reasons: each of one class, and only the transient ones are asked again."""

from __future__ import annotations

import pytest

from ops.reasons import SUCCESS, Reason, ReasonClass, is_transient, reason_class

CLASSES = {
    ReasonClass.POLICY: """caption_missing caption_short caption_long caption_language caption_boilerplate
        caption_encoding url_duplicate opt_out robots too_small aspect pixels_too_many flat_image nsfw""",
    ReasonClass.PERMANENT: """url_invalid url_scheme address_forbidden dns_no_such_host http_4xx http_status
        redirect_limit redirect_forbidden too_large empty content_type not_an_image decode hash_mismatch""",
    ReasonClass.TRANSIENT: """dns_failure connect tls timeout http_408 http_425 http_429 http_5xx truncated internal""",
}
"""As people read them in the documents: a reason that changes its class here changes what a rerun asks for."""


def test_every_reason_is_of_the_class_that_is_promised_and_the_list_is_closed() -> None:
    promised = {name: kind for kind, names in CLASSES.items() for name in names.split()}
    assert {str(reason): reason_class(reason) for reason in Reason} == promised


def test_only_transient_reasons_are_asked_again() -> None:
    assert {str(reason) for reason in Reason if is_transient(reason)} == set(CLASSES[ReasonClass.TRANSIENT].split())
    assert not is_transient(SUCCESS)


def test_success_is_no_reason_and_an_unknown_status_is_refused() -> None:
    assert SUCCESS not in list(Reason)
    with pytest.raises(ValueError, match="gone_fishing"):
        is_transient("gone_fishing")
