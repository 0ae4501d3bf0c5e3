"""The local cloud's S3 and SQS, where moto is kinder than AWS, or fails. test_two_emulators.py holds them to it."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from moto.s3.exceptions import NoSuchUpload
from moto.s3.models import PublicAccessBlock, S3Backend
from moto.sqs.exceptions import SQSException
from moto.sqs.models import Queue, SQSBackend

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SSE_S3 = {"Rule": {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}}


def has_run_out(query: str) -> bool:
    """Whether a signed address is past its time. Moto does not look."""
    found = parse_qs(query)
    if "Signature" in found and "Expires" in found:  # of version 2, which boto3 still makes
        return time.time() > int(found["Expires"][0])
    if "X-Amz-Expires" not in found:
        return False
    signed_at = datetime.strptime(found["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return time.time() > signed_at.timestamp() + int(found["X-Amz-Expires"][0])


def add_to_moto() -> None:
    """Once in a process."""
    for owner, name, wrap in (
        (SQSBackend, "change_message_visibility", only_in_flight),
        (SQSBackend, "_validate_message", only_allowed_characters),
        (Queue, "_setup_dlq", only_to_a_queue),
        (S3Backend, "complete_multipart_upload", only_of_an_upload),
        (S3Backend, "create_bucket", closed_and_encrypted),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))


def only_in_flight(change: Callable[..., None]) -> Callable[..., None]:
    """A message that others may receive again can no longer be extended."""

    @functools.wraps(change)
    def wrapped(self: Any, queue_name: str, receipt_handle: str, visibility_timeout: int) -> None:
        for message in self.get_queue(queue_name)._messages:
            if message.had_receipt_handle(receipt_handle) and message.visible_at <= time.time() * 1000:
                words = "The specified message isn't in flight."
                raise SQSException("AWS.SimpleQueueService.MessageNotInflight", words)
        change(self, queue_name, receipt_handle, visibility_timeout)

    return wrapped


def only_allowed_characters(validate: Callable[..., None]) -> Callable[..., None]:
    """XML's, of which JSON may have more."""

    @functools.wraps(validate)
    def wrapped(self: Any, queue: Any, message_body: str, *args: Any, **kwargs: Any) -> None:
        if FORBIDDEN.search(message_body):
            raise SQSException("InvalidMessageContents", "The message contains characters outside the allowed set.")
        validate(self, queue, message_body, *args, **kwargs)

    return wrapped


def only_to_a_queue(set_up: Callable[..., None]) -> Callable[..., None]:
    """Of dead letters: AWS calls another error what moto does."""

    @functools.wraps(set_up)
    def wrapped(self: Any, policy: Any) -> None:
        try:
            set_up(self, policy)
        except SQSException as error:
            if error.code != "AWS.SimpleQueueService.NonExistentQueue":
                raise
            words = (
                f"Value {policy} for parameter RedrivePolicy is invalid. Reason: Dead letter target does not exist."
            )
            raise SQSException("InvalidParameterValue", words) from error

    return wrapped


def only_of_an_upload(complete: Callable[..., Any]) -> Callable[..., Any]:
    """Moto fails where there is none."""

    @functools.wraps(complete)
    def wrapped(self: Any, bucket_name: str, multipart_id: str, body: Any) -> Any:
        if multipart_id not in self.get_bucket(bucket_name).multiparts:
            raise NoSuchUpload(multipart_id)
        return complete(self, bucket_name, multipart_id, body)

    return wrapped


def closed_and_encrypted(create: Callable[..., Any]) -> Callable[..., Any]:
    """As every new bucket is, since 2023."""

    @functools.wraps(create)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        bucket = create(self, *args, **kwargs)
        bucket.encryption = SSE_S3
        bucket.public_access_block = PublicAccessBlock("True", "True", "True", "True")
        return bucket

    return wrapped
