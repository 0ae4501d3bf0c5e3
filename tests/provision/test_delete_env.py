"""delete_env.sh, run as it is with the real AWS CLI against moto."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import BASE_BUCKET, BUCKET, GROUP, QUEUE, TEMPLATE
from local_cloud import ACCOUNT_ID, REGION
from workplace import Sample, await_that


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


def make_role(aws: Aws, name: str) -> None:
    """The role that create_env.sh makes, to which an operator has attached a policy."""
    iam, role = aws.client("iam"), f"simple-comfy-{name}-asg-worker"
    path = f"/simple-comfy/{REGION}/{name}/"
    iam.create_role(RoleName=role, Path=path, AssumeRolePolicyDocument="{}", Tags=tags(name))
    policy = json.dumps(
        {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
    )
    iam.put_role_policy(RoleName=role, PolicyName="worker", PolicyDocument=policy)
    attached = iam.create_policy(PolicyName=f"company-{name}", PolicyDocument=policy)["Policy"]["Arn"]
    iam.attach_role_policy(RoleName=role, PolicyArn=attached)
    iam.create_instance_profile(InstanceProfileName=role, Path=path, Tags=tags(name))
    iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


def make_environment(aws: Aws, name: str) -> None:
    """What create_env.sh makes, with an instance in the group, one that has left it, and a full bucket."""
    make_role(aws, name)
    aws.client("cloudwatch").put_dashboard(DashboardName=f"simple-comfy-{name}-asg", DashboardBody="{}")
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
@pytest.mark.sampled("stories", 3)
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
    sqs = aws.client("sqs")
    for text in "abc":
        sqs.send_message(QueueUrl=f"{aws.endpoint}/{ACCOUNT_ID}/{QUEUE}", MessageBody=text)
    sqs.receive_message(QueueUrl=f"{aws.endpoint}/{ACCOUNT_ID}/{QUEUE}", VisibilityTimeout=3600)
    # What an instance that has ended has left.
    ec2.create_volume(
        AvailabilityZone=f"{REGION}a", Size=1, TagSpecifications=[{"ResourceType": "volume", "Tags": tags("pro")}]
    )
    other = ec2.register_image(Name=f"{GROUP}-image-20260101T000000Z")["ImageId"]
    kept = [aws.everything(name) for name in ("test", "base")]
    assert instance_states(aws) == [(False, "running"), (True, "running"), (True, "running")]

    code, shown = bundle.run_on_terminal("delete_env.sh", "pro", answer="pro", DELETE_BATCH="3")
    assert code == 0, shown
    assert f"All files in {BUCKET} are lost for ever. Type pro to remove the environment:" in shown
    assert shown.count("to be removed") == 15
    assert "already gone" not in shown
    assert lost in shown
    assert "to be removed, with 1 instance\r\n" in shown
    assert "to be removed, with 2 messages waiting and 1 being worked on" in shown
    assert "to be removed, with 3 files or versions, 58B" in shown
    assert "removed, and 4 files or versions in it" in shown
    assert shown.rstrip().endswith("Nothing is left of the environment pro.")
    assert aws.everything("pro") == {}
    assert instance_states(aws) == [(False, "running"), (True, "terminated"), (True, "terminated")]
    assert [aws.everything(name) for name in ("test", "base")] == kept
    assert other in [image["ImageId"] for image in ec2.describe_images(Owners=["self"])["Images"]]

    ran = bundle.run("delete_env.sh", "pro", "--yes")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("already gone") == 12
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
    ran = bundle.run_function(f"remove_kind bucket $'bucket\\t{BUCKET}\\tpro'; echo $REFUSED", "inventory", "removal")
    assert "not removed: S3 keeps the file held.txt" in ran.stdout
    assert ran.stdout.endswith("yes\n")


def test_instances_that_never_end_are_not_waited_for_without_end(bundle: Bundle, aws: Aws) -> None:
    instance = run_tagged_instance(aws, template=True)
    ran = bundle.run_function("wait_until_gone", "inventory", "removal", GONE_WAIT_SECONDS="0")
    assert ran.returncode == 0
    assert f"still ending after 0 seconds: {instance}; why is in EC2" in ran.stdout


def run_tagged_instance(aws: Aws, *, template: bool) -> str:
    """An instance with the environment's tags, started by a launch template or by hand."""
    ec2 = aws.client("ec2")
    what: dict[str, Any] = {"ImageId": ec2.register_image(Name="image")["ImageId"]}
    if template:
        ec2.create_launch_template(LaunchTemplateName="any", LaunchTemplateData=what | {"InstanceType": "g5.xlarge"})
        what = {"LaunchTemplate": {"LaunchTemplateName": "any"}}
    specifications = [{"ResourceType": "instance", "Tags": tags("pro")}]
    started = ec2.run_instances(MinCount=1, MaxCount=1, TagSpecifications=specifications, **what)
    return str(started["Instances"][0]["InstanceId"])


