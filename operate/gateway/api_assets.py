"""The Comfy API v2's calls about assets, and a job's files as the contract shows them."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import BodyPartReader, web

from comfy_utils import is_text, iso
from operate.gateway.api_door import REUSED, Held, held, json_object, key_of
from operate.gateway.api_shapes import PREFIX, Envelope, content_type_of, deleted_at, moment, type_of
from operate.gateway.assets import BYTES, HASH, Asset, Assets, now, plain
from operate.gateway.claims import Claims
from operate.gateway.cloud import Cloud
from operate.gateway.files import Files, NoSuchPlaceError, NotSatisfiableError, parts_of
from operate.gateway.guard import Bodies, Handler
from operate.gateway.jobs import Standing
from operate.gateway.transfers import BROKEN_FORM, LongFieldError, chunks_of, conditions, quoted, send, text_of
from operate.gateway.uploads import MOST_BYTES, Upload

logger = logging.getLogger(__name__)

URL_S = 600
"""So long a signed address lasts. Less than the credentials of a role last when boto3 signs with them."""
MOST_UPLOADS = 8
MOST_CALL_BYTES = 1024 * 1024
EXPIRES_IN = range(60, 604_801)
MOST_TAGS = 100
JOBS_KEPT = 500
"""So many jobs' files are remembered."""


class RefusedError(Exception):
    """An upload that is not taken, and what is answered."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.answer = Envelope(status, code, message)


class Addresses:
    """Where the bytes of an asset are fetched."""

    def __init__(self, files: Files, *, redirects: bool) -> None:
        self._files, self.redirects = files, redirects

    def of(self, request: web.Request, asset: Asset) -> tuple[str, str]:
        """An address for the bytes, and until when it is good. Signing it takes time: for a thread."""
        until = iso(datetime.now(UTC) + timedelta(seconds=URL_S))
        if self.redirects:
            return self._files.address(asset.key, asset.name, asset.content_type, URL_S), until
        scheme = request.headers.get("X-Forwarded-Proto", request.scheme)
        scheme = scheme if scheme in ("http", "https") else request.scheme
        return f"{scheme}://{request.host}{PREFIX}/assets/{asset.id}/content", until


class Outputs:
    """The files of jobs as the contract's outputs."""

    def __init__(self, cloud: Cloud, assets: Assets, addresses: Addresses) -> None:
        self._cloud, self._assets, self._addresses = cloud, assets, addresses
        self._known: dict[str, tuple[str | tuple[str, ...], list[tuple[dict[str, Any], Asset]]]] = {}

    async def of_job(self, request: web.Request, standing: Standing) -> list[dict[str, Any]]:
        """The outputs of a job: all when it has ended, and while it runs those that its worker has stored."""
        news = standing.result or standing.progress
        if news is None:
            return []
        # A job that begins anew starts with none, and a receipt is never changed.
        version = "all" if standing.result else tuple(file["s3_key"] for file in news.get("outputs") or [])
        known_as, found = self._known.get(standing.job_id, ((), []))
        if known_as != version:
            found = await self._read(standing.job_id, news)
            self._known[standing.job_id] = version, found
            while len(self._known) > JOBS_KEPT:
                del self._known[next(iter(self._known))]
        return await self._cloud.call(lambda: [self._output(request, file, asset) for file, asset in found])

    async def _read(self, job_id: str, result: Mapping[str, Any]) -> list[tuple[dict[str, Any], Asset]]:
        named = {file["s3_key"]: file for file in result.get("outputs") or []}
        files: dict[str, tuple[int, str]] = {}
        if named:
            async for page in self._cloud.names(f"output/{job_id}/"):
                files |= {
                    item["Key"]: (item["Size"], iso(item["LastModified"])) for item in page if item["Key"] in named
                }
        for node_id, kind, number, text in texts_of(result) if result["status"] != "running" else []:
            key = f"{BYTES}{job_id}/{plain(node_id)}-{plain(kind)}-{number}.txt"
            body = text.encode("utf-8", "replace")
            await self._cloud.write(key, body)
            named[key] = {"node_id": node_id, "kind": "text", "filename": key.rpartition("/")[2]}
            files[key] = len(body), str(result["timings"]["finished_at"])
        types = {key: content_type_of(named[key]["filename"]) for key in files}
        assets = await self._assets.note_outputs(job_id, files, types)
        return [(file, assets[key]) for key, file in named.items() if key in assets]

    def _output(self, request: web.Request, file: Mapping[str, Any], asset: Asset) -> dict[str, Any]:
        url, until = self._addresses.of(request, asset)
        return {
            "node_id": file["node_id"] or "",
            "name": file["filename"],
            "type": type_of(file["filename"], file["kind"]),
            "content_type": asset.content_type,
            "size_bytes": asset.size_bytes,
            "id": asset.id,
            "hash": asset.hash,
            "url": url,
            "url_expires_at": until,
            "job_id": asset.job_id,
        }


