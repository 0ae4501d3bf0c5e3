"""The local cloud and a base machine, for the tests of create_env.sh and delete_env.sh.

    aws_fixtures.py FOLDER

alone serves the local cloud on a free loopback port and prints its address. It is a process of its own, so
that it can be reset for every test and no other test shares its state.
"""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from aws_cli_server import AWS_CLI_SOCKET
from botocore.exceptions import ClientError
from local_cloud import ACCOUNT_ID, REGION, LocalCloud
from local_network import open_a_way_out
from places import CLOUD, link_scripts

CALL_LIMIT_S = 300.0
GROUND = ("common", "aws", "names", "fill")
LOOKS_TAG = "looks-until-available"  # on a base instance: how often its new image is still pending when looked at

INTERFACE: dict[str, Any] = {"VpcEndpointType": "Interface", "PrivateDnsEnabled": True}

ENV_FILE = f"""ENV=base
PREFIX=simple-comfy
ACCOUNT_ID={ACCOUNT_ID}
REGION={REGION}
S3_BUCKET=${{PREFIX}}-${{ACCOUNT_ID}}-${{REGION}}-${{ENV}}
SQS_NAME=${{PREFIX}}-${{ENV}}-queue
ASG_NAME=${{PREFIX}}-${{ENV}}-asg
INSTANCE_TYPE=g5.2xlarge
MIN_INSTANCES=0
MAX_INSTANCES=20
"""


# --- The server ------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Serve the local cloud until ended. Prints the address."""
    make_images_take_time()
    with LocalCloud(folder) as cloud:
        print(cloud.endpoint, cloud.aws_cli_socket, flush=True)
        threading.Event().wait()


def make_images_take_time() -> None:
    """Moto has every image at once. Here an image is pending for some looks, and a group refuses it until then."""
    from moto.autoscaling.responses import AutoScalingResponse
    from moto.ec2.exceptions import EC2ClientError
    from moto.ec2.models import EC2Backend
    from moto.ec2.models.elastic_block_store import Snapshot

    create_image, describe_images = EC2Backend.create_image, EC2Backend.describe_images
    create_group = AutoScalingResponse.create_auto_scaling_group
    modify_template = EC2Backend.modify_launch_template

    @functools.wraps(create_image)
    def create_image_pending(self: Any, instance_id: str, *args: Any, **kwargs: Any) -> Any:
        image: Any = create_image(self, instance_id, *args, **kwargs)
        tags = {tag["key"]: tag["value"] for tag in self.get_instance(instance_id).get_tags()}
        image.all_looks = image.looks = int(tags.get(LOOKS_TAG, "0"))
        show_progress(image)
        return image

    def show_progress(image: Any) -> None:
        share = 100 * (image.all_looks - image.looks) // image.all_looks if image.looks > 0 else 100
        image.state = "pending" if image.looks > 0 else "available"
        image.ebs_snapshot.status = "pending" if image.looks > 0 else "completed"
        image.ebs_snapshot.share = f"{share}%"

    @functools.wraps(describe_images)
    def describe_images_as_they_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        images: list[Any] = describe_images(self, *args, **kwargs)
        for image in images:
            if image.state == "pending":
                image.looks -= 1
                show_progress(image)
        return images

    @functools.wraps(create_group)
    def create_group_of_ready_image(self: Any) -> Any:
        # As AWS may: the template is tried first, and an image that is not ready is refused.
        mixed = self._get_param("MixedInstancesPolicy", {}).get("LaunchTemplate", {})
        template = self._get_param("LaunchTemplate") or mixed["LaunchTemplateSpecification"]
        ec2 = self.autoscaling_backend.ec2_backend
        version = ec2.get_launch_template_by_name(template["LaunchTemplateName"]).default_version()
        image = ec2.amis.get(version.image_id)
        if image is None or image.state != "available":
            raise EC2ClientError("ValidationError", f"The image id '[{version.image_id}]' is not available")
        return create_group(self)

    @functools.wraps(modify_template)
    def modify_template_of_ready_image(self: Any, *, template_name: str, default_version: str, **kwargs: Any) -> Any:
        # AWS does not look, but launches would fail until the image is ready.
        version = self.get_launch_template_by_name(template_name).get_version(default_version)
        if self.amis[version.image_id].state != "available":
            raise EC2ClientError("ImageNotReady", f"the image {version.image_id} is not available")
        return modify_template(self, template_name=template_name, default_version=default_version, **kwargs)

    for owner, name, function in (
        (EC2Backend, "create_image", create_image_pending),
        (EC2Backend, "describe_images", describe_images_as_they_end),
        (AutoScalingResponse, "create_auto_scaling_group", create_group_of_ready_image),
        (EC2Backend, "modify_launch_template", modify_template_of_ready_image),
        (Snapshot, "progress", property(lambda snapshot: getattr(snapshot, "share", "100%"))),
    ):
        setattr(owner, name, function)


