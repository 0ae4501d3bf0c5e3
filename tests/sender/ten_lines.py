"""What a user's program may look like: it is checked by mypy --strict, and run, against the installed package."""

import json
import sys
from pathlib import Path

import send_job

workflow: dict[str, dict[str, object]] = json.loads(Path(sys.argv[1]).read_text())
job_id = send_job.submit(workflow)
try:
    result = send_job.wait(job_id, timeout=0.1)
    files: list[str] = [output["filename"] for output in result["outputs"]]
except send_job.JobFailed as failed:
    reason: str = failed.error["message"]
except send_job.WaitTimeoutError:
    print(job_id)
