"""The environment's S3 bucket, as a worker reads and writes it."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any

from comfy_utils import error_code
from worker.retry import Patience

PART_BYTES = 8 * 1024 * 1024
"""A larger file is uploaded in parts, several at once."""


class Bucket:
    """Every call raises what boto3 raises, but for an object that is not there."""

    def __init__(self, s3: Any, name: str) -> None:
        self.s3 = s3
        self.name = name
        self.reading, self.writing = Patience(), Patience()  # a bucket may be read that refuses what is written

    def head(self, key: str) -> dict[str, Any] | None:
        """What S3 says of an object; None when there is none."""
        try:
            return dict(self.s3.head_object(Bucket=self.name, Key=key))
        except Exception as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return None
            raise

    def size(self, key: str) -> int | None:
        """Bytes of an object; None when there is none."""
        head = self.head(key)
        return None if head is None else int(head["ContentLength"])

    def keys(self, prefix: str) -> list[str]:
        """The keys of all objects below a prefix."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def open(self, key: str) -> tuple[Any, int] | None:
        """An object's body, for reading as it comes, and its bytes; None when there is none."""
        try:
            answer = self.s3.get_object(Bucket=self.name, Key=key)
        except self.s3.exceptions.NoSuchKey:
            return None
        return answer["Body"], int(answer["ContentLength"])

    def write(self, key: str, body: bytes, **more: Any) -> None:
        """Store an object, JSON unless `more`, S3's own arguments, says otherwise."""
        self.s3.put_object(Bucket=self.name, Key=key, Body=body, **{"ContentType": "application/json", **more})

    def upload(self, path: Path, key: str) -> None:
        """Store a file. Streamed, in parts when large."""
        content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        if path.stat().st_size > PART_BYTES:
            self.s3.upload_file(str(path), self.name, key, ExtraArgs={"ContentType": content_type})
            return
        with path.open("rb") as file:  # without the threads that upload_file starts
            self.s3.put_object(Bucket=self.name, Key=key, Body=file, ContentType=content_type)

    def delete(self, key: str) -> None:
        """Remove an object."""
        self.s3.delete_object(Bucket=self.name, Key=key)
