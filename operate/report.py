"""A report of jobs that have ended: gathers their receipts and images and what became of their instances."""

from __future__ import annotations

import itertools
import json
import re
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from comfy_utils import InvalidWorkflowError, Settings, Workflow, aws_client, check_workflow, count, say
from operate.prices import price_of
from operate.report_page import Life, Picture, Receipt, draw_report
from operate.words import moment, refusal
from send_job import read_json, read_result

EMBEDDED_BYTES = 256 * 1024
"""A larger image lies beside the page instead of in it, as do all once those in it have PAGE_BYTES together."""
PAGE_BYTES = 16 * 1024 * 1024
IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
               ".gif": "image/gif"}  # fmt: skip
LAUNCH = re.compile(r"(Launching a new|Terminating) EC2 instance: (\S+)")
"""How AWS describes that an instance came or went."""


def make_report(settings: Settings, job_ids: Sequence[str], page: Path, price: float | None, *, as_json: bool) -> int:
    """Draw the page of these jobs; returns the exit code."""
    job_ids = list(dict.fromkeys(job_ids))
    results: dict[str, Receipt] = {}
    try:
        s3 = aws_client("s3", settings.region)
        for job_id in job_ids:
            result = read_result(s3, settings.s3_bucket, job_id)
            if result is None:
                say(f"fleet.py: job {job_id} has no result yet: it is left out", to=sys.stderr)
            else:
                results[job_id] = result
        if results:
            instances = dict.fromkeys(result["instance_id"] for result in results.values())
            autoscaling = aws_client("autoscaling", settings.region)
            lives = read_lives(s3, autoscaling, settings, list(instances), price)
            title = f"Environment {settings.env}"
            write_report(s3, settings.s3_bucket, title, list(results.values()), lives, page)
    except Exception as error:
        say(f"fleet.py: no report: {refusal(error, 's3')}", to=sys.stderr)
        return 1
    if as_json:
        left_out = [job_id for job_id in job_ids if job_id not in results]
        print(json.dumps({"page": str(page) if results else None, "jobs": list(results), "left_out": left_out}))
    elif results:
        say(f"Report of {count(len(results), 'job')}: {page}")
    return 0 if len(results) == len(job_ids) else 1


def write_report(
    s3: Any,
    bucket: str,
    title: str,
    results: Sequence[Receipt],
    lives: Mapping[str, Life],
    page: Path,
    note: str = "",
) -> None:
    """Fetch the jobs' images and write the page. Raises what boto3 raises, and OSError."""
    folder = page.with_name(f"{page.stem}-files")
    room = PAGE_BYTES
    pictures: dict[str, list[Picture]] = {}
    for result in results:
        for output in result["outputs"]:
            kind = IMAGE_TYPES.get(Path(output["filename"]).suffix.lower())
            if kind is None or output["type"] != "output":
                continue
            try:
                body = s3.get_object(Bucket=bucket, Key=output["s3_key"])["Body"].read()
            except s3.exceptions.NoSuchKey:
                continue  # somebody has tidied up
            if len(body) <= min(EMBEDDED_BYTES, room):
                room -= len(body)
                source = f"data:{kind};base64,{b64encode(body).decode()}"
            else:
                folder.mkdir(parents=True, exist_ok=True)
                number = len(pictures.get(result["job_id"], ())) + 1
                file = folder / f"{result['job_id']}-{number}{Path(output['filename']).suffix.lower()}"
                file.write_bytes(body)
                source = quote(f"{folder.name}/{file.name}")
            picture = Picture(source, output["filename"], *made_from(body))
            pictures.setdefault(result["job_id"], []).append(picture)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(draw_report(title, results, pictures, lives, note), encoding="utf-8")


# --- What became of instances ----------------------------------------------------------------------------


def read_lives(
    s3: Any, autoscaling: Any, settings: Settings, instance_ids: Sequence[str], price: float | None = None
) -> dict[str, Life]:
    """What can be known of instances, also of those that are gone: from the group's activities, which AWS keeps for
    six weeks, and from what the workers left in the bucket. What cannot be read is left out."""
    lives = dict.fromkeys(instance_ids, Life(price=price))
    for instance_id in instance_ids:
        with suppress(Exception):
            kind = read_json(s3, settings.s3_bucket, f"output/{instance_id}/worker.json")["instance_type"] or ""
            lives[instance_id] = Life(type=kind, price=price_of(kind, settings.region) if price is None else price)
        with suppress(Exception):
            boot = read_json(s3, settings.s3_bucket, f"output/{instance_id}/boot.json")
            lives[instance_id] = lives[instance_id]._replace(ready=moment(boot["booted_at"]) + boot["total"])
    with suppress(Exception):
        pages = autoscaling.get_paginator("describe_scaling_activities")
        for activity in itertools.chain.from_iterable(
            page["Activities"]
            for page in pages.paginate(AutoScalingGroupName=settings.asg_name, PaginationConfig={"MaxItems": 10_000})
        ):
            match = LAUNCH.match(activity["Description"])
            if not match or match[2] not in lives:
                continue
            if match[1] == "Terminating":
                ended = activity["EndTime"].timestamp() if "EndTime" in activity else None
                lives[match[2]] = lives[match[2]]._replace(ended=ended)
            else:
                lives[match[2]] = lives[match[2]]._replace(launched=activity["StartTime"].timestamp())
            if all(life.launched for life in lives.values()):
                break  # the newest come first, so there is nothing more to learn
    return lives


# --- What images say of their making ---------------------------------------------------------------------


def made_from(png: bytes) -> tuple[str, str]:
    """Prompt and seeds of a PNG as ComfyUI saves it, with the workflow in its tEXt chunk `prompt`; "" without."""
    place = 8
    while png[place + 4 : place + 8] not in (b"", b"IDAT"):
        size = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"tEXt":
            keyword, _, text = png[place + 8 : place + 8 + size].partition(b"\0")
            if keyword == b"prompt":
                with suppress(ValueError, RecursionError, InvalidWorkflowError):
                    return prompt_and_seed(check_workflow(json.loads(text)))
        place += size + 12
    return "", ""


def prompt_and_seed(workflow: Workflow) -> tuple[str, str]:
    """The texts that stand in a workflow, but for negative ones, and its seeds."""
    inputs = {node_id: node.get("inputs", {}) for node_id, node in workflow.items()}
    links = [each["negative"] for each in inputs.values() if isinstance(each.get("negative"), list)]
    negative = {str(link[0]) for link in links if link}
    texts = [each.get("text") for node_id, each in inputs.items() if node_id not in negative]
    seeds = [each.get(name) for each in inputs.values() for name in ("seed", "noise_seed")]
    prompt = "\n".join(text.strip() for text in texts if isinstance(text, str) and text.strip())
    return prompt, ", ".join(str(seed) for seed in seeds if type(seed) is int)
