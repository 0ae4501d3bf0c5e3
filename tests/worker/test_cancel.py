"""Jobs that their sender has cancelled."""

from __future__ import annotations

import json
from collections.abc import Callable

from local_cloud import Fault
from workplace import Site, await_that, image_workflow
from workshop import Calls, cancel, remembering_receiver, start

from comfy_utils import new_job_id


def test_a_queued_job_that_was_cancelled_is_never_run(busy_site: Site) -> None:
    job_id = new_job_id()
    cancel(busy_site, job_id)
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    result = busy_site.await_result(job_id)
    assert (result["status"], result["error"]["kind"]) == ("failed", "cancelled")
    busy_site.await_empty_queue()
    await_that("the marker is gone", lambda: not busy_site.keys(f"input/jobs/{job_id}"))
    assert busy_site.runs(job_id) == 0


def test_a_running_job_is_cancelled_and_its_sender_hears_of_it(make_site: Callable[..., Site]) -> None:
    with remembering_receiver(refuse=0) as (url, called):
        site = make_site()
        start(site)
        job_id, next_id = new_job_id(), new_job_id()
        site.send({"prompt": image_workflow(600), "job_id": job_id, "callback_url": url})
        await_that("the job runs", lambda: site.runs(job_id))
        cancel(site, job_id)
        result = site.await_result(job_id)
        assert (result["status"], result["error"]["kind"], result["attempt"]) == ("failed", "cancelled", 1)
        await_that("the callback", lambda: called)
        assert json.loads(called[0][1]) == result
        await_that("it was interrupted", lambda: site.runs(job_id, "interrupted"))
        site.send({"prompt": image_workflow(), "job_id": next_id})
        assert site.await_result(next_id)["status"] == "succeeded"
        site.await_empty_queue()
        assert not (site.folder / "job-output" / job_id).exists()


def test_a_cancel_is_for_one_job_only(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    first, second = new_job_id(), new_job_id()
    for job_id, seconds in ((first, 10), (second, 600)):
        site.send({"prompt": image_workflow(seconds), "job_id": job_id})
    await_that("the first runs", lambda: site.runs(first))
    cancel(site, second)
    assert site.await_result(second)["error"]["kind"] == "cancelled"
    assert site.await_result(first)["status"] == "succeeded"
    assert site.runs(second) == 0


def test_a_cancel_after_the_end_changes_nothing(busy_site: Site) -> None:
    job_id = new_job_id()
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    result = busy_site.await_result(job_id)
    cancel(busy_site, job_id)
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    busy_site.await_empty_queue()
    assert busy_site.result(job_id) == result
    assert result["status"] == "succeeded"


def test_no_job_waits_for_a_look_that_fails(make_site: Callable[..., Site], calls: Calls) -> None:
    site = make_site()
    calls.next("HEAD", Fault(403, "AccessDenied"), times=1000)
    start(site)
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"
