"""provision/base_machine.sh and provision/network.sh: what environments are made from, and where they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import (
    NO_INSTANCE,
)


def test_on_the_base_machine_its_folder_and_comfyui_are_looked_at(bundle: Bundle) -> None:
    bundle.set(COMFY_HOME=str(bundle.folder), COMFY_ADDRESS="127.0.0.1:9")
    for file in ("start_service.sh", "parse_job.py", "worker/job.py"):
        (bundle.folder / file).unlink()
    ran = bundle.run_function("check_here; die_of_problems", "base_machine")
    assert ran.returncode == 1
    assert "ComfyUI does not answer on 127.0.0.1:9" in ran.stderr
    for file in ("start_service.sh", "parse_job.py", "worker/job.py", "ComfyUI/main.py"):
        assert f"there is no {bundle.folder}/{file}, so no instance of the fleet could work" in ran.stderr
    assert "/env," not in ran.stderr


def test_a_base_machine_that_has_ended_is_refused(bundle: Bundle, aws: Aws) -> None:
    ec2 = aws.client("ec2")
    image = ec2.register_image(Name="ubuntu")["ImageId"]
    instance = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    ran = bundle.run_function(f'inspect_base {instance}; echo "$KEY_NAME"', "base_machine")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "None\n", "")

    ec2.terminate_instances(InstanceIds=[instance])
    ran = bundle.run_function(f"inspect_base {instance}; die_of_problems", "base_machine")
    assert ran.returncode == 1
    assert (
        f"the instance {instance} is terminated: an image can be made of it when it is running or stopped"
        in ran.stderr
    )


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
    ran = bundle.run_function("find_instance_id", "base_machine", AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata_endpoint)
    assert ran.stdout == NO_INSTANCE
    assert not (bundle.folder / "__pycache__").exists()


def chosen_subnets(bundle: Bundle, vpc: str) -> tuple[set[str], str]:
    ran = bundle.run_function(f'VPC={vpc}; choose_subnets; echo "$SUBNETS|$SUBNETS_ARE"', "network")
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
