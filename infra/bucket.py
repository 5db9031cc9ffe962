"""The S3 form of `Store`: the objects below one prefix of a bucket, through boto3, which is imported only here.

Lives here: conditional puts, multipart uploads, retries, and words for what a bucket answers. Credentials, region and
endpoint come from boto3's own chain (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL …), never from settings.
May not live here: what the bytes mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from infra.store import TEMPORARY, Entry, StoreError, check_key, is_temporary

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

PART_BYTES = 16 << 20
"""Larger objects are sent in parts of this size: four at once hold 64 MiB of memory."""
PARTS_AT_ONCE = 4
MAX_PARTS = 10_000
TRIES = 10
"""Attempts of a request: botocore waits 0.05 s · 2^n between them (1 s · 2^n when told to slow down), 12 s in all."""
ROUNDS = 8
"""Our own attempts where botocore makes none: a 409 (another put on the same key is under way), a body cut off."""
CUT_OFF = (ReadTimeoutError, IncompleteReadError, ResponseStreamingError, FlexibleChecksumError)
"""A body that broke off or differs from its checksum."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


class _Connection:
    """The client of this process, and what it knows of buckets. boto3's clients may be shared by threads."""

    def __init__(self) -> None:
        # What the user sets in boto3's own variables wins.
        mode, tries = os.environ.get("AWS_RETRY_MODE", "adaptive"), int(os.environ.get("AWS_MAX_ATTEMPTS", TRIES))
        config = Config(
            retries={"mode": mode, "total_max_attempts": tries},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=64,  # readers of receipts are 16 threads, uploads 4 a file, heartbeats one each
        )
        self.session = boto3.session.Session()
        self.client = self.session.client("s3", config=config)
        self.endpoint = str(self.client.meta.endpoint_url)
        self.seen: set[str] = set()
        self.probed: set[tuple[str, bool]] = set()
        self.lock = threading.Lock()


_connections: dict[tuple[tuple[str, str], ...], _Connection] = {}
_lock = threading.Lock()


def _connection() -> _Connection:
    """One a process, and another one when boto3's variables have changed."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _lock:
        if environment not in _connections:
            try:
                _connections[environment] = _Connection()
            except (BotoCoreError, ValueError) as error:
                raise StoreError(f"S3 can't be used: {error}. Correct the AWS_… variables or ~/.aws/config.") from error
        return _connections[environment]


def _forget() -> None:
    """In a forked child: sockets of its parent's client must not be shared, and a lock might be held for ever."""
    global _lock
    _lock = threading.Lock()
    _connections.clear()


os.register_at_fork(after_in_child=_forget)