# --- What the tests use ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A base machine in a VPC of its own: one public subnet, two private ones (by the main route table)."""

    instance_id: str
    vpc: str
    public: str
    private: tuple[str, str]
    security_group: str


class Aws:
    """A running server, seen by the test."""

    def __init__(self, endpoint: str, aws_cli_socket: str) -> None:
        self.endpoint = endpoint
        self.aws_cli_socket = aws_cli_socket
        self._clients: dict[tuple[str, str], Any] = {}

    def environment(self) -> dict[str, str]:
        """What a script under test sees: this server, the test tools, and no AWS but this."""
        return {
            "PATH": f"{CLOUD}/bin:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9",  # the discard port: nobody answers
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "POLL_SECONDS": "0.1",
            AWS_CLI_SOCKET: self.aws_cli_socket,
        }

    def client(self, service: str, region: str = REGION) -> Any:
        """A boto3 client, made once."""
        if (service, region) not in self._clients:
            self._clients[service, region] = boto3.client(
                service,
                endpoint_url=self.endpoint,
                region_name=region,
                aws_access_key_id="test",
                aws_secret_access_key="test",
            )
        return self._clients[service, region]

    def reset(self) -> None:
        """Forget everything."""
        with urllib.request.urlopen(f"{self.endpoint}/moto-api/reset", data=b"", timeout=CALL_LIMIT_S):
            pass

    def make_base(self, region: str = REGION, *, looks_until_available: int = 0, files: bool = True) -> Base:
        """A base machine and, with `files`, its bucket."""
        ec2, iam = self.client("ec2", region), self.client("iam", region)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        public, first, second = (
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=region + zone)["Subnet"][
                "SubnetId"
            ]
            for i, zone in enumerate("aab")
        )
        (main,) = self.tables(vpc, region)
        self.open_to_internet(vpc, public, region)
        open_a_way_out(ec2, public, main)
        self.make_endpoint(vpc, "s3", self.tables(vpc, region), region=region)
        group = ec2.create_security_group(GroupName="comfy", Description="comfy", VpcId=vpc)["GroupId"]
        with suppress(ClientError):  # of another base
            iam.create_instance_profile(InstanceProfileName="comfy")
            ec2.create_key_pair(KeyName="operator")
        image = ec2.register_image(Name="ubuntu")["ImageId"]
        tags = [{"Key": LOOKS_TAG, "Value": str(looks_until_available)}]
        instance = ec2.run_instances(
            ImageId=image,
            InstanceType="g5.2xlarge",
            MinCount=1,
            MaxCount=1,
            SubnetId=first,
            SecurityGroupIds=[group],
            IamInstanceProfile={"Name": "comfy"},
            KeyName="operator",
            TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        )["Instances"][0]["InstanceId"]
        if files:
            self.make_bucket(f"simple-comfy-{ACCOUNT_ID}-{region}-base", region)
        return Base(instance, vpc, public, (first, second), group)

    def open_to_internet(self, vpc: str, subnet: str, region: str = REGION) -> None:
        """Give the subnet a route table of its own with a route to an internet gateway."""
        ec2 = self.client("ec2", region)
        gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
        table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
        ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})

    def make_endpoint(self, vpc: str, service: str, tables: list[str] | None = None, region: str = REGION) -> None:
        """A gateway endpoint in these route tables, or an interface endpoint with its private DNS name."""
        self.client("ec2", region).create_vpc_endpoint(
            VpcId=vpc,
            ServiceName=f"com.amazonaws.{region}.{service}",
            **({"VpcEndpointType": "Gateway", "RouteTableIds": tables} if tables else INTERFACE),
        )

    def tables(self, vpc: str, region: str = REGION) -> list[str]:
        """The route tables of a VPC."""
        tables = self.client("ec2", region).describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])
        return [table["RouteTableId"] for table in tables["RouteTables"]]

    def table_of(self, subnet: str) -> str:
        """The route table of a subnet that has one of its own."""
        filters = [{"Name": "association.subnet-id", "Values": [subnet]}]
        (table,) = self.client("ec2").describe_route_tables(Filters=filters)["RouteTables"]
        return str(table["RouteTableId"])

    def make_bucket(
        self, name: str, region: str = REGION, *, tag: str = "", files: tuple[str, ...] | None = None
    ) -> None:
        """A bucket with `files` (by default what a base machine has), tagged as environment `tag`."""
        s3 = self.client("s3", region)
        place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        s3.create_bucket(Bucket=name, **place)
        if tag:
            s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": [{"Key": "comfy-env", "Value": tag}]})
        if files is None:
            files = ("models/model.safetensors", "input/photo.png", "input/jobs/queued.json", "output/old.png")
        for key in files:
            s3.put_object(Bucket=name, Key=key, Body=key.encode())

    def files(self, bucket: str) -> dict[str, str]:
        """Every key and what is in it."""
        s3 = self.client("s3")
        keys = [found["Key"] for found in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
        return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode() for key in keys}

    def everything(self, name: str, region: str = REGION) -> dict[str, Any]:
        """All that exists of the environment `name`, as AWS describes it. Empty when there is nothing."""
        ec2, sqs, s3 = self.client("ec2", region), self.client("sqs", region), self.client("s3", region)
        autoscaling, cloudwatch = self.client("autoscaling", region), self.client("cloudwatch", region)
        found: dict[str, Any] = {}
        for url in sqs.list_queues(QueueNamePrefix=f"simple-comfy-{name}-").get("QueueUrls", []):
            attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
            tags = sqs.list_queue_tags(QueueUrl=url).get("Tags", {})
            found[url.rpartition("/")[2]] = {"attributes": attributes, "tags": tags}
        for bucket in s3.list_buckets()["Buckets"]:
            if bucket["Name"].endswith(f"{region}-{name}"):
                found["bucket"] = bucket["Name"]
                for key, look, answer in (
                    ("bucket tags", s3.get_bucket_tagging, "TagSet"),
                    ("bucket access", s3.get_public_access_block, "PublicAccessBlockConfiguration"),
                    ("bucket encryption", s3.get_bucket_encryption, "ServerSideEncryptionConfiguration"),
                    ("bucket policy", s3.get_bucket_policy, "Policy"),
                    ("bucket lifecycle", s3.get_bucket_lifecycle_configuration, "Rules"),
                ):
                    with suppress(ClientError):  # how S3 says that there is none
                        found[key] = look(Bucket=bucket["Name"])[answer]
                events = s3.get_bucket_notification_configuration(Bucket=bucket["Name"])
                found["bucket events"] = {key for key in events if key.endswith(("Configuration", "Configurations"))}
                found["bucket files"] = s3.list_objects_v2(Bucket=bucket["Name"]).get("Contents", [])
        mine = [{"Name": "tag:comfy-env", "Values": [name]}]
        found["images"] = ec2.describe_images(Owners=["self"], Filters=mine)["Images"]
        found["snapshots"] = ec2.describe_snapshots(OwnerIds=["self"], Filters=mine)["Snapshots"]
        states = [{"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}]
        found["instances"] = ec2.describe_instances(Filters=mine + states)["Reservations"]
        found["templates"] = ec2.describe_launch_templates(Filters=mine_by_name(name))["LaunchTemplates"]
        if found["templates"]:
            template = found["templates"][0]["LaunchTemplateName"]
            found["versions"] = ec2.describe_launch_template_versions(LaunchTemplateName=template)[
                "LaunchTemplateVersions"
            ]
        groups = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[f"simple-comfy-{name}-asg"])
        found["groups"] = groups["AutoScalingGroups"]
        if found["groups"]:
            found["hooks"] = autoscaling.describe_lifecycle_hooks(AutoScalingGroupName=f"simple-comfy-{name}-asg")[
                "LifecycleHooks"
            ]
            found["policies"] = autoscaling.describe_policies(AutoScalingGroupName=f"simple-comfy-{name}-asg")[
                "ScalingPolicies"
            ]
        found["alarms"] = cloudwatch.describe_alarms(AlarmNamePrefix=f"simple-comfy-{name}-")["MetricAlarms"]
        for alarm in found["alarms"]:
            alarm["Tags"] = cloudwatch.list_tags_for_resource(ResourceARN=alarm["AlarmArn"])["Tags"]
        with suppress(ClientError):
            found["dashboard"] = cloudwatch.get_dashboard(DashboardName=f"simple-comfy-{name}-asg")["DashboardBody"]
        iam, path = self.client("iam", region), f"/simple-comfy/{region}/{name}/"
        found["roles"] = [role for role in iam.list_roles()["Roles"] if role["Path"] == path]
        for role in found["roles"]:
            role["Tags"] = iam.list_role_tags(RoleName=role["RoleName"])["Tags"]
            policies = iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]
            role["Policies"] = [
                iam.get_role_policy(RoleName=role["RoleName"], PolicyName=policy)["PolicyDocument"]
                for policy in policies
            ]
        profiles = iam.list_instance_profiles()["InstanceProfiles"]
        found["profiles"] = [profile for profile in profiles if profile["Path"] == path]
        free = [{"Name": "status", "Values": ["available"]}]
        found["volumes"] = ec2.describe_volumes(Filters=mine + free)["Volumes"]
        return {key: value for key, value in found.items() if value}


