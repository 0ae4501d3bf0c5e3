"""The one room that knows assets: files with an id, of which some are known by the hash of their bytes.

An upload's bytes are one object below input/assets/, which is never changed. What is known of an asset is a small object
named by its id; an empty one below its hash finds it by that, and one of its path by that. A job's files are assets too:
their ids are made from their keys, and noted when they are first shown. It speaks no protocol.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from comfy_utils import Workflow, error_code, is_job_id, iso
from operate.gateway.cloud import Cloud
from operate.gateway.nodes import MODEL_FILE

logger = logging.getLogger(__name__)

BYTES = "input/assets/"
BY_ID = "input/jobs/serve/assets/id/"
BY_HASH = "input/jobs/serve/assets/hash/"
BY_PATH = "input/jobs/serve/assets/path/"
"""Below input/jobs/, which belongs to one environment alone, and without .json, which S3's trigger would take."""
SPACE = uuid.UUID("5a1f0c1e-6f0e-5d1b-9d56-0a4b6d3f2c11")
HASH = re.compile(r"blake3:[0-9a-f]{64}")
MOST_FETCHED = 100
"""So many files a message may name; more are read through the mount, like those that are larger than INPUT_LIMIT_MB."""
MOST_NAME_BYTES = 200
RULES_S = 300.0
"""So long what was read of the bucket's lifecycle rules is believed."""


@dataclass(frozen=True)
class Asset:
    """A file with an id."""

    id: str
    key: str
    size_bytes: int
    content_type: str
    created_at: str
    hash: str | None = None
    """blake3:…, None where nobody has computed it."""
    path: str | None = None
    """What the client called it."""
    tags: list[str] = field(default_factory=list)
    job_id: str | None = None
    """The job that made it."""

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.key.rpartition("/")[2]


class Resolved(NamedTuple):
    """A workflow whose references are names: those in `inputs` are fetched by the worker from the address there, all
    others lie in its input folder. `missing` are the ids of which there is no asset."""

    workflow: Workflow
    inputs: dict[str, str]
    missing: list[str]


