"""What an instance tells of itself: logs, figures, worker.json, boot.json, and what its ComfyUI can do."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import logging.handlers
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from comfy_utils import OBJECT_INFO_KEY, Settings, aws_client, iso, printable
from ground.comfyui import SYSTEM_STATS_KEY, ComfyUI
from worker.bucket import Bucket
from worker.editor_files import store_editor_files
from worker.errors import explain
from worker.metrics import Metrics
from worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

LOGS_EVERY_S = 300
WORKER_NEWS_EVERY_S = 30
LOG_CHARACTERS = 4000
LOG_LIMIT_BYTES = 50 * 1024 * 1024
"""A larger one is emptied where the disk is full; start_service.sh begins a new one at each start."""


class Reports:
    """Best effort, all of it: no job fails or waits for a report."""

    def __init__(self, settings: Settings, bucket: Bucket, instance_id: str, instance_type: str | None) -> None:
        self._settings = settings
        self._bucket = bucket
        self._instance = {"instance_id": instance_id, "instance_type": instance_type}
        self._folder = settings.comfy_home / "logs"
        self._logs_stored: dict[str, tuple[int, int]] = {}  # log -> its size and time when it was uploaded
        self._jobs_told: list[dict[str, Any]] | None = None
        self._next_news = 0.0
        self._next_logs = time.monotonic() + LOGS_EVERY_S
        self._metrics = Metrics()
        self._cloudwatch: Any = None
        self._metrics_failed = False

    def turn(self, jobs: list[dict[str, Any]], *, in_group: bool) -> None:
        """Called several times a second, with what is to be told of the jobs that run: tells what is due."""
        now = time.monotonic()
        if now >= self._next_news and self.tell_of_jobs(jobs):
            self._next_news = now + WORKER_NEWS_EVERY_S
        if now >= self._next_logs:
            self._next_logs = now + LOGS_EVERY_S
            self.upload_logs()
        self._metrics.tick(now, busy=bool(jobs))
        if in_group:  # figures cost money
            self.publish_metrics()

    def upload_logs(self) -> None:
        """Store this instance's logs, those that have changed, under output/<instance_id>/."""
        for path in sorted(self._folder.glob("*")):
            key = f"output/{self._instance['instance_id']}/{path.name}"
            try:
                state = path.stat()
                stamp = (state.st_size, state.st_mtime_ns)
                if path.is_file() and self._logs_stored.get(path.name) != stamp:
                    extra = {"ContentType": "text/plain; charset=utf-8"}
                    self._bucket.s3.upload_file(str(path), self._bucket.name, key, ExtraArgs=extra)
                    self._logs_stored[path.name] = stamp
            except Exception as error:
                logger.warning("Cannot store the log %s: %s", path.name, explain(error))

    def make_room(self) -> None:
        """Remove the logs of other days, and empty those of today that are large; only what the bucket has."""
        self.upload_logs()
        for path in sorted(self._folder.glob("*")):
            with suppress(OSError):
                state = path.stat()
                if self._logs_stored.get(path.name) != (state.st_size, state.st_mtime_ns):
                    continue
                if re.fullmatch(r".+\.(1|\d{4}-\d\d-\d\d)", path.name):
                    path.unlink()
                elif state.st_size > LOG_LIMIT_BYTES:
                    os.truncate(path, 0)  # who writes it appends

    def tell_of_jobs(self, jobs: list[dict[str, Any]]) -> bool:
        """Write worker.json, by which an operator sees what this instance does; False when there is nothing new."""
        if jobs == self._jobs_told:
            return False
        news = {**self._instance, "jobs": jobs, "updated_at": iso(datetime.now(UTC))}
        try:
            self._bucket.write(f"output/{self._instance['instance_id']}/worker.json", json.dumps(news).encode())
            self._jobs_told = jobs
        except Exception as error:
            logger.info("worker.json is not written: %s", explain(error))
        return True

    def count(self, result: Mapping[str, Any]) -> None:
        """Count a job that has its receipt."""
        self._metrics.add_job(result)

    def publish_metrics(self, *, last: bool = False) -> None:
        """Send the figures that are due to CloudWatch."""
        figures = self._metrics.due(time.monotonic(), last=last)
        if not figures:
            return
        try:
            if self._cloudwatch is None:
                self._cloudwatch = aws_client("cloudwatch", self._settings.region)
            namespace = f"{self._settings.prefix}/{self._settings.env}"
            self._cloudwatch.put_metric_data(Namespace=namespace, MetricData=figures)
            self._metrics.sent(len(figures))
        except Exception as error:
            if not self._metrics_failed:
                self._metrics_failed = True
                logger.warning("Cannot publish figures, which is not said again: %s", explain(error))

    def tell_of_comfyui(self, shutdown: Shutdown) -> None:
        """Once ComfyUI answers, complete boot.json, and store what it can do unless that is stored already.

        In a thread of its own, with a ComfyUI client of its own.
        """
        comfy = ComfyUI(self._settings.comfy_address)
        while not comfy.is_ready():
            if shutdown.stop.wait(0.2):
                return
        boot = finish_boot_report(self._folder)
        self._metrics.add_boot(boot or {})
        (self._folder / "starting").unlink(missing_ok=True)  # this instance works: see boot/giving_up.sh
        self._tell_what_it_can(comfy, boot)
        self._tell_the_editor(comfy)

    def _tell_what_it_can(self, comfy: ComfyUI, boot: dict[str, Any] | None) -> None:
        try:
            if boot:  # it goes with the logs as well, but who watches a fleet wake wants to know now
                self._bucket.write(f"output/{self._instance['instance_id']}/boot.json", json.dumps(boot).encode())
            self._bucket.write(SYSTEM_STATS_KEY, json.dumps(comfy.system_stats()).encode())
            text = json.dumps(comfy.object_info(), sort_keys=True).encode()
            digest = hashlib.sha256(text).hexdigest()
            stored = self._bucket.head(OBJECT_INFO_KEY)
            if stored is not None and stored["Metadata"].get("sha256") == digest:
                logger.info("The bucket knows what ComfyUI can do")
                return
            self._bucket.write(
                OBJECT_INFO_KEY,
                gzip.compress(text),
                ContentType="application/gzip",
                Metadata={"sha256": digest},
            )
            logger.info("Stored what ComfyUI can do in %s", OBJECT_INFO_KEY)
        except Exception as error:
            logger.warning("What ComfyUI can do is not stored: %s", explain(error))

    def _tell_the_editor(self, comfy: ComfyUI) -> None:
        """Store what the editor needs of custom nodes."""
        try:
            store_editor_files(comfy, self._settings.comfy_home / "ComfyUI", self._bucket)
        except Exception as error:
            logger.warning("What the editor needs of custom nodes is not stored: %s", explain(error))


