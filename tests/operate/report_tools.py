"""Receipts and pages, for tests of the report."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfy_utils import new_job_id
from operate.report_page import draw_report

T0 = 1_795_561_200.0


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(T0 + seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def receipt(sent: float, started: float, finished: float, **more: Any) -> dict[str, Any]:
    """A job's result.json, its times in seconds after T0."""
    times = {"sent_at": iso(sent), "started_at": iso(started), "finished_at": iso(finished)}
    known: dict[str, Any] = {
        "job_id": new_job_id(),
        "status": "succeeded",
        "instance_id": "i-1",
        "outputs": [],
        "error": None,
    }
    return known | {"timings": times} | more


def draw(results: list[dict[str, Any]], pictures: Any = None, lives: Any = None) -> ElementTree.Element:
    """The page as a tree, which it is only when it is well formed."""
    return tree(draw_report("Environment pro", results, pictures or {}, lives or {}))


def tree(page: str) -> ElementTree.Element:
    """The page parsed; self-contained is checked on the way."""
    doctype, _, rest = page.partition("\n")
    assert doctype == "<!doctype html>"
    root = ElementTree.fromstring(rest)
    (policy,) = [meta.get("content", "") for meta in root.iter("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src 'self' data: file:;")
    for element in root.iter():
        assert element.tag != "script"
        for name, value in element.items():
            assert not name.startswith("on"), "no handler"
            if name in ("src", "href"):
                assert re.match(r"data:image/|data:,$|#|report-files/", value), f"{value:.80} lies elsewhere"
    assert "url(" not in rest
    assert "@import" not in rest
    return root


def texts(root: ElementTree.Element, path: str) -> list[str]:
    return ["".join(element.itertext()) for element in root.iterfind(path)]


def figures(root: ElementTree.Element) -> dict[str, tuple[str, str]]:
    """The numbers at the top: name -> (value, what stands below)."""
    rows = root.iterfind(".//dl[@class='figures']/div")
    return {name: (value, more) for name, value, more in ([*map("".join, map(_itertext, row))] for row in rows)}


def _itertext(element: ElementTree.Element) -> list[str]:
    return list(element.itertext())


def widths(root: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    """Begin and width, in percent, of everything of that kind on the instances' lanes."""
    styles = [element.get("style", "") for element in root.iter() if kind in element.get("class", "").split()]
    found = [re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", style) for style in styles]
    return [(float(match[1]), float(match[2])) for match in found if match]


def png(prompt: Any, **more: str) -> bytes:
    """A PNG as ComfyUI saves it."""
    info, out = PngInfo(), io.BytesIO()
    for name, text in {**more, "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt)}.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


WORKFLOW = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 7, "positive": ["6", 0], "negative": ["7", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": " a red fox, 日本 "}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "watermark"}},
    "8": {"class_type": "RandomNoise", "inputs": {"noise_seed": 9, "text": ["6", 0]}},
}