class ApiAssets:
    """The calls about assets."""

    def __init__(
        self, cloud: Cloud, files: Files, assets: Assets, addresses: Addresses, claims: Claims, bodies: Bodies
    ) -> None:
        self._cloud, self._files, self._assets, self._addresses = cloud, files, assets, addresses
        self._claims, self._bodies = claims, bodies
        self._uploads = asyncio.Semaphore(MOST_UPLOADS)

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [
            ("POST", "/assets", self.upload),
            ("POST", "/assets/from-hash", self.from_hash),
            ("HEAD", "/assets/by-hash/{hash}", self.by_hash),
            ("GET", "/assets/{id}", self.get),
            ("DELETE", "/assets/{id}", self.delete),
            ("GET", "/assets/{id}/content", self.content),
        ]

    # --- Uploads -----------------------------------------------------------------------------------------

    async def upload(self, request: web.Request) -> web.Response:
        """Store a file as it comes, and make an asset of it, unless its bytes are there already."""
        key = key_of(request)
        if isinstance(key, Envelope):
            return key
        if not request.content_type.startswith("multipart/"):
            return Envelope(422, "invalid_request", "send a form (multipart/form-data) with the bytes as file")
        if (request.content_length or 0) > MOST_BYTES:
            return too_large()
        async with self._uploads, held(self._claims, "assets", key) as hold:
            if hold is None:
                return Envelope(422, "idempotency_key_reuse", REUSED)
            form = Form(self._cloud)
            try:
                await form.read(request)
                return await self._make(request, form, hold)
            except RefusedError as error:
                return error.answer
            except BROKEN_FORM as error:
                logger.info("A form cannot be read: %s", error)
                return Envelope(422, "invalid_request", "the form cannot be read")
            finally:
                if form.upload is not None and not form.is_stored:
                    await asyncio.shield(form.upload.give_up())

    async def _make(self, request: web.Request, form: Form, hold: Held) -> web.Response:
        upload, path = form.check()
        blobs = await self._assets.by_hash(upload.hash)
        if blobs:
            asset, _ = await self._assets.mint(blobs[0], path, form.tags)
            hold.keep()
            return await self._answer(request, asset, is_new=False, status=200)
        await upload.finish()
        form.is_stored = True
        blob = Asset("", upload.key, upload.size, form.content_type(path), now(), upload.hash)
        asset, _ = await self._assets.mint(blob, path, form.tags)
        hold.keep()
        if asset.key != blob.key:  # the same bytes came by another process at the same time
            await self._cloud.delete(blob.key)
            return await self._answer(request, asset, is_new=False, status=200)
        return await self._answer(request, asset, is_new=True, status=201)

    async def from_hash(self, request: web.Request) -> web.Response:
        """Make an asset of bytes that are there."""
        async with json_object(self._bodies, request, MOST_CALL_BYTES) as body:
            wrong = "the body is no JSON object: send one with a hash" if body is None else wrong_from_hash(body)
            if wrong or body is None:
                return Envelope(404, "blob_not_found", wrong or "")
            blobs = await self._assets.by_hash(body["hash"])
            if not blobs:
                return Envelope(404, "blob_not_found", "there are no bytes of that hash: upload them")
            path = body.get("file_path") or blobs[0].path or blobs[0].name
            asset, is_new = await self._assets.mint(blobs[0], path, body.get("tags") or ())
            return await self._answer(request, asset, is_new=False, status=201 if is_new else 200)

    async def by_hash(self, request: web.Request) -> web.Response:
        """Whether bytes of a hash are there."""
        found = await self._assets.by_hash(request.match_info["hash"])
        return web.Response(status=200 if found else 404)

    # --- One asset ---------------------------------------------------------------------------------------

    async def get(self, request: web.Request) -> web.Response:
        """What is known of an asset, with a fresh address of its bytes."""
        asset = await self._assets.get(request.match_info["id"])
        return no_asset(request) if asset is None else await self._answer(request, asset)

    async def delete(self, request: web.Request) -> web.Response:
        """Forget an upload. A job's files stay as long as the job."""
        asset = await self._assets.get(request.match_info["id"])
        if asset is None:
            return no_asset(request)
        if asset.hash is None:
            return Envelope(409, "asset_in_use", "this asset cannot be deleted while the fleet needs it")
        await self._assets.delete(asset)
        return web.Response(status=204)

    async def content(self, request: web.Request) -> web.StreamResponse:
        """The bytes: at the address that the answer names, or by this one."""
        asset = await self._assets.get(request.match_info["id"])
        if asset is None:
            return no_asset(request)
        if self._addresses.redirects:
            url, _ = await self._cloud.call(self._addresses.of, request, asset)
            return web.Response(status=302, headers={"Location": url, "Cache-Control": "no-store"})
        return await self._send(request, asset)

    async def _send(self, request: web.Request, asset: Asset) -> web.StreamResponse:
        """Pass the bytes on as they come."""
        try:
            async with self._files.open(asset.key, conditions(request)) as stored:
                if stored is None:
                    return no_asset(request)
                headers = {
                    # The contract's type, which no browser runs; the asset says what it is.
                    "Content-Type": "application/octet-stream",
                    "Content-Disposition": f'attachment; filename="{quoted(asset.name)}"',
                    "X-Content-Type-Options": "nosniff",
                }
                return await send(request, self._files, stored, headers)
        except NotSatisfiableError:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{asset.size_bytes}"})

    async def _answer(
        self, request: web.Request, asset: Asset, *, is_new: bool | None = None, status: int = 200
    ) -> web.Response:
        prefix = "output/" if asset.key.startswith("output/") else BYTES
        days = await self._assets.days_kept(prefix)
        url, until = await self._cloud.call(self._addresses.of, request, asset)
        shown = {
            "id": asset.id,
            "hash": asset.hash,
            "size_bytes": asset.size_bytes,
            "content_type": asset.content_type,
            "file_path": asset.path,
            "created_at": asset.created_at,
            "url": url,
            "url_expires_at": until,
            "expires_at": None if days is None else iso(deleted_at(moment(asset.created_at), days)),
        }
        shown |= {"created_new": is_new} if is_new is not None else {}
        shown |= {"job_id": asset.job_id} if asset.job_id else {}
        return web.json_response(shown, status=status)


