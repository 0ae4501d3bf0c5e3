"""parse_job.py, the door: how the worker starts, what business code hears, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable

from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import NO_RESULT_YET, start


def test_bad_settings_are_refused_at_start(make_site: Callable[..., Site]) -> None:
    site = make_site(EXEC_CMD="sometimes")
    ran = site.run("python", "parse_job.py")
    assert ran.returncode == 2
    assert ran.stderr.startswith("parse_job.py: EXEC_CMD='sometimes' cannot be used")


def test_a_failing_hook_changes_nothing_for_the_job(make_site: Callable[..., Site]) -> None:
    site = make_site()
    script = site.folder / "parse_job.py"
    hook = 'def on_job_done(result: Result) -> None:\n    print("HOOK", result["job_id"])\n    raise OSError\n'
    script.write_text(script.read_text().replace("def on_job_done(result: Result) -> None:\n", hook, 1))
    start(site)
    job_id = site.send(image_workflow())
    assert site.await_result(job_id)["status"] == "succeeded"
    site.await_empty_queue()
    assert f"HOOK {job_id}" in site.log()
    assert "on_job_done failed" in site.log()


def test_sigterm_gives_the_job_back_at_once(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    job_id = site.send(image_workflow(600))
    await_that("the job runs", lambda: site.runs(job_id))
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    assert site.depth() == (1, 0), "the message is visible again, long before its lease would have ended"
    assert site.result(job_id) is NO_RESULT_YET
    await_that("ComfyUI was interrupted", lambda: site.runs(job_id, "interrupted"))
    assert "parse_job.log" in " ".join(site.keys("output/"))


def test_an_interrupted_job_is_run_again_not_called_done(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    job_id = site.send(image_workflow(4))
    await_that("the job runs", lambda: site.runs(job_id))
    worker.terminate()
    worker.wait(LIMIT_S)
    site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    assert site.runs(job_id, "success") == 1


def test_an_interrupt_that_takes_effect_later_is_no_end_either(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.variables["STANDIN_NODE_SECONDS"] = "6"  # so long each ImageBlur hears of no interrupt
    site.start_comfyui()
    worker = site.start_worker()
    blur = {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 1, "sigma": 1.0}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}}
    job_id = site.send(image_workflow(0, {"4": blur, "5": save}))
    await_that("the job runs", lambda: site.runs(job_id))
    worker.terminate()
    worker.wait(LIMIT_S)
    site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
