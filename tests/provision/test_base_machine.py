"""provision/base_machine.sh and provision/network.sh: what environments are made from, and where they run."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from aws_fixtures import Aws, Bundle, tags_of
from environment_pro import GROUP, NO_INSTANCE, refused
from local_cloud import REGION
from local_network import open_a_way_out


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


ZONES = {"pub": "us-west-2c", "a": "us-west-2a", "b": "us-west-2b"}
NO_WAY = "the private subnets {both} have no way to AWS, so no instance could take a job"


class Network:
    """A VPC with a public subnet and two private ones, none of which leads anywhere yet."""

    def __init__(self, aws: Aws) -> None:
        self.aws, self.ec2 = aws, aws.client("ec2")
        self.vpc = self.ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        (self.main,) = aws.tables(self.vpc)
        self.subnets: dict[str, str] = {}
        for number, (name, zone) in enumerate(ZONES.items()):
            made = self.ec2.create_subnet(VpcId=self.vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=zone)
            self.subnets[name] = made["Subnet"]["SubnetId"]
        aws.open_to_internet(self.vpc, self.subnets["pub"])

    def table(self, subnet: str) -> str:
        """A route table of its own for the subnet."""
        table = self.ec2.create_route_table(VpcId=self.vpc)["RouteTable"]["RouteTableId"]
        self.ec2.associate_route_table(RouteTableId=table, SubnetId=self.subnets[subnet])
        return str(table)

    def route(self, table: str, to: str = "0.0.0.0/0", **target: str) -> None:
        self.ec2.create_route(RouteTableId=table, DestinationCidrBlock=to, **target)

    def nat(self, table: str) -> str:
        return open_a_way_out(self.ec2, self.subnets["pub"], table)

    def transit(self) -> str:
        return str(self.ec2.create_transit_gateway()["TransitGateway"]["TransitGatewayId"])

    def instance(self) -> str:
        """A NAT instance."""
        image = self.ec2.register_image(Name="nat")["ImageId"]
        started = self.ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, SubnetId=self.subnets["pub"])
        return str(started["Instances"][0]["InstanceId"])

    def peering(self) -> str:
        other = self.ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
        made = self.ec2.create_vpc_peering_connection(VpcId=self.vpc, PeerVpcId=other)
        return str(made["VpcPeeringConnection"]["VpcPeeringConnectionId"])

    def firewall(self) -> str:
        """Its endpoint, as AWS Network Firewall makes one."""
        made = self.ec2.create_vpc_endpoint(
            VpcId=self.vpc,
            VpcEndpointType="GatewayLoadBalancer",
            ServiceName=f"com.amazonaws.vpce.{REGION}.vpce-svc-1",
        )
        return str(made["VpcEndpoint"]["VpcEndpointId"])

    def only_ipv6(self) -> None:
        gateway = self.ec2.create_egress_only_internet_gateway(VpcId=self.vpc)["EgressOnlyInternetGateway"]
        self.ec2.create_route(
            RouteTableId=self.main,
            DestinationIpv6CidrBlock="::/0",
            EgressOnlyInternetGatewayId=gateway["EgressOnlyInternetGatewayId"],
        )

    def endpoints(self, *services: str, s3: str = "") -> None:
        for service in services:
            self.aws.make_endpoint(self.vpc, service)
        self.aws.make_endpoint(self.vpc, "s3", [s3 or self.main])

    def public(self, *names: str) -> None:
        for name in names:
            self.aws.open_to_internet(self.vpc, self.subnets[name])

    def give_no_addresses(self, name: str) -> None:
        self.ec2.modify_subnet_attribute(SubnetId=self.subnets[name], MapPublicIpOnLaunch={"Value": False})


def a_nat_gateway_that_is_gone(net: Network) -> None:
    net.ec2.delete_nat_gateway(NatGatewayId=net.nat(net.main))


def a_nat_instance_that_has_ended(net: Network) -> None:
    instance = net.instance()
    net.route(net.main, InstanceId=instance)
    net.ec2.terminate_instances(InstanceIds=[instance])


def all_public_but_one_without_addresses(net: Network) -> None:
    net.public("a", "b")
    net.give_no_addresses("b")


def all_public_without_addresses(net: Network) -> None:
    net.public("a", "b")
    for name in ZONES:
        net.give_no_addresses(name)


WAYS: list[tuple[Callable[[Network], object], str, str]] = [
    (lambda net: net.nat(net.main), "a b", "private"),
    (lambda net: net.nat(net.table("a")), "a", "private; no way to AWS from {b}"),
    (lambda net: net.route(net.main, TransitGatewayId=net.transit()), "a b", "private"),
    (lambda net: net.route(net.main, InstanceId=net.instance()), "a b", "private"),
    (lambda net: net.route(net.main, VpcEndpointId=net.firewall()), "a b", "private"),
    (lambda net: net.endpoints("sqs", "autoscaling", "monitoring"), "a b", "private"),
    (lambda net: net.endpoints("sqs", "autoscaling", "monitoring", s3=net.table("b")), "b", "private; no way to AWS from {a}"),
    (lambda net: net.public("a", "b"), "pub a b", "no subnet is private, so all that give out public addresses are used"),
    (all_public_but_one_without_addresses, "pub a", "no subnet is private, so all that give out public addresses are used"),
    # What leads nowhere. A peered VPC lets nobody through; IPv6 does not reach the APIs' IPv4 addresses.
    (lambda _: None, "", NO_WAY),
    (a_nat_gateway_that_is_gone, "", NO_WAY),
    (a_nat_instance_that_has_ended, "", NO_WAY),
    (lambda net: net.route(net.main, VpcPeeringConnectionId=net.peering()), "", NO_WAY),
    (lambda net: net.route(net.main, "192.168.0.0/16", TransitGatewayId=net.transit()), "", NO_WAY),
    (lambda net: net.only_ipv6(), "", NO_WAY),
    (lambda net: net.endpoints("sqs"), "", "of endpoints is missing: autoscaling (interface, with private DNS)"),
    (lambda net: net.aws.make_endpoint(net.vpc, "sqs"), "", "autoscaling (interface, with private DNS), s3 (gateway, in rtb-"),
    (all_public_without_addresses, "", "no subnet of {vpc} is private, and {all} give out no public addresses"),
]  # fmt: skip


def test_the_fleet_has_the_subnets_with_a_way_out(bundle: Bundle, aws: Aws) -> None:
    networks = [Network(aws) for _ in WAYS]
    for network, (make, _, _) in zip(networks, WAYS, strict=True):
        make(network)
    shell = (
        f"for VPC in {' '.join(network.vpc for network in networks)}; do "
        'PROBLEMS=(); choose_subnets; echo "$SUBNETS|$ZONES|$SUBNETS_ARE|${PROBLEMS[*]}"; done'
    )
    ran = bundle.run_function(shell, "network")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = ran.stdout.splitlines()
    for network, (_, chosen, words), line in zip(networks, WAYS, found, strict=True):
        subnets, zones, are, problems = line.split("|")
        names, private = network.subnets, sorted(network.subnets[name] for name in "ab")
        said = words.format(**names, vpc=network.vpc, both=" ".join(private), all=" ".join(sorted(names.values())))
        if chosen:
            wanted = {network.subnets[name] for name in chosen.split()}
            in_zones = sorted(ZONES[name] for name in chosen.split())
            assert (set(subnets.split(",")), zones.split(","), are, problems) == (wanted, in_zones, said, "")
        else:
            assert (subnets, said in problems) == ("", True), line
            assert "--subnets" in problems


def test_without_the_metrics_endpoint_there_are_no_figures(bundle: Bundle, aws: Aws) -> None:
    network = Network(aws)
    network.endpoints("sqs", "autoscaling")
    ran = bundle.run_function(f"VPC={network.vpc}; choose_subnets; check_endpoint", "network")
    assert ran.returncode == 0
    assert "there is no interface endpoint for monitoring in" in ran.stderr


def test_the_subnets_of_a_group_may_be_named(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()

    def used() -> tuple[str, str]:
        (group,) = aws.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
        return group["VPCZoneIdentifier"], tags_of(group["Tags"]).get("comfy-subnets", "")

    def chosen(asked: str) -> subprocess.CompletedProcess[str]:
        shell = (
            f'VPC={base.vpc}; choose_subnets {asked}; die_of_problems; remember_subnets "{asked}"; echo "$SUBNETS"'
        )
        return bundle.run_function(shell, "network")

    image = aws.client("ec2").describe_instances()["Reservations"][0]["Instances"][0]["ImageId"]
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName="any", LaunchTemplateData=data)
    aws.client("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        LaunchTemplate={"LaunchTemplateName": "any"},
        MinSize=0,
        MaxSize=1,
        VPCZoneIdentifier=base.public,
    )
    assert chosen(base.public).stdout == f"{base.public}\n"
    assert used() == (base.public, "named")
    assert chosen("").stdout == f"{base.public}\n", "they stay without being named again"
    private = ",".join(sorted(base.private))
    assert chosen("auto").stdout == f"{private}\n"
    assert used()[1] == "auto"
    assert chosen("").stdout == f"{private}\n"

    (main,) = set(aws.tables(base.vpc)) - {aws.table_of(base.public)}
    aws.client("ec2").delete_route(RouteTableId=main, DestinationCidrBlock="0.0.0.0/0")
    assert "have no way to AWS, so no instance could take a job" in chosen("").stderr
    ran = chosen(private)
    assert (ran.returncode, ran.stdout) == (0, f"{private}\n"), "whoever names them knows better"
    assert "have no way to AWS that can be seen here: give rtb-" in ran.stderr
    assert used()[1] == "named"


def test_a_subnet_that_is_not_there_cannot_be_named(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()
    other = Network(aws)
    named = other.subnets["a"]
    assert f"--subnets has {named}, which is no subnet of {base.vpc}, the base machine's VPC" in refused(
        bundle, "pro", base.instance_id, "--subnets", named
    )
