"""The local cloud: one machine plays AWS, so that the real scripts run unchanged against it.

`LocalCloud` is what demo, tests and soak start inside their own process. Moto's server plays S3, SQS, EC2,
IAM, CloudWatch and the Auto Scaling API. Added here is what moto lacks: group limits, lifecycle states and
hooks, scaling activities, alarms that are evaluated and scale, an instance metadata service per instance, and
"instances": process groups that run the launch template's user data and the systemd units' commands in a copy
of the base folder. Everything listens on loopback, and everything started is ended with it.
"""

from __future__ import annotations

import ast
import configparser
import functools
import gc
import io
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

import boto3
import local_iam
import local_network
import local_storage
from aws_cli_server import AWS_CLI_SOCKET, AwsCliServer
from local_news import LateNews
from local_pool import Launches
from moto.autoscaling.models import InstanceState
from moto.backends import get_backend
from moto.core.exceptions import ServiceException
from moto.ec2.models.instances import Instance
from moto.ec2.models.launch_templates import LaunchTemplateVersion
from moto.ec2.utils import parse_user_data
from moto.iam.access_control import PermissionResult
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import FakeBucket
from moto.servicequotas.exceptions import NoSuchResource
from moto.servicequotas.models import ServiceQuotasBackend
from moto.sqs import models as sqs_models
from places import CLOUD, TESTS
from werkzeug.serving import make_server

logger = logging.getLogger("local_cloud")

# Moto has read what each region offers into 150,000 objects: the collector need not go through them again and again.
gc.freeze()

# Moto counts a queue's messages anew for each that is sent, and asks the clock four times for each of them.
# Its own clock takes some 6 µs, so that a queue of a thousand messages took 50 a second.
vars(sqs_models)["unix_time_millis"] = lambda: time.time() * 1000

ACCOUNT_ID, REGION = local_iam.ACCOUNT_ID, local_iam.REGION
INSTALL_DIR = "/home/ubuntu/comfy"  # where the units expect the bundle; each instance has its own copy
FAULTLESS_KEY = "faultless"  # the access key of those who watch the cloud: they meet no faults
VCPU_QUOTA = 768.0
CLOCK_S = 0.1
SHUTDOWN_S = 10.0


class ApiError(Exception):
    """An error answer of the Auto Scaling API."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Fault:
    """What a call is answered instead: an error with this status and AWS code, after a while."""

    status: int
    code: str
    after_s: float = 0.0
    message: str = "a fault of the local cloud"


@dataclass
class Termination:
    """An instance on its way out of its group, waiting for its lifecycle hook."""

    group_name: str
    hook_name: str
    deadline: float
    heartbeat_s: float


@dataclass
class Activity:
    """An entry of a group's activity history."""

    group_name: str
    group_arn: str
    description: str
    cause: str
    status_code: str
    status_message: str = ""
    activity_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    ended: datetime | None = field(default_factory=lambda: datetime.now(UTC))

    def as_xml(self) -> str:
        """As the API answers it."""
        fields = {
            "ActivityId": self.activity_id,
            "AutoScalingGroupName": self.group_name,
            "AutoScalingGroupARN": self.group_arn,
            "Description": self.description,
            "Cause": self.cause,
            "StartTime": self.started.isoformat(),
            "EndTime": self.ended.isoformat() if self.ended else "",
            "StatusCode": self.status_code,
            "StatusMessage": self.status_message,
            "Progress": "100" if self.ended else "50",
        }
        return "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items() if value)