# --- By tag, by half, by and by ------------------------------------------------------------------------------


def test_what_has_the_tags_goes_under_any_name_but_base_never(bundle: Bundle, aws: Aws) -> None:
    sqs, s3 = aws.client("sqs"), aws.client("s3")
    for queue in ("an-older-name", "simple-comfy-base-queue"):
        sqs.create_queue(QueueName=queue, tags={"comfy-env": "pro", "comfy-prefix": "simple-comfy"})
    for bucket in ("an-older-bucket", BASE_BUCKET):
        aws.make_bucket(bucket, files=("file",))
        s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": tags("pro")})
    put_alarm(aws, "an-older-alarm", tags("pro"))
    put_alarm(aws, f"{GROUP}-x-asg-first-instance", tags("pro-asg-x"))
    base = run_tagged_instance(aws, template=False)

    ran = bundle.run("delete_env.sh", "pro", "--yes")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("left alone: it is the base machine's, although its tags say pro") == 2
    assert [url.rpartition("/")[2] for url in sqs.list_queues()["QueueUrls"]] == ["simple-comfy-base-queue"]
    assert [found["Name"] for found in s3.list_buckets()["Buckets"]] == [BASE_BUCKET]
    assert aws.files(BASE_BUCKET) == {"file": "file"}
    alarms = aws.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert [alarm["AlarmName"] for alarm in alarms] == [f"{GROUP}-x-asg-first-instance"]
    assert base not in ran.stdout
    assert instance_states(aws) == [(True, "running")]


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_what_a_stopped_create_env_has_left_goes(bundle: Bundle, aws: Aws, sample: Sample) -> None:
    base = aws.make_base()
    points = ("s3api put-bucket-tagging", "iam put-role-policy", "autoscaling create-auto-scaling-group")
    for stopped_at in sample(points, 1):
        path = bundle.break_call(stopped_at, "AccessDenied")
        assert bundle.run("create_env.sh", "pro", base.instance_id, PATH=path).returncode == 1
        assert aws.everything("pro"), stopped_at
        ran = bundle.run("delete_env.sh", "pro", "--yes")
        assert (ran.returncode, ran.stderr) == (0, ""), stopped_at
        assert aws.everything("pro") == {}, stopped_at


def test_the_bucket_can_be_kept_and_a_dry_run_keeps_all(bundle: Bundle, aws: Aws) -> None:
    aws.client("sqs").create_queue(QueueName=QUEUE, tags={"comfy-env": "pro"})
    aws.make_bucket(BUCKET, tag="pro", files=("output/picture.png",))
    before = aws.everything("pro")
    ran = bundle.run("delete_env.sh", "pro", "--dry-run")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("Nothing was removed, because of --dry-run.\n")
    assert aws.everything("pro") == before

    ran = bundle.run("delete_env.sh", "pro", "--yes", "--keep-bucket")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "kept, with 1 files or versions, 18B" in ran.stdout
    assert ran.stdout.endswith(f"but its bucket {BUCKET}, which ./create_env.sh pro takes up again.\n")
    assert aws.files(BUCKET) == {"output/picture.png": "output/picture.png"}
    assert QUEUE not in aws.everything("pro")
    assert bundle.run_function("bucket_owner", "bucket").stdout == "pro"