class Assets:
    """The assets of one environment."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._noted: dict[str, int] = {}  # keys of jobs' files whose assets are stored -> bytes
        self._rules: list[dict[str, Any]] = []
        self._rules_at = 0.0
        self._reading_rules = asyncio.Lock()

    # --- Finding -----------------------------------------------------------------------------------------

    async def get(self, asset_id: str) -> Asset | None:
        """An asset whose bytes are there."""
        asset = await self._read(asset_id)
        return asset if asset and await self._cloud.head(asset.key) is not None else None

    async def _read(self, asset_id: str) -> Asset | None:
        """What is known of an asset."""
        record = await self._cloud.read_json(BY_ID + asset_id) if is_job_id(asset_id) else None
        return Asset(**record) if record else None

    async def by_hash(self, digest: str) -> list[Asset]:
        """The assets of these bytes, as long as the bytes are there."""
        digest = digest.lower()
        if not HASH.fullmatch(digest):
            return []
        prefix = f"{BY_HASH}{digest.removeprefix('blake3:')}/"
        found: list[Asset | None] = []
        async for page in self._cloud.names(prefix):
            found += await asyncio.gather(*(self._read(item["Key"].removeprefix(prefix)) for item in page))
        assets = [asset for asset in found if asset is not None]
        keys = list(dict.fromkeys(asset.key for asset in assets))
        heads = await asyncio.gather(*map(self._cloud.head, keys))
        there = {key for key, head in zip(keys, heads, strict=True) if head is not None}
        return [asset for asset in assets if asset.key in there]

    async def by_path(self, path: str) -> Asset | None:
        """The asset that was uploaded last under a path, unless a file of that name came into input/ since."""
        asset_id = await self._cloud.read(key_of_path(path))
        if asset_id is None:
            return None
        asset, noted, other = await asyncio.gather(
            self.get(asset_id.decode()),
            self._cloud.head(key_of_path(path)),
            self._cloud.head(f"input/{path.removeprefix('input/')}"),
        )
        is_older = noted and other and other["LastModified"] > noted["LastModified"]
        return None if is_older else asset

    # --- Making ------------------------------------------------------------------------------------------

    async def mint(self, blob: Asset, path: str, tags: Iterable[str] = ()) -> tuple[Asset, bool]:
        """The asset of a blob's bytes under a path, and whether it is new: the same bytes under the same path are one."""
        assert blob.hash is not None
        made = replace(blob, id=id_of(blob.hash, path), path=path, tags=list(tags), created_at=now(), job_id=None)
        body = as_json(made)
        is_new = await self._cloud.create(BY_ID + made.id, body)
        if not is_new:
            standing = await self.get(made.id)
            if standing:
                made = standing
            else:  # its bytes were deleted
                await self._cloud.write(BY_ID + made.id, body)
                is_new = True
        await asyncio.gather(
            self._cloud.write(f"{BY_HASH}{blob.hash.removeprefix('blake3:')}/{made.id}", b""),
            self._cloud.write(key_of_path(path), made.id.encode()),
        )
        return made, is_new

    async def note_outputs(
        self, job_id: str, files: Mapping[str, tuple[int, str]], content_types: Mapping[str, str]
    ) -> dict[str, Asset]:
        """The assets of a job's files, by key; `files` has the size of each and when it was stored."""
        assets = {
            key: Asset(
                str(uuid.uuid5(SPACE, key)), key, size, content_types[key], created_at, path=key.rpartition("/")[2],
                job_id=job_id,
            )
            for key, (size, created_at) in files.items()
        }  # fmt: skip
        new = [asset for key, asset in assets.items() if self._noted.get(key) != asset.size_bytes]
        await asyncio.gather(*(self._cloud.write(BY_ID + asset.id, as_json(asset)) for asset in new))
        self._noted.update({asset.key: asset.size_bytes for asset in new})
        return assets

    # --- Deleting ----------------------------------------------------------------------------------------

    async def delete(self, asset: Asset) -> None:
        """Forget an asset, and delete its bytes where no other has them."""
        assert asset.hash is not None
        hash_key = f"{BY_HASH}{asset.hash.removeprefix('blake3:')}/{asset.id}"
        await asyncio.gather(self._cloud.delete(BY_ID + asset.id), self._cloud.delete(hash_key))
        if asset.path and await self._cloud.read(key_of_path(asset.path)) == asset.id.encode():
            await self._cloud.delete(key_of_path(asset.path))
        if all(other.key != asset.key for other in await self.by_hash(asset.hash)):
            await self._cloud.delete(asset.key)

    # --- Workflows ---------------------------------------------------------------------------------------

    async def resolve(self, workflow: Workflow) -> Resolved:
        """Put names in the place of references, and find the names that mean an asset.

        The worker fetches what is not too large itself, an input's file as well as what another job has made; the
        rest is read from the bucket through its mount.
        """
        ids, names = references_in(workflow)
        by_id = dict(zip(ids, await asyncio.gather(*map(self.get, ids)), strict=True))
        if missing := [each for each, asset in by_id.items() if asset is None]:
            return Resolved(workflow, {}, missing)
        by_name = dict(zip(names, await asyncio.gather(*map(self._of_name, names)), strict=True))
        resolver = _Resolver(self._cloud, by_id, {name: asset for name, asset in by_name.items() if asset})
        changed = {node_id: resolver.node(node) for node_id, node in workflow.items()}
        await asyncio.gather(*(self._bring(asset) for asset in resolver.to_bring.values()))
        return Resolved(changed, resolver.inputs, [])

    async def _of_name(self, name: str) -> Asset | None:
        """The asset that a name in a workflow means: one that a resolved workflow has, or a path."""
        asset = await self.get(name[:36]) if is_job_id(name[:36]) and name[36:37] == "-" else None
        return asset or await self.by_path(name)

    async def _bring(self, asset: Asset) -> None:
        """Have a job's file below input/, where the mount shows it."""
        key = mounted_key(asset)
        if await self._cloud.head(key) is None:
            source = {"Bucket": self._cloud.bucket, "Key": asset.key}
            await self._cloud.move(self._cloud.s3_for_files.copy, source, self._cloud.bucket, key)

    # --- How long they stay ------------------------------------------------------------------------------

    async def days_kept(self, prefix: str) -> int | None:
        """After how many days the bucket's rules delete what lies below a prefix, None where they do not."""
        async with self._reading_rules:
            if not self._rules_at or time.monotonic() - self._rules_at > RULES_S:
                self._rules = await self._cloud.call(self._read_rules)
                self._rules_at = time.monotonic()
        return days_of(self._rules, prefix)

    def _read_rules(self) -> list[dict[str, Any]]:
        try:
            answer = self._cloud.s3.get_bucket_lifecycle_configuration(Bucket=self._cloud.bucket)
            return list(answer.get("Rules", []))
        except Exception as error:
            if error_code(error) != "NoSuchLifecycleConfiguration":
                logger.warning(
                    "How long files are kept cannot be read (%s): taken for ever", error_code(error) or error
                )
            return []


