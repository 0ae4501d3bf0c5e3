"""The environment's bucket and queue for code that must not wait: boto3 in a bounded pool of threads."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from comfy_utils import Settings, aws_client, error_code, is_refused_condition

T = TypeVar("T")

CALLS_AT_ONCE = 28
STREAMS_AT_ONCE = 12
"""Calls that move files have threads and connections of their own, so that they never keep a job waiting. Neither are
more than aws_client keeps connections for."""
CHUNK_BYTES = 256 * 1024
KEPT_BYTES = 32 * 1024 * 1024
"""So much is remembered of objects that are written once and never changed."""


class Cloud:
    """One environment's bucket. Every call raises what boto3 raises, but for an object that is not there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bucket = settings.s3_bucket
        self.s3 = aws_client("s3", settings.region)
        self.s3_for_files = aws_client("s3", settings.region)
        self._calls = ThreadPoolExecutor(CALLS_AT_ONCE, "call")
        self._streams = ThreadPoolExecutor(STREAMS_AT_ONCE, "stream")
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0

    async def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Do what blocks in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._calls, lambda: function(*arguments, **named))

    async def move(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """The same for what moves a file."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._streams, lambda: function(*arguments, **named))

    async def read(self, key: str) -> bytes | None:
        """A small object, None where there is none."""

        def get() -> bytes | None:
            try:
                body: bytes = self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            except self.s3.exceptions.NoSuchKey:
                return None
            return body

        return await self.call(get)

    async def read_json(self, key: str) -> Any:
        """A JSON object that others may change."""
        body = await self.read(key)
        return None if body is None else json.loads(body)

    async def read_final(self, key: str) -> Any:
        """A JSON object that is written once: it is remembered."""
        body = self._kept.get(key)
        if body is not None:
            self._kept.move_to_end(key)
            return json.loads(body)
        body = await self.read(key)
        if body is None:
            return None
        self.keep(key, body)
        return json.loads(body)

    def keep(self, key: str, body: bytes) -> None:
        """Remember an object that is written once, until newer ones need the room."""
        if key in self._kept or len(body) > KEPT_BYTES // 4:
            return
        self._kept[key] = body
        self._kept_bytes += len(body)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    async def write(self, key: str, body: bytes) -> None:
        """Store a small object."""
        await self.call(self.s3.put_object, Bucket=self.bucket, Key=key, Body=body, ContentType="application/json")

    async def create(self, key: str, body: bytes) -> bool:
        """Store a small object where there is none; False where there is, even if it came just now by another process."""
        try:
            await self.call(
                self.s3.put_object,
                Bucket=self.bucket,
                Key=key,
                Body=body,
                ContentType="application/json",
                IfNoneMatch="*",
            )
        except Exception as error:
            if is_refused_condition(error):
                return False
            raise
        return True

    async def delete(self, key: str) -> None:
        """Remove an object, which may be gone already."""
        await self.call(self.s3.delete_object, Bucket=self.bucket, Key=key)

    async def head(self, key: str) -> dict[str, Any] | None:
        """What S3 says of an object, None where there is none."""

        def head() -> dict[str, Any] | None:
            try:
                return dict(self.s3.head_object(Bucket=self.bucket, Key=key))
            except Exception as error:
                if error_code(error) in ("404", "NoSuchKey"):
                    return None
                raise

        return await self.call(head)

    async def names(self, prefix: str, after: str = "", delimiter: str = "") -> AsyncIterator[list[dict[str, Any]]]:
        """The objects below `prefix` in the order of their keys, in pages of at most a thousand.

        With a `delimiter` also the folders, each as {"Prefix": …}.
        """
        more: dict[str, str] = {"StartAfter": after} if after else {}
        more |= {"Delimiter": delimiter} if delimiter else {}
        while True:
            page = await self.call(self.s3.list_objects_v2, Bucket=self.bucket, Prefix=prefix, **more)
            yield [*page.get("Contents", []), *page.get("CommonPrefixes", [])]
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def end(self) -> None:
        """Wait for nothing any more."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._streams.shutdown(wait=False, cancel_futures=True)
