"""Whose the files are that ComfyUI writes: each job's are brought into a folder of its own, job-output/<job_id>/."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from comfy_utils import OBJECT_INFO_KEY, Settings, Workflow, is_job_id
from ground.answers import OutputFile, outputs_of
from ground.comfyui import ComfyAbsentError, ComfyGoneError, ComfySlowError, ComfyUI, JobStoppedError
from ground.savers import CACHE_BREAKER, is_contained
from worker.pictures import Pictures

logger = logging.getLogger(__name__)

FORGOTTEN_S = 86_400
"""What has lain on the disk for so long is nobody's: no message can be held half as long."""
TEMP_S = 3600
"""So much longer than a job may run does a temp file stay that no job has taken along."""
SWEEP_S = 600
TICK_NS = 10_000_000
"""A file's time is that of the kernel's last tick, so up to 10 ms before what the clock says."""


class Outputs:
    """ComfyUI's output and temp folders, which it shares among its jobs, and each job's own folder.

    A contained workflow (see own_outputs) writes into its job's folder by itself. Any other writes where it likes, on
    ground that belongs to one such job at a time, from before it is sent to ComfyUI until its files have been moved.
    So no two write files of one name, however short the pause between them. Whose ground it is stands in a file, so
    that a worker which starts anew knows it.

    On the base machine designers' files lie on the same ground, which is the bucket: a job's are copied there.
    """

    def __init__(self, settings: Settings, comfy: ComfyUI) -> None:
        self.settings = settings
        self.comfy = comfy
        self._is_base = settings.env == "base"
        self._ground = settings.output_dir
        self._own = settings.comfy_home / "job-output"
        self._temp = settings.comfy_home / "ComfyUI/temp"
        self._marker = self._own / ".ground"
        self._holder: str | None = None
        self._changed = threading.Condition()
        self._jobs: dict[str, bool] = {}  # folder -> whether it is a job's own
        self._shown: dict[str, list[Path]] = {}  # job -> its temp files
        self._pictures: dict[str, Pictures] = {}
        self._sweep_at = 0.0

    # --- The ground --------------------------------------------------------------------------------------

    @contextmanager
    def held(self, job_id: str, workflow: Workflow, should_stop: Callable[[], bool]) -> Iterator[None]:
        """While the block runs a workflow, no other that writes where it likes is in ComfyUI.

        Afterwards its files are in the job's own folder. One that is contained waits for nobody. Raises
        JobStoppedError while it waits.
        """
        self._jobs[job_id] = True
        if is_contained(workflow):
            yield
            return
        self._claim(job_id, should_stop)
        is_gone = False
        try:
            self._make_folders(workflow)
            yield
            is_gone = True
        finally:
            try:
                # One that was given back may go on until its node ends: then the next to come waits for that.
                if is_gone or not self._is_in_comfyui(job_id):
                    self._gather(job_id)
                    self._marker.unlink(missing_ok=True)
            finally:
                self._let_go()

    def _claim(self, job_id: str, should_stop: Callable[[], bool]) -> None:
        """Wait for the ground; what the last job has left there is moved into that one's folder first."""
        with self._changed:
            while self._holder is not None:
                if should_stop():
                    raise JobStoppedError
                self._changed.wait(0.5)
            self._holder = job_id
        try:
            last = self._read_marker()
            if last == job_id:  # adopted: what it has written until now is its own
                return
            while last is not None and self._is_in_comfyui(last):
                if should_stop():
                    raise JobStoppedError
                time.sleep(0.2)
            if last is not None:
                self._gather(last)
            self._own.mkdir(exist_ok=True)
            self._marker.write_text(job_id)
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        with self._changed:
            self._holder = None
            self._changed.notify_all()

    def _read_marker(self) -> str | None:
        try:
            job_id = self._marker.read_text(errors="replace")
        except FileNotFoundError:
            return None
        return job_id if is_job_id(job_id) else None

    def _is_in_comfyui(self, job_id: str) -> bool:
        try:
            return self.comfy.place(job_id) is not None
        except ComfySlowError:
            return True
        except ComfyGoneError:
            return False

    def _make_folders(self, workflow: Workflow) -> None:
        """Make the folders that prefixes name: designers have them, and some savers do not make them.

        As far as the name is plain: what stands behind a % or [ the node makes up when it runs.
        """
        for node in workflow.values():
            prefix = node.get("inputs", {}).get("filename_prefix")
            plain = re.split(r"[%\[\0]", prefix)[0] if isinstance(prefix, str) else ""
            if "/" in plain:
                with suppress(OSError):  # the node will say it better
                    (self._ground / os.path.dirname(plain.lstrip("/"))).mkdir(parents=True, exist_ok=True)  # noqa: PTH120

    def _gather(self, job_id: str) -> None:
        """Bring what lies on the ground since this job got it into the job's folder."""
        with suppress(FileNotFoundError):
            since_ns = self._marker.stat().st_mtime_ns
            if not self._is_base:
                self._bring(job_id, self._strays(since_ns))
                return
        with suppress(ComfyGoneError):
            window = window_ns(self.comfy.history(job_id) or {})
            if window is not None:
                # S3 and Mountpoint know whole seconds.
                self._bring(job_id, self._strays(window[0] - 1_000_000_000, window[1]))

    def _strays(self, since_ns: int, until_ns: int | None = None) -> list[Path]:
        """The files outside all jobs' folders that were written then."""
        ours = {self._ground / Path(OBJECT_INFO_KEY).name} if self._is_base else {self._marker}
        found = []
        for folder, names, files in os.walk(self._ground):
            if folder == str(self._ground):
                names[:] = [name for name in names if not self._is_jobs(name)]
            for path in {Path(folder, name) for name in files} - ours:
                with suppress(FileNotFoundError):
                    # A file can be given another time, as by a copy, but not this one.
                    changed_ns = path.lstat().st_ctime_ns
                    if since_ns <= changed_ns and (until_ns is None or changed_ns <= until_ns):
                        found.append(path)
        return found

    def _is_jobs(self, folder: str) -> bool:
        """Whether a folder of the ground belongs to a job, and not to what business code has named by an id of its
        own; on the base machine, where all jobs' receipts lie and instances' logs, too, it goes by the name."""
        if self._is_base or not is_job_id(folder):
            return self._is_base and (is_job_id(folder) or bool(re.fullmatch(r"i-[0-9a-f]+", folder)))
        if folder not in self._jobs:
            try:
                is_known = self.comfy.history(folder) is not None or self.comfy.place(folder) is not None
            except ComfyGoneError:
                return True
            self._jobs[folder] = is_known
        return self._jobs[folder]

    def _bring(self, job_id: str, paths: Iterable[Path]) -> None:
        """Move files into the job's folder. The folders they lay in stay: a node may have made them for good."""
        for path in paths:
            target = self._own / job_id / path.relative_to(self._ground)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if not self._is_base:
                    path.replace(target)
                elif path.is_file():
                    shutil.copy2(path, target)
            except FileNotFoundError:
                logger.info("%s was gone before it could be brought to job %s", path, job_id)

    # --- A job's files -----------------------------------------------------------------------------------

    def pictures(self, job_id: str, workflow: Workflow | None = None) -> Pictures:
        """What comes of the job over the websocket; `workflow` is that of a run which begins."""
        if workflow is not None or job_id not in self._pictures:
            self._pictures[job_id] = Pictures(workflow or {}, self._own / job_id)
        return self._pictures[job_id]

    def collect(self, job_id: str, entry: Mapping[str, Any]) -> None:
        """Take in the history entry of a job that has ended: what else was written while it ran is its own, too."""
        nodes = _nodes(entry)
        self._shown[job_id] = [
            path
            for file in outputs_of(entry)[0]
            if file.type == "temp" and CACHE_BREAKER in nodes.get(file.node_id, {}).get("inputs", {})
            if (path := self.locate(job_id, file)) is not None
        ]
        window = window_ns(entry)
        if window is not None and not self._is_base:
            # A job's first files may bear a time before its start. Where another holds the ground, those are its own.
            is_ours = self._holder is None and not self._marker.exists()
            since_ns, until_ns = (window[0] - TICK_NS, window[1]) if is_ours else (window[0], window[1] - TICK_NS)
            self._bring(job_id, self._strays(since_ns, until_ns))

    def locate(self, job_id: str, file: OutputFile) -> Path | None:
        """Where a file is that the history names; None where nothing is, or not in ComfyUI's folders."""
        root = {"output": self._ground, "temp": self._temp}.get(file.type, self.settings.comfy_home / "ComfyUI/input")
        below = os.path.normpath(root / file.subfolder / file.filename)
        relative = os.path.relpath(below, root)
        if relative.split("/")[0] == "..":
            return None
        moved = [self._own / job_id / relative] if file.type == "output" else []
        return next((path for path in (*moved, Path(below)) if _is_there(path)), None)

    def unnamed(self, job_id: str) -> list[Path]:
        """The files in the job's own folder, named in the history or not."""
        folders = {self._own / job_id, self._ground / job_id}
        paths = sorted(path for folder in folders for path in folder.rglob("*"))
        return [path for path in paths if path.is_file() and not path.is_symlink()]

    def place(self, job_id: str, path: Path) -> str:
        """What a file is called among its job's, wherever it lies."""
        roots = {self._own / job_id: "", self._ground / job_id: "", self._ground: ""}
        roots |= {self._temp: "temp/", self.settings.comfy_home / "ComfyUI/input": "input/"}
        root = next(root for root in roots if path.is_relative_to(root))
        return f"{roots[root]}{path.relative_to(root).as_posix()}"

    def is_whole(self, job_id: str, entry: Mapping[str, Any]) -> bool:
        """Whether no file is missing that ComfyUI's cache has named, and that an earlier job has taken along."""
        cached = {
            node_id
            for name, data in (entry.get("status") or {}).get("messages") or []
            if name == "execution_cached"
            for node_id in data.get("nodes") or []
        }
        return all(
            self.locate(job_id, file) is not None
            for file in outputs_of(entry)[0]
            if file.node_id in cached and file.type != "input"
        )

    # --- The disk ----------------------------------------------------------------------------------------

    def clear(self, job_id: str) -> None:
        """Remove what an earlier try of the job has left, which ComfyUI does not know any more."""
        if self._holder == job_id:
            self._gather(job_id)
        remove_folder(self._own / job_id)
        self.pictures(job_id).forget()

    def remove(self, job_id: str) -> None:
        """Free the disk of a job's files: they are in the bucket, or of no use. On the base machine the output
        folder is the bucket."""
        self._pictures.pop(job_id, None)
        self._jobs.pop(job_id, None)
        remove_folder(self._own / job_id)
        try:
            for path in self._shown.pop(job_id, []):
                path.unlink(missing_ok=True)
            if time.monotonic() > self._sweep_at:
                self._sweep_at = time.monotonic() + SWEEP_S
                self.sweep()
        except OSError as error:
            logger.warning("The disk is not cleared: %s", error)

    def make_room(self, needed: set[str], but: str | None, since: float) -> None:
        """Remove what no job needs: neither one of the `needed`, nor one that ComfyUI still has.

        What was written after `since`, when the first of those in hand was received, may be theirs and not be in their
        folders yet. Only what is in the folder of `but` is known to be of no use.
        """
        try:
            needed = needed | set(self.comfy.jobs())
        except ComfyAbsentError:
            pass  # it has none
        except ComfyGoneError:
            return
        if but is not None and is_job_id(but):
            self._forget(self._own / but)
        for folder in self._own.iterdir() if self._own.is_dir() else []:
            if is_job_id(folder.name) and folder.name not in needed and folder.lstat().st_mtime < since:
                self._forget(folder)
        if not self._is_base:
            shown = {path for paths in self._shown.values() for path in paths}
            _remove_old((path for path in self._temp.rglob("*") if path not in shown), since)
            _remove_old(self._strays(0), since)

    def _forget(self, folder: Path) -> None:
        """Remove a job's folder, and have ComfyUI forget it, so that it is run should it come back."""
        remove_folder(folder)
        with suppress(ComfyGoneError):
            self.comfy.forget(folder.name)

    def sweep(self, later_s: float = 0) -> None:
        """Remove what has lain on the disk for too long, as of a job that was given back. `later_s` is for tests."""
        now = time.time() + later_s
        for folder in self._own.iterdir() if self._own.is_dir() else []:
            if is_job_id(folder.name) and folder.lstat().st_mtime < now - FORGOTTEN_S:
                logger.info("Nobody came back for %s", folder)
                self._forget(folder)
        if not self._is_base:
            _remove_old(self._strays(0), now - FORGOTTEN_S)
            _remove_old(self._temp.rglob("*"), now - self.settings.job_timeout_s - TEMP_S)


