#!/usr/bin/env python3
"""For those who keep a fleet: how it stands, its dead jobs, a report of jobs that ended, and a door to it for all that
speaks to a ComfyUI (`fleet.py --help`)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from comfy_utils import Settings, SettingsError, is_job_id, load_settings, new_job_id, say
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
            case "serve":
                return run_server(settings, options)
            case _:
                return make_report(settings, options.job_ids, options.output, options.price, as_json=options.json)
    except SettingsError as error:
        say(f"fleet.py: {error}", to=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        say(f"fleet.py: {refusal(error, 'sqs')}", to=sys.stderr)
        return 1


def run_server(settings: Settings, options: argparse.Namespace) -> int:
    """Answer as a ComfyUI until told to end."""
    try:
        from operate.gateway.serve import choose_address, serve
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("aiohttp", "blake3"):
            raise
        say(f"fleet.py serve needs {missing}: pip install -r requirements-serve.txt", to=sys.stderr)
        return 2
    address = choose_address(
        options.host, options.port, options.token_file, no_auth=options.no_auth, no_redirect=options.no_redirect
    )
    return serve(settings, address)


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
        if name != "serve":
            made.add_argument("--json", action="store_true", help="print one object, for programs")
        return made

    status = command("status", "how queue and instances stand", STATUS_HELP)
    status.add_argument("--watch", action="store_true", help="look again every few seconds")
    command("dead", "the jobs in the dead-letter queue, and what their results say", DEAD_HELP)
    command("redrive", "send the dead jobs anew", REDRIVE_HELP)
    purging = command("purge", "delete the dead jobs, after a question", PURGE_HELP)
    purging.add_argument("--yes", action="store_true", help="do not ask; --json needs it")
    report = command("report", "draw a page of jobs that have ended", REPORT_HELP)
    report.add_argument("job_ids", nargs="+", type=job_id, metavar="JOB_ID", help="as printed when a job is sent")
    report.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page (default: report.html)")  # fmt: skip
    for priced in (status, report):
        priced.add_argument("--price", type=usd_per_hour, metavar="USD", help="what an instance's hour costs")
    serving = command("serve", "answer as a ComfyUI, and have the fleet do the work", SERVE_HELP)
    serving.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                         help="where to listen (default: 127.0.0.1, this machine only)")  # fmt: skip
    serving.add_argument("--port", type=port, default=8188, metavar="N", help="default: 8188, where clients look")
    who = serving.add_mutually_exclusive_group()
    who.add_argument("--token-file", type=Path, metavar="FILE", help="let in who brings the token in this file")
    who.add_argument("--no-auth", action="store_true", help="let in all who reach another --host")
    serving.add_argument("--no-redirect", action="store_true",
                         help="pass the files of the Comfy API on; else clients fetch them from S3")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.command == "purge" and options.json and not options.yes:
        purging.error("--json leaves no room for a question: add --yes")
    return options


def job_id(text: str) -> str:
    """An argument that may be part of a key."""
    if not is_job_id(text):
        raise argparse.ArgumentTypeError(f"{text:.60}: that is no job id, such as {new_job_id()}")
    return text


def port(text: str) -> int:
    """An argument that is a port."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text:.60}: give a port from 0 to 65535, where 0 is any that is free")


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

Looking leaves the jobs where they are. The object has queue, jobs, hidden (how many could not be received, because a
worker looks at them just now) and not_seen. A job has job_id, kind, problem (why it is none), sent_at, receives,
result (its receipt; null: no answer yet), answered_at (when its callback was made, too) and attempts: of each that is
known attempt, at, instance_id, kind, message and log.
"""
REDRIVE_HELP = """\
example:
  ./fleet.py redrive --env pro

Each is a new job with an id of its own, whose result names the dead one in retry_of. A job that has ended, and only
its callback was not accepted, is sent under its id, and only its callback is made. A letter is deleted only after its
job was sent, so none gets lost, and a redrive that was cut can be done again: an id is run once. Exits with 1 when some
could not be sent or deleted. The object has queue, sent (of each dead, its old id, and job_id, the new one), unsent
and undeleted (message id: reason), hidden (how many somebody else looks at just now) and instances_wanted.
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
SERVE_HELP = """\
example:
  ./fleet.py serve --env pro

Programs that know a ComfyUI are given this address. It keeps nothing itself: several of them on one environment answer
the same. Needs what requirements-serve.txt names, and the sender's permissions. Ends on SIGTERM.
"""


if __name__ == "__main__":
    sys.exit(main())
