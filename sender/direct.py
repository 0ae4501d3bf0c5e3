"""A workflow run on a ComfyUI at hand, without the fleet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comfy_utils import new_job_id, say
from ground.answers import error_of, explain_node_errors, outputs_of
from ground.comfyui import ComfyGoneError, ComfyUI, JobTimeoutError, WorkflowRefusedError
from ground.savers import own_outputs


def run_direct(address: str, bodies: Sequence[dict[str, Any]], folder: Path, complain: Callable[[str], None]) -> int:
    """Run workflows on a ComfyUI at hand, without any AWS, and save their files; returns the exit code."""
    comfy, failed = ComfyUI(address), 0
    for body in bodies:
        job_id = new_job_id()
        try:
            workflow = own_outputs(body["prompt"], job_id)
            finished = comfy.run(workflow, job_id, timeout_s=86_400, extra_data=body.get("extra_data"))
            error = error_of(finished.entry)
            for warning in explain_node_errors(finished.node_errors):
                say(f"Dropped: {warning}", to=sys.stderr)
            for file in outputs_of(finished.entry)[0]:
                # Below the job's folder whatever the server says.
                parts = [
                    each for each in Path(file.subfolder, file.filename).parts if each not in (job_id, "..", "/")
                ]
                if file.type != "output":
                    parts.insert(0, file.type)
                target = folder.joinpath(job_id, *parts)
                comfy.download(file, target)
                say(f"Saved {target}")
        except WorkflowRefusedError as refused:
            error = refused.error
        except (ComfyGoneError, JobTimeoutError) as gone:
            complain(str(gone))
            return 1
        if error:
            failed += 1
            complain(f"job {job_id} failed: {error['message']}")
    return 1 if failed else 0