class Form:
    """The form of an upload: its fields, and the file as it comes, whichever is first."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self.upload: Upload | None = None
        self.is_stored = False
        self.tags: list[str] = []
        self._fields: dict[str, str] = {}
        self._file_name, self._file_type = "", ""

    async def read(self, request: web.Request) -> None:
        """Read it to its end. Raises RefusedError, and what aiohttp raises."""
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader) or not part.name:
                continue
            if part.name == "file":
                if self.upload is not None:
                    raise RefusedError(
                        422, "invalid_request", "the form has more than one file: upload them one by one"
                    )
                await self._take(part)
                continue
            try:
                text = await text_of(part)
            except LongFieldError:
                raise RefusedError(422, "invalid_request", f"the field {part.name:.40} is too long") from None
            if part.name == "tags":
                self.tags += tags_in(text)
            else:
                self._fields[part.name] = text

    async def _take(self, part: BodyPartReader) -> None:
        """Pass the file on as it comes."""
        self._file_name = part.filename or ""
        self._file_type = part.headers.get("Content-Type", "")
        path = self._fields.get("file_path") or self._file_name or "file"
        name = plain(path.replace("\\", "/").rpartition("/")[2])
        self.upload = Upload(self._cloud, f"{BYTES}{uuid.uuid4()}/{name}", self.content_type(path))
        async for chunk in chunks_of(part):
            if self.upload.size + len(chunk) > MOST_BYTES:
                raise RefusedError(422, "too_large", TOO_LARGE)
            await self.upload.add(chunk)

    def content_type(self, path: str) -> str:
        """What the file is: as the client says, or as its name does."""
        for said in (self._fields.get("content_type", ""), self._file_type):
            if "/" in said and said.isascii() and said.isprintable() and len(said) <= 200:
                return said
        return content_type_of(path)

    def check(self) -> tuple[Upload, str]:
        """The file and its path. Raises RefusedError where it is not to be kept."""
        if self.upload is None:
            raise RefusedError(422, "invalid_request", "the form has no file: send the bytes as file")
        path = self._fields.get("file_path") or self._file_name
        if wrong := wrong_path(path):
            raise RefusedError(422, "invalid_request", wrong)
        expires_in = self._fields.get("expires_in", "")
        if expires_in and not (expires_in.isascii() and expires_in.isdigit() and int(expires_in[:9]) in EXPIRES_IN):
            raise RefusedError(422, "invalid_request", WRONG_EXPIRES_IN)
        expected = self._fields.get("expected_hash", "")
        if expected and expected.lower() != self.upload.hash:
            text = f"the bytes have the hash {self.upload.hash}, not {expected:.100}: they are not kept"
            raise RefusedError(409, "hash_mismatch", text)
        return self.upload, path


# --- Small things ----------------------------------------------------------------------------------------

TOO_LARGE = f"a file has at most {MOST_BYTES} bytes"
WRONG_EXPIRES_IN = f"expires_in is a number of seconds from {EXPIRES_IN[0]} to {EXPIRES_IN[-1]}"


def too_large() -> Envelope:
    return Envelope(422, "too_large", TOO_LARGE)


def no_asset(request: web.Request) -> Envelope:
    return Envelope(404, "not_found", f"there is no asset {request.match_info['id']:.60}")


def wrong_path(path: Any) -> str | None:
    """What is wrong with the path of an upload."""
    if not isinstance(path, str) or not path:
        return "file_path is missing: say what the file is called, such as photo.png"
    if len(path) > 500 or not is_text(path):
        return "file_path is too long, or no text"
    if path.startswith(("models/", "output/", "temp/")):
        return (
            f"file_path {path:.60} leads out of the inputs: models come by the base machine, and all else is an input"
        )
    try:
        parts_of("", path)
    except NoSuchPlaceError as error:
        return f"file_path {path!r:.60}: {error}"
    return None


def wrong_from_hash(body: Mapping[str, Any]) -> str | None:
    """What is wrong with a call that names bytes by their hash."""
    if not isinstance(body.get("hash"), str) or not HASH.fullmatch(body["hash"].lower()):
        return "hash is blake3: and 64 hexadecimal digits"
    if body.get("file_path") is not None and (wrong := wrong_path(body["file_path"])):
        return wrong
    tags = body.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        return "tags is a list of texts"
    expires_in = body.get("expires_in")
    is_number = isinstance(expires_in, int) and not isinstance(expires_in, bool)
    if expires_in is not None and not (is_number and expires_in in EXPIRES_IN):
        return WRONG_EXPIRES_IN
    return None


def tags_in(text: str) -> list[str]:
    """The tags of one field: a tag, or a JSON list of them."""
    if text.startswith("["):
        with suppress(ValueError, RecursionError):
            tags = json.loads(text)
            if isinstance(tags, list):
                return [str(tag) for tag in tags][:MOST_TAGS]
    return [text][:MOST_TAGS]


def texts_of(result: Mapping[str, Any]) -> list[tuple[str, str, int, str]]:
    """What a job has shown that is no file, as texts: node, kind, number and text of each."""
    found = []
    for node_id, kinds in (result.get("values") or {}).items():
        for kind, items in kinds.items():
            for number, item in enumerate(items if isinstance(items, list) else [items]):
                if isinstance(item, bool) or item is None:  # such as `animated`, which says something of the files
                    continue
                text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
                found.append((node_id, kind, number, text))
    return found
