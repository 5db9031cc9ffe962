"""What a bucket may do to us: ignore conditions, lose replies, answer 409 and 503, cut bodies off, refuse us."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.bucket import PART_BYTES
from infra.store import StoreError, open_store
from tests.buckets import BUCKET, KEY_ID, READER, Answer, Bucket, Proxy, Rule, Seen, passed_on

REPO = Path(__file__).parents[2]
BIG = b"0123456789abcdef" * (PART_BYTES // 16) + b"the second part"


@pytest.fixture
def proxy(seaweedfs_server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of SeaweedFS, which this process talks to."""
    with Proxy(seaweedfs_server) as proxy:
        proxy.bucket.use(monkeypatch)
        yield proxy


@pytest.fixture
def location(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').strip(']')}"


def is_commit(request: Seen, key: str) -> bool:
    """Whether this request makes the object visible: a put, or the last request of a multipart upload."""
    ends_upload = request.method == "POST" and "uploadId=" in request.path
    return f"/{key}" in request.path and (
        (request.method == "PUT" and "partNumber=" not in request.path) or ends_upload
    )


def once(of: Callable[[Seen], bool], does: Rule, times: int = 1) -> Rule:
    """Does something to the first request that it is for, and passes on the rest."""
    left = [times]

    def rule(request: Seen, forward: Callable[[], Answer]) -> Answer | None:
        if of(request) and left[0]:
            left[0] -= 1
            return does(request, forward)
        return forward()

    return rule


def loses_the_reply(request: Seen, forward: Callable[[], Answer]) -> None:
    forward()


def hangs_up(request: Seen, forward: Callable[[], Answer]) -> None:
    pass


def answers(status: int, code: str) -> Rule:
    body = f"<Error><Code>{code}</Code><Message>said by the proxy</Message></Error>".encode()
    return lambda request, forward: (status, {"Content-Type": "application/xml"}, body)


DATA = pytest.mark.parametrize("data", [b"small", BIG], ids=["whole", "parts"])


