"""provision/checks.sh: what is told before anything is made."""

from __future__ import annotations

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import (
    BASE_BUCKET,
    NO_INSTANCE,
    refused,
)
from local_cloud import ACCOUNT_ID, REGION


def test_all_problems_are_told_together(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    bundle.set(MIN_INSTANCES="30", INSTANCE_TYPE="g99.xlarge")
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--rollback")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert [line.split(": ", 1)[1][:40] for line in ran.stderr.splitlines()] == [
        "MIN_INSTANCES is '30': set it in " + str(bundle.env_file)[:7],
        "AWS has no g99.xlarge in us-west-2a,us-w",
        f"the base machine's bucket {BASE_BUCKET}"[:40],
        "there is no earlier image of pro to go b",
    ]
    assert aws.everything("pro") == {}


def test_warnings_stop_nobody(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()
    ec2 = aws.client("ec2")
    endpoints = [endpoint["VpcEndpointId"] for endpoint in ec2.describe_vpc_endpoints()["VpcEndpoints"]]
    ec2.delete_vpc_endpoints(VpcEndpointIds=endpoints)
    bundle.set(MAX_INSTANCES="100", INSTANCE_TYPES='"g5.2xlarge g99.xlarge"', SPOT_PERCENT="1")
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--dry-run")
    assert ran.returncode == 0
    (table,) = set(aws.tables(base.vpc)) & set(ran.stderr.replace("\n", " ").split())
    warnings = [line.removeprefix("create_env.sh: warning: ") for line in ran.stderr.splitlines()]
    assert warnings[0].endswith(
        f"aws ec2 create-vpc-endpoint --region {REGION} --vpc-id {base.vpc} "
        f"--service-name com.amazonaws.{REGION}.s3 --route-table-ids {table}"
    )
    assert warnings[1].startswith("AWS has no g99.xlarge in us-west-2a,us-west-2b")
    assert warnings[2] == (
        "MAX_INSTANCES is 100, but the account may run only 96 g5.2xlarge (on-demand) at a time, because its quota is "
        f"768 vCPUs: aws service-quotas request-service-quota-increase --region {REGION} --service-code ec2 "
        "--quota-code L-DB2E81BA --desired-value 792"
    )
    assert len(warnings) == 3
    path = bundle.break_call("service-quotas get-service-quota", "AccessDeniedException")
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--dry-run", PATH=path)
    assert ran.returncode == 0
    assert "whether the account may run 99 g5.2xlarge (on-demand) is not checked, see Service Quotas" in ran.stderr


@pytest.fixture
def with_base_bucket(aws: Aws) -> None:
    aws.make_bucket(BASE_BUCKET)


@pytest.mark.usefixtures("with_base_bucket")
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ACCOUNT_ID", "1234", "ACCOUNT_ID is '1234': set it in"),
        ("ACCOUNT_ID", "", "ACCOUNT_ID is '': set it in"),
        (
            "ACCOUNT_ID",
            "210987654321",
            f"the credentials belong to account {ACCOUNT_ID}, but ACCOUNT_ID is 210987654321",
        ),
        ("REGION", "Oregon", "REGION is 'Oregon': set it in"),
        ("PREFIX", "My-Comfy", "PREFIX is 'My-Comfy': use lowercase"),
        ("MIN_INSTANCES", "-1", "MIN_INSTANCES is '-1': set it in"),
        ("MIN_INSTANCES", "21", "to a whole number from 0 to 20"),
        ("MAX_INSTANCES", "many", "MAX_INSTANCES is 'many': set it in"),
        ("MAX_INSTANCES", "010", "MAX_INSTANCES is '010': set it in"),
        ("VISIBILITY_TIMEOUT", "43201", "to a whole number from 3 to 43200"),
        ("MAX_RECEIVES", "0", "to a whole number from 1 to 1000"),
        ("INSTANCE_TYPE", "large", "INSTANCE_TYPE is 'large': set it in"),
        ("INSTANCE_TYPES", '"g5.2xlarge large"', "INSTANCE_TYPES has 'large': set it in"),
        ("INSTANCE_TYPES", '"g5.xlarge g6.xlarge g5.xlarge"', "INSTANCE_TYPES has g5.xlarge twice: take one out"),
        ("INSTANCE_TYPES", f'"{" ".join(f"g{n}.large" for n in range(41))}"', "has 41 types and AWS allows 40"),
        ("SPOT_PERCENT", "101", "SPOT_PERCENT is '101': set it in"),
        ("SPOT_PERCENT", "50%", "to a whole number from 0 to 100"),
        ("WARM_POOL", "21", "to a whole number from 0 to 20"),
        ("WARM_POOL", "1\nSPOT_PERCENT=50", "AWS keeps no Spot instances in a warm pool: set one of them"),
        ("VOLUME_INIT_RATE", "99", "VOLUME_INIT_RATE is '99': set it in"),
        ("VOLUME_INIT_RATE", "fast", "to a whole number from 100 to 300"),
        ("ALARM_AGE", "1h", "ALARM_AGE is '1h': set it in"),
        ("ALARM_TOPIC", "operators", "ALARM_TOPIC is 'operators': set it in"),
        ("ALARM_TOPIC", f"arn:aws:sns:eu-west-1:{ACCOUNT_ID}:ops", f"to the ARN of an SNS topic in {REGION}"),
        ("ALARM_TOPIC", f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:gone", "but there is no such topic: create it"),
        ("COMFY_HOME", "comfy", "COMFY_HOME is 'comfy': set it in"),
        ("INSTANCE_PROFILE", "a/b", "INSTANCE_PROFILE is 'a/b': set it in"),
        ("ASG_NAME", "a" * 54 + "-${ENV}", "has 65 characters and IAM allows 64: choose a shorter ASG_NAME"),
        ("S3_BUCKET", "ab", "S3_BUCKET is 'ab' for both base and pro: write it with ${ENV}"),
        ("S3_BUCKET", "My.Bucket-${ENV}", "S3_BUCKET is 'My.Bucket-pro': use 3 to 63 lowercase"),
        ("SQS_NAME", "jobs.${ENV}", "SQS_NAME is 'jobs.pro': use at most 76"),
        ("ASG_NAME", "fleet", "ASG_NAME is 'fleet' for both base and pro"),
        ("ASG_NAME", "${FLEET}-${ENV}", "uses ${FLEET}, which is not set"),
        ("ASG_NAME", "$(id)", "(ASG_NAME) is malformed: write NAME=value"),
    ],
)
def test_bad_settings(bundle: Bundle, name: str, value: str, sentence: str) -> None:
    bundle.set(ENV="base", **{name: value})
    assert sentence in refused(bundle, "pro", NO_INSTANCE)


