"""ComfyUI's calls about files: /view and the uploads."""

from __future__ import annotations

import asyncio
import json
import mimetypes
from typing import Any

from aiohttp import BodyPartReader, web

from operate.gateway.files import Files, NoSuchPlaceError, NotSatisfiableError, Spooled, key_of, parts_of
from operate.gateway.guard import Handler, plain_error
from operate.gateway.nodes import Nodes
from operate.gateway.transfers import (
    ACTIVE,
    BROKEN_FORM,
    MOST_FIELD_BYTES,
    LongFieldError,
    chunks_of,
    conditions,
    quoted,
    send,
    text_of,
)

MOST_UPLOAD_BYTES = 1024 * 1024 * 1024
MOST_UPLOADS = 8
"""Uploads at once; each may lie on the disk for a moment."""
MOST_PICTURE_BYTES = 64 * 1024 * 1024
MOST_PICTURES = 2
"""Pictures that are made anew at once: for a preview, a channel or a mask."""
PLACES = ("output", "input", "temp")


class ComfyFiles:
    """The calls about files."""

    def __init__(self, files: Files, nodes: Nodes) -> None:
        self._files, self._nodes = files, nodes
        self._uploads = asyncio.Semaphore(MOST_UPLOADS)
        self._pictures = asyncio.Semaphore(MOST_PICTURES)

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [
            ("GET", "/view", self.view),
            ("POST", "/upload/image", self.upload_image),
            ("POST", "/upload/mask", self.upload_mask),
        ]

    # --- /view -------------------------------------------------------------------------------------------

    async def view(self, request: web.Request) -> web.StreamResponse:
        """A file as it comes from the bucket, or a part of it, or a picture made of it."""
        query = request.query
        if not query.get("filename"):
            return web.Response(status=400 if "filename" in query else 404)
        name, place = annotated(query["filename"], query.get("type", "output"))
        try:
            if name.startswith("/") or ".." in name:
                raise NoSuchPlaceError("a name with .. or a / first is not allowed")
            # ComfyUI takes the last part of a name only, and the folder from `subfolder`.
            key = key_of(place, query.get("subfolder", ""), name.rpartition("/")[2])
        except NoSuchPlaceError as error:
            folder = query.get("subfolder", "")
            if ".." in name or name.startswith("/") or place not in PLACES:
                return web.Response(status=400, text=str(error))
            return web.Response(status=403 if ".." in folder or folder.startswith("/") else 404, text=str(error))
        if "preview" in query or query.get("channel", "rgba") in ("rgb", "a"):
            return await self._picture(key, name, query.get("preview"), query.get("channel", ""))
        return await self._send(request, key, name.rpartition("/")[2])

    async def _send(self, request: web.Request, key: str, name: str) -> web.StreamResponse:
        """Pass a file on as it comes."""
        try:
            async with self._files.open(key, conditions(request)) as stored:
                if stored is None:
                    return web.Response(status=404)
                headers = headers_for(name, request.headers.get("Sec-Fetch-Dest"))
                return await send(request, self._files, stored, headers)
        except NotSatisfiableError:
            return web.Response(status=416)

    async def _picture(self, key: str, name: str, preview: str | None, channel: str) -> web.Response:
        """A picture as the editor wants it: smaller, or some of its channels."""
        if not has_pillow():
            return plain_error(
                501,
                "no_pillow",
                "preview and channel need Pillow beside serve: pip install pillow, or leave them out",
            )
        async with self._pictures:
            data = await self._files.read(key, MOST_PICTURE_BYTES)
            if data is None:
                return web.Response(status=404)
            try:
                made, kind = await asyncio.to_thread(draw, data, preview, channel)
            except (OSError, ValueError) as error:
                return plain_error(400, "no_picture", f"{name:.100} is no picture that can be shown so: {error}")
        headers = {"Content-Disposition": f'filename="{quoted(name)}"'}
        return web.Response(body=made, content_type=f"image/{kind}", headers=headers)

    # --- Uploads -----------------------------------------------------------------------------------------

    async def upload_image(self, request: web.Request) -> web.Response:
        """Store a file below input/, under its own name or the next that is free."""
        async with self._uploads:
            file, fields = await self._receive(request)
            try:
                return await self._store(file, fields)
            finally:
                if file:
                    file.close()

    async def upload_mask(self, request: web.Request) -> web.Response:
        """Store a picture of the fleet with the alpha channel of the one that is uploaded."""
        if not has_pillow():
            return plain_error(501, "no_pillow", "masks need Pillow beside serve: pip install pillow")
        async with self._uploads, self._pictures:
            file, fields = await self._receive(request)
            try:
                if file is None or file.size > MOST_PICTURE_BYTES:
                    return web.Response(status=400)
                try:
                    original = json.loads(fields["original_ref"])
                    name, place = annotated(str(original["filename"]), str(original.get("type", "output")))
                    key = key_of(place, str(original.get("subfolder", "")), name)
                except (KeyError, ValueError, TypeError):
                    return web.Response(status=400, text="original_ref names no file")
                data = await self._files.read(key, MOST_PICTURE_BYTES)
                if data is None:
                    return web.Response(status=404, text="there is no such original")
                file.data.seek(0)
                masked = Spooled("image/png")
                try:
                    masked.add(await asyncio.to_thread(mask, data, file.data.read()))
                    return await self._store(masked, fields)
                except (OSError, ValueError) as error:
                    return web.Response(status=400, text=f"that is no picture: {error}")
                finally:
                    masked.close()
            finally:
                if file:
                    file.close()

    async def _store(self, file: Spooled | None, fields: dict[str, str]) -> web.Response:
        name, place = fields.get("filename", ""), fields.get("type", "input")
        if file is None or not name:
            return web.Response(status=400)
        if place != "input":
            # The instances keep nothing in output/ and temp/ where a workflow would find it.
            return web.Response(status=400, text=f"uploads go to input, not to {place!r:.40}")
        subfolder = fields.get("subfolder", "")
        parts_of(subfolder, name)
        overwrite = fields.get("overwrite") in ("true", "1")
        stored = await self._files.store_input(subfolder, name, file, overwrite=overwrite)
        self._nodes.note_input()
        return web.json_response({"name": stored, "subfolder": subfolder, "type": "input"})

    async def _receive(self, request: web.Request) -> tuple[Spooled | None, dict[str, str]]:
        """The file of a form, and its other fields, the file's name as `filename`."""
        if (request.content_length or 0) > MOST_UPLOAD_BYTES:
            raise web.HTTPRequestEntityTooLarge(MOST_UPLOAD_BYTES, request.content_length or 0)
        if not request.content_type.startswith("multipart/"):
            raise web.HTTPBadRequest(text="send a form (multipart/form-data) with the file as image")
        file: Spooled | None = None
        fields: dict[str, str] = {}
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader):
                    continue
                if part.name == "image" and part.filename and file is None:
                    fields["filename"] = part.filename
                    file = Spooled(mimetypes.guess_type(part.filename)[0] or "application/octet-stream")
                    await self._spool(part, file)
                elif part.name:
                    fields[part.name] = await text_of(part)
        except BaseException as error:
            if file:
                file.close()
            if isinstance(error, LongFieldError):
                raise web.HTTPRequestEntityTooLarge(MOST_FIELD_BYTES, error.size) from None
            if isinstance(error, BROKEN_FORM):
                raise web.HTTPBadRequest(text="the form cannot be read") from None
            raise
        return file, fields

    async def _spool(self, part: BodyPartReader, file: Spooled) -> None:
        async for chunk in chunks_of(part):
            if file.size + len(chunk) > MOST_UPLOAD_BYTES:
                raise web.HTTPRequestEntityTooLarge(MOST_UPLOAD_BYTES, file.size + len(chunk))
            await asyncio.to_thread(file.add, chunk)


