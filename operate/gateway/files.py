"""The one room that knows files: which object a name means, and how its bytes come and go. It speaks no protocol.

No path of a request reaches S3 but through `key_of` and `input_key`: they lead into input/ and output/ only, and never
to what belongs to the fleet itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import quote

from comfy_utils import error_code, is_job_id, is_refused_condition, is_text
from operate.gateway.cloud import CHUNK_BYTES, Cloud

SPOOL_BYTES = 1024 * 1024
"""A larger upload lies on the disk until it is known under which name it is stored."""
MOST_STREAMS = 200
"""Files under way at once; each holds a connection to S3."""
MOST_KEY_BYTES = 900
OWN_FILES = ("result.json", "progress.json", "attempts.json")
"""The fleet's own among a job's files."""


class NoSuchPlaceError(Exception):
    """A name that leads out of the folders, or to what is not for clients."""


class NotSatisfiableError(Exception):
    """A range that the file does not have."""


class Stored(NamedTuple):
    """An object on its way: what S3 says of it, and its bytes as they come."""

    status: int
    headers: dict[str, str]
    body: Any


def parts_of(subfolder: str, name: str) -> list[str]:
    """The parts of a path that stays below its folder, as ComfyUI reads `subfolder` and `filename`.

    Raises NoSuchPlaceError.
    """
    text = f"{subfolder}/{name}" if subfolder else name
    if "\\" in text or not text.isprintable() or not is_text(text):
        raise NoSuchPlaceError("a path of plain characters, with / between folders, is allowed")
    if subfolder.startswith("/") or name.startswith("/"):
        raise NoSuchPlaceError("a path must not begin with /")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts or not parts or name.endswith("/"):
        raise NoSuchPlaceError("a path must name a file and stay below its folder")
    return parts


def key_of(place: str, subfolder: str, name: str) -> str:
    """The object that ComfyUI's `type`, `subfolder` and `filename` mean. Raises NoSuchPlaceError.

    A job's temp files lie among its others: `<job_id>/x` in temp is output/<job_id>/temp/x.
    """
    parts = parts_of(subfolder, name)
    if place == "input":
        return input_key(parts)
    if place not in ("output", "temp"):
        raise NoSuchPlaceError(f"there is no folder {place!r:.40}: it is output, input or temp")
    job_id, *rest = parts
    if not is_job_id(job_id) or not rest:
        # Beside the jobs' folders lie logs and what the instances say of themselves.
        raise NoSuchPlaceError("a job's files lie in its own folder: use subfolder as the history has it")
    if rest[0] in OWN_FILES and len(rest) == 1:
        raise NoSuchPlaceError(f"{rest[0]} is the fleet's own")
    return _checked("/".join(("output", job_id, *(("temp",) if place == "temp" else ()), *rest)))


def input_key(parts: list[str]) -> str:
    """The object of an input. Raises NoSuchPlaceError for what lies in input/jobs/: posted jobs, which run."""
    if parts[0] == "jobs":
        raise NoSuchPlaceError("the input folder jobs is the fleet's own: use another subfolder")
    return _checked("/".join(("input", *parts)))


def _checked(key: str) -> str:
    if len(key.encode()) > MOST_KEY_BYTES:
        raise NoSuchPlaceError("the path is too long")
    return key


def place_of_key(key: str) -> dict[str, str] | None:
    """The other way round: `filename`, `subfolder` and `type` of a job's object; None for what is none."""
    folder, *parts = key.split("/")
    if folder != "output" or len(parts) < 2 or not is_job_id(parts[0]):
        return None
    job_id, *rest = parts
    place = "temp" if rest[0] == "temp" and len(rest) > 1 else "output"
    below = rest[1:] if place == "temp" else rest
    return {"filename": below[-1], "subfolder": "/".join([job_id, *below[:-1]]), "type": place}