def make_group(aws: Aws) -> None:
    image = aws.client("ec2").register_image(Name="image")["ImageId"]
    data = {"ImageId": image, "InstanceType": "g5.xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName="any", LaunchTemplateData=data)
    aws.client("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        LaunchTemplate={"LaunchTemplateName": "any"},
        MinSize=0,
        MaxSize=1,
        AvailabilityZones=[f"{REGION}a"],
        Tags=[{**tag, "PropagateAtLaunch": False} for tag in tags("pro")],
    )


def test_draining_waits_until_what_is_there_has_been_run(bundle: Bundle, aws: Aws) -> None:
    sqs = aws.client("sqs")
    make_group(aws)
    url = sqs.create_queue(QueueName=QUEUE, tags={"comfy-env": "pro"})["QueueUrl"]
    for text in "ab":
        sqs.send_message(QueueUrl=url, MessageBody=text)
    drain = ["delete_env.sh", "pro", "--drain", "--yes"]

    ran = bundle.run(*drain, DRAIN_WAIT_SECONDS="0")
    assert ran.returncode == 1
    assert f"{QUEUE} is not empty after 0 seconds and nothing was removed: run this again" in ran.stderr
    assert '"Draining"' in aws.everything("pro")[QUEUE]["attributes"]["Policy"]
    bundle.run_function("ensure_queues", "queues")
    policy = aws.everything("pro")[QUEUE]["attributes"]["Policy"]
    assert '"Draining"' not in policy
    assert '"OnlyTls"' in policy

    with ThreadPoolExecutor() as pool:
        running = pool.submit(bundle.run, *drain, DRAIN_QUIET_SECONDS="1")

        def wanted() -> bool:
            groups = aws.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
            return [group["DesiredCapacity"] for group in groups] == [1]

        await_that("an instance is started for what waits", wanted)
        for _ in "ab":
            (message,) = sqs.receive_message(QueueUrl=url, VisibilityTimeout=3600)["Messages"]
            sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        ran = running.result()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "2 messages waiting, 0 being worked on" in ran.stdout
    assert "0 messages waiting, 0 being worked on" in ran.stdout
    assert QUEUE not in aws.everything("pro")


def test_a_queue_that_is_gone_and_a_group_that_aws_removes_already_are_no_trouble(bundle: Bundle, aws: Aws) -> None:
    make_group(aws)
    line = f"queue\\t{aws.endpoint}/{ACCOUNT_ID}/{QUEUE}\\tpro"
    ran = bundle.run_function(f"remove_kind queue $'{line}'; echo $REFUSED", "inventory", "removal")
    assert "already gone\nno\n" in ran.stdout
    path = bundle.answer_call("autoscaling describe-auto-scaling-groups", "Delete in progress")
    ran = bundle.run_function(f"remove_group {GROUP}", "removal", PATH=path)
    assert (ran.returncode, ran.stdout) == (0, "AWS is removing it already")
    assert "groups" in aws.everything("pro")


@pytest.mark.parametrize("answer", ["", "Pro", "base"])
def test_another_answer_removes_nothing(bundle: Bundle, aws: Aws, answer: str) -> None:
    aws.make_bucket(BUCKET, tag="pro", files=())
    ran = bundle.run_function(f"KEEP_BUCKET=no; confirm <<<'{answer}'", "removal")
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
    assert "Usage: ./delete_env.sh NAME [--drain] [--keep-bucket] [--dry-run] [--yes]" in ran.stdout
