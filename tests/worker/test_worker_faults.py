"""AWS misbehaves, call by call. Each test fails without its defence."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError
from local_cloud import Fault
from workplace import Site, await_that, image_workflow
from workshop import Calls

from worker.errors import explain

OPERATIONS = [
    "GetQueueUrl",
    "ReceiveMessage",
    "ChangeMessageVisibility",
    "GetQueueAttributes",
    "DeleteMessageBatch",
    "GET",
    "PUT",
    "DescribeAutoScalingGroups",
]


@pytest.mark.sampled("failing calls", 2)
@pytest.mark.parametrize("code", ["ThrottlingException", "InternalError", "AccessDenied"])
def test_every_aws_call_may_fail_and_nothing_is_lost(make_site: Callable[..., Site], calls: Calls, code: str) -> None:
    site = make_site(VISIBILITY_TIMEOUT="3")
    site.start_comfyui()
    status = {"ThrottlingException": 400, "InternalError": 500, "AccessDenied": 403}[code]
    for operation in OPERATIONS:
        calls.next(operation, Fault(status, code), times=2)
    site.start_worker()
    job_id = site.send(image_workflow(2))
    assert site.await_result(job_id)["status"] == "succeeded"
    site.await_empty_queue()
    assert site.runs(job_id) == 1


@pytest.mark.parametrize(
    ("operation", "permission"),
    [
        ("ReceiveMessage", "sqs:ReceiveMessage"),
        ("DeleteMessageBatch", "sqs:DeleteMessage"),
        ("GET", "s3:GetObject and s3:ListBucket"),
        ("PUT", "s3:PutObject"),
        ("DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingGroups"),
    ],
)
def test_a_refused_call_names_the_permission_and_does_not_spin(
    make_site: Callable[..., Site], calls: Calls, operation: str, permission: str
) -> None:
    site = make_site()
    site.start_comfyui()
    calls.next(operation, Fault(403, "AccessDenied"), times=1000)
    more = calls.count(operation)
    site.start_worker()
    site.send(image_workflow())
    await_that("the permission is named", lambda: f"this instance's role needs {permission})" in site.log())
    started, before = time.monotonic(), more()
    await_that("some seconds pass", lambda: time.monotonic() > started + 3)
    assert more() - before < 10, "it waits between its tries"


def test_only_aws_refusals_ask_for_permissions() -> None:
    refused = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "SetInstanceHealth")
    assert explain(refused).endswith("(this instance's role needs autoscaling:SetInstanceHealth)")
    assert "role" not in explain(ClientError({"Error": {"Code": "Throttling"}}, "GetObject"))
    assert explain(OSError("no\nspace")) == "no space"
