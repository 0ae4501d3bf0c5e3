"""Why a job goes back to the queue, and what an AWS error means to whoever reads the log."""

from __future__ import annotations

from comfy_utils import error_code

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
