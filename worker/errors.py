"""Why a job goes back to the queue, and what an AWS error means to whoever reads the log."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from typing import Any

from comfy_utils import error_code
from ground.answers import job_error

PERMISSIONS = {
    "HeadObject": "s3:GetObject and s3:ListBucket",
    "GetObject": "s3:GetObject and s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteMessageBatch": "sqs:DeleteMessage",
    "PutMetricData": "cloudwatch:PutMetricData",
}
"""Where the permission is not named like the operation. Without s3:ListBucket a missing object is "access denied"."""


class PutBackError(Exception):
    """The job did not end, and another try may help: the message goes back to the queue."""

    error: dict[str, Any] | None = None
    """The `error` of the job's result where this was the last try; without one it is `gave_up`."""


class OutOfMemoryError(PutBackError):
    """The job needs more memory than there is, also after ComfyUI freed its own."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"out of memory, also after ComfyUI freed its own: {error['message']}")
        self.error = error


class ComfyDiedError(PutBackError):
    """ComfyUI ended, or hung, while it ran the job."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.error = job_error("comfyui_died", message)

    def name_node(self, node_id: str | None, node_type: str | None) -> None:
        """Say at which node it was, as far as that is known."""
        if node_id is not None:
            where = f"{self} (at node {node_id} {node_type})"
            self.args = (where,)
            self.error = job_error("comfyui_died", where, node_id=node_id, node_type=node_type)


class DiskFullError(PutBackError):
    """There was no room on this machine's disk, which is no fault of the job."""


class NeverStartedError(PutBackError):
    """The job had not begun to run when ComfyUI was gone."""


def explain(error: Exception) -> str:
    """An error in one line; when AWS refused access it ends with the permission that is missing."""
    text = " ".join(str(error).split()) or repr(error)
    code = error_code(error)
    if "AccessDenied" in code or code in ("403", "UnauthorizedOperation"):
        operation = str(getattr(error, "operation_name", "PutObject"))  # an upload's error does not say its own
        service = "sqs" if "Message" in operation or "Queue" in operation else "autoscaling"
        text += f" (this instance's role needs {PERMISSIONS.get(operation, f'{service}:{operation}')})"
    return text


def is_disk_full(error: BaseException | None) -> bool:
    """Whether at the bottom of an error there is a disk without room."""
    while error is not None:
        if isinstance(error, DiskFullError) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def found_no_room(error: Mapping[str, Any] | None) -> bool:
    """Whether a node failed because the disk has no room, as the `error` of its job tells.

    Each library has a type of its own for it (OSError, SafetensorError, FFmpegError); all repeat what the kernel says.
    """
    said = (error or {}).get("message", "") if (error or {}).get("kind") == "execution_error" else ""
    return bool(re.search(r"No space left on device|Disk quota exceeded", said))
