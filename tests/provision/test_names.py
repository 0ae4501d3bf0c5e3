"""provision/names.sh and provision/summary.sh: what everything is called, and where it is seen."""

from __future__ import annotations

import pytest
from aws_fixtures import Bundle
from environment_pro import (
    BASE_BUCKET,
    BUCKET,
    QUEUE,
)
from local_cloud import ACCOUNT_ID


def test_the_argument_chooses_the_environment_not_the_shell(bundle: Bundle) -> None:
    show = 'echo "$ENV $S3_BUCKET $DLQ_NAME $TEMPLATE_NAME $BASE_S3_BUCKET $MAX_INSTANCES"'
    ran = bundle.run_function(show, ENV="test", MAX_INSTANCES="9")
    assert ran.stdout.split() == ["pro", BUCKET, f"{QUEUE}-dlq", "simple-comfy-pro-asg-template", BASE_BUCKET, "9"]


def test_names_have_defaults(bundle: Bundle) -> None:
    bundle.env_file.write_text(f"ACCOUNT_ID={ACCOUNT_ID}\nREGION=eu-central-1\n")
    ran = bundle.run_function(
        'echo "$S3_BUCKET $SQS_NAME $ASG_NAME $AWS_DEFAULT_REGION $AWS_REGION"', AWS_REGION="us-east-1"
    )
    assert ran.stdout.split() == [
        f"simple-comfy-{ACCOUNT_ID}-eu-central-1-pro",
        QUEUE,
        "simple-comfy-pro-asg",
        "eu-central-1",
        "eu-central-1",
    ]


@pytest.mark.parametrize(
    ("partition", "console", "queue"),
    [
        ("aws", "console.aws.amazon.com", "sqs.us-west-2.amazonaws.com%2F"),
        ("aws-cn", "console.amazonaws.cn", "sqs.us-west-2.amazonaws.com.cn%2F"),
    ],
)
def test_the_summary_has_links_to_the_console(bundle: Bundle, partition: str, console: str, queue: str) -> None:
    lines = bundle.run_function(f"set_partition {partition}; show_links", "summary").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["Files", "Queue", "Fleet", "Dashboard"]
    assert all(f" https://{console}/" in line for line in lines)
    assert queue in lines[1]
