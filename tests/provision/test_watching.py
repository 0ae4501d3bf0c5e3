"""provision/watching.sh: the dashboard. The alarms are tested where they ring, in the local cloud."""

from __future__ import annotations

import json

from aws_fixtures import Aws, Bundle


def test_a_dashboard_is_put_only_where_it_differs(bundle: Bundle, aws: Aws) -> None:
    cloudwatch = aws.client("cloudwatch")

    def run(shell: str = "ensure_dashboard") -> str:
        ran = bundle.run_function(shell, "watching")
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout.strip().rpartition("  ")[2]

    assert run("DRY_RUN=yes ensure_dashboard") == "to be created"
    assert not cloudwatch.list_dashboards()["DashboardEntries"]
    assert run() == "created"
    body = cloudwatch.get_dashboard(DashboardName="simple-comfy-pro-asg")["DashboardBody"]
    cloudwatch.put_dashboard(
        DashboardName="simple-comfy-pro-asg", DashboardBody=json.dumps(json.loads(body), indent=2)
    )
    assert run() == "already there", "AWS may keep it in its own layout"
    bundle.set(SQS_NAME="other-${ENV}")
    assert run() == "updated"


def test_a_dashboard_that_may_not_be_seen_is_not_overwritten(bundle: Bundle, aws: Aws) -> None:
    path = bundle.break_call("cloudwatch get-dashboard", "AccessDenied")
    ran = bundle.run_function("ensure_dashboard", "watching", PATH=path)
    assert ran.returncode == 1
    assert "cannot look at the dashboard simple-comfy-pro-asg: An error occurred (AccessDenied)" in ran.stderr
    assert not aws.client("cloudwatch").list_dashboards()["DashboardEntries"]