class LocalCloud:
    """AWS on loopback. `with LocalCloud(folder) as cloud:` starts it and ends everything it started."""

    def __init__(
        self,
        folder: Path,
        *,
        restart_s: float | None = None,
        metrics_period_s: float = 60.0,
        machine: type[Machine] | None = None,
    ) -> None:
        """`restart_s` stands for the units' own RestartSec, `metrics_period_s` for AWS's minute; see Machine."""
        self.folder = folder.resolve()
        self.restart_s = restart_s
        self.metrics_period_s = metrics_period_s
        self.machines: dict[str, Machine] = {}
        self.machine = machine or Machine
        self.terminations: dict[str, Termination] = {}
        self.launches = Launches(self)
        self.activities: list[Activity] = []
        self.launch_failure: str | None = None
        """Tests set it: the StatusMessage with which no group gets an instance, such as a lack of capacity."""
        self.fault: Callable[[str, str], Fault | None] = lambda _service, _operation: None
        """Tests set it: (service, operation) -> what to answer instead. S3 operations are HTTP methods."""
        self.late_news: LateNews | None = None
        """Tests set it, for a time in which AWS is slow to know what has been made."""
        self.policies: dict[str, Callable[[], list[Any]]] = {}
        """By access key: what returns the caller's policies, read at each call. Who has none may do all."""
        self.denied: list[str] = []
        """Every call that was refused for want of a permission, in AWS's words."""
        self._bases: set[str] = set()
        self._launched_at: dict[str, float] = {}
        self._measured_at = time.monotonic()
        self._points: dict[str, deque[float | None]] = {}  # of the alarms that look at more than the last minute
        self.minutes = 0  # how often the alarms were evaluated
        self._lock = threading.RLock()
        self._sqs_lock, self._s3_lock = threading.Lock(), threading.Lock()
        self._clients: dict[str, Any] = {}
        self._clients_lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._ended = threading.Event()
        # Moto's own thousand images take two seconds, and nobody asks for another than the first.
        os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
        image = self._ec2().register_image("ubuntu")
        image.architecture, image.owner_id = "x86_64", "099720109477"  # its maker's, not the account's own
        setattr(ServiceQuotasBackend, "get_service_quota", get_service_quota)  # noqa: B010 - or mypy would object
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        # Moto does not look at a bucket policy's conditions, so it would refuse everything for want of TLS.
        setattr(FakeBucket, "get_permission", lambda *_: PermissionResult.NEUTRAL)  # noqa: B010 - mypy forbids the other
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler)
        self._aws_cli = None if AWS_CLI_SOCKET in os.environ else AwsCliServer()
        self.aws_cli_socket = self._aws_cli.socket if self._aws_cli else os.environ[AWS_CLI_SOCKET]
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalCloud:
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        threading.Thread(target=self._run_clock, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.switch_off_all()
        self._server.shutdown()
        if self._aws_cli:
            self._aws_cli.end()

    def environment(self) -> dict[str, str]:
        """Variables that make the CLI and boto3 use this cloud, and nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            AWS_CLI_SOCKET: self.aws_cli_socket,
        }

    def client(self, service: str) -> Any:
        """A boto3 client of this cloud, whatever the process environment says, which meets no faults; made once."""
        with self._clients_lock:
            if service not in self._clients:
                self._clients[service] = boto3.client(
                    service,
                    endpoint_url=self.endpoint,
                    region_name=REGION,
                    aws_access_key_id=FAULTLESS_KEY,
                    aws_secret_access_key="local",
                )
            return self._clients[service]

    def allow_only(self, access_key: str, *policies: str) -> dict[str, str]:
        """Let a caller do what these policies say. Returns the variables that make a process this caller."""
        documents = [json.loads(policy) for policy in policies]
        self.policies[access_key] = lambda: documents
        return {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": "local"}

    def instance_state(self, instance_id: str) -> str:
        """EC2's word for the instance: running, terminated, ..."""
        instance = self._ec2_instance(instance_id)
        return str(instance.state) if instance else "terminated"

    def instance_type(self, instance_id: str) -> str:
        """g5.2xlarge, ..."""
        return str(self._ec2_instance(instance_id).instance_type)

    def switch_off_all(self) -> None:
        """End every instance's processes."""
        with self._lock:
            machines = list(self.machines.values())
        for thread in [machine.switch_off() for machine in machines]:
            thread.join()

    # --- The base machine ---------------------------------------------------------------------------------

    def make_base(self, folder: Path) -> Machine:
        """A VPC with a public and two private subnets, and in it the base instance living in `folder`."""
        ec2, iam = self.client("ec2"), self.client("iam")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        zones = [zone["ZoneName"] for zone in ec2.describe_availability_zones()["AvailabilityZones"]]
        subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
            for i, zone in enumerate([zones[0], zones[0], zones[1]])
        ]
        tables = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"]
        ec2.create_vpc_endpoint(
            VpcId=vpc,
            VpcEndpointType="Gateway",
            ServiceName=f"com.amazonaws.{REGION}.s3",
            RouteTableIds=[table["RouteTableId"] for table in tables],
        )
        gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
        public = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        ec2.create_route(RouteTableId=public, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
        ec2.associate_route_table(RouteTableId=public, SubnetId=subnets[0])
        local_network.open_a_way_out(ec2, subnets[0], tables[0]["RouteTableId"])
        security_group = ec2.create_security_group(GroupName="comfy", Description="comfy", VpcId=vpc)["GroupId"]
        with suppress(iam.exceptions.EntityAlreadyExistsException):  # of another base
            iam.create_role(RoleName="comfy", AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName="comfy")
            iam.add_role_to_instance_profile(InstanceProfileName="comfy", RoleName="comfy")
        instance_id = ec2.run_instances(
            ImageId=ec2.describe_images()["Images"][0]["ImageId"],
            InstanceType="g5.2xlarge",
            MinCount=1,
            MaxCount=1,
            SubnetId=subnets[0],
            SecurityGroupIds=[security_group],
            IamInstanceProfile={"Name": "comfy"},
            TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "comfy-base"}]}],
        )["Instances"][0]["InstanceId"]
        self._bases.add(instance_id)
        machine = self.machines[instance_id] = self.machine(self, instance_id, folder.resolve())
        return machine

    # --- The clock ----------------------------------------------------------------------------------------

    def _run_clock(self) -> None:
        while not self._ended.wait(CLOCK_S):
            try:
                with self._lock:
                    self._tick()
            except Exception:
                logger.exception("the clock goes on")

    def _tick(self) -> None:
        """Give groups what they miss, boot it, end what EC2 has terminated, let hooks run out, look at alarms."""
        for group in list(self._autoscaling().autoscaling_groups.values()):
            self.launches.tick(group)
            self._reconcile(group)
            for state in list(group.instance_states):
                if state.instance_id not in self.machines and state.lifecycle_state in ("InService", "Pending:Wait"):
                    self.boot(state, "InService")
        for instance_id, machine in self.machines.items():
            instance = self._ec2_instance(instance_id)
            if machine.is_on() and (instance is None or instance.state in ("terminated", "shutting-down")):
                machine.switch_off()
        for instance_id, termination in list(self.terminations.items()):
            if time.monotonic() > termination.deadline:
                logger.warning("%s: hook %s ran out", instance_id, termination.hook_name)
                self._proceed(instance_id)
        if time.monotonic() >= self._measured_at + self.metrics_period_s:
            self._measured_at = time.monotonic()
            for alarm in list(self._cloudwatch().alarms.values()):
                self._evaluate(alarm)
            self.minutes += 1

    def boot(self, state: Any, target: str) -> None:
        """Switch an instance on for the first time; `target` is what its group wants of it."""
        instance = state.instance
        user_data = instance.user_data.decode() if instance.user_data else ""
        machine = self.machine(self, instance.id, self.folder / "instances" / instance.id)
        group = state.auto_scaling_group
        profile = local_iam.template_data(group.ec2_launch_template, group.launch_template_version).get(
            "IamInstanceProfile"
        )
        if profile:  # else it does what it likes, for the tests that make a template of their own
            self.policies[instance.id] = lambda: local_iam.policies_of_profile(profile)
            machine.give_credentials(instance.id)
        machine.boot(self.folder / "images" / instance.image_id, user_data)
        machine.metadata["autoscaling/target-lifecycle-state"] = target
        self.machines[instance.id] = machine  # last: whoever finds it here may change what it is told

    def _autoscaling(self) -> Any:
        return get_backend("autoscaling")[ACCOUNT_ID][REGION]

    def _cloudwatch(self) -> Any:
        return get_backend("cloudwatch")[ACCOUNT_ID][REGION]

    def _ec2(self) -> Any:
        return get_backend("ec2")[ACCOUNT_ID][REGION]

    def _ec2_instance(self, instance_id: str) -> Any:
        return self._ec2().get_instance_by_id(instance_id)

    # --- Capacity -----------------------------------------------------------------------------------------

    def _set_capacity(self, group: Any, wanted: int, request: str) -> None:
        before, group.desired_capacity = group.desired_capacity, wanted
        self._reconcile(group, f"{request} changing the desired capacity from {before} to {wanted}.")

    def _reconcile(self, group: Any, cause: str = "") -> None:
        """Launch what the group misses or take out what is too much. `cause` is empty where only time went by."""
        there = [state for state in group.instance_states if state.lifecycle_state in ("InService", "Pending:Wait")]
        before, wanted = len(there), group.desired_capacity
        is_suspended = any(process["ProcessName"] == "Launch" for process in group.suspended_processes)
        if before == wanted or (wanted > before and is_suspended):
            return
        verb, side = ("started", "increasing") if wanted > before else ("taken out of service", "shrinking")
        difference = (
            f"an instance was {verb} in response to a difference between desired and actual capacity, "
            f"{side} the capacity from {before} to {wanted}."
        )
        causes = "  ".join(f"At {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {why}" for why in (cause, difference) if why)
        if wanted > before:
            self._launch(group, wanted - before, causes, asked=bool(cause))
        else:
            self._scale_in(group, before - wanted, causes, asked=bool(cause))

    def _launch(self, group: Any, count: int, cause: str, *, asked: bool) -> None:
        failure = self.launch_failure
        count -= self.launches.from_pool(group, count)
        launched: list[Any] = []
        if failure is None and count:
            try:
                launched = self.new_instances(group, count)
            except ServiceException as error:  # an image that is gone, for example
                failure = f"{error} Launching EC2 instance failed."
        if failure is not None:
            self._refuse(
                group, f"Launching a new EC2 instance.  Status Reason: {failure}", cause, "Failed", failure, asked
            )
            return
        for state in launched:
            self.launches.begin(state, "Pending")
            description = f"Launching a new EC2 instance: {state.instance_id}"
            self.activities.append(Activity(group.name, group.arn, description, cause, "Successful"))

    def new_instances(self, group: Any, count: int) -> list[Any]:
        """Have EC2 make instances for a group."""
        known = {state.instance_id for state in group.instance_states}
        template = group.ec2_launch_template
        version = str(template.get_version(group.launch_template_version).number) if template else None
        group.replace_autoscaling_group_instances(count, group.get_propagated_tags())
        launched = [state for state in group.instance_states if state.instance_id not in known]
        for state in launched:
            state.launched_version = version
            self._launched_at[state.instance_id] = time.monotonic()
            if template is not None:  # moto forgets the tags
                state.instance.add_tags(
                    local_iam.template_tags(template, group.launch_template_version).get("instance", {})
                    | {"aws:ec2launchtemplate:id": template.id}
                )
        return launched

    def hooks(self, group_name: str) -> list[Any]:
        """A group's lifecycle hooks."""
        return list(self._autoscaling().describe_lifecycle_hooks(group_name))

    def _scale_in(self, group: Any, count: int, cause: str, *, asked: bool) -> None:
        """AWS takes no instance that is protected, and lets the others pass through their hook."""
        free = [state for state in group.active_instances() if not state.protected_from_scale_in][:count]
        for state in free:
            self._begin_termination(state, f"{cause}  Instance {state.instance_id} was selected for termination.")
        if len(free) < count:
            message = (
                "Could not scale to desired capacity because all remaining instances are protected from scale-in."
            )
            self._refuse(group, message, cause, "Cancelled", message, asked)

    def _refuse(self, group: Any, description: str, cause: str, code: str, message: str, asked: bool) -> None:
        """Tell what does not come to be: when it was asked for, and once a period, because AWS goes on trying."""
        own = [activity for activity in self.activities if activity.group_arn == group.arn]
        since = (datetime.now(UTC) - own[-1].started).total_seconds() if own else 0.0
        if asked or not own or own[-1].status_message != message or since >= self.metrics_period_s:
            self.activities.append(Activity(group.name, group.arn, description, cause, code, message))

    # --- CloudWatch alarms --------------------------------------------------------------------------------

    def _evaluate(self, alarm: Any) -> None:
        """One minute of an alarm on a metric math expression. What is not understood is said, and left alone.

        A longer period is so many minutes, each of which must be as the whole is to be.
        """
        try:
            (expression,) = [query.expression for query in alarm.metric_data_queries if query.expression]
            stats = {query.id: query.metric_stat for query in alarm.metric_data_queries if query.metric_stat}
            value = metric_math(expression, {name: self._measure(stat.metric) for name, stat in stats.items()})
            minutes = alarm.evaluation_periods * max(int(stat.period) for stat in stats.values()) // 60
            points = self._points.setdefault(alarm.alarm_arn, deque()) if minutes > 1 else deque[float | None]()
            points.append(value)
            while len(points) > minutes:
                points.popleft()
            state = alarm_state(alarm, [*[None] * (minutes - len(points)), *points])
            if state != alarm.state_value:
                alarm.update_state(f"{expression} is {value}", "{}", state)
            if state == "ALARM" and value is not None and alarm.actions_enabled:
                for action in alarm.alarm_actions:
                    if ":autoscaling:" in action:
                        self._scale_out(alarm, action, value)
        except (ValueError, KeyError) as error:
            logger.error("the alarm %s is not evaluated: %s", alarm.name, error)

    def _measure(self, metric: Any) -> float | None:
        """The latest data point of a metric that AWS publishes, None where it publishes none."""
        (name,) = [dimension.value for dimension in metric.dimensions]
        group = self._autoscaling().autoscaling_groups.get(name)
        published = group is not None and metric.metric_name in group.metrics
        with self._sqs_lock:
            queue = get_backend("sqs")[ACCOUNT_ID][REGION].queues.get(name)
            match metric.namespace, metric.metric_name:
                case "AWS/SQS", "ApproximateNumberOfMessagesVisible":
                    return float(queue.approximate_number_of_messages) if queue else None
                case "AWS/SQS", "ApproximateNumberOfMessagesNotVisible":
                    return float(queue.approximate_number_of_messages_not_visible) if queue else None
                case "AWS/SQS", "ApproximateAgeOfOldestMessage":
                    sent_ms = [message.sent_timestamp or 0 for message in queue._messages] if queue else []
                    return time.time() - min(sent_ms) / 1000 if sent_ms else None
                case "AWS/AutoScaling", "GroupDesiredCapacity":
                    return float(group.desired_capacity) if published else None
                case "AWS/AutoScaling", "GroupInServiceInstances":
                    states = [state.lifecycle_state for state in group.instance_states] if published else []
                    return float(states.count("InService")) if published else None
        raise ValueError(f"the metric {metric.namespace} {metric.metric_name} is not understood")

    def _scale_out(self, alarm: Any, action: str, value: float) -> None:
        """A step scaling policy. An instance that is warming up is no capacity yet, but already counts as added."""
        (policy,) = [policy for policy in self._autoscaling().policies.values() if policy.arn == action]
        if (policy.policy_type, policy.adjustment_type) != ("StepScaling", "ChangeInCapacity"):
            raise ValueError(f"{policy.policy_type} with {policy.adjustment_type} is not understood")
        group = self._autoscaling().autoscaling_groups[policy.auto_scaling_group_name]
        (step,) = policy.step_adjustments
        if not float(step["MetricIntervalLowerBound"]) <= value - alarm.threshold:
            return
        warm_since = time.monotonic() - float(policy.estimated_instance_warmup)
        warm = [
            state for state in group.active_instances() if self._launched_at.get(state.instance_id, 0.0) <= warm_since
        ]
        wanted = min(len(warm) + int(step["ScalingAdjustment"]), group.max_size)
        if wanted > group.desired_capacity:
            request = f"a monitor alarm {alarm.name} in state ALARM triggered policy {policy.name}"
            self._set_capacity(group, wanted, request)

    # --- The Auto Scaling API, where moto has gaps --------------------------------------------------------

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The WSGI application: ours first, then moto's."""
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        scope = re.search(r"Credential=([^/]+)/[0-9]+/[^/]+/(\w+)/", environ.get("HTTP_AUTHORIZATION", ""))
        who, service = scope.groups() if scope else ("", "")
        parameters = dict(parse_qsl(body.decode(errors="replace"))) if service != "s3" else {}
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        action = parameters.get("Action") or target.rpartition(".")[2] or environ["REQUEST_METHOD"]
        fault = self.fault(service, action) if who != FAULTLESS_KEY else None
        if fault is not None:
            return self._answer_fault(fault, start_response, service, json_protocol=bool(target))
        refusal = self._refuse_without_permission(who, service, action, environ, body, parameters)
        if refusal is not None:
            return self._answer_fault(refusal, start_response, service, json_protocol=bool(target))
        if local_storage.has_run_out(environ["QUERY_STRING"]):
            late_fault = Fault(403, "AccessDenied", message="Request has expired")
            return self._answer_fault(late_fault, start_response, "s3", json_protocol=False)
        if self.late_news is not None and who != FAULTLESS_KEY:
            late = self.late_news.answer(service, action, json.loads(body) if target else parameters, environ)
            if isinstance(late, tuple):
                status, code, message = late
                late_fault = Fault(status, code, message=message)
                return self._answer_fault(late_fault, start_response, service, json_protocol=bool(target))
            if late is not None:
                start_response("200 OK", [("Content-Type", "text/xml")])
                return [late.encode()]
        if service == "s3" and action == "GET" and environ["QUERY_STRING"] == "notification":
            return self._answer_notifications(environ, start_response)
        handler = getattr(self, f"_on_{service}_{action}", None)
        if handler is None:
            if target == "AmazonSQS.ReceiveMessage":
                body = self._await_message(json.loads(body), environ["werkzeug.socket"])
                environ.update({"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))})
            # Moto's SQS loses messages and its S3 overwrites objects when two calls come at the same moment.
            # A file that comes into input/jobs/ may be a message, too.
            is_sent = service == "sqs" or "/input/jobs/" in environ["PATH_INFO"]
            is_conditional = "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ
            lock = self._sqs_lock if is_sent else self._s3_lock if is_conditional else None
            with lock or nullcontext():
                return [b"".join(self._moto(environ, start_response))]

        motos_start: list[Any] = []

        def pass_on() -> bytes:
            changed = urlencode(parameters).encode()
            environ.update({"wsgi.input": io.BytesIO(changed), "CONTENT_LENGTH": str(len(changed))})
            return b"".join(self._moto(environ, lambda *start: motos_start.extend(start)))

        try:
            with self._lock:
                answer = handler(parameters, pass_on)
        except ApiError as error:
            text = (
                f"<ErrorResponse><Error><Type>Sender</Type><Code>{error.code}</Code>"
                f"<Message>{escape(str(error))}</Message></Error><RequestId>local</RequestId></ErrorResponse>"
            )
            start_response("400 Bad Request", [("Content-Type", "text/xml")])
            return [text.encode()]
        if isinstance(answer, bytes):
            start_response(*motos_start)
            return [answer]
        start_response("200 OK", [("Content-Type", "text/xml")])
        text = (
            f'<{action}Response xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">'
            f"<{action}Result>{answer}</{action}Result>"
            f"<ResponseMetadata><RequestId>local</RequestId></ResponseMetadata></{action}Response>"
        )
        return [text.encode()]

    def _refuse_without_permission(
        self,
        who: str,
        service: str,
        action: str,
        environ: dict[str, Any],
        body: bytes,
        parameters: dict[str, str],
    ) -> Fault | None:
        """What a caller with policies is answered when they do not allow the call."""
        policies = self.policies.get(who)
        if policies is None:
            return None
        call = json.loads(body) if "HTTP_X_AMZ_TARGET" in environ else parameters
        with self._lock:
            wanted = local_iam.accesses(service, action, call, environ, body)
            missing = [access for access in wanted if not local_iam.is_allowed(policies(), access)]
        if not missing:
            return None
        message = f"User: {who} is not authorized to perform: {missing[0].action} on resource: {missing[0].resource}"
        self.denied.append(message)
        logger.warning(message)
        codes = {
            "ec2": "UnauthorizedOperation",
            "tagging": "AccessDeniedException",
            "servicequotas": "AccessDeniedException",
        }
        return Fault(403, codes.get(service, "AccessDenied"), message=message)

    def _answer_notifications(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """What moto keeps but does not tell: that the bucket's events go to EventBridge."""
        start: list[Any] = []
        answer = b"".join(self._moto(environ, lambda *values: start.extend(values)))
        bucket = get_backend("s3")[ACCOUNT_ID]["aws"].buckets.get(environ["PATH_INFO"].strip("/"))
        configuration = bucket.notification_configuration if bucket else None
        if configuration is not None and configuration.event_bridge is not None:
            name = b"NotificationConfiguration"
            inside = b"<EventBridgeConfiguration/></" + name + b">"
            answer = re.sub(
                rb"/>$|</" + name + rb">$", lambda end: (b">" if end[0] == b"/>" else b"") + inside, answer
            )
        headers = [(key, value) for key, value in start[1] if key.lower() != "content-length"]
        start_response(start[0], [*headers, ("Content-Length", str(len(answer)))])
        return [answer]

    def _await_message(self, call: dict[str, Any], caller: socket.socket) -> bytes:
        """Poll here for as long as the caller polls, so that moto, which is locked meanwhile, need not."""
        limit = time.monotonic() + call.get("WaitTimeSeconds", 0)
        queues = get_backend("sqs")[ACCOUNT_ID][REGION].queues
        queue = queues.get(call["QueueUrl"].rpartition("/")[2])
        while queue and not queue.messages and time.monotonic() < limit and not self._ended.is_set():
            with suppress(BlockingIOError):
                if not caller.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    raise ConnectionAbortedError("the worker is gone: no message for it")
            time.sleep(0.05)
        return json.dumps(call | {"WaitTimeSeconds": 0}).encode()

    def _answer_fault(
        self, fault: Fault, start_response: Callable[..., Any], service: str, *, json_protocol: bool
    ) -> Iterable[bytes]:
        self._ended.wait(fault.after_s)
        if json_protocol:
            headers = [("Content-Type", "application/x-amz-json-1.0")]
            text = json.dumps({"__type": f"com.amazonaws#{fault.code}", "message": fault.message})
        else:
            headers = [("Content-Type", "text/xml")]
            error = f"<Code>{fault.code}</Code><Message>{escape(fault.message)}</Message>"
            text = f"<ErrorResponse><Error>{error}</Error><RequestId>local</RequestId></ErrorResponse>"
            if service == "s3":
                text = f"<Error>{error}</Error>"
        start_response(f"{fault.status} Fault", headers)
        return [text.encode()]

    def _on_ec2_CreateImage(self, parameters: dict[str, str], pass_on: Callable[[], bytes]) -> bytes:  # noqa: N802
        # moto answers 500 to tags for the snapshots, so they are set afterwards.
        snapshot_tags = {}
        for prefix in [
            name.removesuffix("ResourceType") for name, value in parameters.items() if value == "snapshot"
        ]:
            ours = {name: parameters.pop(name) for name in list(parameters) if name.startswith(prefix)}
            tags = re.findall(r"Tag\.(\d+)\.Key", " ".join(ours))
            snapshot_tags = {ours[f"{prefix}Tag.{n}.Key"]: ours[f"{prefix}Tag.{n}.Value"] for n in tags}
        answer = pass_on()
        match = re.search(rb"<imageId>([^<]+)</imageId>", answer)
        if match is None:
            return answer
        image_id = match[1].decode()
        if snapshot_tags:
            self._ec2().create_tags([self._ec2().amis[image_id].ebs_snapshot.id], snapshot_tags)
        if parameters["InstanceId"] in self._bases:
            self.machines[parameters["InstanceId"]].copy_disk(self.folder / "images" / image_id)
        return answer

    def _on_autoscaling_CreateAutoScalingGroup(  # noqa: N802
        self, parameters: dict[str, str], pass_on: Callable[[], bytes]
    ) -> bytes:
        name = parameters["AutoScalingGroupName"]
        wanted = int(parameters.get("DesiredCapacity", parameters["MinSize"]))
        parameters["DesiredCapacity"] = "0"
        answer = pass_on()
        if not is_error(answer):
            prefix = "LifecycleHookSpecificationList.member.1."
            if f"{prefix}LifecycleHookName" in parameters:
                self._autoscaling().create_lifecycle_hook(
                    parameters[f"{prefix}LifecycleHookName"],
                    name,
                    parameters[f"{prefix}LifecycleTransition"],
                    int(parameters.get(f"{prefix}HeartbeatTimeout", "3600")),
                    parameters.get(f"{prefix}DefaultResult", "ABANDON"),
                )
            self._set_capacity(self._group(name), wanted, "a user request created an AutoScalingGroup")
        return answer

    def _on_autoscaling_UpdateAutoScalingGroup(  # noqa: N802
        self, parameters: dict[str, str], pass_on: Callable[[], bytes]
    ) -> bytes:
        group = self._group(parameters["AutoScalingGroupName"])
        least = int(parameters.pop("MinSize", group.min_size))
        most = int(parameters.pop("MaxSize", group.max_size))
        if least > most:
            raise ApiError(
                "ValidationError", f"Max bound, {most}, must be greater than or equal to min bound, {least}"
            )
        wanted = int(parameters.pop("DesiredCapacity", min(max(group.desired_capacity, least), most)))
        if not least <= wanted <= most:
            raise ApiError(
                "ValidationError",
                f"Desired capacity:{wanted} must be between the specified min size:{least} and max size:{most}",
            )
        mixed = group.mixed_instances_policy
        answer = pass_on()
        if is_error(answer):
            return answer
        if not any(name.startswith(("LaunchTemplate.", "MixedInstancesPolicy.")) for name in parameters):
            group.mixed_instances_policy = mixed  # moto forgets what was not named
        group.min_size, group.max_size = least, most
        request = "a user request update of AutoScalingGroup constraints"
        self._set_capacity(group, wanted, f"{request} to min: {least}, max: {most}, desired: {wanted}")
        return answer

    def _on_autoscaling_DescribeScalingActivities(  # noqa: N802
        self, parameters: dict[str, str], _: Callable[[], bytes]
    ) -> str:
        found = self.activities
        if "AutoScalingGroupName" in parameters:
            group = self._group(parameters["AutoScalingGroupName"])
            found = [activity for activity in found if activity.group_arn == group.arn]
        found = found[: -1 - int(parameters.get("MaxRecords", "100")) : -1]  # the newest first
        return f"<Activities>{''.join(f'<member>{activity.as_xml()}</member>' for activity in found)}</Activities>"

    def _on_autoscaling_PutScalingPolicy(  # noqa: N802
        self, parameters: dict[str, str], pass_on: Callable[[], bytes]
    ) -> bytes | str:
        answer = pass_on()
        if is_error(answer):
            return answer
        # moto leaves it out
        return f"<PolicyARN>{self._autoscaling().policies[parameters['PolicyName']].arn}</PolicyARN>"

    def _on_ec2_TerminateInstances(  # noqa: N802
        self, parameters: dict[str, str], pass_on: Callable[[], bytes]
    ) -> bytes:
        gone = {value for name, value in parameters.items() if name.startswith("InstanceId.")}
        groups = list(self._autoscaling().autoscaling_groups.values())
        for group in groups:
            group.instance_states = [state for state in group.instance_states if state.instance_id not in gone]
        answer = pass_on()
        why = "an instance was taken out of service in response to an EC2 health check: it has been terminated."
        for group in groups:
            self._reconcile(group, why)
        return answer

    def _on_autoscaling_SetDesiredCapacity(  # noqa: N802
        self, parameters: dict[str, str], _: Callable[[], bytes]
    ) -> str:
        group = self._group(parameters["AutoScalingGroupName"])
        wanted = int(parameters["DesiredCapacity"])
        for limit, name, outside in ((group.max_size, "max", 1), (group.min_size, "min", -1)):
            if (wanted - limit) * outside > 0:
                side = "above" if outside > 0 else "below"
                raise ApiError(
                    "ValidationError",
                    f"New SetDesiredCapacity value {wanted} is {side} {name} value {limit} for the AutoScalingGroup.",
                )
        self._set_capacity(group, wanted, "a user request explicitly set group desired capacity")
        return ""

    def _on_autoscaling_TerminateInstanceInAutoScalingGroup(  # noqa: N802
        self, parameters: dict[str, str], _: Callable[[], bytes]
    ) -> str:
        instance_id = parameters["InstanceId"]
        state = self._state(instance_id)
        if state is None or state.lifecycle_state != "InService":
            raise ApiError(
                "ValidationError", f"Instance Id not found - No managed instance found for instance ID: {instance_id}"
            )
        group = state.auto_scaling_group
        why = f"instance {instance_id} was taken out of service in response to a user request"
        if parameters["ShouldDecrementDesiredCapacity"] == "true":
            if group.desired_capacity - 1 < group.min_size:
                raise ApiError(
                    "ValidationError",
                    f"Currently, desiredSize equals minSize ({group.min_size}). Terminating instance without replacement "
                    "will violate group's min size constraint. Either set shouldDecrementDesiredCapacity flag to false "
                    "or lower group's min size.",
                )
            group.desired_capacity -= 1
            why += f", shrinking the capacity from {group.desired_capacity + 1} to {group.desired_capacity}"
        activity = self._begin_termination(state, f"At {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {why}.")
        self._reconcile(group, f"{why}.")  # launches the replacement, if there is to be one
        return f"<Activity>{activity.as_xml()}</Activity>"

    def _on_autoscaling_CompleteLifecycleAction(  # noqa: N802
        self, parameters: dict[str, str], _: Callable[[], bytes]
    ) -> str:
        if (wait := self.launches.wait_of(parameters)) is not None:
            self.launches.proceed(wait.state)
            return ""
        self._termination(parameters)
        self._proceed(parameters["InstanceId"])
        return ""

    def _on_autoscaling_RecordLifecycleActionHeartbeat(  # noqa: N802
        self, parameters: dict[str, str], _: Callable[[], bytes]
    ) -> str:
        if (wait := self.launches.wait_of(parameters)) is not None:
            self.launches.beat(wait)
            return ""
        termination = self._termination(parameters)
        termination.deadline = time.monotonic() + termination.heartbeat_s
        return ""

    def _on_autoscaling_SetInstanceHealth(  # noqa: N802
        self, parameters: dict[str, str], pass_on: Callable[[], bytes]
    ) -> bytes:
        answer = pass_on()
        state = self._state(parameters["InstanceId"])
        if state is not None and state.lifecycle_state == "InService" and state.health_status == "Unhealthy":
            why = "an instance was taken out of service in response to a user health-check."
            self._begin_termination(state, f"At {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {why}")
            self._reconcile(state.auto_scaling_group, why)
        return answer

    def _on_autoscaling_DeleteAutoScalingGroup(  # noqa: N802
        self, parameters: dict[str, str], pass_on: Callable[[], bytes]
    ) -> bytes:
        group = self._autoscaling().autoscaling_groups.get(parameters["AutoScalingGroupName"])
        if group is not None and group.instance_states:
            if parameters.get("ForceDelete") != "true":
                raise ApiError(
                    "ResourceInUse", "You cannot delete an AutoScalingGroup while there are instances in the group."
                )
            instance_ids = [state.instance_id for state in group.instance_states]
            group.instance_states = []
            for instance_id in instance_ids:
                self.terminations.pop(instance_id, None)
            self._ec2().terminate_instances(instance_ids)
        answer = pass_on()
        if group is not None:  # as AWS does, and moto does not
            for policy in self._autoscaling().describe_policies(group.name):
                self._autoscaling().delete_policy(policy.name)
        return answer

    def _group(self, name: str) -> Any:
        group = self._autoscaling().autoscaling_groups.get(name)
        if group is None:
            raise ApiError(
                "ValidationError", f"AutoScalingGroup name not found - AutoScalingGroup '{name}' not found"
            )
        return group

    def _state(self, instance_id: str) -> Any:
        states = self._autoscaling().describe_auto_scaling_instances([instance_id])
        return states[0] if states else None

    def _termination(self, parameters: dict[str, str]) -> Termination:
        termination = self.terminations.get(parameters["InstanceId"])
        if (
            termination is None
            or termination.hook_name != parameters["LifecycleHookName"]
            or termination.group_name != parameters["AutoScalingGroupName"]
        ):
            raise ApiError(
                "ValidationError", f"No active Lifecycle Action found with instance ID {parameters['InstanceId']}"
            )
        return termination

    def _begin_termination(self, state: Any, cause: str) -> Activity:
        group_name = state.auto_scaling_group_name
        description = f"Terminating EC2 instance: {state.instance_id}"
        arn = state.auto_scaling_group.arn
        activity = Activity(group_name, arn, description, cause, "MidLifecycleAction", ended=None)
        self.activities.append(activity)
        hooks = [
            hook
            for hook in self.hooks(group_name)
            if hook.lifecycle_transition == "autoscaling:EC2_INSTANCE_TERMINATING"
        ]
        if state.instance_id in self.machines:
            self.machines[state.instance_id].metadata["autoscaling/target-lifecycle-state"] = "Terminated"
        if not hooks:
            self._proceed(state.instance_id)
            return activity
        state.lifecycle_state = "Terminating:Wait"
        heartbeat_s = float(hooks[0].heartbeat_timeout)
        deadline = time.monotonic() + heartbeat_s
        self.terminations[state.instance_id] = Termination(group_name, hooks[0].name, deadline, heartbeat_s)
        return activity

    def terminate(self, instance_id: str) -> None:
        """EC2 ends the instance. Called under the lock, for which a call to EC2 would wait."""
        self._ec2().terminate_instances([instance_id])

    def _proceed(self, instance_id: str) -> None:
        """Past the hook: the machine is shut down and leaves the group."""
        self.terminations.pop(instance_id, None)
        state = self._state(instance_id)
        if state is None:
            return
        state.lifecycle_state = "Terminating:Proceed"

        def end() -> None:
            if instance_id in self.machines:
                self.machines[instance_id].switch_off().join()
            with self._lock:
                group = state.auto_scaling_group
                group.instance_states = [other for other in group.instance_states if other is not state]
                self.terminate(instance_id)
                for activity in self.activities:
                    if activity.description == f"Terminating EC2 instance: {instance_id}":
                        activity.status_code, activity.ended = "Successful", datetime.now(UTC)

        threading.Thread(target=end, daemon=True).start()


class Machine:
    """One EC2 instance: a folder, a metadata service, and the services its units name.

    tests/machine has another kind, with an operating system of its own.
    """

    def __init__(self, cloud: LocalCloud, instance_id: str, folder: Path) -> None:
        self.cloud = cloud
        self.instance_id = instance_id
        self.folder = folder
        self.side = cloud.folder / "machines" / instance_id  # journal and cloud-init state: not in the image
        self.side.mkdir(parents=True, exist_ok=True)
        self.off = threading.Event()
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self._starts = threading.Lock()  # or one that is started while it is switched off would live on
        self.booted = False
        self._starting: threading.Thread | None = None
        self.booted_at = int(time.time())
        self.metadata: dict[str, str] = {
            "instance-id": instance_id,
            "instance-type": cloud.instance_type(instance_id),
            "placement/region": REGION,
            "iam/security-credentials/": "comfy",
        }
        self.give_credentials("local")
        self._metadata_server = ThreadingHTTPServer(("127.0.0.1", 0), metadata_handler(self))
        threading.Thread(target=self._metadata_server.serve_forever, daemon=True).start()
        self.metadata_endpoint = f"http://127.0.0.1:{self._metadata_server.server_port}"
        self.comfy_port = free_port()

    def environment(self) -> dict[str, str]:
        """What a process on this machine sees: credentials come from the metadata service, as on EC2."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("STANDIN_")}
        return kept | {
            "PATH": f"{CLOUD}/bin:{TESTS}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.side),
            "LANG": "C.UTF-8",
            "AWS_ENDPOINT_URL": self.cloud.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata_endpoint,
            "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "10",
            "AWS_METADATA_SERVICE_TIMEOUT": "5",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            AWS_CLI_SOCKET: self.cloud.aws_cli_socket,
            "BOOTED_AT": str(self.booted_at),
            "COMFY_HOME": str(self.folder),
            "COMFY_ADDRESS": f"127.0.0.1:{self.comfy_port}",
            "LOCAL_INSTANCE_DIR": str(self.side),
        }

    def give_credentials(self, access_key: str) -> None:
        """Have the metadata service hand these out."""
        self.metadata["iam/security-credentials/comfy"] = json.dumps(
            {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "AccessKeyId": access_key,
                "SecretAccessKey": "local",
                "Token": "local",
                "Expiration": "2099-01-01T00:00:00Z",
                "LastUpdated": "2026-01-01T00:00:00Z",
            }
        )

    def copy_disk(self, image: Path) -> None:
        """Make an image of it. A mounted bucket is no part of the machine's disk, so no part of its image."""
        shutil.copytree(
            self.folder,
            image,
            symlinks=True,
            ignore=lambda parent, _: {"s3"} if Path(parent) == self.folder else set(),
        )

    def boot(self, image: Path, user_data: str) -> None:
        """Start as a machine does: disk from the image, then cloud-init and the services side by side."""
        self.metadata["autoscaling/target-lifecycle-state"] = "InService"
        self.metadata["user-data"] = user_data

        def start() -> None:
            # An image that was not made of a base folder has nothing to run.
            if self.off.is_set() or not image.is_dir():
                return
            shutil.copytree(image, self.folder, symlinks=True)
            self.booted = True
            threading.Thread(target=self._run_cloud_init, args=(user_data,), daemon=True).start()
            self._start_services()

        self._starting = threading.Thread(target=start, daemon=True)
        self._starting.start()

    def _start_services(self) -> None:
        for unit in sorted((self.folder / "systemd").glob("*.service")):
            if unit.name == "comfy-gateway.service":
                continue  # it is installed where serve is wanted, and on no instance of a fleet
            threading.Thread(target=self._run_service, args=(unit,), daemon=True).start()

    def power_off(self) -> None:
        """Stop it as soon as it has its disk. What is cut off of its first boot then never comes."""
        if self._starting is not None:
            self._starting.join()
        if not self.off.is_set():
            self._stop_starting()
            self._end_services()

    def power_on(self) -> None:
        """Start it again: its services run, its user data does not."""
        self.off.clear()
        self.booted_at = int(time.time())
        self.metadata["autoscaling/target-lifecycle-state"] = "InService"
        self._start_services()

    def is_on(self) -> bool:
        """Whether it has not been switched off."""
        return not self.off.is_set()

    def state(self) -> dict[str, Any]:
        """For demo and tests: is it on, and which services run."""
        running = {name: process.pid for name, process in self.services.items() if process.poll() is None}
        return {"on": self.is_on(), "booted": self.booted, "services": running, "comfy_port": self.comfy_port}

    def switch_off(self) -> threading.Thread:
        """Shut down: SIGTERM to the services, SIGKILL to what is left. Returns the thread that does it."""
        self._stop_starting()

        def end() -> None:
            self._end_services()
            self.end_metadata()

        thread = threading.Thread(target=end)
        thread.start()
        return thread

    def _stop_starting(self) -> None:
        """From now on no process is started here, and each that was is known."""
        with self._starts:
            self.off.set()

    def _start(self, name: str, command: list[str], **more: Any) -> subprocess.Popen[bytes] | None:
        """Start a process in a group of its own; None where the machine is switched off."""
        with self._starts:
            if self.off.is_set():
                return None
            process = subprocess.Popen(command, env=self.environment(), start_new_session=True, **more)
            self.services[name] = process
            return process

    def _end_services(self) -> None:
        processes = list(self.services.values())
        for process in processes:
            with suppress(ProcessLookupError):
                process.terminate()
        limit = time.monotonic() + SHUTDOWN_S
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def end_metadata(self) -> None:
        """The machine is gone, and its metadata service with it."""
        self._metadata_server.shutdown()
        self._metadata_server.server_close()

    def _run_cloud_init(self, user_data: str) -> None:
        script = self.side / "user-data"
        script.write_text(user_data, encoding="utf-8")
        # cloud-init runs user data as root with a bare environment; only where the bundle lies is told.
        with (self.side / "cloud-init-output.log").open("wb") as log:
            process = self._start("cloud-init", ["/bin/bash", str(script)], stdout=log, stderr=log)
            if process is None:
                return
            process.wait()
        (self.side / "cloud-init.done").touch()

    def _run_service(self, unit: Path) -> None:
        """systemd's Restart=always, with the unit's own command and pause."""
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(unit)
        command = shlex.split(parser["Service"]["ExecStart"].replace(INSTALL_DIR, str(self.folder)))
        pause_s = float(parser["Service"].get("RestartSec", "0.1"))
        if self.cloud.restart_s is not None:
            pause_s = self.cloud.restart_s
        with (self.side / f"{unit.stem}.log").open("ab") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            while (process := self._start(unit.stem, command, cwd=self.folder, **streams)) is not None:
                (self.side / f"{unit.stem}.pid").write_text(str(process.pid))  # for the stand-in of systemctl
                process.wait()
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                self.off.wait(pause_s)


def version_at_launch(state: Any) -> dict[str, Any] | None:
    """An instance's launch template as AWS shows it, with the version it came from. Moto shows today's default."""
    template = state.auto_scaling_group.ec2_launch_template
    version = getattr(state, "launched_version", None)
    if template is None or version is None:
        return None
    return {"LaunchTemplateId": template.id, "LaunchTemplateName": template.name, "Version": version}


def user_data_of(version: Any) -> Any:
    """A template version's user data. Moto takes it apart only for a template's first version, and then fails."""
    user_data = version.data.get("UserData")
    return parse_user_data(user_data) if isinstance(user_data, str) else user_data


InstanceState.launch_template = property(version_at_launch)
LaunchTemplateVersion.user_data = property(user_data_of)


def get_service_quota(_: Any, service_code: str, quota_code: str) -> dict[str, Any]:
    """The account's vCPUs of the G and VT family, on demand and Spot. Moto knows only quotas of VPCs."""
    if (service_code, quota_code) in (("ec2", "L-DB2E81BA"), ("ec2", "L-3819A6DF")):
        return {"QuotaCode": quota_code, "Value": VCPU_QUOTA}
    raise NoSuchResource


def metadata_handler(machine: Machine) -> type[BaseHTTPRequestHandler]:
    """The instance metadata service of one machine: IMDSv2 only, 404 for what is not there."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer(200 if self.path == "/latest/api/token" else 404, "token-of-" + machine.instance_id)

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") != "token-of-" + machine.instance_id:
                self._answer(401, "")
                return
            value = machine.metadata.get(self.path.removeprefix("/latest/").removeprefix("meta-data/"))
            self._answer(404 if value is None else 200, value or "")

        def _answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def metric_math(expression: str, values: dict[str, float | None]) -> float | None:
    """CloudWatch's metric math for one data point of each metric, None where it is missing.

    Numbers, metrics, sums, comparisons, AND, OR, IF(condition, then, else) and FILL(metric, number); ValueError for
    anything else.
    """

    def value(node: ast.expr) -> float | None:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.Call(func=ast.Name(id="FILL"), args=[metric, filling]):
                known = value(metric)
                return value(filling) if known is None else known
            case ast.Call(func=ast.Name(id="IF"), args=[condition, then, otherwise]):
                holds = value(condition)
                return None if holds is None else value(then) if holds else value(otherwise)
            case ast.BoolOp(op=operator, values=parts):
                known_parts = [value(part) for part in parts]
                if None in known_parts:
                    return None
                return float(all(known_parts) if isinstance(operator, ast.And) else any(known_parts))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                a, b = value(left), value(right)
                return None if a is None or b is None else a + b
            case ast.Compare(left=left, ops=[ast.Gt() | ast.Lt() as operator], comparators=[right]):
                a, b = value(left), value(right)
                if a is None or b is None:
                    return None
                return float(a > b if isinstance(operator, ast.Gt) else a < b)
        raise ValueError(f"the expression {expression!r} is not understood")

    try:
        tree = ast.parse(re.sub(r"\b(AND|OR)\b", lambda word: word[0].lower(), expression), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"the expression {expression!r} is not understood") from error
    return value(tree.body)


def alarm_state(alarm: Any, points: Sequence[float | None]) -> str:
    """The state of an alarm with the data points that it looks at, the newest last, None where one is missing."""
    if alarm.comparison_operator != "GreaterThanOrEqualToThreshold":
        raise ValueError(f"{alarm.comparison_operator} is not understood")
    known = [point >= alarm.threshold for point in points if point is not None]
    if len(known) == len(points) or not all(known):
        return "ALARM" if all(known) else "OK"
    states = {"notBreaching": "OK", "breaching": "ALARM", "ignore": alarm.state_value}
    return str(states.get(alarm.treat_missing_data, "INSUFFICIENT_DATA"))


def keep_the_images_volume(add_block_device: Callable[..., None]) -> Callable[..., None]:
    """Moto refuses a template's volume without size and snapshot; on AWS it is the image's, and here it is there."""

    @functools.wraps(add_block_device)
    def add(self: Any, size: Any, device_path: str, snapshot_id: Any = None, *args: Any, **kwargs: Any) -> None:
        if size is not None or snapshot_id is not None:
            add_block_device(self, size, device_path, snapshot_id, *args, **kwargs)

    return add


Instance.add_block_device = keep_the_images_volume(Instance.add_block_device)
local_network.add_to_moto()
local_storage.add_to_moto()


def is_error(answer: bytes) -> bool:
    """Whether moto has refused a call of the query protocol."""
    return b"<Error>" in answer


def free_port() -> int:
    """A port that nobody uses, below those that the kernel gives to connections: one of these may be taken again before
    the server that is to have it is there."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
