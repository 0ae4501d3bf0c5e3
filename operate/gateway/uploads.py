"""Files of any size on their way to S3: hashed as they come, and never more of one in memory than two parts."""

from __future__ import annotations

import asyncio
from typing import Any

from blake3 import blake3

from operate.gateway.cloud import Cloud

PART_BYTES = 8 * 1024 * 1024
"""S3 takes 10,000 parts, none but the last smaller than 5 MiB."""
MOST_BYTES = 9_999 * PART_BYTES


class Upload:
    """One file that comes. Small ones are one request to S3, and are stored only when `finish` is called."""

    def __init__(self, cloud: Cloud, key: str, content_type: str) -> None:
        self._cloud = cloud
        self.key = key
        self._content_type = content_type
        self.size = 0
        self._digest = blake3()
        self._buffer = bytearray()
        self._upload_id = ""
        self._parts: list[dict[str, Any]] = []
        self._going: asyncio.Task[Any] | None = None

    @property
    def hash(self) -> str:
        """What the bytes so far are known by."""
        return f"blake3:{self._digest.hexdigest()}"

    async def add(self, chunk: bytes) -> None:
        """Take in what has come; returns when there is room for more."""
        self.size += len(chunk)
        self._digest.update(chunk)
        self._buffer += chunk
        if len(self._buffer) >= PART_BYTES:
            await self._send()

    async def _send(self) -> None:
        """Have a part under way: one at a time, while the next comes."""
        if not self._upload_id:
            answer = await self._call("create_multipart_upload", ContentType=self._content_type)
            self._upload_id = answer["UploadId"]
        await self._arrive()
        number, body, self._buffer = len(self._parts) + 1, bytes(self._buffer), bytearray()
        self._going = asyncio.create_task(
            self._call("upload_part", UploadId=self._upload_id, PartNumber=number, Body=body)
        )

    async def _arrive(self) -> None:
        if self._going is not None:
            going, self._going = self._going, None
            answer = await going
            self._parts.append({"PartNumber": len(self._parts) + 1, "ETag": answer["ETag"]})

    async def finish(self) -> None:
        """Store the file."""
        if not self._upload_id:
            await self._call("put_object", Body=bytes(self._buffer), ContentType=self._content_type)
            return
        if self._buffer:
            await self._send()
        await self._arrive()
        await self._call(
            "complete_multipart_upload", UploadId=self._upload_id, MultipartUpload={"Parts": self._parts}
        )
        self._upload_id = ""

    async def give_up(self) -> None:
        """Leave nothing of it in S3."""
        if self._going is not None:
            await asyncio.gather(self._going, return_exceptions=True)
        if self._upload_id:
            await self._call("abort_multipart_upload", UploadId=self._upload_id)

    async def _call(self, name: str, **more: Any) -> dict[str, Any]:
        function = getattr(self._cloud.s3_for_files, name)
        return dict(await self._cloud.move(function, Bucket=self._cloud.bucket, Key=self.key, **more))
