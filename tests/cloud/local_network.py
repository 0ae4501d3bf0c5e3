"""The local cloud's network, where moto's is kinder than AWS: a route whose target is gone leads nowhere."""

from __future__ import annotations

from typing import Any

from moto.ec2.models.route_tables import Route

GONE = {"deleting", "deleted", "failed", "terminated", "shutting-down"}


def route_state(route: Any) -> str:
    """`blackhole` where the target has been deleted, ended or detached. Moto says `active` whatever happens."""
    ec2 = route.route_table.ec2_backend
    for target in (route.nat_gateway, route.instance, route.transit_gateway):
        if target is not None and target.state in GONE:
            return "blackhole"
    internet = str(route.gateway_id).startswith("igw-")
    if internet and getattr(ec2.internet_gateways.get(route.gateway_id), "vpc", None) is None:
        return "blackhole"
    return "active"


def add_to_moto() -> None:
    """Once in a process."""
    setattr(Route, "state", property(route_state))  # noqa: B010 - mypy forbids the other


def open_a_way_out(ec2: Any, public: str, table: str) -> str:
    """A NAT gateway in the public subnet, and a default route to it in the table. Returns the gateway."""
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    gateway = ec2.create_nat_gateway(SubnetId=public, AllocationId=address)["NatGateway"]["NatGatewayId"]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=gateway)
    return str(gateway)