def shape(found: Any) -> str:
    """All of it but what differs from run to run: ids, times, digests and the order of lists."""

    def in_order(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: in_order(value[key]) for key in sorted(value)}
        return sorted(map(in_order, value), key=str) if isinstance(value, list) else value

    text = re.sub(r"\b([a-z]+)-[0-9a-f]{17}\b", r"\1-id", json.dumps(found, default=str))
    text = re.sub(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{16}\b", "digest", text)
    text = re.sub(r"\b20\d\d-?\d\d-?\d\d[T ][0-9:.]+(Z|[+]00:00)?|\b[0-9]{10}([.][0-9]+)?\b", "time", text)
    text = re.sub(r"(subnet-id,?)+", "subnets", text)
    text = re.sub(r'("(?:RoleId|InstanceProfileId)": )"\w+"', r'\1"id"', text)
    return json.dumps(in_order(json.loads(text)), indent=1)


def mine_by_name(name: str) -> list[dict[str, Any]]:
    return [{"Name": "launch-template-name", "Values": [f"simple-comfy-{name}-asg-template"]}]


def tags_of(described: list[dict[str, Any]]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in described}


class Bundle:
    """A folder with the scripts and an `env`, as an operator has it."""

    def __init__(self, folder: Path, aws: Aws) -> None:
        self.folder = folder
        self.aws = aws
        self.env_file = folder / "env"
        folder.mkdir()
        link_scripts(folder)
        self.env_file.write_text(ENV_FILE)

    def set(self, **settings: str) -> None:
        """Change lines of `env`, or add them."""
        text = self.env_file.read_text()
        for name, value in settings.items():
            text = re.sub(rf"^{name}=.*\n", "", text, flags=re.MULTILINE)
            # Settings that others refer to stay above them.
            text = f"{name}={value}\n{text}"
        self.env_file.write_text(text)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the bundle, with no terminal."""
        return self._run([str(self.folder / command[0]), *command[1:]], environment)

    def run_function(self, shell: str, *rooms: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `shell` with these rooms of provision/, besides those that all stand on, as environment pro."""
        sources = "".join(f"source {self.folder}/provision/{room}.sh; " for room in (*GROUND, *rooms))
        return self._run(["bash", "-c", f"set -euo pipefail; {sources}choose_env pro; {shell}"], environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.aws.environment() | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CALL_LIMIT_S,
            check=False,
            start_new_session=True,  # so that run_killed ends the script and nothing else
        )

    def run_on_terminal(self, *command: str, answer: str, **environment: str) -> tuple[int, str]:
        """Run a script on a terminal where `answer` is typed. Returns the exit code and all that was shown."""
        controller, terminal = pty.openpty()
        process = subprocess.Popen(
            [str(self.folder / command[0]), *command[1:]],
            env=self.aws.environment() | environment,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        os.write(controller, f"{answer}\n".encode())
        shown = b""
        try:
            while chunk := os.read(controller, 4096):
                shown += chunk
        except OSError:
            pass  # how Linux says that the other side has closed
        os.close(controller)
        return process.wait(timeout=CALL_LIMIT_S), shown.decode()

    def break_call(self, words: str, message: str, times: int = 1000) -> str:
        """A PATH on which `aws ... WORDS ...` fails `times` times with `message`; the rest is the real CLI."""
        refuse = f"printf '\\nAn error occurred (%s) when calling an operation: no.\\n' '{message}' >&2; exit 254"
        return self._replace_call(words, refuse, times)

    def answer_call(self, words: str, answer: str) -> str:
        """A PATH on which `aws ... WORDS ...` prints `answer`; the rest is the real CLI."""
        return self._replace_call(words, f"echo '{answer}'; exit", 1000)

    def _replace_call(self, words: str, command: str, times: int) -> str:
        folder = self.folder / "broken"
        folder.mkdir(exist_ok=True)
        counter = folder / "left"
        counter.write_text(str(times))
        stub = folder / "aws"
        stub.write_text(
            f"""#!/usr/bin/env bash
left=$(<'{counter}')
if [[ " $* " == *" {words} "* ]] && ((left > 0)); then
  echo $((left - 1)) >'{counter}'
  {command}
fi
exec '{CLOUD}/bin/aws' "$@"
"""
        )
        stub.chmod(0o755)
        return f"{folder}:{self.aws.environment()['PATH']}"

    def run_killed(self, *command: str, after: int | str, **environment: str) -> int | None:
        """Run a script that is killed, with all it started, after so many AWS calls or after the first with these words.

        Returns None when it was, else how many calls it made until it ended by itself.
        """
        folder = self.folder.parent / "killing"
        folder.mkdir(exist_ok=True)
        calls = folder / "calls"
        calls.write_text("")
        condition = f"$(wc -l <'{calls}') -eq {after}" if isinstance(after, int) else f'" $* " == *" {after} "*'
        stub = folder / "aws"
        stub.write_text(
            f"""#!/usr/bin/env bash
'{CLOUD}/bin/aws' "$@"
code=$?
echo >>'{calls}'
[[ {condition} ]] && kill -KILL 0
exit $code
"""
        )
        stub.chmod(0o755)
        ran = self.run(*command, PATH=f"{folder}:{self.aws.environment()['PATH']}", **environment)
        assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
        return calls.read_text().count("\n") if ran.returncode == 0 else None


@pytest.fixture(scope="session")
def aws_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    """The server, one for each pytest process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), str(tmp_path_factory.mktemp("cloud"))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    printed = process.stdout.readline().split()
    assert printed, "the local cloud did not start"
    try:
        yield Aws(*printed)
    finally:
        process.terminate()
        process.wait(timeout=CALL_LIMIT_S)


@pytest.fixture
def aws(aws_server: Aws) -> Aws:
    """The server with nothing in it."""
    aws_server.reset()
    return aws_server


@pytest.fixture
def bundle(tmp_path: Path, aws: Aws) -> Bundle:
    return Bundle(tmp_path / "bundle", aws)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
