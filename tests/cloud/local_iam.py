"""The local cloud's IAM: which permissions a call needs, and whether policies give them.

Moto has an IAM of its own, which knows neither resources nor conditions. This one knows as much as our policies
use, and refuses to judge (ValueError) what it does not know. A call that is not told here needs its action on "*",
so that a policy which names resources does not allow it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qs, unquote

from moto.backends import get_backend

ACCOUNT_ID = "123456789012"
REGION = "us-west-2"
PREFIXES = {"monitoring": "cloudwatch", "tagging": "tag"}  # where it is not the name that signs the call

WITHOUT_RESOURCE = re.compile(
    r"(ec2|autoscaling|cloudwatch):Describe\w+|sqs:ListQueues|iam:List(Roles|InstanceProfiles)|(tag|servicequotas):\w+"
)
S3_ACTIONS = {
    "tagging": "BucketTagging",
    "publicAccessBlock": "BucketPublicAccessBlock",
    "encryption": "EncryptionConfiguration",
    "policy": "BucketPolicy",
    "lifecycle": "LifecycleConfiguration",
    "notification": "BucketNotification",
}
"""A bucket's settings: the query of the call, and what stands after Get and Put."""


@dataclass(frozen=True)
class Access:
    """A permission that a call needs: an action on a resource, and the keys that conditions look at."""

    action: str
    resource: str = "*"
    keys: dict[str, str] = field(default_factory=dict)


def is_allowed(policies: Iterable[dict[str, Any]], access: Access) -> bool:
    """Whether one statement allows it. ValueError for a statement that is not understood."""
    return any(_allows(statement, access) for policy in policies for statement in _list(policy["Statement"]))


def _allows(statement: dict[str, Any], access: Access) -> bool:
    if statement["Effect"] != "Allow" or statement.keys() - {"Sid", "Effect", "Action", "Resource", "Condition"}:
        raise ValueError(f"the statement {statement} is not understood")
    return (
        any(_matches(access.action.lower(), action.lower()) for action in _list(statement["Action"]))
        and any(_matches(access.resource, resource) for resource in _list(statement["Resource"]))
        and all(_holds(operator, wanted, access.keys) for operator, wanted in statement.get("Condition", {}).items())
    )


def _holds(operator: str, wanted: dict[str, Any], keys: dict[str, str]) -> bool:
    if operator not in ("StringEquals", "ArnLike"):
        raise ValueError(f"the condition {operator} is not understood")
    return all(
        key in keys
        and any(
            keys[key] == value if operator == "StringEquals" else _matches(keys[key], value)
            for value in _list(values)
        )
        for key, values in wanted.items()
    )


