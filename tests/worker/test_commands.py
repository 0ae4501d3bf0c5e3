"""exec_cmd, and what else is different on the base machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from local_cloud import LocalCloud
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import cancel, fetch_ahead, is_alive, start, started_and_ended

from comfy_utils import new_job_id


def test_commands_are_refused_on_the_fleet(busy_site: Site) -> None:
    result = busy_site.await_result(busy_site.send({"exec_cmd": f"touch {busy_site.folder}/made"}))
    assert result["error"]["kind"] == "command_refused"
    assert not (busy_site.folder / "made").exists()


@pytest.fixture(scope="module")
def base_site(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(cloud, tmp_path_factory.mktemp("base") / "comfy", ENV="base", JOB_TIMEOUT="2")
    site.variables["MALLOC_TRIM_THRESHOLD_"] = "131072"  # as start_service.sh does
    start(site)
    yield site
    site.end()


@pytest.mark.parametrize(
    ("command", "status", "kind", "exit_code", "output"),
    [
        ("echo hello $COMFY_JOB_ID | cut -c1-5", "succeeded", None, 0, "hello\n"),
        ("echo ${MALLOC_TRIM_THRESHOLD_-unset}", "succeeded", None, 0, "unset\n"),
        ("echo out; echo err >&2; exit 3", "failed", "command_failed", 3, "out\nerr\n"),
        ("yes | head -c 100000; printf end", "succeeded", None, 0, "y\n" * 2046 + "\nend"),
        ("sleep 60 & echo first; wait", "failed", "timeout", None, "first\n"),
    ],
)
def test_commands_on_the_base_machine(
    base_site: Site, command: str, status: str, kind: str | None, exit_code: int | None, output: str
) -> None:
    result = base_site.await_result(base_site.send({"exec_cmd": command}))
    assert (result["status"], (result["error"] or {}).get("kind")) == (status, kind)
    said = result["values"]["command"]
    assert said["exit_code"] == exit_code
    assert said["output"] == output[-4096:] or (len(said["output"]) == 4096 and said["output"].endswith("end"))


def test_a_commands_children_end_with_it(base_site: Site) -> None:
    base_site.await_result(base_site.send({"exec_cmd": "sleep 600 & echo $!"}))
    job_id = base_site.send({"exec_cmd": "sleep 600 & echo $!"})
    pid = int(base_site.await_result(job_id)["values"]["command"]["output"])
    await_that("the child is gone", lambda: not is_alive(pid))


def test_a_commands_children_end_when_the_worker_is_stopped(make_site: Callable[..., Site]) -> None:
    site = make_site(EXEC_CMD="always")
    site.start_comfyui()
    worker = site.start_worker()
    site.send({"exec_cmd": "sleep 600 & echo $! > child; wait"})
    child = site.folder / "child"
    pid = int(await_that("the command runs", lambda: child.exists() and child.read_text().strip()))
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    await_that("the child is gone", lambda: not is_alive(pid))
    assert site.depth() == (1, 0)


def test_a_running_command_is_cancelled_with_its_children(make_site: Callable[..., Site]) -> None:
    site = make_site(ENV="base")
    start(site)
    job_id = new_job_id()
    site.send({"exec_cmd": "sleep 600 & echo $! | tee pid; wait", "job_id": job_id})
    pid = await_that("it runs", lambda: (file := site.folder / "pid").exists() and file.read_text().strip())
    cancel(site, job_id)
    result = site.await_result(job_id)
    assert result["error"]["kind"] == "cancelled"
    assert result["values"]["command"]["output"] == f"{pid}\n"
    await_that("the child is gone", lambda: not is_alive(int(pid)))


@pytest.mark.parametrize("beside", ["no", "yes"])
def test_a_command_runs_alone_unless_it_is_asked_to_run_beside(make_site: Callable[..., Site], beside: str) -> None:
    site = make_site(EXEC_CMD="always", EXEC_CMD_BESIDE=beside)
    start(site)
    first, (command, second) = fetch_ahead(site, 8, {"exec_cmd": "sleep 1; date +%s.%N"}, image_workflow(1))
    results = {job_id: site.await_result(job_id) for job_id in (first, command, second)}
    ended = float(results[command]["values"]["command"]["output"])
    runs = [started_and_ended(site, job_id) for job_id in (first, second)]
    overlaps = [began < ended and ended - 1 < over for began, over in runs]
    assert any(overlaps) == (beside == "yes"), (runs, ended)


# --- The base machine ------------------------------------------------------------------------------------


def test_files_on_the_base_machine_stay_where_designers_see_them(base_site: Site) -> None:
    job_id = base_site.send(image_workflow())
    assert base_site.await_result(job_id)["status"] == "succeeded"
    base_site.await_empty_queue()
    assert (base_site.folder / "ComfyUI/output" / job_id / "x_00001_.png").is_file()


def test_a_job_over_its_time_is_interrupted_and_failed(base_site: Site) -> None:
    job_id = base_site.send(image_workflow(600))
    assert base_site.await_result(job_id)["error"]["kind"] == "timeout"
    assert base_site.await_result(base_site.send(image_workflow()))["status"] == "succeeded"


def test_scaling_is_off_without_a_group_and_said_once(base_site: Site) -> None:
    base_site.await_result(base_site.send(image_workflow()))
    await_that("it is said", lambda: "scaling is off" in base_site.log())
    base_site.await_result(base_site.send(image_workflow()))
    assert base_site.log().count("scaling is off") == 1
