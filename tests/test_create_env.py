"""create_env.sh, run as it is with the real AWS CLI against moto."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from aws_fixtures import ENV_FILE, Aws, Base, Bundle, aws, aws_server, bundle, tags_of
from local_cloud import ACCOUNT_ID, REGION

__all__ = ["aws", "aws_server", "bundle"]

BASE_BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-base"
BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"
ALARM = "simple-comfy-pro-asg-first-instance"
QUEUE = "simple-comfy-pro-queue"
NO_INSTANCE = "i-0123456789abcdef0"


# --- A whole environment: stopped half-way, completed, made again, changed -----------------------------------


@dataclass
class Story:
    """What the runs printed, and what there was after each."""

    base: Base
    ran: list[subprocess.CompletedProcess[str]] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)


STOPPED, COMPLETED, AGAIN, CHANGED = range(4)


@pytest.mark.slow
def test_an_environment_is_made_completed_left_alone_and_changed(bundle: Bundle, aws: Aws) -> None:
    """One test, because each run of the script takes seconds: the checks below look at what the runs left."""
    story = Story(aws.make_base(looks_until_available=2))

    def run(**environment: str) -> None:
        story.ran.append(bundle.run("create_env.sh", "pro", story.base.instance_id, **environment))
        story.found.append(aws.everything("pro"))

    run(PATH=bundle.break_call("ec2 create-launch-template", "UnauthorizedOperation"))
    check_the_run_that_was_stopped(story)
    run()
    check_the_run_that_completed_it(story)
    for check in (check_queues, check_bucket, check_image, check_template, check_group, check_alarm):
        check(story)
    run()
    check_that_nothing_changed(story)
    bundle.set(MAX_INSTANCES="7", INSTANCE_TYPE="g6.xlarge", VISIBILITY_TIMEOUT="60", MAX_RECEIVES="5")
    bundle.set(INSTANCE_TYPES='"g6.xlarge g5.2xlarge"', SPOT_PERCENT="70")
    group = {"AutoScalingGroupName": "simple-comfy-pro-asg"}
    aws.client("autoscaling").delete_policy(PolicyName=ALARM)
    aws.client("autoscaling").delete_lifecycle_hook(LifecycleHookName="comfy-terminating", **group)
    aws.client("autoscaling").resume_processes(ScalingProcesses=["AZRebalance"], **group)
    aws.open_to_internet(story.base.vpc, story.base.private[1])
    run()
    check_that_settings_were_applied(story)


def check_the_run_that_was_stopped(story: Story) -> None:
    ran, found = story.ran[STOPPED], story.found[STOPPED]
    assert ran.returncode == 1
    assert ran.stderr == (
        "create_env.sh: cannot create the launch template simple-comfy-pro-asg-template: "
        "An error occurred (UnauthorizedOperation) when calling an operation: no.\n"
    )
    assert found["images"]
    assert "templates" not in found
    assert "groups" not in found


def check_the_run_that_completed_it(story: Story) -> None:
    ran = story.ran[COMPLETED]
    assert (ran.returncode, ran.stderr) == (0, "")
    steps = [line.split() for line in ran.stdout.splitlines() if line]
    assert [(step[0], step[-1]) for step in steps if step[0] in ("template", "group", "alarm")] == [
        ("template", "created"),
        ("group", "created"),
        ("alarm", "created"),
    ]
    assert ran.stdout.count("already there") == 4
    assert "0 instances wanted now, 0 to 20 g5.2xlarge" in ran.stdout
    assert "Next: ./send_job.py --env pro" in ran.stdout
    image_ids = [[image["ImageId"] for image in found["images"]] for found in story.found]
    assert image_ids == [image_ids[STOPPED]] * 2


def check_queues(story: Story) -> None:
    found = story.found[COMPLETED]
    for name in (QUEUE, f"{QUEUE}-dlq"):
        attributes = found[name]["attributes"]
        assert attributes["VisibilityTimeout"] == "120"
        assert attributes["ReceiveMessageWaitTimeSeconds"] == "20"
        assert attributes["MessageRetentionPeriod"] == str(14 * 24 * 3600)
        assert attributes["MaximumMessageSize"] == str(1024 * 1024)
        assert found[name]["tags"] == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": name}
    assert json.loads(found[QUEUE]["attributes"]["RedrivePolicy"]) == {
        "deadLetterTargetArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}-dlq",
        "maxReceiveCount": 3,
    }
    assert "RedrivePolicy" not in found[f"{QUEUE}-dlq"]["attributes"]


def check_bucket(story: Story) -> None:
    found = story.found[COMPLETED]
    assert found["bucket"] == BUCKET
    assert set(found["bucket access"].values()) == {True}
    assert tags_of(found["bucket tags"]) == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": BUCKET}
    assert [file["Key"] for file in found["bucket files"]] == ["input/photo.png", "models/model.safetensors"]


def check_image(story: Story) -> None:
    tags = {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": "simple-comfy-pro-asg"}
    (image,), (snapshot,) = story.found[COMPLETED]["images"], story.found[COMPLETED]["snapshots"]
    assert image["SourceInstanceId"] == story.base.instance_id
    assert image["Name"].startswith("simple-comfy-pro-asg-image-2")
    assert tags_of(image["Tags"]) == tags
    assert tags_of(snapshot["Tags"]) == tags
    assert image["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"] == snapshot["SnapshotId"]


def check_template(story: Story) -> None:
    (template,), (version,) = story.found[COMPLETED]["templates"], story.found[COMPLETED]["versions"]
    assert tags_of(template["Tags"])["comfy-env"] == "pro"
    data = version["LaunchTemplateData"]
    assert base64.b64decode(data["UserData"]).decode().startswith("#!/bin/bash\n# First boot")
    assert data["ImageId"] == story.found[COMPLETED]["images"][0]["ImageId"]
    assert data["InstanceType"] == "g5.2xlarge"
    assert data["SecurityGroupIds"] == [story.base.security_group]
    assert data["IamInstanceProfile"] == {"Arn": f"arn:aws:iam::{ACCOUNT_ID}:instance-profile/comfy"}
    assert data["KeyName"] == "operator"
    assert data["MetadataOptions"] == {
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "HttpEndpoint": "enabled",
    }
    tags = {spec["ResourceType"]: tags_of(spec["Tags"]) for spec in data["TagSpecifications"]}
    for resource in ("instance", "volume"):
        assert tags[resource] == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": "simple-comfy-pro"}


def check_group(story: Story) -> None:
    (group,), (hook,) = story.found[COMPLETED]["groups"], story.found[COMPLETED]["hooks"]
    assert (group["MinSize"], group["MaxSize"], group["DesiredCapacity"]) == (0, 20, 0)
    assert set(group["VPCZoneIdentifier"].split(",")) == set(story.base.private)
    assert group["LaunchTemplate"]["LaunchTemplateName"] == "simple-comfy-pro-asg-template"
    assert group["LaunchTemplate"]["Version"] == "$Default"
    assert group["NewInstancesProtectedFromScaleIn"] is True
    assert group["HealthCheckType"] == "EC2"
    assert [process["ProcessName"] for process in group["SuspendedProcesses"]] == ["AZRebalance"]
    assert tags_of(group["Tags"])["comfy-env"] == "pro"
    assert hook["LifecycleHookName"] == "comfy-terminating"
    assert hook["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING"
    assert (hook["HeartbeatTimeout"], hook["DefaultResult"]) == (300, "CONTINUE")


def check_alarm(story: Story) -> None:
    found = story.found[COMPLETED]
    (policy,), (alarm,) = found["policies"], found["alarms"]
    assert {metric["Metric"] for metric in found["groups"][0]["EnabledMetrics"]} == {
        "GroupDesiredCapacity",
        "GroupInServiceInstances",
        "GroupPendingInstances",
        "GroupTotalInstances",
    }
    assert (policy["PolicyName"], policy["PolicyType"]) == (ALARM, "StepScaling")
    assert policy["AdjustmentType"] == "ChangeInCapacity"
    assert policy["StepAdjustments"] == [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}]
    assert policy["EstimatedInstanceWarmup"] == 300
    assert alarm["AlarmName"] == ALARM
    assert alarm["AlarmActions"] == [policy["PolicyARN"]]
    assert tags_of(alarm["Tags"]) == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": ALARM}
    assert (alarm["ComparisonOperator"], alarm["Threshold"]) == ("GreaterThanOrEqualToThreshold", 1)
    assert (alarm["EvaluationPeriods"], alarm["TreatMissingData"]) == (1, "notBreaching")
    measured = {
        metric["Id"]: (stat["Metric"]["MetricName"], stat["Metric"]["Dimensions"][0]["Value"], stat["Period"])
        for metric in alarm["Metrics"]
        if (stat := metric.get("MetricStat"))
    }
    assert measured == {
        "visible": ("ApproximateNumberOfMessagesVisible", QUEUE, 60),
        "desired": ("GroupDesiredCapacity", "simple-comfy-pro-asg", 60),
    }
    returned = [metric for metric in alarm["Metrics"] if metric["ReturnData"]]
    assert [metric["Expression"] for metric in returned] == ["IF(visible > 0 AND desired < 1, 1, 0)"]


def check_that_nothing_changed(story: Story) -> None:
    assert story.found[AGAIN] == story.found[COMPLETED]
    printed = story.ran[AGAIN].stdout
    assert printed.count("already there") == 7
    assert "created" not in printed
    assert "updated" not in printed


def check_that_settings_were_applied(story: Story) -> None:
    found = story.found[CHANGED]
    assert found[QUEUE]["attributes"]["VisibilityTimeout"] == "60"
    assert json.loads(found[QUEUE]["attributes"]["RedrivePolicy"])["maxReceiveCount"] == 5
    (group,) = found["groups"]
    assert group["MaxSize"] == 7
    assert group["VPCZoneIdentifier"] == story.base.private[0]
    assert [process["ProcessName"] for process in group["SuspendedProcesses"]] == ["AZRebalance"]
    assert found["hooks"] == story.found[COMPLETED]["hooks"]
    assert len(found["versions"]) == 2
    (default,) = [version for version in found["versions"] if version["DefaultVersion"]]
    assert default["LaunchTemplateData"]["InstanceType"] == "g6.xlarge"
    assert found["images"] == story.found[COMPLETED]["images"]
    policy = group["MixedInstancesPolicy"]
    assert policy["LaunchTemplate"]["LaunchTemplateSpecification"]["Version"] == "$Default"
    assert [item["InstanceType"] for item in policy["LaunchTemplate"]["Overrides"]] == ["g6.xlarge", "g5.2xlarge"]
    assert policy["InstancesDistribution"] == {
        "OnDemandAllocationStrategy": "prioritized",
        "OnDemandBaseCapacity": 0,
        "OnDemandPercentageAboveBaseCapacity": 30,
        "SpotAllocationStrategy": "price-capacity-optimized",
    }
    assert found["policies"] == story.found[COMPLETED]["policies"]
    printed = story.ran[CHANGED].stdout
    assert printed.count("updated") == 5
    assert "0 to 7 g6.xlarge or g5.2xlarge as jobs come and go.\nSpot instances are 70 % of them.\n" in printed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ENV_FILE, ENV_FILE.replace("ENV=base", "ENV=pro")),
        ("# mine\nENV=test\nMY_ENV=base\nX=y", "# mine\nENV=pro\nMY_ENV=base\nX=y"),
        ("REGION=us-west-2\nS3_BUCKET=a-${ENV}\n", "ENV=pro\nREGION=us-west-2\nS3_BUCKET=a-${ENV}\n"),
    ],
    ids=["as shipped", "another ENV", "no ENV line"],
)
def test_user_data_chooses_the_environment_and_forgets_the_logs(
    bundle: Bundle, tmp_path: Path, before: str, after: str
) -> None:
    user_data = bundle.run_function("user_data").stdout
    assert "home=${COMFY_HOME:-/home/ubuntu/comfy}" in user_data
    home = tmp_path / "comfy"
    (home / "logs" / "old").mkdir(parents=True)
    (home / "logs" / "parse_job.log").write_text("the base machine's")
    (home / "ComfyUI").mkdir()
    (home / "env").write_text(before)
    (home / "env").chmod(0o600)
    for _ in range(2):
        subprocess.run(
            ["bash", "-c", user_data], env={"PATH": os.environ["PATH"], "COMFY_HOME": str(home)}, check=True
        )
        assert (home / "env").read_text() == after
        assert (home / "env").stat().st_mode & 0o777 == 0o600
        assert {path.name for path in home.iterdir()} == {"env", "logs", "ComfyUI"}
        assert list((home / "logs").iterdir()) == []


# --- Bad input: one sentence, and nothing is made ------------------------------------------------------------


def refused(bundle: Bundle, *arguments: str, **environment: str) -> str:
    """Run create_env.sh, which must refuse in one sentence and make nothing. Returns the sentence."""
    ran = bundle.run("create_env.sh", *arguments, **environment)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert ran.stderr.startswith("create_env.sh: ")
    assert bundle.aws.everything("pro") == {}
    assert not bundle.aws.client("s3").list_objects_v2(Bucket=BASE_BUCKET, Prefix="none").get("Contents")
    return ran.stderr


@pytest.fixture
def with_base_bucket(aws: Aws) -> None:
    aws.make_bucket(BASE_BUCKET)


@pytest.mark.usefixtures("with_base_bucket")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "which environment? Give its name: create_env.sh NAME"),
        (["Pro"], "the environment's name 'Pro' is not allowed: use lowercase letters"),
        (["pro_1"], "'pro_1' is not allowed"),
        (["-"], "the option '-' is not known"),
        (["pro-"], "'pro-' is not allowed"),
        (["x" * 40], "has 76 characters and S3 allows 63: choose a shorter name than"),
        (["base"], "base is the machine that environments are made from: choose another name"),
        (["pro", "--fast"], "the option '--fast' is not known: see --help"),
        (["pro", NO_INSTANCE, "more"], "the argument 'more' is one too many"),
        (["pro", "web-1"], "'web-1' is not an instance id: it looks like i-"),
        (["pro", NO_INSTANCE], f"there is no instance {NO_INSTANCE} in {REGION}: give the id"),
        (["pro"], "this is not an EC2 instance"),
    ],
)
def test_bad_arguments(bundle: Bundle, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(bundle, *arguments)


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
        ("COMFY_HOME", "comfy", "COMFY_HOME is 'comfy': set it in"),
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


@pytest.mark.usefixtures("with_base_bucket")
def test_no_settings_file(bundle: Bundle) -> None:
    bundle.env_file.unlink()
    assert f"cannot read the settings file {bundle.env_file}: copy env.example" in refused(bundle, "pro")
    bundle.env_file.mkdir()  # what not even root can read as a file
    assert f"cannot read the settings file {bundle.env_file}" in refused(bundle, "pro")


@pytest.mark.usefixtures("with_base_bucket")
def test_no_aws_cli(bundle: Bundle, tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    assert "the AWS CLI is not installed: install it, see https://" in refused(bundle, "pro", PATH=str(tmp_path))


def test_no_base_bucket(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    ran = bundle.run("create_env.sh", "pro", base.instance_id)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert ran.stderr == (
        f"create_env.sh: the base machine's bucket {BASE_BUCKET} does not exist: "
        f"set up the base machine first, and check S3_BUCKET in {bundle.env_file}\n"
    )
    assert aws.everything("pro") == {}


def test_help(bundle: Bundle) -> None:
    ran = bundle.run("create_env.sh", "--help")
    assert ran.returncode == 0
    assert "Usage: ./create_env.sh NAME [INSTANCE_ID] [--reboot] [--with-output]" in ran.stdout
    assert ran.stdout.rstrip().endswith("is used again.")


# --- The base machine ----------------------------------------------------------------------------------------


def test_a_base_machine_without_a_profile_is_warned_about(bundle: Bundle, aws: Aws) -> None:
    ec2 = aws.client("ec2")
    image = ec2.register_image(Name="ubuntu")["ImageId"]
    instance = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    ran = bundle.run_function(f'inspect_base {instance}; echo "$PROFILE $KEY_NAME"')
    assert (ran.returncode, ran.stdout) == (0, "None None\n")
    assert f"Warning: the base machine {instance} has no instance profile" in ran.stderr

    ec2.terminate_instances(InstanceIds=[instance])
    ran = bundle.run_function(f"inspect_base {instance}")
    assert ran.returncode == 1
    assert (
        f"the instance {instance} is terminated: an image can be made of it when it is running or stopped"
        in ran.stderr
    )


# --- Names ---------------------------------------------------------------------------------------------------


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


class MetadataHandler(BaseHTTPRequestHandler):
    """An instance metadata service that knows one thing, and tells it only to who holds a token."""

    def do_PUT(self) -> None:
        self.answer(b"token" if self.path == "/latest/api/token" else b"")

    def do_GET(self) -> None:
        known = self.path == "/latest/meta-data/instance-id" and self.headers["X-aws-ec2-metadata-token"] == "token"
        self.answer(NO_INSTANCE.encode() if known else b"")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def metadata_endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), MetadataHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_on_the_base_machine_the_id_comes_from_the_metadata_service(bundle: Bundle, metadata_endpoint: str) -> None:
    ran = bundle.run_function("find_instance_id", AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata_endpoint)
    assert ran.stdout == NO_INSTANCE
    assert not (bundle.folder / "__pycache__").exists()


# --- Subnets -------------------------------------------------------------------------------------------------


def chosen_subnets(bundle: Bundle, vpc: str) -> tuple[set[str], str]:
    ran = bundle.run_function(f'VPC={vpc}; choose_subnets; echo "$SUBNETS|$SUBNETS_ARE"')
    subnets, _, are = ran.stdout.strip().partition("|")
    return set(subnets.split(",")), are


def test_a_subnet_is_private_by_its_route_table(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    ec2 = aws.client("ec2")
    # Now the main table leads to the internet, and only what has a table of its own without such a route is private.
    main = ec2.describe_route_tables(
        Filters=[{"Name": "vpc-id", "Values": [base.vpc]}, {"Name": "association.main", "Values": ["true"]}]
    )["RouteTables"][0]["RouteTableId"]
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.create_route(RouteTableId=main, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    own = ec2.create_route_table(VpcId=base.vpc)["RouteTable"]["RouteTableId"]
    ec2.associate_route_table(RouteTableId=own, SubnetId=base.private[1])
    assert chosen_subnets(bundle, base.vpc) == ({base.private[1]}, "private")


def test_without_a_private_subnet_all_are_used(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    for subnet in base.private:
        aws.open_to_internet(base.vpc, subnet)
    assert chosen_subnets(bundle, base.vpc) == (
        {base.public, *base.private},
        "no subnet is private, so all are used",
    )


# --- Bucket --------------------------------------------------------------------------------------------------


def test_the_bucket_gets_what_is_new_and_loses_nothing(bundle: Bundle, aws: Aws) -> None:
    s3 = aws.client("s3")
    aws.make_bucket(BASE_BUCKET)
    assert "2 copied" in bundle.run_function("ensure_bucket no").stdout
    s3.put_object(Bucket=BUCKET, Key="output/job/result.json", Body=b"production's")
    s3.put_object(Bucket=BUCKET, Key="models/own.safetensors", Body=b"production's")
    s3.put_object(Bucket=BASE_BUCKET, Key="models/new.safetensors", Body=b"new")
    s3.delete_object(Bucket=BASE_BUCKET, Key="input/photo.png")
    expected = {
        "input/photo.png": "input/photo.png",
        "models/model.safetensors": "models/model.safetensors",
        "models/own.safetensors": "production's",
        "models/new.safetensors": "new",
        "output/job/result.json": "production's",
    }
    ran = bundle.run_function("ensure_bucket no")
    assert ran.returncode == 0
    assert "1 copied" in ran.stdout
    assert aws.files(BUCKET) == expected
    bundle.run_function("ensure_bucket yes")  # --with-output
    assert aws.files(BUCKET) == expected | {"output/old.png": "output/old.png"}


def test_us_east_1_needs_no_location(bundle: Bundle, aws: Aws) -> None:
    bundle.set(REGION="us-east-1")
    aws.make_bucket(f"simple-comfy-{ACCOUNT_ID}-us-east-1-base", "us-east-1")
    ran = bundle.run_function("ensure_bucket no")
    assert (ran.returncode, ran.stderr) == (0, "")
    bucket = f"simple-comfy-{ACCOUNT_ID}-us-east-1-pro"
    assert aws.client("s3", "us-east-1").get_bucket_location(Bucket=bucket)["LocationConstraint"] is None


def test_a_bucket_with_files_of_unknown_origin_is_used_but_not_claimed(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=("company.txt",))
    ran = bundle.run_function("claim_bucket None")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "delete_env.sh will leave it alone" in ran.stdout
    assert bundle.run_function("bucket_owner").stdout == "None"


def test_an_empty_bucket_is_claimed(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=())  # an earlier run was stopped before it could tag it
    assert bundle.run_function("claim_bucket None; bucket_owner").stdout == "pro"


def test_a_bucket_of_another_environment_is_refused(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, tag="test")
    ran = bundle.run_function("ensure_bucket no")
    assert ran.returncode == 1
    assert f"the bucket {BUCKET} belongs to the environment test: write S3_BUCKET with ${{ENV}}" in ran.stderr


# --- When AWS refuses ----------------------------------------------------------------------------------------


def test_a_queue_name_that_aws_still_keeps_is_waited_for(bundle: Bundle, aws: Aws) -> None:
    path = bundle.break_call("sqs create-queue", "AWS.SimpleQueueService.QueueDeletedRecently", times=3)
    ran = bundle.run_function(f"create_queue {QUEUE} '{{}}'", PATH=path)
    assert ran.returncode == 0
    assert ran.stdout.count("AWS frees its name within a minute, waiting") == 1
    assert QUEUE in aws.everything("pro")


def test_a_queue_name_is_not_waited_for_without_end(bundle: Bundle) -> None:
    path = bundle.break_call("sqs create-queue", "AWS.SimpleQueueService.QueueDeletedRecently")
    ran = bundle.run_function(f"create_queue {QUEUE} '{{}}'", PATH=path, QUEUE_WAIT_SECONDS="1")
    assert ran.returncode == 1
    assert f"AWS still keeps the name of the deleted queue {QUEUE} after 1 seconds" in ran.stderr


FACTS = "IMAGE={image} IMAGE_STATE=pending SUBNETS={subnet} SECURITY_GROUPS=None PROFILE=None KEY_NAME=None; "


@pytest.mark.parametrize("min_instances", ["0", "2"])
def test_a_group_waits_for_the_image_when_it_must(bundle: Bundle, aws: Aws, min_instances: str) -> None:
    """With instances to start at once it waits before, else only when AWS refuses the image."""
    bundle.set(MIN_INSTANCES=min_instances)
    base = aws.make_base(looks_until_available=2)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="slow")["ImageId"]
    facts = FACTS.format(image=image, subnet=base.private[0])
    ran = bundle.run_function(facts + "check_fleet_settings; ensure_template; ensure_group; summarise")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "waiting until it can be used" in ran.stdout
    assert (f"it costs {min_instances} instances day and night" in ran.stdout) == (min_instances != "0")
    assert aws.everything("pro")["groups"][0]["DesiredCapacity"] == int(min_instances)


def test_a_smaller_maximum_never_lowers_what_is_wanted(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    template = "simple-comfy-pro-asg-template"
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName=template, LaunchTemplateData=data)
    aws.client("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName="simple-comfy-pro-asg",
        LaunchTemplate={"LaunchTemplateName": template, "Version": "$Default"},
        MinSize=0,
        MaxSize=9,
        DesiredCapacity=3,
        VPCZoneIdentifier=base.private[0],
    )
    bundle.set(MAX_INSTANCES="2", MIN_INSTANCES="1")
    ran = bundle.run_function(f"SUBNETS={base.private[0]}; check_fleet_settings; ensure_group")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "3 instances are wanted: maximum 2 cannot be set yet, run this again later" in ran.stdout
    (group,) = aws.everything("pro")["groups"]
    assert (group["MinSize"], group["MaxSize"], group["DesiredCapacity"]) == (1, 3, 3)
    assert group["NewInstancesProtectedFromScaleIn"] is True


def test_a_group_gets_spot_instances_or_a_warm_pool_and_goes_back(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    template = "simple-comfy-pro-asg-template"
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName=template, LaunchTemplateData=data)

    def run(**settings: str) -> dict[str, Any]:
        # Twice: the second run finds all as it is wanted.
        shell = f"SUBNETS={base.private[0]} IMAGE_STATE=available; check_fleet_settings; ensure_group; ensure_group"
        ran = bundle.run_function(shell, **settings)
        assert (ran.returncode, ran.stderr) == (0, "")
        shown.append([line.split()[0] + " " + " ".join(line.split()[2:]) for line in ran.stdout.splitlines()])
        (group,) = aws.everything("pro")["groups"]
        return dict(group)

    shown: list[list[str]] = []
    policy = run(SPOT_PERCENT="100")["MixedInstancesPolicy"]
    assert [item["InstanceType"] for item in policy["LaunchTemplate"]["Overrides"]] == ["g5.2xlarge"]
    assert policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 0
    group = run(WARM_POOL="2")
    assert "MixedInstancesPolicy" not in group
    assert group["LaunchTemplate"]["Version"] == "$Default"
    assert group["WarmPoolConfiguration"] == {"MaxGroupPreparedCapacity": 2, "MinSize": 2, "PoolState": "Stopped"}
    group = run(SPOT_PERCENT="40")
    assert "WarmPoolConfiguration" not in group
    assert group["MixedInstancesPolicy"]["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 60
    assert shown == [
        ["group created", "group already there"],
        ["group updated", "pool created", "group already there", "pool already there"],
        ["pool removed", "group updated", "group already there"],
    ], "the pool goes before Spot instances come, because AWS allows only one of them"


# --- The S3 trigger ------------------------------------------------------------------------------------------


def trigger(bundle: Bundle, wanted: str, dry_run: str = "no", **environment: str) -> str:
    """Run the two steps of create_env.sh that make the trigger, and return the line that they report."""
    ran = bundle.run_function(
        f"PARTITION=aws DRY_RUN={dry_run}; look_at_trigger '{wanted}'; ensure_trigger", **environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_the_trigger_is_added_kept_repaired_and_taken_away(bundle: Bundle, aws: Aws) -> None:
    sqs, s3 = aws.client("sqs"), aws.client("s3")
    aws.make_bucket(BUCKET)
    url = sqs.create_queue(QueueName=QUEUE)["QueueUrl"]
    other = {
        "QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}",
        "Events": ["s3:ObjectRemoved:*"],
        "Id": "theirs",
    }
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET,
        NotificationConfiguration={"QueueConfigurations": [other]},
    )

    def events() -> dict[str, Any]:
        answer = s3.get_bucket_notification_configuration(Bucket=BUCKET)
        return {entry["Id"]: entry for entry in answer["QueueConfigurations"]}

    def statements() -> list[dict[str, Any]]:
        answer = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["Policy"])
        policy = answer.get("Attributes", {}).get("Policy")
        return json.loads(policy)["Statement"] if policy else []

    assert trigger(bundle, "") == "", "nobody asked for it"
    assert (list(events()), statements()) == (["theirs"], [])

    path = bundle.break_call("put-bucket-notification-configuration", "Unable to validate the following", times=2)
    said = trigger(bundle, "yes", PATH=path)
    assert said.count("waiting until the queue's new policy counts") == 1
    assert said.endswith("created\n")
    ours = events()["comfy-jobs"]
    assert (ours["QueueArn"], ours["Events"]) == (other["QueueArn"], ["s3:ObjectCreated:*"])
    rules = {rule["Name"].lower(): rule["Value"] for rule in ours["Filter"]["Key"]["FilterRules"]}
    assert rules == {"prefix": "input/jobs/", "suffix": ".json"}
    assert "theirs" in events()
    (statement,) = statements()
    assert statement.pop("Sid").startswith("ComfyTrigger")
    assert statement == {
        "Effect": "Allow",
        "Principal": {"Service": "s3.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": other["QueueArn"],
        "Condition": {
            "ArnEquals": {"aws:SourceArn": f"arn:aws:s3:::{BUCKET}"},
            "StringEquals": {"aws:SourceAccount": ACCOUNT_ID},
        },
    }

    assert "already there" in trigger(bundle, ""), "it stays without being asked for again"
    theirs = {"Sid": "x", "Effect": "Deny", "Principal": "*", "Action": "sqs:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [theirs]})
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": policy})
    assert "updated" in trigger(bundle, "")
    assert [found["Sid"][:12] for found in statements()] == ["x", "ComfyTrigger"]
    assert "to be removed" in trigger(bundle, "no", dry_run="yes")
    assert "comfy-jobs" in events()
    assert "removed" in trigger(bundle, "no")
    assert (list(events()), statements()) == (["theirs"], [theirs])
    assert "already there" in trigger(bundle, "no")


@pytest.mark.slow
def test_with_the_option_an_environment_is_made_with_its_trigger(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--s3-trigger")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"A workflow that is dropped into s3://{BUCKET}/input/jobs/ runs." in ran.stdout
    s3, sqs = aws.client("s3"), aws.client("sqs")
    url = sqs.get_queue_url(QueueName=QUEUE)["QueueUrl"]
    for key in ("input/jobs/a b.json", "input/jobs/note.txt", "input/other.json"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    messages = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
    tested, told = (json.loads(message["Body"]) for message in messages)
    assert tested["Event"] == "s3:TestEvent"
    assert [record["s3"]["object"]["key"] for record in told["Records"]] == ["input%2Fjobs%2Fa+b.json"]