def finish_boot_report(folder: Path) -> dict[str, Any] | None:
    """Add to boot.json in `folder` how long ComfyUI, which answers now, took for that, and the total; return it.

    start_service.sh has begun it: {"booted_at": ISO, "comfyui_started_at": seconds since 1970, "phases": {name:
    seconds}}. None where there is nothing to add: it is complete, or there is none.
    """
    file = folder / "boot.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        if "total" in report:
            return None
        phases = report["phases"]
        phases["comfyui"] = round(time.time() - report["comfyui_started_at"], 3)
        report["total"] = round(sum(phases.values()), 3)
        new = file.with_suffix(".json.new")
        new.write_text(json.dumps(report))
        new.replace(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("Cannot complete %s: %s", file, error)
        return None
    return report


class OneLine(logging.Formatter):
    """Each message a line, whatever of a job's words is in it; a traceback follows in lines that are set off."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message, LOG_CHARACTERS)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(
            f"    {printable(line, LOG_CHARACTERS)}" for line in super().formatException(ei).splitlines()
        )


def set_up_logging(folder: Path) -> None:
    """Log to stdout, and to parse_job.log in `folder`: rotated at midnight, 30 kept."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "parse_job.log"
        handlers.append(
            logging.handlers.TimedRotatingFileHandler(file, when="midnight", backupCount=30, encoding="utf-8")
        )
    except OSError as error:
        print(f"parse_job.py: logs go to stdout only: {error}", file=sys.stderr)
    for handler in handlers:
        handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk does not stop jobs
