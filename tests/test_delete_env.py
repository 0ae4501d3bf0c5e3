"""delete_env.sh, run as it is with the real AWS CLI against moto."""

from __future__ import annotations

from typing import Any

import pytest
from aws_fixtures import Aws, Bundle, aws, aws_server, bundle
from local_cloud import ACCOUNT_ID, REGION

__all__ = ["aws", "aws_server", "bundle"]

BASE_BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-base"
BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"
QUEUE = "simple-comfy-pro-queue"
GROUP = "simple-comfy-pro-asg"
TEMPLATE = f"{GROUP}-template"


def tags(name: str) -> list[dict[str, str]]:
    return [{"Key": "comfy-env", "Value": name}, {"Key": "comfy-prefix", "Value": "simple-comfy"}]


def put_alarm(aws: Aws, name: str, tags: list[dict[str, str]]) -> None:
    aws.client("cloudwatch").put_metric_alarm(
        AlarmName=name,
        Namespace="AWS/SQS",
        MetricName="ApproximateNumberOfMessagesVisible",
        Statistic="Maximum",
        Period=60,
        ComparisonOperator="GreaterThanThreshold",
        EvaluationPeriods=1,
        Threshold=0,
        Tags=tags,
    )


def make_environment(aws: Aws, name: str) -> None:
    """What create_env.sh makes, with an instance in the group, one that has left it, and a full bucket."""
    ec2, sqs, s3, autoscaling = (aws.client(service) for service in ("ec2", "sqs", "s3", "autoscaling"))
    put_alarm(aws, f"simple-comfy-{name}-asg-first-instance", tags(name))
    base = aws.make_base(files=False) if name == "pro" else None
    for queue in (f"simple-comfy-{name}-queue-dlq", f"simple-comfy-{name}-queue"):
        sqs.create_queue(QueueName=queue, tags={"comfy-env": name})
    bucket = f"simple-comfy-{ACCOUNT_ID}-{REGION}-{name}"
    aws.make_bucket(bucket, tag=name, files=("models/model.safetensors", "output/a/日本.png"))
    if base is None:
        return
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    s3.put_object(Bucket=bucket, Key="models/model.safetensors", Body=b"another version")
    s3.delete_object(Bucket=bucket, Key="output/a/日本.png")
    s3.create_multipart_upload(Bucket=bucket, Key="models/unfinished.safetensors")
    specifications = [{"ResourceType": kind, "Tags": tags(name)} for kind in ("image", "snapshot")]
    image = ec2.create_image(InstanceId=base.instance_id, Name="image", TagSpecifications=specifications)["ImageId"]
    ec2.create_launch_template(
        LaunchTemplateName=TEMPLATE,
        LaunchTemplateData={
            "ImageId": image,
            "InstanceType": "g5.2xlarge",
            "TagSpecifications": [{"ResourceType": "instance", "Tags": tags(name)}],
        },
        TagSpecifications=[{"ResourceType": "launch-template", "Tags": tags(name)}],
    )
    ec2.run_instances(LaunchTemplate={"LaunchTemplateName": TEMPLATE}, MinCount=1, MaxCount=1)
    autoscaling.create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        LaunchTemplate={"LaunchTemplateName": TEMPLATE, "Version": "$Default"},
        MinSize=1,
        MaxSize=2,
        VPCZoneIdentifier=",".join(base.private),
        Tags=[{**tag, "PropagateAtLaunch": False} for tag in tags(name)],
    )


def instance_states(aws: Aws) -> list[tuple[bool, str]]:
    """Of every instance: does it belong to an environment, and its state."""
    reservations = aws.client("ec2").describe_instances()["Reservations"]
    instances: list[dict[str, Any]] = [instance for found in reservations for instance in found["Instances"]]
    return sorted(
        ("comfy-env" in [tag["Key"] for tag in instance.get("Tags", [])], instance["State"]["Name"])
        for instance in instances
    )


@pytest.mark.slow
def test_everything_of_the_environment_goes_and_nothing_else(bundle: Bundle, aws: Aws) -> None:
    make_environment(aws, "pro")
    make_environment(aws, "test")
    make_environment(aws, "base")
    ec2 = aws.client("ec2")
    # A snapshot whose image an interrupted run has removed already, and images that only look like ours.
    lost = ec2.create_snapshot(
        VolumeId=ec2.create_volume(AvailabilityZone=f"{REGION}a", Size=1)["VolumeId"],
        TagSpecifications=[{"ResourceType": "snapshot", "Tags": tags("pro")}],
    )["SnapshotId"]
    other = ec2.register_image(Name=f"{GROUP}-image-20260101T000000Z")["ImageId"]
    kept = [aws.everything(name) for name in ("test", "base")]
    assert instance_states(aws) == [(False, "running"), (True, "running"), (True, "running")]

    code, shown = bundle.run_on_terminal("delete_env.sh", "pro", answer="pro", DELETE_BATCH="3")
    assert code == 0, shown
    assert f"All files in {BUCKET} are lost for ever. Type pro to remove the environment:" in shown
    assert shown.count("to be removed") == 11
    assert "already gone" not in shown
    assert lost in shown
    assert "removed, and 4 files or versions in it" in shown
    assert shown.rstrip().endswith("Nothing is left of the environment pro.")
    assert aws.everything("pro") == {}
    assert instance_states(aws) == [(False, "running"), (True, "terminated"), (True, "terminated")]
    assert [aws.everything(name) for name in ("test", "base")] == kept
    assert other in [image["ImageId"] for image in ec2.describe_images(Owners=["self"])["Images"]]

    ran = bundle.run("delete_env.sh", "pro", "--yes")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("already gone") == 8
    assert "Nothing is left of the environment pro." in ran.stdout