def _matches(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def policies_of_profile(profile: dict[str, str]) -> list[dict[str, Any]]:
    """The policies in the role of an instance profile, which a launch template names by Name or Arn."""
    iam = get_backend("iam")[ACCOUNT_ID]["aws"]
    found = [
        known
        for known in iam.instance_profiles.values()
        if profile.get("Name", known.name) == known.name and profile.get("Arn", known.arn) == known.arn
    ]
    documents = [document for known in found for role in known.roles for document in role.policies.values()]
    return [json.loads(unquote(document)) for document in documents]


def template_data(template: Any, version: str) -> dict[str, Any]:
    """What a version of a launch template says, nothing where a group has no template."""
    return dict(template.get_version(version).data) if template is not None else {}


def template_tags(template: Any, version: str) -> dict[str, dict[str, str]]:
    """The tags that it gives to what is launched, by the kind of resource."""
    return {
        specification["ResourceType"]: {tag["Key"]: tag["Value"] for tag in specification["Tags"]}
        for specification in template_data(template, version).get("TagSpecifications", [])
    }


def accesses(
    service: str, operation: str, call: dict[str, Any], environ: dict[str, Any], body: bytes
) -> list[Access]:
    """Every permission that the call needs. `call` is its parameters, `operation` for S3 the HTTP method."""
    action = f"{PREFIXES.get(service, service)}:{operation}"
    if action == "sts:GetCallerIdentity":
        return []
    if service == "s3":
        return _of_s3(operation, environ, body)
    if WITHOUT_RESOURCE.fullmatch(action):
        return [Access(action)]
    of_service = {
        "sqs": _of_sqs,
        "autoscaling": _of_autoscaling,
        "ec2": _of_ec2,
        "monitoring": _of_cloudwatch,
        "iam": _of_iam,
    }.get(service)
    return of_service(action, call) if of_service else [Access(action)]


def _arn(service: str, resource: str, region: str = REGION, account: str = ACCOUNT_ID) -> str:
    return f"arn:aws:{service}:{region}:{account}:{resource}"


def _of_sqs(action: str, call: dict[str, Any]) -> list[Access]:
    name = call.get("QueueName") or call.get("QueueUrl", "").rpartition("/")[2]
    needed = [Access(action.removesuffix("Batch"), _arn("sqs", name))]
    if call.get("tags") or "Tag.1.Key" in call:
        needed.append(Access("sqs:TagQueue", _arn("sqs", name)))
    return needed


def _of_s3(method: str, environ: dict[str, Any], body: bytes) -> list[Access]:
    bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    arn = f"arn:aws:s3:::{bucket}"
    if not bucket:
        return [Access("s3:ListAllMyBuckets")]
    if not key:
        for name, setting in S3_ACTIONS.items():
            if name in query:
                return [Access(f"s3:{method.capitalize()}{setting}", arn)]
        if "delete" in query:
            action = "s3:DeleteObjectVersion" if b"<VersionId>" in body else "s3:DeleteObject"
            return [Access(action, f"{arn}/{found.decode()}") for found in re.findall(rb"<Key>(.*?)</Key>", body)]
        looks = {"versions": "ListBucketVersions", "uploads": "ListBucketMultipartUploads"}
        look = next((action for name, action in looks.items() if name in query), "ListBucket")
        return [Access("s3:" + {"PUT": "CreateBucket", "DELETE": "DeleteBucket"}.get(method, look), arn)]
    arn += f"/{key}"
    if "tagging" in query:
        return [Access(f"s3:{method.capitalize()}ObjectTagging", arn)]
    if method in ("GET", "HEAD"):
        return [Access("s3:GetObject", arn)]
    if method == "DELETE":
        return [Access("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", arn)]
    needed = [Access("s3:PutObject", arn)]
    source = environ.get("HTTP_X_AMZ_COPY_SOURCE")
    if source:
        path = unquote(source).lstrip("/").partition("?")[0]
        needed.append(Access("s3:GetObject", f"arn:aws:s3:::{path}"))
        if environ.get("HTTP_X_AMZ_TAGGING_DIRECTIVE") != "REPLACE" and _is_tagged(path):
            needed += [
                Access("s3:GetObjectTagging", f"arn:aws:s3:::{path}"),
                Access("s3:PutObjectTagging", arn),
            ]
    return needed


def _is_tagged(path: str) -> bool:
    """Whether an object, bucket/key, has tags, which a copy takes along."""
    s3 = get_backend("s3")[ACCOUNT_ID]["aws"]
    bucket, _, key = path.partition("/")
    found = s3.get_object(bucket, key)
    return bool(found and s3.get_object_tagging(found).get("Tags"))


def _of_autoscaling(action: str, call: dict[str, str]) -> list[Access]:
    name = call.get("AutoScalingGroupName") or call.get("Tags.member.1.ResourceId", "")
    if not name and "InstanceId" in call:
        states = get_backend("autoscaling")[ACCOUNT_ID][REGION].describe_auto_scaling_instances([call["InstanceId"]])
        name = states[0].auto_scaling_group_name if states else ""
    group = _arn("autoscaling", f"autoScalingGroup:00000000:autoScalingGroupName/{name}")
    needed = [Access(action, group)]
    if action == "autoscaling:CreateAutoScalingGroup" and "Tags.member.1.Key" in call:
        needed.append(Access("autoscaling:CreateOrUpdateTags", group))
    template_name = next((value for key, value in call.items() if key.endswith("LaunchTemplateName")), "")
    return needed + (_to_launch(template_name) if template_name else [])


def _to_launch(template_name: str) -> list[Access]:
    """What AWS asks of who makes or changes a group: that he could start its instances himself."""
    ec2 = get_backend("ec2")[ACCOUNT_ID][REGION]
    if template_name not in ec2.launch_template_name_to_ids:
        return []  # which is refused anyway
    template = ec2.get_launch_template_by_name(template_name)
    arn = _arn("ec2", f"launch-template/{template.id}")
    needed = [Access("ec2:RunInstances", arn, _tag_keys("Resource", ec2.tags.get(template.id, {})))]
    kinds = ["instance", "volume", "network-interface", "subnet", "security-group"]
    needed += [Access("ec2:RunInstances", _arn("ec2", f"{kind}/x"), {"ec2:LaunchTemplate": arn}) for kind in kinds]
    needed.append(Access("ec2:RunInstances", _arn("ec2", "image/x", account=""), {"ec2:LaunchTemplate": arn}))
    for kind, tags in template_tags(template, "$Default").items():
        keys = _tag_keys("Request", tags) | {"ec2:CreateAction": "RunInstances"}
        needed.append(Access("ec2:CreateTags", _arn("ec2", f"{kind}/x"), keys))
    profile = template_data(template, "$Default").get("IamInstanceProfile", {})
    for known in get_backend("iam")[ACCOUNT_ID]["aws"].instance_profiles.values():
        if known.name == profile.get("Name") or known.arn == profile.get("Arn"):
            needed += [_to_pass(role.name) for role in known.roles]
    return needed


def _tag_keys(kind: str, tags: dict[str, str]) -> dict[str, str]:
    return {f"aws:{kind}Tag/{name}": value for name, value in tags.items()}


def _of_ec2(action: str, call: dict[str, str]) -> list[Access]:
    ec2 = get_backend("ec2")[ACCOUNT_ID][REGION]

    def arn(kind: str, identity: str) -> str:
        return _arn("ec2", f"{kind}/{identity}", account="" if kind in ("image", "snapshot") else ACCOUNT_ID)

    kinds = {"i": "instance", "ami": "image", "snap": "snapshot", "vol": "volume"}
    needed = []
    for name, value in call.items():
        if re.fullmatch(r"ResourceId\.\d+", name):  # CreateTags on what is there
            kind = kinds[value.partition("-")[0]]
            needed.append(Access(action, arn(kind, value), _tag_keys("Resource", ec2.tags.get(value, {}))))
        if match := re.fullmatch(r"(Instance|Image|Snapshot|Volume)Id(\.\d+)?", name):
            needed.append(
                Access(action, arn(match[1].lower(), value), _tag_keys("Resource", ec2.tags.get(value, {})))
            )
        if name == "LaunchTemplateName" and value in ec2.launch_template_name_to_ids:
            identity = ec2.launch_template_name_to_ids[value]
            keys = _tag_keys("Resource", ec2.tags.get(identity, {}))
            needed.append(Access(action, arn("launch-template", identity), keys))
        if match := re.fullmatch(r"(TagSpecification\.\d+)\.ResourceType", name):
            tags = {
                call[key]: call[key.removesuffix("Key") + "Value"]
                for key in call
                if key.startswith(f"{match[1]}.Tag.") and key.endswith(".Key")
            }
            keys = _tag_keys("Request", tags)
            needed.append(Access(action, arn(value, "x"), keys))
            needed.append(Access("ec2:CreateTags", arn(value, "x"), keys | {"ec2:CreateAction": action[4:]}))
    return needed or [Access(action)]


def _of_cloudwatch(action: str, call: dict[str, Any]) -> list[Access]:
    if action == "cloudwatch:PutMetricData":
        return [Access(action, keys={"cloudwatch:namespace": call["Namespace"]})]

    def named(name: str) -> list[str]:
        """One, or a list of them, in JSON or in the query of an older CLI."""
        listed = [value for key, value in call.items() if key.startswith(f"{name}s.member.")]
        return [*call.get(f"{name}s", []), *listed, *([call[name]] if name in call else [])]

    alarms, boards = named("AlarmName"), named("DashboardName")
    arns = [_arn("cloudwatch", f"alarm:{name}") for name in alarms]
    arns += [_arn("cloudwatch", f"dashboard/{name}", region="") for name in boards]
    arns += [call["ResourceARN"]] if "ResourceARN" in call else []
    needed = [Access(action, arn) for arn in arns] or [Access(action)]
    if call.get("Tags") or "Tags.member.1.Key" in call:
        needed += [Access("cloudwatch:TagResource", arn) for arn in arns]
    return needed


def _of_iam(action: str, call: dict[str, str]) -> list[Access]:
    iam = get_backend("iam")[ACCOUNT_ID]["aws"]
    kind, known = ("instance-profile", list[Any](iam.instance_profiles.values()))
    if "InstanceProfileName" not in call:
        kind, known = "role", list(iam.get_roles())
    name = call.get("InstanceProfileName") or call.get("RoleName", "")
    paths = [each.path for each in known if each.name == name]
    arn = _arn("iam", f"{kind}{call.get('Path') or (paths[0] if paths else '/')}{name}", region="")
    needed = [Access(action, arn)]
    if "Tags.member.1.Key" in call:
        needed.append(Access(f"iam:Tag{'InstanceProfile' if kind == 'instance-profile' else 'Role'}", arn))
    if action == "iam:AddRoleToInstanceProfile":
        needed.append(_to_pass(call["RoleName"]))
    return needed


def _to_pass(role_name: str) -> Access:
    roles = [role for role in get_backend("iam")[ACCOUNT_ID]["aws"].get_roles() if role.name == role_name]
    arn = roles[0].arn if roles else _arn("iam", f"role/{role_name}", region="")
    return Access("iam:PassRole", arn, {"iam:PassedToService": "ec2.amazonaws.com"})
