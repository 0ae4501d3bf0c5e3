"""What AWS knows late: whatever was made or removed a moment ago, the next call that names it meets the time before.

IAM, EC2, S3 and SQS say of themselves that they are eventually consistent; moto never is. A test that wants it sets
`LocalCloud.late_news`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from moto.backends import get_backend

NO_IMAGES = "<DescribeImagesResponse><imagesSet/></DescribeImagesResponse>"


Refusal = tuple[int, str, str]
"""Status, code and message of an error."""


class LateNews:
    """Each piece of news is missed once."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        """The codes with which calls met the time before, and what they named."""
        self._news: set[str] = set()

    def answer(
        self, service: str, action: str, call: dict[str, Any], environ: dict[str, Any]
    ) -> Refusal | str | None:
        """What the call is answered instead: an error, or the text of a good answer."""
        if service == "s3":
            return self._of_s3(action, environ["PATH_INFO"].lstrip("/"), environ.get("QUERY_STRING", ""))
        of_service = {"iam": self._of_iam, "sqs": self._of_sqs, "ec2": self._of_ec2}.get(service)
        return of_service(action, call) if of_service else None

    def _miss(self, name: str, status: int, code: str, message: str = "") -> Refusal | None:
        if name not in self._news:
            return None
        self._news.remove(name)
        self.missed.append(f"{code} {name.partition(' ')[0]}")
        return (status, code, message or f"{name} is not as it will be")

    def _of_s3(self, method: str, path: str, query: str) -> Refusal | None:
        bucket, _, key = path.partition("/")
        if not key and not query and method in ("PUT", "DELETE"):
            again = self._miss(f"gone {bucket}", 409, "OperationAborted") if method == "PUT" else None
            self._news.add(f"{'bucket' if method == 'PUT' else 'gone'} {bucket}")
            return again
        return self._miss(f"bucket {bucket}", 404, "NoSuchBucket")

    def _of_iam(self, action: str, call: dict[str, str]) -> Refusal | None:
        for kind in ("Role", "InstanceProfile"):
            if action == f"Create{kind}":
                self._news.add(f"{kind} {call[f'{kind}Name']}")
            elif found := self._miss(f"{kind} {call.get(f'{kind}Name', '')}", 404, "NoSuchEntity"):
                return found
        return None

    def _of_sqs(self, action: str, call: dict[str, Any]) -> Refusal | None:
        if action != "CreateQueue":
            return None
        # In JSON, or in the query of an older CLI.
        values = [str(value) for value in (*call.get("Attributes", {}).values(), *call.values())]
        redrive = [json.loads(value) for value in values if value.startswith('{"deadLetterTargetArn"')]
        target = redrive[0]["deadLetterTargetArn"].rpartition(":")[2] if redrive else ""
        words = "Value for parameter RedrivePolicy is invalid. Reason: Dead letter target does not exist."
        self._news.add(f"queue {call['QueueName']}")
        return self._miss(f"queue {target}", 400, "InvalidParameterValue", words)

    def _of_ec2(self, action: str, call: dict[str, str]) -> Refusal | str | None:
        if action == "CreateImage":
            self._news.add("image")
        elif action == "DescribeImages" and "ImageId.1" in call:
            return self._miss("image", 400, "InvalidAMIID.NotFound")
        elif action == "DescribeImages" and any(re.match("ami-[0-9a-f]+$", value) for value in call.values()):
            return NO_IMAGES if self._miss("image", 400, "nothing") else None
        elif action == "DeregisterImage":
            image = get_backend("ec2")["123456789012"]["us-west-2"].amis[call["ImageId"]]
            self._news.add(f"snapshot {image.ebs_snapshot.id}")
        elif action == "DeleteSnapshot":
            return self._miss(f"snapshot {call['SnapshotId']}", 400, "InvalidSnapshot.InUse")
        return None
