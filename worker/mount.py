"""Whether ComfyUI sees what lies in the bucket: models and inputs come through a mount that may die, or be out of date."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comfy_utils import Settings, Workflow
from ground.answers import missing_files
from worker.bucket import Bucket
from worker.errors import explain

logger = logging.getLogger(__name__)

ANSWER_S = 20
"""A mount that has not answered for so long hangs."""
TRIED = 1000
"""Of so many files it is remembered that ComfyUI does not see them, however often it is started."""


class Mount:
    """The bucket's mount at s3/, which start_service.sh makes, and which models/, input/ and output/ lead to."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        self._path = settings.comfy_home / "s3"
        self._links = [settings.comfy_home / "ComfyUI" / name for name in ("models", "input", "output")]
        self._is_base = settings.env == "base"
        self._bucket = bucket
        self._asking: threading.Thread | None = None
        self._said: list[str] = []
        self._lock = threading.Lock()
        self._tried: dict[str, None] = {}

    def problem(self) -> str | None:
        """What is wrong with the mount; None where it is well, or ComfyUI needs none."""
        if not any(self.holds(link) for link in self._links):
            return None
        with self._lock:
            asking, said = self._ask()
        asking.join(ANSWER_S)
        return (said[0] if said else f"the mount {self._path} hangs") or None

    def _ask(self) -> tuple[threading.Thread, list[str]]:
        """Who asks the mount just now, and where the answer will be: a mount that hangs is asked once, by all jobs."""
        if self._asking is not None and self._asking.is_alive():
            return self._asking, self._said
        said: list[str] = []

        def ask() -> None:
            try:
                os.statvfs(self._path)  # not answered from the kernel's memory, as what a folder is would be
                is_mounted = subprocess.run(["mountpoint", "-q", self._path], check=False).returncode == 0
                said.append("" if is_mounted else f"nothing is mounted at {self._path}")
            except OSError as error:
                said.append(f"the mount {self._path} is dead: {error.strerror}")

        self._said, self._asking = said, threading.Thread(target=ask, name="mount", daemon=True)
        self._asking.start()
        return self._asking, said

    def doubt(self, workflow: Workflow, node_errors: Mapping[str, Any], *, has_failed: bool) -> str | None:
        """Why ComfyUI's verdict on a workflow may only come from what it does not see; None where the verdict counts.

        It lists a folder of models once, and again when the folder's time changes. Mountpoint gives all folders the
        time at which it was started (its doc/SEMANTICS.md), so a model that came later is unknown to ComfyUI until
        both start anew. `node_errors` are those of a refusal, or of branches that were dropped.
        """
        missing = missing_files(workflow, node_errors)
        if not (has_failed or missing):
            return None
        if problem := self.problem():
            return problem
        unseen = [name for name in self._in_bucket(missing) if name not in self._tried]
        if not unseen:
            return None
        self._tried |= dict.fromkeys(unseen)
        while len(self._tried) > TRIED:
            del self._tried[next(iter(self._tried))]
        return f"{', '.join(unseen):.400} came into the bucket, and ComfyUI does not see it"

    def _in_bucket(self, names: list[str]) -> Iterator[str]:
        """Those of the names that the bucket has, as a model of any kind or as an input. On the base machine none:
        designers are not to lose what they run."""
        if not names or self._is_base:
            return
        try:
            models = self._bucket.keys("models/")
            for name in names:
                path = "/" + name.replace("\\", "/")
                if any(key.endswith(path) for key in models) or self._bucket.head(f"input{path}") is not None:
                    yield name
        except Exception as error:
            logger.warning("Whether ComfyUI sees all that is in the bucket is not known: %s", explain(error))

    def holds(self, link: Path) -> bool:
        """Whether what lies there is the bucket's."""
        return link.is_symlink() and Path(os.path.normpath(link.parent / link.readlink())).is_relative_to(self._path)