def _is_there(path: Path) -> bool:
    """Whether there is such a file; raises OSError where that cannot be told."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False
        raise
    return True


def window_ns(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """When a job ran, in nanoseconds since 1970, from its history entry; None where that does not tell."""
    messages = (entry.get("status") or {}).get("messages") or []
    stamps = [data["timestamp"] for _, data in messages if isinstance(data.get("timestamp"), int)]
    return (min(stamps) * 1_000_000, max(stamps) * 1_000_000 + 999_999) if stamps else None


def silent_nodes(entry: Mapping[str, Any]) -> list[str]:
    """The nodes of a workflow that end its branches, from its history entry."""
    nodes = _nodes(entry)
    prompt = entry.get("prompt")
    ids = prompt[4] if isinstance(prompt, list) and len(prompt) > 4 and isinstance(prompt[4], list) else []
    return [f"{node_id} {nodes[node_id].get('class_type')}" for node_id in ids if node_id in nodes]


def _nodes(entry: Mapping[str, Any]) -> Workflow:
    prompt = entry.get("prompt")
    nodes = prompt[2] if isinstance(prompt, list) and len(prompt) > 2 else None
    return nodes if isinstance(nodes, dict) else {}


def _remove_old(paths: Iterable[Path], before: float) -> None:
    for path in list(paths):
        with suppress(OSError):
            if not path.is_dir() and path.lstat().st_ctime < before:
                path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as that is possible."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    with suppress(OSError):
        folder.rmdir()
