"""What S3 and SQS answer, by AWS's documents, held against the local cloud and against a second emulator.

Where the local cloud differs it is corrected (local_storage.py). Where the other one does, that is written down below, and
in docs/development.md; so both are seen to change.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from local_cloud import ACCOUNT_ID, REGION, LocalCloud, free_port
from places import TESTS
from workplace import await_that

MIB = 1024 * 1024


class Aws:
    """An emulator's clients, and new queues and buckets on it."""

    def __init__(self, endpoint: str) -> None:
        config = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": ACCOUNT_ID, "aws_secret_access_key": "local", "region_name": REGION}
        self.sqs = boto3.client("sqs", endpoint_url=endpoint, config=config, **keys)
        self.s3 = boto3.client("s3", endpoint_url=endpoint, config=config, **keys)

    def queue(self, **attributes: str) -> str:
        return str(self.sqs.create_queue(QueueName=f"q{uuid.uuid4().hex}", Attributes=attributes)["QueueUrl"])

    def queue_with_message(self, **attributes: str) -> str:
        url = self.queue(**attributes)
        self.sqs.send_message(QueueUrl=url, MessageBody="hello")
        return url

    def arn(self, url: str) -> str:
        answer = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return str(answer["Attributes"]["QueueArn"])

    def receive(self, url: str, wait_s: int = 0, **options: Any) -> list[dict[str, Any]]:
        answer = self.sqs.receive_message(
            QueueUrl=url, WaitTimeSeconds=wait_s, MaxNumberOfMessages=10, AttributeNames=["All"], **options
        )
        return list(answer.get("Messages", []))

    def bucket(self) -> str:
        name = f"b{uuid.uuid4().hex}"
        self.s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return name

    def put(self, key: str = "key", body: bytes = b"body", **options: Any) -> dict[str, Any]:
        """Where it is."""
        place = {"Bucket": self.bucket(), "Key": key}
        self.s3.put_object(Body=body, **place, **options)
        return place

    def upload(self, *parts: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A multipart upload that is not complete, and its parts."""
        place = {"Bucket": self.bucket(), "Key": "key"}
        place["UploadId"] = self.s3.create_multipart_upload(**place)["UploadId"]
        etags = [
            {"PartNumber": number, "ETag": self.s3.upload_part(**place, PartNumber=number, Body=part)["ETag"]}
            for number, part in enumerate(parts, 1)
        ]
        return place, etags


def code(call: Callable[..., Any], **arguments: Any) -> str:
    """The error code of a call, without the name of the service; `good` without an error."""
    try:
        call(**arguments)
    except ClientError as error:
        return str(error.response["Error"]["Code"]).rpartition(".")[2]
    return "good"


# --- SQS ---------------------------------------------------------------------------------------------------------


def a_received_message_comes_back(aws: Aws) -> Any:
    url = aws.queue_with_message(VisibilityTimeout="1")
    first, hidden, second = aws.receive(url), aws.receive(url), aws.receive(url, wait_s=20)
    counts = [message["Attributes"]["ApproximateReceiveCount"] for message in first + second]
    return len(hidden), counts, first[0]["MessageId"] == second[0]["MessageId"]


def a_message_is_given_back_at_once(aws: Aws) -> Any:
    url = aws.queue_with_message()
    receipt = aws.receive(url)[0]["ReceiptHandle"]
    aws.sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=receipt, VisibilityTimeout=0)
    return len(aws.receive(url))


def a_message_that_is_not_in_flight_is_not_extended(aws: Aws) -> Any:
    url = aws.queue_with_message()
    change = {"QueueUrl": url, "ReceiptHandle": aws.receive(url)[0]["ReceiptHandle"]}
    aws.sqs.change_message_visibility(**change, VisibilityTimeout=0)
    return code(aws.sqs.change_message_visibility, **change, VisibilityTimeout=30)


def a_message_is_deleted_twice(aws: Aws) -> Any:
    url = aws.queue_with_message()
    delete = {"QueueUrl": url, "ReceiptHandle": aws.receive(url)[0]["ReceiptHandle"]}
    return code(aws.sqs.delete_message, **delete), code(aws.sqs.delete_message, **delete)


def a_receipt_of_nothing(aws: Aws) -> Any:
    return code(aws.sqs.delete_message, QueueUrl=aws.queue(), ReceiptHandle="of nothing")


def nobody_holds_a_message_longer_than_twelve_hours(aws: Aws) -> Any:
    url = aws.queue_with_message()
    change = {"QueueUrl": url, "ReceiptHandle": aws.receive(url)[0]["ReceiptHandle"]}
    return code(aws.sqs.change_message_visibility, **change, VisibilityTimeout=43_201)


def a_message_goes_to_the_dead_letters(aws: Aws) -> Any:
    dead = aws.queue()
    redrive = json.dumps({"deadLetterTargetArn": aws.arn(dead), "maxReceiveCount": 2})
    url = aws.queue_with_message(RedrivePolicy=redrive, VisibilityTimeout="0")
    seen = [aws.receive(url), aws.receive(url), aws.receive(url)]
    (letter,) = await_that("the letter is there", lambda: aws.receive(dead))
    same = [letter[key] == seen[0][0][key] for key in ("MessageId", "Body")]
    kept = letter["Attributes"]["SentTimestamp"] == seen[0][0]["Attributes"]["SentTimestamp"]
    return [len(messages) for messages in seen], same, kept


def dead_letters_need_a_queue(aws: Aws) -> Any:
    arn = aws.arn(aws.queue()).rpartition(":")[0] + ":nothing"
    redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2})
    return code(aws.sqs.create_queue, QueueName=f"q{uuid.uuid4().hex}", Attributes={"RedrivePolicy": redrive})


def sizes_of_messages(aws: Aws) -> Any:
    url = aws.queue(MaximumMessageSize=str(MIB))
    entries = [{"Id": str(number), "MessageBody": "x" * (MIB // 2 + 1)} for number in range(2)]
    return (
        code(aws.sqs.send_message, QueueUrl=url, MessageBody="x" * MIB),
        code(aws.sqs.send_message, QueueUrl=url, MessageBody="x" * (MIB + 1)),
        code(aws.sqs.send_message_batch, QueueUrl=url, Entries=entries),
    )


def how_many_at_a_time(aws: Aws) -> Any:
    url = aws.queue()
    entries = [{"Id": str(number), "MessageBody": "x"} for number in range(11)]
    return (
        code(aws.sqs.send_message_batch, QueueUrl=url, Entries=entries),
        code(aws.sqs.send_message_batch, QueueUrl=url, Entries=[]),
        code(aws.sqs.receive_message, QueueUrl=url, MaxNumberOfMessages=11),
    )


def characters_that_are_not_allowed(aws: Aws) -> Any:
    return code(aws.sqs.send_message, QueueUrl=aws.queue(), MessageBody="\x00")


def a_queue_is_purged_once_a_minute(aws: Aws) -> Any:
    url = aws.queue_with_message()
    return code(aws.sqs.purge_queue, QueueUrl=url), code(aws.sqs.purge_queue, QueueUrl=url), len(aws.receive(url))


def a_deleted_queue_keeps_its_name(aws: Aws) -> Any:
    url = aws.queue()
    aws.sqs.delete_queue(QueueUrl=url)
    return code(aws.sqs.create_queue, QueueName=url.rpartition("/")[2])


def a_queue_is_made_again(aws: Aws) -> Any:
    url = aws.queue(VisibilityTimeout="30")
    make = {"QueueName": url.rpartition("/")[2]}
    again = aws.sqs.create_queue(**make, Attributes={"VisibilityTimeout": "30"})["QueueUrl"]
    return again == url, code(aws.sqs.create_queue, **make, Attributes={"VisibilityTimeout": "31"})


def a_queue_that_is_not_there(aws: Aws) -> Any:
    return code(aws.sqs.get_queue_url, QueueName="nothing")


def messages_are_counted(aws: Aws) -> Any:
    url = aws.queue_with_message()
    aws.sqs.send_message(QueueUrl=url, MessageBody="later", DelaySeconds=900)
    aws.receive(url)
    aws.sqs.send_message(QueueUrl=url, MessageBody="more")
    counts = aws.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    return [counts[f"ApproximateNumberOfMessages{kind}"] for kind in ("", "NotVisible", "Delayed")]


# --- S3 ----------------------------------------------------------------------------------------------------------


def a_receipt_is_written_once(aws: Aws) -> Any:
    place = {"Bucket": aws.bucket(), "Key": "result.json"}
    codes: list[str] = []

    def write(text: str) -> None:
        codes.append(code(aws.s3.put_object, **place, Body=text.encode(), IfNoneMatch="*"))

    writers = [threading.Thread(target=write, args=(str(number),)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    return sorted(set(codes)), codes.count("good"), code(aws.s3.put_object, **place, IfNoneMatch="*")


def what_has_not_changed_is_not_read_again(aws: Aws) -> Any:
    place = aws.put()
    etag = aws.s3.head_object(**place)["ETag"]
    return (
        code(aws.s3.get_object, **place, IfNoneMatch=etag),
        code(aws.s3.get_object, **place, IfMatch='"other"'),
        code(aws.s3.put_object, **place, Body=b"new", IfMatch='"other"'),
        code(aws.s3.put_object, **place, Body=b"new", IfMatch=etag),
    )


def an_upload_in_parts(aws: Aws) -> Any:
    place, parts = aws.upload(b"x" * 5 * MIB, b"y")
    where = {key: place[key] for key in ("Bucket", "Key")}
    before = code(aws.s3.head_object, **where)
    under_way = len(aws.s3.list_multipart_uploads(Bucket=place["Bucket"])["Uploads"])
    etag = aws.s3.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})["ETag"]
    after = "Uploads" in aws.s3.list_multipart_uploads(Bucket=place["Bucket"])
    return before, under_way, etag.strip('"')[-2:], after, aws.s3.head_object(**where)["ContentLength"]


def parts_are_not_small(aws: Aws) -> Any:
    place, parts = aws.upload(b"x", b"y")
    return code(aws.s3.complete_multipart_upload, **place, MultipartUpload={"Parts": parts})


def an_upload_in_parts_is_made_once(aws: Aws) -> Any:
    place, parts = aws.upload(b"x")
    aws.s3.put_object(Bucket=place["Bucket"], Key=place["Key"], Body=b"first")
    complete = {**place, "MultipartUpload": {"Parts": parts}}
    return code(aws.s3.complete_multipart_upload, **complete, IfNoneMatch="*")


def an_upload_that_was_given_up(aws: Aws) -> Any:
    place, parts = aws.upload(b"x")
    aws.s3.abort_multipart_upload(**place)
    return code(aws.s3.complete_multipart_upload, **place, MultipartUpload={"Parts": parts})


def an_address_that_is_signed(aws: Aws) -> Any:
    place = aws.put()

    def status(address: str) -> int:
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    good = aws.s3.generate_presigned_url("get_object", Params=place, ExpiresIn=3600)
    old = aws.s3.generate_presigned_url("get_object", Params=place, ExpiresIn=-1)
    return status(good), status(old)


def what_is_not_there(aws: Aws) -> Any:
    place = {"Bucket": aws.bucket(), "Key": "nothing"}
    return (
        code(aws.s3.get_object, **place),
        code(aws.s3.head_object, **place),
        code(aws.s3.delete_object, **place),
        code(aws.s3.copy_object, Bucket=place["Bucket"], Key="new", CopySource=place),
        code(aws.s3.get_object, Bucket="nothing-here", Key="key"),
    )


def settings_that_a_bucket_lacks(aws: Aws) -> Any:
    bucket = {"Bucket": aws.bucket()}
    looks = ("tagging", "policy", "lifecycle_configuration")
    return [code(getattr(aws.s3, f"get_bucket_{look}"), **bucket) for look in looks]


def settings_that_a_new_bucket_has(aws: Aws) -> Any:
    bucket = {"Bucket": aws.bucket()}
    return code(aws.s3.get_bucket_encryption, **bucket), code(aws.s3.get_public_access_block, **bucket)


def a_part_of_an_object(aws: Aws) -> Any:
    place = aws.put(body=b"0123456789")
    part = aws.s3.get_object(**place, Range="bytes=8-20")
    return part["Body"].read(), part["ContentRange"], code(aws.s3.get_object, **place, Range="bytes=10-11")


def a_list_in_pages(aws: Aws) -> Any:
    place = aws.put("a b+ü&<")
    for key in ("b/1", "b/2"):
        aws.s3.put_object(Bucket=place["Bucket"], Key=key)
    pages = aws.s3.get_paginator("list_objects_v2").paginate(Bucket=place["Bucket"], PaginationConfig={"PageSize": 1})
    folders = aws.s3.list_objects_v2(Bucket=place["Bucket"], Delimiter="/")["CommonPrefixes"]
    return [found["Key"] for page in pages for found in page["Contents"]], folders


def a_bucket_with_files_is_not_deleted(aws: Aws) -> Any:
    return code(aws.s3.delete_bucket, Bucket=aws.put()["Bucket"])


def what_an_object_says_of_itself(aws: Aws) -> Any:
    place = aws.put(ContentType="application/gzip", Metadata={"sha256": "abc"})
    found = aws.s3.head_object(**place)
    return found["ContentType"], found["Metadata"], found["ContentLength"]


BEHAVIOUR: dict[Callable[[Aws], Any], Any] = {
    a_received_message_comes_back: (0, ["1", "2"], True),
    a_message_is_given_back_at_once: 1,
    a_message_that_is_not_in_flight_is_not_extended: "MessageNotInflight",
    a_message_is_deleted_twice: ("good", "good"),
    a_receipt_of_nothing: "ReceiptHandleIsInvalid",
    nobody_holds_a_message_longer_than_twelve_hours: "InvalidParameterValue",
    a_message_goes_to_the_dead_letters: ([1, 1, 0], [True, True], True),
    dead_letters_need_a_queue: "InvalidParameterValue",
    sizes_of_messages: ("good", "InvalidParameterValue", "BatchRequestTooLong"),
    how_many_at_a_time: ("TooManyEntriesInBatchRequest", "EmptyBatchRequest", "InvalidParameterValue"),
    characters_that_are_not_allowed: "InvalidMessageContents",
    a_queue_is_purged_once_a_minute: ("good", "PurgeQueueInProgress", 0),
    a_deleted_queue_keeps_its_name: "QueueDeletedRecently",
    a_queue_is_made_again: (True, "QueueAlreadyExists"),
    a_queue_that_is_not_there: "NonExistentQueue",
    messages_are_counted: ["1", "1", "1"],
    a_receipt_is_written_once: (["PreconditionFailed", "good"], 1, "PreconditionFailed"),
    what_has_not_changed_is_not_read_again: ("304", "PreconditionFailed", "PreconditionFailed", "good"),
    an_upload_in_parts: ("404", 1, "-2", False, 5 * MIB + 1),
    parts_are_not_small: "EntityTooSmall",
    an_upload_in_parts_is_made_once: "PreconditionFailed",
    an_upload_that_was_given_up: "NoSuchUpload",
    an_address_that_is_signed: (200, 403),
    what_is_not_there: ("NoSuchKey", "404", "good", "NoSuchKey", "NoSuchBucket"),
    settings_that_a_bucket_lacks: ["NoSuchTagSet", "NoSuchBucketPolicy", "NoSuchLifecycleConfiguration"],
    settings_that_a_new_bucket_has: ("good", "good"),
    a_part_of_an_object: (b"89", "bytes 8-9/10", "InvalidRange"),
    a_list_in_pages: (["a b+ü&<", "b/1", "b/2"], [{"Prefix": "b/"}]),
    a_bucket_with_files_is_not_deleted: "BucketNotEmpty",
    what_an_object_says_of_itself: ("application/gzip", {"sha256": "abc"}, 4),
}
"""What AWS answers."""

OF_LOCAL_CLOUD: dict[Callable[[Aws], Any], Any] = {
    a_deleted_queue_keeps_its_name: "good",  # or the tests of create_env.sh would wait a minute after delete_env.sh
}
OF_SECOND: dict[Callable[[Aws], Any], Any] = {
    a_message_that_is_not_in_flight_is_not_extended: "good",
    a_message_is_deleted_twice: ("good", "ReceiptHandleIsInvalid"),
    nobody_holds_a_message_longer_than_twelve_hours: "good",
    dead_letters_need_a_queue: "InvalidAttributeValue",
    a_queue_is_purged_once_a_minute: ("good", "good", 0),
    a_deleted_queue_keeps_its_name: "good",
    parts_are_not_small: "good",
    an_address_that_is_signed: (200, 200),
    settings_that_a_new_bucket_has: ("good", "NoSuchPublicAccessBlockConfiguration"),
}
"""What they answer instead."""


@pytest.mark.parametrize("behaviour", BEHAVIOUR, ids=lambda behaviour: behaviour.__name__)
def test_the_local_cloud_answers_as_aws(cloud: LocalCloud, behaviour: Callable[[Aws], Any]) -> None:
    assert behaviour(Aws(cloud.endpoint)) == OF_LOCAL_CLOUD.get(behaviour, BEHAVIOUR[behaviour])


@pytest.fixture(scope="module")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    """The second emulator, in tests/.ministack or on the PATH: its own botocore would replace that of the tests."""
    program = shutil.which(str(TESTS / ".ministack/bin/ministack")) or shutil.which("ministack")
    if program is None:
        pytest.skip("no second emulator: see docs/development.md, The local cloud")
    port = free_port()
    environment = {"PATH": "/usr/bin:/bin", "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3,sqs"}
    folder: Path = tmp_path_factory.mktemp("ministack")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program], env=environment | {"HOME": str(folder), "TMPDIR": str(folder)}, stdout=log, stderr=log
        )
    aws = Aws(f"http://127.0.0.1:{port}")

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            aws.s3.list_buckets()
        except Exception:
            return False
        return True

    try:
        await_that("the second emulator answers", answers)
        yield aws
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("behaviour", BEHAVIOUR, ids=lambda behaviour: behaviour.__name__)
def test_the_second_emulator_answers_as_aws_but_for_what_is_known(
    ministack: Aws, behaviour: Callable[[Aws], Any]
) -> None:
    assert behaviour(ministack) == OF_SECOND.get(behaviour, BEHAVIOUR[behaviour])
