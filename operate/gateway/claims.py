"""Keys that count once: who brings one first has it, whichever process is asked. One small object in the bucket each."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from comfy_utils import error_code, is_refused_condition
from operate.gateway.cloud import Cloud

CLAIMS = "input/jobs/serve/keys/"
KEPT_S = 86_400
"""So long a key counts."""


class Claims:
    """The keys of one environment."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def take(self, kind: str, key: str) -> bool:
        """Have a key of this kind; False where somebody has it."""
        name = name_of(kind, key)
        if await self._cloud.create(name, b""):
            return True
        head = await self._cloud.head(name)
        if head is None:  # let go of a moment ago
            return await self._cloud.create(name, b"")
        if datetime.now(UTC) - head["LastModified"] < timedelta(seconds=KEPT_S):
            return False
        return await self._take_over(name, head["ETag"])

    async def _take_over(self, name: str, tag: str) -> bool:
        """Have a key that no longer counts, unless another was sooner."""
        body = datetime.now(UTC).isoformat().encode()  # so that its ETag is another
        try:
            await self._cloud.call(
                self._cloud.s3.put_object, Bucket=self._cloud.bucket, Key=name, Body=body, IfMatch=tag
            )
        except Exception as error:
            if is_refused_condition(error) or error_code(error) == "NoSuchKey":
                return False
            raise
        return True

    async def let_go(self, kind: str, key: str) -> None:
        """Give a key back that has made nothing."""
        await self._cloud.delete(name_of(kind, key))


def name_of(kind: str, key: str) -> str:
    """A key's object: it may be any text."""
    return f"{CLAIMS}{kind}/{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"
