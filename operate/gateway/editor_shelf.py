"""What people keep in the editor: workflows, settings, subgraphs. It lies in the bucket, for all who serve it.

Nothing that somebody else has saved is replaced unseen: every write is on the condition that what lies there is what
the browser has read, or has written itself. Who comes later is told.

No path of a request reaches S3 but through `shelf_key`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from comfy_utils import error_code, is_refused_condition
from operate.gateway.cloud import Cloud
from operate.gateway.files import MOST_KEY_BYTES, NoSuchPlaceError, parts_of

SHELF = "editor/user/"
MOST_READ = 20_000
"""So many readings are remembered: of each browser, which state of a file it has."""
MOST_LISTED = 20_000
TRIES = 30
"""For a change to a file that others change as well."""
WRITER = "browser"
"""Under this name an object says which browser has written it."""


class ChangedError(Exception):
    """Somebody else has saved it meanwhile."""


class TakenError(Exception):
    """There is one of that name."""


class Browser(NamedTuple):
    """Who reads and writes: a mark that stays, and when its page was opened, in seconds since 1970."""

    mark: str
    opened_s: float


class Kept(NamedTuple):
    """A file on the shelf: its path, its size, when it was written."""

    path: str
    size: int
    modified_s: float


class Found(NamedTuple):
    """What lies there at this moment."""

    tag: str
    writer: str
    modified_s: float


def shelf_key(path: str) -> str:
    """The object of a path. Raises NoSuchPlaceError for one that leads elsewhere."""
    key = SHELF + "/".join(parts_of("", path))
    if len(key.encode()) > MOST_KEY_BYTES:
        raise NoSuchPlaceError("the path is too long")
    return key


def may_replace(found: Found, browser: Browser | None, read_tag: str | None) -> bool:
    """Whether what lies there may be replaced: a browser has to have seen it. What is no browser does as it says.

    A process that began after a browser had read the file knows nothing of that: then its age decides.
    """
    if browser is None or found.writer == browser.mark or found.tag == read_tag:
        return True
    return read_tag is None and found.modified_s < browser.opened_s


class Shelf:
    """The shelf of one environment."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._read: OrderedDict[tuple[str, str], str] = OrderedDict()  # by browser and key: the tag of what it has
        self._changing = asyncio.Lock()

    async def list(self, folder: str) -> list[Kept]:
        """All files below a folder, "" for all there are. Raises NoSuchPlaceError."""
        below = folder.rstrip("/")
        prefix = f"{shelf_key(below)}/" if below not in ("", ".") else SHELF
        found: list[Kept] = []
        async for page in self._cloud.names(prefix):
            found += [
                Kept(item["Key"].removeprefix(SHELF), item["Size"], item["LastModified"].timestamp()) for item in page
            ]
            if len(found) >= MOST_LISTED:
                break
        return found[:MOST_LISTED]

    async def read(self, path: str, browser: Browser | None) -> tuple[bytes, str] | None:
        """A file and its ETag, None where there is none."""
        key = shelf_key(path)
        found = await self._get(key)
        if found is not None:
            self._note(browser, key, found[1])
        return found

    async def write(self, path: str, body: bytes, browser: Browser | None, *, overwrite: bool) -> Kept:
        """Store a file. Raises TakenError where there is one and it is not to be overwritten, ChangedError where it
        is not what this browser has seen."""
        key = shelf_key(path)
        condition = {"IfNoneMatch": "*"}
        if overwrite and (found := await self._look(key)) is not None:
            if not may_replace(found, browser, self._read.get((browser.mark, key)) if browser else None):
                raise ChangedError(path)
            # One who has no page to keep up to date replaces whatever comes in between.
            condition = {"IfMatch": found.tag} if browser else {}
        elif overwrite and browser is None:
            condition = {}
        try:
            tag = await self._put(key, body, browser, condition)
        except Exception as error:
            if not is_other(error):
                raise
            raise (ChangedError if overwrite else TakenError)(path) from None
        self._note(browser, key, tag)
        head = await self._cloud.head(key)
        if head is None:
            raise ChangedError(path)
        return Kept(key.removeprefix(SHELF), len(body), head["LastModified"].timestamp())

    async def delete(self, path: str, browser: Browser | None) -> bool:
        """Take a file away; False where there is none. Raises ChangedError."""
        key = shelf_key(path)
        found = await self._look(key)
        if found is None:
            return False
        if not may_replace(found, browser, self._read.get((browser.mark, key)) if browser else None):
            raise ChangedError(path)
        await self._cloud.call(self._cloud.s3.delete_object, Bucket=self._cloud.bucket, Key=key)
        return True

    async def move(self, path: str, to: str, browser: Browser | None, *, overwrite: bool) -> Kept | None:
        """Give a file another path; None where there is none. Raises TakenError, ChangedError."""
        found = await self._get(shelf_key(path))
        if found is None:
            return None
        if shelf_key(path) == shelf_key(to):
            return next(kept for kept in await self.list("") if kept.path == shelf_key(path).removeprefix(SHELF))
        kept = await self.write(to, found[0], browser, overwrite=overwrite)
        # What somebody has saved since stays where it is: there are two then, and nothing is lost.
        now = await self._look(shelf_key(path))
        if now is not None and now.tag == found[1]:
            await self._cloud.call(self._cloud.s3.delete_object, Bucket=self._cloud.bucket, Key=shelf_key(path))
        return kept

    async def change(self, path: str, change: Callable[[bytes | None], bytes]) -> None:
        """Make of a file another, whoever does the same: no one's change is lost. Raises ChangedError where that does
        not come to an end."""
        key = shelf_key(path)
        async with self._changing:
            for _ in range(TRIES):
                found = await self._get(key)
                condition = {"IfMatch": found[1]} if found else {"IfNoneMatch": "*"}
                try:
                    await self._put(key, change(found[0] if found else None), None, condition)
                    return
                except Exception as error:
                    if not is_other(error):
                        raise
        raise ChangedError(path)

    async def _get(self, key: str) -> tuple[bytes, str] | None:
        def get() -> tuple[bytes, str] | None:
            try:
                answer = self._cloud.s3.get_object(Bucket=self._cloud.bucket, Key=key)
            except self._cloud.s3.exceptions.NoSuchKey:
                return None
            return answer["Body"].read(), answer["ETag"]

        return await self._cloud.call(get)

    async def _look(self, key: str) -> Found | None:
        head = await self._cloud.head(key)
        if head is None:
            return None
        return Found(head["ETag"], head.get("Metadata", {}).get(WRITER, ""), head["LastModified"].timestamp())

    async def _put(self, key: str, body: bytes, browser: Browser | None, condition: dict[str, str]) -> str:
        more: dict[str, Any] = {"Metadata": {WRITER: browser.mark}} if browser else {}
        answer = await self._cloud.call(
            self._cloud.s3.put_object, Bucket=self._cloud.bucket, Key=key, Body=body, **more, **condition
        )
        return str(answer["ETag"])

    def _note(self, browser: Browser | None, key: str, tag: str) -> None:
        if browser is None:
            return
        self._read[browser.mark, key] = tag
        self._read.move_to_end((browser.mark, key))
        while len(self._read) > MOST_READ:
            self._read.popitem(last=False)


def is_other(error: Exception) -> bool:
    """Whether S3 has found something else than the condition names; with If-Match also where nothing is left."""
    return is_refused_condition(error) or error_code(error) in ("412", "NoSuchKey", "404")