class S3Store:
    """A prefix of a bucket. A put is one request, or a multipart upload that its last request makes visible."""

    def __init__(self, location: str) -> None:
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        if not _BUCKET.fullmatch(bucket) or (prefix and {"", ".", ".."} & set(prefix.split("/"))):
            raise StoreError(f"{location} is no place in a bucket. Write s3://bucket or s3://bucket/some/prefix.")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.location = f"s3://{bucket}/{prefix}".rstrip("/")

    # Reading ----------------------------------------------------------------------------------------------------------

    def read(self, key: str) -> bytes:
        return self._get(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._get(key, Range=f"bytes={start}-{start + length - 1}") if length > 0 else b""

    def _get(self, key: str, **asked: str) -> bytes:
        name = self._name(key)
        for left in reversed(range(ROUNDS)):
            try:
                with self._in_words(key):
                    body = _connection().client.get_object(Bucket=self.bucket, Key=name, **asked)["Body"]
                    data: bytes = body.read()
                    return data
            except _PastTheEnd:
                return b""
            except _CutOff as error:
                if not left:
                    raise StoreError(f"{self.location}/{key} can't be read whole: {error}. Run it again.") from error
                time.sleep(random.random() * 0.1 * 2 ** (ROUNDS - left))
        raise AssertionError  # the last round returns or raises

    def stat(self, key: str) -> Entry | None:
        if is_temporary(key):
            return next(
                (entry for entry in self.list(key.rpartition("/")[0], temporary=True) if entry.key == key), None
            )
        try:
            found = _connection().client.head_object(Bucket=self.bucket, Key=self._name(key))
        except ClientError as error:
            self._look()  # a HEAD has no body: whether it is the bucket that is missing is asked another way
            if _status(error) == 404:
                return None
            raise self._words(error, key) from error
        except BotoCoreError as error:
            raise self._words(error, key) from error
        return Entry(key, found["ContentLength"], found["LastModified"].timestamp())

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        with self._in_words():
            pages = _connection().client.get_paginator("list_objects_v2")
            found = [
                Entry(item["Key"].removeprefix(self.prefix), item["Size"], item["LastModified"].timestamp())
                for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # "folders" that some tools make
            ]
            if temporary:
                found += self._unfinished(prefix)
        # Sorted here as well: stores that keep directories (SeaweedFS) list `a/b` before `a.txt`.
        for entry in sorted(found, key=lambda entry: entry.key):
            if is_temporary(entry.key) is temporary:
                yield entry

    def _unfinished(self, prefix: str) -> Iterator[Entry]:
        """Multipart uploads that were begun and not ended, each under a temporary name that holds its id."""
        pages = _connection().client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
            for upload in page.get("Uploads", ()):
                folder, slash, name = upload["Key"].removeprefix(self.prefix).rpartition("/")
                temporary = f"{folder}{slash}{TEMPORARY}{quote(upload['UploadId'], safe='')}@{name}"
                yield Entry(temporary, 0, upload["Initiated"].timestamp())

    def clock_s(self) -> float:
        with self._in_words():
            return _date_s(_connection().client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1))

    def arrow(self) -> tuple[FileSystem, str]:
        with self._in_words():
            connection = _connection()
            credentials = connection.session.get_credentials()
            if credentials is None:
                raise NoCredentialsError
            now = credentials.get_frozen_credentials()  # they may be renewed every hour
        filesystem = _arrow(now.access_key, now.secret_key, now.token, connection.endpoint, self._region())
        return filesystem, f"{self.bucket}/{self.prefix}".rstrip("/")

    def _region(self) -> str:
        """Where the bucket lies: boto3 follows a redirect to another region, pyarrow does not."""
        connection = _connection()
        with self._in_words():
            told = _regions.get((connection.endpoint, self.bucket))
            if told is None:
                told = connection.client.head_bucket(Bucket=self.bucket).get("BucketRegion")
                told = _regions[connection.endpoint, self.bucket] = told or connection.client.meta.region_name
        return str(told)

    # Writing ----------------------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
        name = self._name(key)
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        send = self._send_parts if size > PART_BYTES else self._send_whole
        if if_absent:
            self._probe(is_multipart=size > PART_BYTES)
            if isinstance(data, Path) and self.stat(key) is not None:
                return False  # said before the upload of hundreds of megabytes, and again at its end
        begun_s, was_retried = time.monotonic(), False
        for left in reversed(range(ROUNDS)):
            try:
                send(name, data, if_absent)
                return True
            except ClientError as error:
                was_retried |= error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                lost = _status(error) == 412 or (was_retried and _code(error) == "NoSuchUpload")
                if if_absent and lost:
                    # A request that was sent twice may have been refused because its first sending got through.
                    return was_retried and self._is_ours(key, data, size, begun_s)
                if _status(error) != 409 or not left:
                    raise self._words(error, key) from error
                time.sleep(random.random() * 0.05 * 2 ** (ROUNDS - left))
            except BotoCoreError as error:
                raise self._words(error, key) from error
        raise AssertionError  # the last round returns or raises

    def _send_whole(self, name: str, data: bytes | Path, if_absent: bool) -> None:
        body = data.read_bytes() if isinstance(data, Path) else data
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        _connection().client.put_object(
            Bucket=self.bucket, Key=name, Body=body, ChecksumAlgorithm="SHA256", **condition
        )

    def _send_parts(self, name: str, data: bytes | Path, if_absent: bool) -> None:
        """Visible, whole, by the last request, which carries the condition: boto3's own upload_file can't send one."""
        client, place = _connection().client, {"Bucket": self.bucket, "Key": name}
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        upload = client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]

        def send(number: int) -> dict[str, Any]:
            body = _piece(data, (number - 1) * part_bytes, part_bytes)
            sent = client.upload_part(
                **place, UploadId=upload, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256"
            )
            told = {name: sent[name] for name in ("ETag", "ChecksumSHA256") if name in sent}
            return {"PartNumber": number, **told}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                numbers = range(1, max(1, -(-size // part_bytes)) + 1)
                parts = list(pool.map(send, numbers))
            condition = {"IfNoneMatch": "*"} if if_absent else {}
            client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            with contextlib.suppress(ClientError, BotoCoreError):  # what is left then is for `armchair sweep`
                client.abort_multipart_upload(**place, UploadId=upload)
            raise

    def _is_ours(self, key: str, data: bytes | Path, size: int, begun_s: float) -> bool:
        """Whether the object has these bytes and was written since `begun_s`, by the bucket's clock: an older one may
        be about to be swept, so its writer must know that it was there before."""
        with self._in_words(key):
            found = _connection().client.head_object(Bucket=self.bucket, Key=self._name(key))
        then_s = _date_s(found) - (time.monotonic() - begun_s)
        if found["ContentLength"] != size or found["LastModified"].timestamp() < then_s - 2:  # both in whole seconds
            return False
        starts = range(0, size, PART_BYTES)
        return all(self.read_range(key, at, PART_BYTES) == _piece(data, at, PART_BYTES) for at in starts)

    def _probe(self, *, is_multipart: bool) -> None:
        """Once a process and bucket: a second conditional put must be refused. Raises StoreError for a store that takes
        it: there two writers would both believe that they had won."""
        connection = _connection()
        with connection.lock:
            self._look()  # a put into a bucket that is missing may be answered by "access denied"
            if (self.bucket, is_multipart) in connection.probed:
                return
            name = f"{self.prefix}{TEMPORARY}probe-{secrets.token_hex(8)}"
            keeps = True
            try:
                try:
                    self._send_whole(name, b"first", if_absent=True)
                    (self._send_parts if is_multipart else self._send_whole)(name, b"second", True)
                    keeps = False
                except ClientError as error:
                    if _status(error) == 501 or _code(error) == "NotImplemented":
                        keeps = False
                    elif _status(error) != 412:
                        raise
                finally:
                    with contextlib.suppress(ClientError, BotoCoreError):
                        connection.client.delete_object(Bucket=self.bucket, Key=name)
            except (ClientError, BotoCoreError) as error:
                raise self._words(error, None) from error
            if not keeps:
                raise StoreError(
                    f"s3://{self.bucket} at {connection.endpoint} ignores the condition of a put (If-None-Match: *): "
                    "two writers would overwrite each other's shards. Use a store that keeps it, as Amazon S3 and "
                    "SeaweedFS do (a proxy in between must pass the header on), or a local directory."
                )
            connection.probed.add((self.bucket, is_multipart))

    def delete(self, key: str) -> None:
        folder, slash, name = key.rpartition("/")
        upload, at, real = name.removeprefix(TEMPORARY).partition("@")
        try:
            if name.startswith(TEMPORARY) and at:
                place = {"Bucket": self.bucket, "Key": self._name(f"{folder}{slash}{real}")}
                _connection().client.abort_multipart_upload(**place, UploadId=unquote(upload))
            else:
                _connection().client.delete_object(Bucket=self.bucket, Key=self._name(key))
        except (ClientError, BotoCoreError) as error:
            if not (isinstance(error, ClientError) and _code(error) in ("NoSuchKey", "NoSuchUpload")):
                raise self._words(error, key) from error

    # Words ------------------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        check_key(key)
        return self.prefix + key

    @contextlib.contextmanager
    def _in_words(self, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError) as error:
            raise self._words(error, key) from error

    def _look(self) -> None:
        """Raises StoreError if the bucket is not there or does not answer us; asked once a process."""
        connection = _connection()
        if self.bucket not in connection.seen:
            with self._in_words():
                connection.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
            connection.seen.add(self.bucket)

    def _words(self, error: ClientError | BotoCoreError, key: str | None) -> OSError:
        """The error as an OSError that says what happened, where, and what to do next."""
        place = self.location if key is None else f"{self.location}/{key}"
        endpoint = _connection().endpoint
        if isinstance(error, CUT_OFF):
            return _CutOff(str(error))
        if not isinstance(error, ClientError):
            if isinstance(error, NoCredentialsError | PartialCredentialsError):
                return StoreError(
                    f"{place}: there are no credentials for S3 ({error}). Set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a profile of ~/.aws/config."
                )
            if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
                return StoreError(
                    f"{place}: {endpoint} can't be reached. Does the server run, and is AWS_ENDPOINT_URL (or the "
                    "region) right?"
                )
            return StoreError(f"{place}: {error} (at {endpoint}). Look at the AWS_… variables and the network.")
        code, status = _code(error), _status(error)
        if code in ("NoSuchKey", "404"):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        if code == "InvalidRange":
            return _PastTheEnd()
        if code == "NoSuchBucket":
            return StoreError(
                f"there is no bucket {self.bucket!r} at {endpoint}. Create it (aws s3 mb s3://{self.bucket}), or "
                "correct the name; AWS_ENDPOINT_URL names another server."
            )
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"):
            return StoreError(
                f"{place}: the credentials are not accepted at {endpoint} ({code}). Correct AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (or the profile in AWS_PROFILE)."
            )
        if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired"):
            return StoreError(f"{place}: the session's credentials have expired. Sign in again and run it again.")
        if status == 403:
            return StoreError(
                f"{place}: access denied to {error.operation_name} at {endpoint}. The policy of these credentials must "
                "allow to list the bucket, and to get, put and delete its objects."
            )
        if status >= 500 or code in ("SlowDown", "Throttling", "RequestTimeout"):
            return StoreError(
                f"{place}: {endpoint} answers {status} {code} to {error.operation_name}, again and again. Run "
                "the same command again later: what is committed stays."
            )
        told = error.response["Error"].get("Message") or "no message"
        return StoreError(f"{place}: {error.operation_name} is refused at {endpoint}: {status} {code}, {told}")


class _PastTheEnd(OSError):
    """The range begins at or after the object's end."""


class _CutOff(OSError):
    """A body that did not arrive whole."""


_regions: dict[tuple[str, str], str | None] = {}


@lru_cache(maxsize=16)
def _arrow(access_key: str, secret_key: str, token: str | None, endpoint: str, region: str) -> FileSystem:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    parts = urlsplit(endpoint)
    return S3FileSystem(
        access_key=access_key,
        secret_key=secret_key,
        session_token=token,
        region=region,
        scheme=parts.scheme,
        endpoint_override=None if parts.netloc.endswith("amazonaws.com") else parts.netloc,
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=TRIES),
    )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _date_s(response: dict[str, Any]) -> float:
    """When the bucket answered, by its own clock."""
    return parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


def _piece(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, bytes):
        return data[start : start + length]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(length)