def test_what_is_refused_is_named_and_the_rest_goes(bundle: Bundle, aws: Aws) -> None:
    for queue in (f"{QUEUE}-dlq", QUEUE):
        aws.client("sqs").create_queue(QueueName=queue, tags={"comfy-env": "pro"})
    aws.make_bucket(BUCKET, tag="pro")
    path = bundle.break_call(f"sqs delete-queue --queue-url {aws.endpoint}/{ACCOUNT_ID}/{QUEUE}", "AccessDenied")
    ran = bundle.run("delete_env.sh", "pro", "--yes", PATH=path)
    assert ran.returncode == 1
    assert "not removed: An error occurred (AccessDenied)" in ran.stdout
    (sentence,) = ran.stderr.splitlines()
    assert sentence.startswith("delete_env.sh: of the environment pro is left: queue")
    assert QUEUE in sentence
    assert f"{QUEUE}-dlq" not in sentence
    assert list(aws.everything("pro")) == [QUEUE]


def test_what_create_env_did_not_make_is_left_alone(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=("company.txt",))
    aws.client("sqs").create_queue(QueueName=QUEUE)
    put_alarm(aws, f"{GROUP}-first-instance", [])
    ran = bundle.run("delete_env.sh", "pro", "--yes")
    assert ran.returncode == 1
    assert ran.stdout.count("left alone: no tag comfy-env=pro") == 3
    assert (
        f"is left: alarm {GROUP}-first-instance, queue {aws.endpoint}/{ACCOUNT_ID}/{QUEUE}, bucket {BUCKET} ("
        in ran.stderr
    )
    assert aws.files(BUCKET) == {"company.txt": "company.txt"}


def test_files_that_s3_keeps_are_named(bundle: Bundle, aws: Aws) -> None:
    s3 = aws.client("s3")
    place = {"LocationConstraint": REGION}
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration=place, ObjectLockEnabledForBucket=True)
    s3.put_object(Bucket=BUCKET, Key="held.txt", Body=b"x", ObjectLockLegalHoldStatus="ON")
    ran = bundle.run_function(
        f"REFUSED=no; remove_kind bucket $'bucket\\t{BUCKET}\\tpro'; echo $REFUSED", "delete_env.sh"
    )
    assert "not removed: S3 keeps the file held.txt" in ran.stdout
    assert ran.stdout.endswith("yes\n")


def test_instances_that_never_end_are_not_waited_for_without_end(bundle: Bundle, aws: Aws) -> None:
    image = aws.client("ec2").register_image(Name="image")["ImageId"]
    aws.client("ec2").run_instances(
        ImageId=image,
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags("pro")}],
    )
    ran = bundle.run_function("wait_until_gone", "delete_env.sh", GONE_WAIT_SECONDS="0")
    assert ran.returncode == 0
    assert "still ending after 0 seconds" in ran.stdout


@pytest.mark.parametrize("answer", ["", "Pro", "base"])
def test_another_answer_removes_nothing(bundle: Bundle, aws: Aws, answer: str) -> None:
    aws.make_bucket(BUCKET, tag="pro", files=())
    shell = f"ask <<<'{answer}'"
    ran = bundle.run_function(shell, "delete_env.sh")
    assert ran.returncode == 1
    assert f"'{answer}' is not pro: nothing was removed" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "which environment? Give its name: delete_env.sh NAME"),
        (["base"], "base is the machine that environments are made from: it is never removed"),
        (["base", "--yes"], "base is the machine that environments are made from: it is never removed"),
        (["Pro", "--yes"], "the environment's name 'Pro' is not allowed"),
        (["pro"], "there is no terminal to ask on: add --yes to remove pro without a question"),
        (["pro", "more", "--yes"], "the argument 'more' is one too many"),
        (["pro", "--force"], "the option '--force' is not known: see --help"),
    ],
)
def test_bad_arguments(bundle: Bundle, arguments: list[str], sentence: str) -> None:
    ran = bundle.run("delete_env.sh", *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"delete_env.sh: {sentence}")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("S3_BUCKET", BASE_BUCKET), ("SQS_NAME", "simple-comfy-base-queue"), ("ASG_NAME", "asg")]
)
@pytest.mark.parametrize("where", ["file", "shell"])
def test_what_belongs_to_base_is_never_removed(bundle: Bundle, name: str, value: str, where: str) -> None:
    environment = {name: value} if where == "shell" else {}
    if where == "file":
        bundle.set(**{name: value})
    ran = bundle.run("delete_env.sh", "pro", "--yes", **environment)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"{name} is '{value}' for both base and pro" in ran.stderr


def test_another_account_is_refused(bundle: Bundle) -> None:
    ran = bundle.run("delete_env.sh", "pro", "--yes", ACCOUNT_ID="210987654321")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"the credentials belong to account {ACCOUNT_ID}, but ACCOUNT_ID is 210987654321" in ran.stderr


def test_help(bundle: Bundle) -> None:
    ran = bundle.run("delete_env.sh", "-h")
    assert ran.returncode == 0
    assert "Usage: ./delete_env.sh NAME [--yes]" in ran.stdout