class Files:
    """The files of one environment."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._streams = asyncio.Semaphore(MOST_STREAMS)
        self._signer: Any = None

    @asynccontextmanager
    async def open(self, key: str, asked: dict[str, str]) -> AsyncIterator[Stored | None]:
        """An object, or the part that `asked` (get_object's Range and conditions) names; None where there is none.

        Its status is 200, 206, or 304. Raises NotSatisfiableError, and what boto3 raises.
        """
        async with self._streams:
            answer = await self._get(key, asked)
            if answer is None or isinstance(answer, Stored):
                yield answer
                return
            headers = {
                name: str(answer[field])
                for name, field in (("ETag", "ETag"), ("Content-Range", "ContentRange"), ("Content-Length", "ContentLength"))
                if field in answer
            }  # fmt: skip
            headers["Last-Modified"] = answer["LastModified"].strftime("%a, %d %b %Y %H:%M:%S GMT")
            headers["Accept-Ranges"] = "bytes"
            try:
                yield Stored(206 if "ContentRange" in answer else 200, headers, answer["Body"])
            finally:
                answer["Body"].close()

    async def _get(self, key: str, asked: dict[str, str]) -> dict[str, Any] | Stored | None:
        try:
            return dict(
                await self._cloud.move(
                    self._cloud.s3_for_files.get_object, Bucket=self._cloud.bucket, Key=key, **asked
                )
            )
        except Exception as error:
            code = error_code(error)
            if code in ("NoSuchKey", "404"):
                return None
            if code in ("304", "NotModified"):
                return Stored(304, {}, None)
            if code in ("InvalidRange", "416"):
                raise NotSatisfiableError from None
            if code == "PreconditionFailed" and "IfMatch" in asked:  # If-Range: it has changed, so all of it
                return await self._get(key, {})
            raise

    def address(self, key: str, name: str, content_type: str, seconds: int) -> str:
        """An address at which anybody may fetch an object for so many seconds. It blocks: for a thread."""
        if self._signer is None:
            self._signer = signing_client(self._cloud)
        about = {
            "ResponseContentType": content_type,
            "ResponseContentDisposition": f"inline; filename*=UTF-8''{quote(name)}",
        }
        signed: str = self._signer.generate_presigned_url(
            "get_object", Params={"Bucket": self._cloud.bucket, "Key": key, **about}, ExpiresIn=seconds
        )
        return signed

    async def chunks(self, body: Any) -> AsyncIterator[bytes]:
        """The bytes of an open object as they come, no more than one chunk of them in memory."""
        while chunk := await self._cloud.move(body.read, CHUNK_BYTES):
            yield chunk

    async def read(self, key: str, most_bytes: int) -> bytes | None:
        """A whole object of at most `most_bytes`; None where there is none, or a larger one."""
        head = await self._cloud.head(key)
        if head is None or head["ContentLength"] > most_bytes:
            return None
        return await self._cloud.read(key)

    async def store_input(self, subfolder: str, name: str, file: Spooled, *, overwrite: bool) -> str:
        """Store an upload below input/ and return the name it got, as ComfyUI chooses it.

        One of the same name and content is taken for it; one of the same name and other content makes it
        `name (1).png`, unless it is to be overwritten. Raises NoSuchPlaceError.
        """
        pure = PurePosixPath(name)
        if len(pure.parts) > 1:  # a folder in the name itself is one, as in ComfyUI
            subfolder, name = str(PurePosixPath(subfolder) / pure.parent), pure.name
        stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
        number, chosen = 0, name
        while True:
            parts = parts_of(subfolder, chosen)
            if parts[0] == "assets":
                raise NoSuchPlaceError("the input folder assets has what is never changed: use another subfolder")
            key = input_key(parts)
            if overwrite:
                await self._cloud.move(self._put, key, file, {})
            elif not await self._store_new(key, file) and not await self._is_same(key, file):
                number += 1
                chosen = f"{stem} ({number}){suffix}"
                continue
            return str(PurePosixPath(*pure.parts[:-1], chosen))

    async def _store_new(self, key: str, file: Spooled) -> bool:
        """Store a file where there is none; False where there is, even if it came just now by another process."""
        if await self._cloud.head(key) is not None:
            return False
        try:
            await self._cloud.move(self._put, key, file, {"IfNoneMatch": "*"})
        except Exception as error:
            if is_refused_condition(error):
                return False
            raise
        return True

    def _put(self, key: str, file: Spooled, condition: dict[str, str]) -> None:
        file.data.seek(0)
        self._cloud.s3_for_files.put_object(
            Bucket=self._cloud.bucket, Key=key, Body=file.data, ContentType=file.content_type, **condition
        )

    async def _is_same(self, key: str, file: Spooled) -> bool:
        """Whether an object has the content of an upload."""
        head = await self._cloud.head(key)
        if head is None or head["ContentLength"] != file.size:
            return False
        digest = hashlib.sha256()
        async with self.open(key, {}) as stored:
            if stored is None:
                return False
            async for chunk in self.chunks(stored.body):
                digest.update(chunk)
        return digest.digest() == file.digest.digest()


def signing_client(cloud: Cloud) -> Any:
    """A client that signs by version 4, as encrypted buckets want it; boto3's own choice is older."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(region_name=cloud.settings.region)
    return session.client("s3", config=Config(signature_version="s3v4"))


class Spooled:
    """An upload as it comes: in memory while it is small, else on the disk."""

    def __init__(self, content_type: str) -> None:
        self.content_type = content_type
        self.data: IO[bytes] = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115  close() ends it
        self.digest = hashlib.sha256()
        self.size = 0

    def add(self, chunk: bytes) -> None:
        """Take in what has come."""
        self.data.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)

    def close(self) -> None:
        """Let go of it."""
        self.data.close()
