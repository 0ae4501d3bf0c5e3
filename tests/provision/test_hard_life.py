"""An environment comes and goes where AWS is as it can be, and the AWS CLI is the older one.

The caller has the role that base machines have had from the first, AWS's own FullAccess policies, which say nothing of
quotas and of the tagging API. AWS knows late what was made or removed. And the CLI is version 1: all other tests have
version 2, where that is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from aws_cli_server import AWS_CLI_SOCKET, AwsCliServer
from aws_fixtures import Aws, Bundle, tags_of
from local_cloud import ACCOUNT_ID, REGION, LocalCloud
from local_news import LateNews
from moto.iam.aws_managed_policies import aws_managed_policies_data

POLICIES = (
    "AmazonEC2FullAccess",
    "AmazonS3FullAccess",
    "AmazonSQSFullAccess",
    "AutoScalingFullAccess",
    "CloudWatchFullAccessV2",  # without sns:*, which the first version has
    "IAMFullAccess",
)
BESIDES = {"servicequotas:GetServiceQuota", "tag:GetResources", "sns:GetTopicAttributes"}
"""What these policies refuse, and the scripts can do without."""
LATE = {
    "NoSuchBucket bucket",
    "OperationAborted gone",
    "NoSuchEntity Role",
    "NoSuchEntity InstanceProfile",
    "InvalidParameterValue queue",
    "nothing image",
    "InvalidSnapshot.InUse snapshot",
}
"""What AWS answered because it did not know yet, or still knew."""


@pytest.fixture
def aws_cli() -> Iterator[AwsCliServer]:
    server = AwsCliServer(1)
    yield server
    server.end()


@pytest.fixture
def news(cloud: LocalCloud) -> Iterator[LateNews]:
    """They begin when the test sets them."""
    yield LateNews()
    cloud.late_news = None


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_an_environment_comes_and_goes(
    cloud: LocalCloud, news: LateNews, aws_cli: AwsCliServer, tmp_path: Path
) -> None:
    bundle = Bundle(tmp_path / "bundle", Aws(cloud.endpoint, aws_cli.socket))
    bundle.set(PREFIX="hard-life", SPOT_PERCENT="50", ALARM_TOPIC=f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:operators")
    base = bundle.aws.make_base(files=False)
    bundle.aws.make_bucket(f"hard-life-{ACCOUNT_ID}-{REGION}-base", files=("models/m", "output/o"))
    known = json.loads(aws_managed_policies_data)
    caller = cloud.allow_only("base-machine", *(json.dumps(known[name]["Document"]) for name in POLICIES))
    caller[AWS_CLI_SOCKET] = aws_cli.socket
    assert bundle.run_function("aws --version", **caller).stdout.startswith("aws-cli/1.")
    cloud.late_news, before = news, len(cloud.denied)

    def run(*command: str) -> str:
        ran = bundle.run(*command, **caller)
        assert ran.returncode == 0, ran.stderr
        return ran.stderr

    create = ("create_env.sh", "pro", base.instance_id)
    said = run(*create, "--s3-trigger", "--with-output", "--wait", "--subnets", base.public)
    assert "whether the account may run 10 g5.2xlarge (on-demand) is not checked" in said
    name = "hard-life-pro-asg"
    found = cloud.client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=[name])
    (group,) = found["AutoScalingGroups"]
    assert (group["VPCZoneIdentifier"], tags_of(group["Tags"])["comfy-subnets"]) == (base.public, "named")
    bundle.set(SPOT_PERCENT="0", WARM_POOL="1")
    run(*create, "--rebake", "--keep", "0", "--no-s3-trigger")
    said = run("delete_env.sh", "pro", "--yes")
    assert "what is tagged as pro but has another name than the settings say is not found" in said
    said = bundle.run_function("ensure_bucket", "bucket", **caller).stdout
    assert "was deleted a moment ago: AWS frees its name within some minutes, waiting" in said

    refused = {message.partition("perform: ")[2].split()[0] for message in cloud.denied[before:]}
    del cloud.denied[before:]
    assert refused == BESIDES
    assert set(news.missed) == LATE