def test_no_base_bucket(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    ran = bundle.run("create_env.sh", "pro", base.instance_id)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert ran.stderr == (
        f"create_env.sh: the base machine's bucket {BASE_BUCKET} does not exist: "
        f"run ./create_env.sh base first, and check S3_BUCKET in {bundle.env_file}\n"
    )
    assert aws.everything("pro") == {}


def test_a_cli_that_is_older_than_a_setting_is_told_of_before_anything_is_made(bundle: Bundle) -> None:
    bundle.set(VOLUME_INIT_RATE="200")
    path = bundle.answer_call(
        "ec2 create-launch-template --generate-cli-skeleton input", '"VolumeInitializationRate"'
    )
    ran = bundle.run_function("check_cli; die_of_problems", "checks", PATH=path)
    assert (ran.returncode, ran.stderr) == (0, "")
    path = bundle.answer_call("ec2 create-launch-template --generate-cli-skeleton input", "{}")
    ran = bundle.run_function("check_cli; die_of_problems", "checks", PATH=path)
    assert ran.returncode == 1
    assert "VOLUME_INIT_RATE is 200, which this AWS CLI does not know (aws-cli/" in ran.stderr


def test_a_topic_that_may_not_be_seen_is_believed(bundle: Bundle) -> None:
    path = bundle.break_call("sns get-topic-attributes", "AuthorizationError")
    bundle.set(ALARM_TOPIC=f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:of-another-team")
    ran = bundle.run_function("check_fleet_settings; check_topic", "checks", PATH=path)
    assert (ran.returncode, ran.stderr) == (0, "")