# --- Small things ----------------------------------------------------------------------------------------


def annotated(name: str, place: str) -> tuple[str, str]:
    """A name and its place, as ComfyUI reads `x.png [output]`."""
    for other in PLACES:
        if name.endswith(f"[{other}]"):
            return name[: -len(f" [{other}]")], other
    return name, place


def headers_for(name: str, destination: str | None) -> dict[str, str]:
    """What a browser has to know of a file, by the rule of ComfyUI's own server: what it could run it must save."""
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": f'filename="{quoted(name)}"'}
    if ACTIVE.fullmatch(kind):
        headers |= {"Vary": "Sec-Fetch-Dest", "Cache-Control": "no-store"}
        if not (kind == "image/svg+xml" and destination == "image"):
            kind = "application/octet-stream"
            headers["Content-Disposition"] = f"attachment; {headers['Content-Disposition']}"
    return headers | {"Content-Type": kind}


def has_pillow() -> bool:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


def draw(data: bytes, preview: str | None, channel: str) -> tuple[bytes, str]:
    """A picture as /view makes it for `preview` (`webp;90`) and `channel` (rgb or a); its bytes and their kind.

    Raises OSError and ValueError.
    """
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    with Image.open(BytesIO(data)) as image:
        picture: Any = image
        if preview is not None:
            kind, *rest = preview.split(";")
            if kind not in ("webp", "jpeg") or "a" in channel:
                kind = "webp"
            quality = int(rest[-1]) if rest and rest[-1].isdigit() else 90
            if kind == "jpeg" or channel == "rgb":
                picture = image.convert("RGB")
            picture.save(out, format=kind, quality=min(quality, 100))
            return out.getvalue(), kind
        if channel == "rgb":
            picture = image.convert("RGB")
        else:
            alpha = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
            picture = Image.new("RGBA", image.size)
            picture.putalpha(alpha)
        picture.save(out, format="PNG")
    return out.getvalue(), "png"


def mask(original: bytes, masked: bytes) -> bytes:
    """The original with the other's alpha channel, as PNG with the texts it carried. Raises OSError and ValueError."""
    from io import BytesIO

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    out, texts = BytesIO(), PngInfo()
    with Image.open(BytesIO(original)) as image, Image.open(BytesIO(masked)) as other:
        for name, text in getattr(image, "text", {}).items():
            texts.add_text(name, text)
        picture = image.convert("RGBA")
        picture.putalpha(other.convert("RGBA").getchannel("A"))
        picture.save(out, format="PNG", compress_level=4, pnginfo=texts)
    return out.getvalue()
