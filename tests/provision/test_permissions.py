"""provision/permissions.sh: the policies, and the workers' role."""

from __future__ import annotations

import json

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import (
    PATH_OF_WORKER,
    QUEUE,
    WORKER,
)
from local_cloud import ACCOUNT_ID, REGION


@pytest.mark.parametrize("name", ["pro", "base"])
@pytest.mark.parametrize("who", ["worker", "sender", "operator"])
def test_policies_are_printed_without_aws_and_fit_into_iam(bundle: Bundle, who: str, name: str) -> None:
    bundle.set(PREFIX="a-company-with-a-longer-name")
    ran = bundle.run("create_env.sh", "--print-policy", who, name, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert (ran.returncode, ran.stderr) == (0, "")
    policy = json.loads(ran.stdout)
    assert len("".join(ran.stdout.split())) <= 6144, "the longest that a managed policy may be"
    text = json.dumps(policy)
    assert f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:a-company-with-a-longer-name-{name}-queue" in text
    open_to_all = {
        action
        for statement in policy["Statement"]
        if statement["Resource"] == "*"
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    looks = ("Describe", "List", "GetResources", "GetServiceQuota", "GetMetricData", "PutMetricData")
    assert all(action.partition(":")[2].startswith(looks) for action in open_to_all), open_to_all
    if name == "base" and who == "operator":
        assert "Delete" not in text, "designers keep all"
    if who == "sender":
        deletes = [each["Resource"] for each in policy["Statement"] if "Delete" in json.dumps(each["Action"])]
        arns = [arn for each in deletes for arn in ([each] if isinstance(each, str) else each)]
        assert [arn.partition("/")[2] for arn in arns] == ["editor/user/*", "input/assets/*", "input/jobs/serve/*"]


def test_what_people_keep_in_the_editor_is_changed_by_who_serves_it_and_by_no_instance(bundle: Bundle) -> None:
    def written(who: str) -> set[str]:
        policy = json.loads(bundle.run("create_env.sh", "--print-policy", who, "pro").stdout)
        return {
            resource.partition("/")[2]
            for each in policy["Statement"]
            if "s3:PutObject" in each["Action"]
            for resource in ([each["Resource"]] if isinstance(each["Resource"], str) else each["Resource"])
        }

    assert written("sender") == {"input/*", "editor/user/*"}
    assert written("worker") == {"input/*", "output/*", "editor/of-instances/*"}


def test_a_policy_is_that_of_the_env_in_the_settings(bundle: Bundle) -> None:
    bundle.set(ENV="pro")
    printed = [bundle.run("create_env.sh", "--print-policy", "sender", *name).stdout for name in ([], ["pro"])]
    assert printed[0] == printed[1] != ""
    ran = bundle.run("create_env.sh", "--print-policy", "sender", REGION="cn-north-1")
    assert f'"arn:aws-cn:sqs:cn-north-1:{ACCOUNT_ID}:{QUEUE}"' in ran.stdout
    for arguments, sentence in (
        (["root"], "'root' is no one's policy: use --print-policy worker, sender or operator"),
        ([], "'' is no one's policy"),
        (["sender", "pro", "more"], "the argument 'more' is one too many"),
        (["sender", "Pro"], "the environment's name 'Pro' is not allowed"),
    ):
        ran = bundle.run("create_env.sh", "--print-policy", *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith(f"create_env.sh: {sentence}")


def test_a_changed_policy_is_applied_and_a_stopped_run_completed(bundle: Bundle, aws: Aws) -> None:
    iam = aws.client("iam")
    iam.create_role(RoleName=WORKER, Path=PATH_OF_WORKER, AssumeRolePolicyDocument="{}")
    other = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
    iam.put_role_policy(RoleName=WORKER, PolicyName="worker", PolicyDocument=json.dumps(other))
    ran = bundle.run_function("ensure_profile; ensure_profile; echo $PROFILE", "permissions")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [line.split(maxsplit=2)[2] for line in ran.stdout.splitlines()[:2]] == ["updated", "already there"]
    found = aws.everything("pro")
    printed = bundle.run("create_env.sh", "--print-policy", "worker", "pro").stdout
    assert found["roles"][0]["Policies"] == [json.loads(printed)]
    assert found["profiles"][0]["Roles"][0]["RoleName"] == WORKER


def test_a_role_of_another_region_is_refused(bundle: Bundle, aws: Aws) -> None:
    path = "/simple-comfy/eu-central-1/pro/"
    aws.client("iam").create_role(RoleName=WORKER, Path=path, AssumeRolePolicyDocument="{}")
    ran = bundle.run_function("ensure_profile", "permissions")
    assert ran.returncode == 1
    assert f"the role {WORKER} is not this environment's (its path is {path}, not {PATH_OF_WORKER})" in ran.stderr


def test_another_profile_can_be_named(bundle: Bundle, aws: Aws) -> None:
    bundle.set(INSTANCE_PROFILE="company")
    ran = bundle.run_function("ensure_profile", "permissions")
    assert ran.returncode == 1
    assert f"cannot use the instance profile company, see INSTANCE_PROFILE in {bundle.env_file}" in ran.stderr
    aws.client("iam").create_instance_profile(InstanceProfileName="company")
    ran = bundle.run_function("ensure_profile; echo $PROFILE", "permissions")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "company")
    assert "roles" not in aws.everything("pro")