class _Resolver:
    """Names in the place of one workflow's references."""

    def __init__(self, cloud: Cloud, by_id: Mapping[str, Asset | None], by_name: Mapping[str, Asset]) -> None:
        self._bucket = cloud.bucket
        self._limit_bytes = cloud.settings.input_limit_mb * 1_000_000
        self._by_id, self._by_name = by_id, by_name
        self.inputs: dict[str, str] = {}
        self.to_bring: dict[str, Asset] = {}

    def node(self, node: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: self._top(value) for name, value in node.get("inputs", {}).items()}
        return {**node, "inputs": inputs} if "inputs" in node else node

    def _top(self, value: Any) -> Any:
        """The value of an input."""
        if isinstance(value, str):
            asset = self._by_name.get(value)
            return self._name(asset, value) if asset else value
        if is_reference(value):
            asset = self._by_id[id_in(value)]
            assert asset is not None
            return self._name(asset, f"{asset.id}-{plain(asset.name)}")
        return self._within(value)

    def _within(self, value: Any) -> Any:
        """What stands deeper: the worker renames no such name, so it is one that the mount has."""
        if is_reference(value):
            asset = self._by_id[id_in(value)]
            assert asset is not None
            return self._mounted(asset)
        if isinstance(value, dict):
            return {name: self._within(each) for name, each in value.items()}
        return [self._within(each) for each in value] if isinstance(value, list) else value

    def _name(self, asset: Asset, name: str) -> str:
        if asset.size_bytes > self._limit_bytes or (name not in self.inputs and len(self.inputs) >= MOST_FETCHED):
            return self._mounted(asset)
        if "/" in name:
            name = f"{asset.id}-{plain(asset.name)}"
        self.inputs[name] = f"s3://{self._bucket}/{asset.key}"
        return name

    def _mounted(self, asset: Asset) -> str:
        self.to_bring[asset.key] = asset
        return mounted_key(asset).removeprefix("input/")


# --- Small things ----------------------------------------------------------------------------------------


def is_reference(value: Any) -> bool:
    """Whether it says that it is a reference, well made or not."""
    return isinstance(value, dict) and value.get("__type") == "core/ASSET"


def id_in(reference: Mapping[str, Any]) -> str:
    """The id in a reference; what is none is told as it stands."""
    info = reference.get("info")
    found = info.get("id") if isinstance(info, dict) else None
    return found if isinstance(found, str) else "(a reference without an id)"


def references_in(workflow: Workflow) -> tuple[list[str], list[str]]:
    """The ids that a workflow refers to, and the names in it that may mean an asset."""
    ids: dict[str, None] = {}
    names: dict[str, None] = {}
    ahead: list[Any] = []
    for node in workflow.values():
        for value in node.get("inputs", {}).values():
            if isinstance(value, str) and may_be_path(value):
                names[value] = None
            ahead.append(value)
    while ahead:
        value = ahead.pop()
        if is_reference(value):
            ids[id_in(value)] = None
        elif isinstance(value, dict | list):
            ahead += value.values() if isinstance(value, dict) else value
    return list(ids), list(names)


def may_be_path(text: str) -> bool:
    """Whether a text in a workflow may be the path of an upload: it ends as a file does, and as no model."""
    if len(text.encode("utf-8", "replace")) > MOST_NAME_BYTES or not text.isprintable() or MODEL_FILE.search(text):
        return False
    return bool(re.fullmatch(r"[^./\\][^\\]*\.\w{1,5}", text))


def plain(name: str) -> str:
    """A name that every file system takes, with its ending."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[-80:].lstrip(".") or "file"


def mounted_key(asset: Asset) -> str:
    """Where the instances see it."""
    return asset.key if asset.key.startswith("input/") else f"{BYTES}{asset.id}/{plain(asset.name)}"


def id_of(digest: str, path: str) -> str:
    return str(uuid.uuid5(SPACE, f"{digest}\n{path}"))


def key_of_path(path: str) -> str:
    return BY_PATH + hashlib.sha256(path.removeprefix("input/").encode("utf-8", "replace")).hexdigest()


def as_json(asset: Asset) -> bytes:
    return json.dumps(asdict(asset)).encode()


def now() -> str:
    return iso(datetime.now(UTC))


def days_of(rules: Iterable[Mapping[str, Any]], prefix: str) -> int | None:
    """The fewest days after which one of the rules deletes all that lies below a prefix."""
    found = []
    for rule in rules:
        about = rule.get("Filter") or {}
        about = about.get("And") or about
        days = (rule.get("Expiration") or {}).get("Days")
        is_for_all = prefix.startswith(about.get("Prefix", rule.get("Prefix", ""))) and not about.keys() - {"Prefix"}
        if rule.get("Status") == "Enabled" and days and is_for_all:
            found.append(int(days))
    return min(found, default=None)
