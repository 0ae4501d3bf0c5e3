#!/usr/bin/env python3
"""How long ComfyUI's editor takes from opening its address until it can be used: before `fleet.py serve`, and before a
real ComfyUI that has the same nodes.

Both are opened in turn in a headless Chromium, with nothing kept (a browser that was never there) and anew (one that
comes back). AWS is moto's server behind a proxy that adds a round trip. The real one is yours, with as many nodes as you
like; what it has is what the fleet has.

Usage: tests/bench/bench_editor.py HOST:PORT [--rounds N] [--round-trip SECONDS]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.extend(
    str(Path(__file__).resolve().parents[2] / folder)
    for folder in ("", "tests/cloud", "tests/operate", "tests/bench")
)

import requests
from bench_gateway import BUCKET, environment
from editor_tools import open_browser
from playwright.sync_api import BrowserContext

from comfy_utils import OBJECT_INFO_KEY
from ground.comfyui import EDITOR_FILES_KEY, SYSTEM_STATS_KEY, ComfyUI
from worker.editor_files import pack

USABLE = "window.app?.vueAppReady && app.graph?._nodes.length >= 0 && app.extensionManager && !document.querySelector('#splash-loader')"


def opens(context: BrowserContext, url: str) -> float:
    """Seconds from asking for the page until it can be used."""
    page = context.new_page()
    began = time.monotonic()
    page.goto(url, wait_until="commit")
    page.wait_for_function(USABLE, timeout=120_000)
    took = time.monotonic() - began
    page.close()
    return took


def measure(urls: dict[str, str], rounds: int) -> dict[tuple[str, str], list[float]]:
    """The times of each server, in turn, so that what else the machine does falls on both."""
    times: dict[tuple[str, str], list[float]] = {}
    with open_browser() as browser:
        for number in range(rounds + 1):
            for name, url in urls.items():
                context = browser.new_context()
                first, again = opens(context, url), opens(context, url)
                context.close()
                if number:  # in the first round serve packs its files, once
                    times.setdefault((name, "first time"), []).append(first)
                    times.setdefault((name, "comes back"), []).append(again)
                else:
                    print(f"{name}: the very first time {first:.2f} s", flush=True)
    return times


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description="How long the editor takes to open.")
    parser.add_argument("address", help="a real ComfyUI's, HOST:PORT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-trip", type=float, default=0.025)
    options = parser.parse_args()
    comfy = ComfyUI(options.address)
    nodes = comfy.object_info()
    text = json.dumps(nodes).encode()
    print(f"{len(nodes)} nodes, {len(text) / 1e6:.1f} MB of object_info")
    with environment(options.round_trip) as (serve, s3, _):
        for key, body in {
            OBJECT_INFO_KEY: gzip.compress(text),
            SYSTEM_STATS_KEY: json.dumps(comfy.system_stats()).encode(),
            EDITOR_FILES_KEY: pack(comfy, Path(os.devnull)),
        }.items():
            s3.put_object(Bucket=BUCKET, Key=key, Body=body)
        while requests.get(f"{serve.url}/object_info", timeout=60).status_code != 200:
            time.sleep(0.5)
        urls = {"ComfyUI": f"http://{options.address}", "serve": serve.url}
        for url in urls.values():
            requests.post(f"{url}/settings", json={"Comfy.TutorialCompleted": True}, timeout=60).raise_for_status()
        times = measure(urls, options.rounds)
    for (name, how), each in sorted(times.items(), key=lambda item: item[0][1]):
        print(
            f"{name:8} {how}: half within {statistics.median(each):.2f} s, best {min(each):.2f} s, {len(each)} times"
        )
    for how in ("first time", "comes back"):
        ratio = statistics.median(times["serve", how]) / statistics.median(times["ComfyUI", how])
        print(f"{how}: serve takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
