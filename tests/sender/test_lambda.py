"""The Lambda functions in the pages, run as they stand there, with an event as EventBridge has it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from places import ROOT
from sender_tools import bodies, store
from workplace import Site, image_workflow

from comfy_utils import new_job_id


def function(page: str, name: str) -> Any:
    """The function of this name in a page."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(block for block in found if f"def {name}(" in block), names)
    return names[name]


def event_of(site: Site, key: str) -> dict[str, Any]:
    """What EventBridge tells of an object that was stored."""
    detail = {
        "version": "0",
        "bucket": {"name": site.bucket},
        "object": {"key": key, "size": 1},
        "reason": "PutObject",
    }
    return {"version": "0", "source": "aws.s3", "detail-type": "Object Created", "detail": detail}


def test_the_function_for_results(sender_site: Site) -> None:
    handler = function("results.md", "handler")
    good, bad = new_job_id(), new_job_id()
    store(sender_site, good, outputs=[{"s3_key": f"output/{good}/x.png"}])
    store(sender_site, bad, status="failed", error={"message": "node 1 X: no"})
    for job_id, said in ((good, {"files": [f"output/{good}/x.png"]}), (bad, {"failed": "node 1 X: no"})):
        assert handler(event_of(sender_site, f"output/{job_id}/result.json"), None) == {"job_id": job_id} | said
    assert handler(event_of(sender_site, f"output/{good}/mine/result.json"), None) is None


@pytest.mark.parametrize("more", [{}, {"callback_url": "https://x/y"}])
def test_the_function_that_sends(sender_site: Site, more: dict[str, str]) -> None:
    workflow = image_workflow()
    said = function("jobs.md", "send")({"workflow": workflow} | more, None)
    assert bodies(sender_site) == [{"prompt": workflow} | said | more]
