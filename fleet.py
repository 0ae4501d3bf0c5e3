#!/usr/bin/env python3
"""For those who keep a fleet: how it stands, its dead jobs, a report of jobs that ended (`fleet.py --help`)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from comfy_utils import SettingsError, is_job_id, load_settings, new_job_id
from operate.dead_letters import list_dead, purge, redrive
from operate.fleet_view import show_fleet
from operate.report import make_report
from operate.words import refusal


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one command; returns 0, 1 for a failure, 2 for bad input, 130 when interrupted."""
    options = parse_arguments(arguments)
    try:
        settings = load_settings(options.env)
        match options.command:
            case "status":
                return show_fleet(settings, options.price, watch=options.watch, as_json=options.json)
            case "dead":
                return list_dead(settings, as_json=options.json)
            case "redrive":
                return redrive(settings, as_json=options.json)
            case "purge":
                return purge(settings, sure=options.yes, as_json=options.json)
            case _:
                return make_report(settings, options.job_ids, options.output, options.price, as_json=options.json)
    except SettingsError as error:
        print(f"fleet.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"fleet.py: {refusal(error, 'sqs')}", file=sys.stderr)
        return 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked for what belongs together."""
    parser = argparse.ArgumentParser(
        prog="fleet.py", description="Looks after a fleet. Every command has its own --help."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, more: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--env", metavar="NAME", help="the environment, instead of ENV in the settings")
        made.add_argument("--json", action="store_true", help="print one object, for programs")
        return made

    status = command("status", "how queue and instances stand", STATUS_HELP)
    status.add_argument("--watch", action="store_true", help="look again every few seconds")
    command("dead", "the jobs in the dead-letter queue, and why they are there", DEAD_HELP)
    command("redrive", "send the dead jobs back to the queue", REDRIVE_HELP)
    purging = command("purge", "delete the dead jobs, after a question", PURGE_HELP)
    purging.add_argument("--yes", action="store_true", help="do not ask; --json needs it")
    report = command("report", "draw a page of jobs that have ended", REPORT_HELP)
    report.add_argument("job_ids", nargs="+", type=job_id, metavar="JOB_ID", help="as printed when a job is sent")
    report.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page (default: report.html)")  # fmt: skip
    for priced in (status, report):
        priced.add_argument("--price", type=usd_per_hour, metavar="USD", help="what an instance's hour costs")
    options = parser.parse_args(arguments)
    if options.command == "purge" and options.json and not options.yes:
        purging.error("--json leaves no room for a question: add --yes")
    return options


def job_id(text: str) -> str:
    """An argument that may be part of a key."""
    if not is_job_id(text):
        raise argparse.ArgumentTypeError(f"{text:.60}: that is no job id, such as {new_job_id()}")
    return text


def usd_per_hour(text: str) -> float:
    """An argument that is a price."""
    with suppress(ValueError):
        if 0 <= (price := float(text)) < math.inf:
            return price
    raise argparse.ArgumentTypeError(f"{text:.60}: give USD per hour, such as 1.212")


STATUS_HELP = """\
example:
  ./fleet.py status --env pro --watch

What one is not allowed to see costs its line only. Exits with 1 when neither queue nor group can be seen.
With --watch --json prints an object a line. The object has env, region, at, queue, oldest_s, last_hour, group,
instances, usd_per_hour, scaling_errors and not_seen; what cannot be read is null.
"""
DEAD_HELP = """\
example:
  ./fleet.py dead --env pro

Looking leaves the jobs where they are. The object has queue, jobs (job_id, kind, problem, sent_at, receives, reason,
log, result) and not_seen.
"""
REDRIVE_HELP = """\
example:
  ./fleet.py redrive --env pro

Each job keeps its id and is deleted only after it was sent, so none gets lost. Exits with 1 when some could not be
sent. The object has queue, sent (how many), unsent (message id: reason) and instances_wanted.
"""
PURGE_HELP = """\
example:
  ./fleet.py purge --env pro

Asks for the environment's name first. The object has queue and deleted (how many).
"""
REPORT_HELP = """\
example:
  ./fleet.py report --env pro --output monday.html 0f8fad5b-d9cb-469f-a165-70867728950e

The page needs nothing from elsewhere; large images lie beside it, in FILE-files/. Exits with 1 when a job has no
result yet and is left out. The object has page, jobs and left_out.
"""


if __name__ == "__main__":
    sys.exit(main())
