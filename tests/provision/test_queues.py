"""provision/queues.sh."""

from __future__ import annotations

from aws_fixtures import Aws, Bundle
from environment_pro import (
    QUEUE,
)


def test_a_queue_name_that_aws_still_keeps_is_waited_for(bundle: Bundle, aws: Aws) -> None:
    path = bundle.break_call("sqs create-queue", "AWS.SimpleQueueService.QueueDeletedRecently", times=3)
    ran = bundle.run_function(f"create_queue {QUEUE} '{{}}'", "queues", PATH=path)
    assert ran.returncode == 0
    assert ran.stdout.count("AWS frees its name within a minute, waiting") == 1
    assert QUEUE in aws.everything("pro")


def test_a_queue_name_is_not_waited_for_without_end(bundle: Bundle) -> None:
    path = bundle.break_call("sqs create-queue", "AWS.SimpleQueueService.QueueDeletedRecently")
    ran = bundle.run_function(f"create_queue {QUEUE} '{{}}'", "queues", PATH=path, QUEUE_WAIT_SECONDS="1")
    assert ran.returncode == 1
    assert f"AWS still keeps the name of the deleted queue {QUEUE} after 1 seconds" in ran.stderr