@DATA
def test_a_bucket_that_ignores_conditions_is_refused(
    moto_server: Bucket, location: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto, which checks no signatures: SeaweedFS would see that a header is missing."""

    def strip(request: Seen, forward: Callable[[], Answer]) -> Answer:
        # A store that knows the condition for single puts only, or not at all.
        if request.method == "POST" or len(data) < PART_BYTES:
            request.headers = {name: value for name, value in request.headers.items() if name != "If-None-Match"}
        return forward()

    with Proxy(moto_server) as proxy:
        proxy.rule = strip
        proxy.bucket.use(monkeypatch)
        store = open_store(location)
        with pytest.raises(StoreError, match=f"s3://{BUCKET} at {proxy.bucket.endpoint} ignores the condition") as told:
            store.put("receipts/00000.g0.json", data)
        assert "Use a store that keeps it" in str(told.value)
        assert list(store.list()) == []
        assert list(store.list(temporary=True)) == [], "the probe is removed"


def test_a_bucket_is_probed_once_a_process(proxy: Proxy, location: str) -> None:
    store = open_store(location)
    for n in range(3):
        assert store.put(f"key/{n}", b"")
    assert sum("probe-" in path for _, path in proxy.requests) == 3, "two puts and a delete"


@DATA
def test_a_put_whose_reply_is_lost_counts_as_ours(proxy: Proxy, location: str, data: bytes) -> None:
    store = open_store(location)
    proxy.rule = once(lambda request: is_commit(request, "receipt"), loses_the_reply)
    assert store.put("receipt", data)
    assert store.read("receipt") == data
    assert not store.put("receipt", data), "without a lost reply it was there before"
    assert list(store.list(temporary=True)) == []


def test_a_put_that_another_won_while_our_reply_was_lost_is_not_ours(proxy: Proxy, location: str) -> None:
    store = open_store(location)
    store.put("other", b"")  # probed

    def overtaken(request: Seen, forward: Callable[[], Answer]) -> None:
        open_store(location).put("receipt", b"another's")

    proxy.rule = once(lambda request: is_commit(request, "receipt"), overtaken)
    assert not store.put("receipt", b"ours")
    assert store.read("receipt") == b"another's"


def test_equal_bytes_from_before_are_not_ours_although_a_request_was_sent_twice(proxy: Proxy, location: str) -> None:
    """Their writer renews them, so that a sweep does not find them old."""
    store = open_store(location)
    store.put("data", b"equal")
    time.sleep(3.1)  # buckets stamp whole seconds
    proxy.rule = once(lambda request: is_commit(request, "data"), hangs_up)
    assert not store.put("data", b"equal")


@DATA
def test_a_conflict_is_tried_again(proxy: Proxy, location: str, data: bytes) -> None:
    store = open_store(location)
    is_ours = lambda request: is_commit(request, "receipt")  # noqa: E731
    proxy.rule = once(is_ours, answers(409, "ConditionalRequestConflict"), times=2)
    assert store.put("receipt", data)
    assert store.read("receipt") == data
    assert list(store.list(temporary=True)) == []


def test_a_server_that_is_busy_for_a_moment_is_waited_for(proxy: Proxy, location: str) -> None:
    store = open_store(location)
    store.put("key", b"x")
    proxy.rule = once(lambda request: True, answers(503, "ServiceUnavailable"), times=4)
    assert store.read("key") == b"x"
    proxy.rule = once(lambda request: True, answers(503, "ServiceUnavailable"), times=4)
    assert store.put("another", b"x")


def test_a_server_that_stays_busy_is_told(proxy: Proxy, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.rule = answers(503, "ServiceUnavailable")
    with pytest.raises(StoreError, match=f"{proxy.bucket.endpoint} answers 503 ServiceUnavailable .* Run the same"):
        open_store(location).read("key")
    assert len(proxy.requests) == 2, "what the user sets in boto3's own variables wins"


def _cut(answer: Answer) -> Answer:
    status, headers, body = answer
    return status, {**headers, "Content-Length": str(len(body))}, body[: len(body) // 2]


def _flip(answer: Answer) -> Answer:
    status, headers, body = answer
    return status, headers, bytes([body[0] ^ 1]) + body[1:]


@pytest.mark.parametrize("harm", [_cut, _flip])
def test_a_body_that_is_cut_off_or_altered_on_its_way_is_read_again(
    proxy: Proxy, location: str, harm: Callable[[Answer], Answer]
) -> None:
    store = open_store(location)
    data = bytes(range(256)) * 100
    store.put("key", data)
    is_read = lambda request: request.method == "GET" and "/key" in request.path  # noqa: E731
    proxy.rule = once(is_read, lambda request, forward: harm(forward()), times=2)
    assert store.read("key") == data


def test_bytes_that_are_altered_on_their_way_are_not_put(proxy: Proxy, location: str) -> None:
    store = open_store(location)
    store.put("other", b"")

    def alter(request: Seen, forward: Callable[[], Answer]) -> Answer:
        request.body = request.body.replace(b"o", b"0")
        return forward()

    proxy.rule = alter
    with pytest.raises(StoreError, match="PutObject"):
        store.put("key", b"to be or not")
    proxy.rule = passed_on
    assert store.stat("key") is None


def test_an_unfinished_upload_is_a_leftover_that_is_found_and_removed(proxy: Proxy, location: str) -> None:
    store = open_store(location)
    store.put("data/whole", b"")
    proxy.rule = lambda request, forward: (
        answers(403, "AccessDenied")(request, forward)
        if is_commit(request, "data/half") or request.method == "DELETE"
        else forward()
    )
    with pytest.raises(StoreError, match="access denied to CompleteMultipartUpload"):
        store.put("data/half", BIG, if_absent=False)
    proxy.rule = passed_on
    assert [entry.key for entry in store.list()] == ["data/whole"]
    [left] = store.list("data/", temporary=True)
    assert left.key.startswith("data/.tmp-")
    assert store.stat(left.key) == left
    assert abs(store.clock_s() - left.modified_s) < 60
    assert list(store.list("receipts/", temporary=True)) == []
    store.delete(left.key)
    store.delete(left.key)
    assert store.stat(left.key) is None
    assert list(store.list(temporary=True)) == []


@pytest.mark.parametrize(
    ("changed", "place", "told"),
    [
        ({}, "s3://no-such-bucket/run", r"there is no bucket 'no-such-bucket' at http.*aws s3 mb"),
        (
            {"AWS_ACCESS_KEY_ID": "somebody"},
            f"s3://{BUCKET}/run",
            r"not accepted .*InvalidAccessKeyId.*Correct AWS_ACC",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{BUCKET}/run", r"not accepted .*SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": READER}, f"s3://{BUCKET}/run", r"access denied to PutObject .* must allow"),
        ({"AWS_ACCESS_KEY_ID": ""}, f"s3://{BUCKET}/run", r"no credentials|missing: AWS_ACCESS_KEY_ID"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            f"s3://{BUCKET}/run",
            r"no credentials .* AWS_PROFILE",
        ),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"s3://{BUCKET}/run", r"127.0.0.1:9 can't be reached. Does"),
        ({"AWS_PROFILE": "nobody"}, f"s3://{BUCKET}/run", r"\(nobody\) could not be found"),
        ({}, "s3://b", r"is no place in a bucket"),
        ({}, f"s3://{BUCKET}/a//b", r"is no place in a bucket"),
    ],
)
def test_a_refusal_says_what_where_and_what_to_do(
    seaweedfs_server: Bucket, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], place: str, told: str
) -> None:
    seaweedfs_server.use(monkeypatch)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    for name, value in changed.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=told):
        open_store(place).put("key", b"")
    if KEY_ID in str(changed.get("AWS_ACCESS_KEY_ID", KEY_ID)):
        for ask in (lambda store: store.stat("key"), lambda store: store.read("key"), lambda store: [*store.list()]):
            with pytest.raises(StoreError, match=told):
                ask(open_store(place))


def test_a_changed_environment_is_another_client(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket)
    store.put("key", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError):
        store.read("key")


def test_its_pyarrow_filesystem_writes_and_reads_as_ray_train_does(bucket: str) -> None:
    filesystem, root = open_store(bucket).arrow()
    filesystem.create_dir(f"{root}/train", recursive=True)
    with filesystem.open_output_stream(f"{root}/train/checkpoint") as file:
        file.write(b"x" * 11_000_000)  # two parts of pyarrow's
    assert open_store(bucket).read_range("train/checkpoint", 10_999_999, 5) == b"x"


# A child puts one key after another until it is killed, in the middle of one.
KILLED = """
import os, random, signal, sys, time
from infra.store import open_store
from infra.bucket import PART_BYTES
location, size, rounds, rng = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), random.Random(0)
for round in range(rounds):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        store = open_store(location)
        started_s = time.monotonic()
        for n in range(10_000):
            store.put(f"{round}/{n:05d}", n.to_bytes(4) * (size // 4))
            os.write(tell, b"%f " % (time.monotonic() - started_s))
            started_s = time.monotonic()
    time.sleep(float(os.read(ready, 9).split()[0]) * rng.uniform(0, 1.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize(("size", "rounds"), [(4_000, 8), (PART_BYTES + 4_000_000, 4)])
def test_a_put_that_is_killed_leaves_the_whole_object_or_none(bucket: str, size: int, rounds: int) -> None:
    command = [sys.executable, "-c", KILLED, bucket, str(size), str(rounds)]
    killed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert killed.returncode == 0, killed.stderr
    store = open_store(bucket)
    put = [entry.key for entry in store.list()]
    assert len(put) >= rounds
    for key in put:
        number = int(key.rpartition("/")[2])
        assert store.read(key) == number.to_bytes(4) * (size // 4)
    for left in store.list(temporary=True):
        store.delete(left.key)
    assert list(store.list(temporary=True)) == []
