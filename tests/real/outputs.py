"""What of each of ComfyUI's own output nodes comes into the receipt, by a real ComfyUI and a real worker.

    tests/.venv/bin/python tests/real/outputs.py ~/ComfyUI ~/ComfyUI/venv/bin/python [ARGUMENT...]

Arguments go to ComfyUI's main.py, such as --cpu. Every workflow runs twice; what is counted is what the second gave,
which a cache may have answered. Prints a table, and ends with 1 where a row is not as it should be. A node that this
ComfyUI does not have is left out.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from server import HERE, parser_of, start

sys.path[:0] = [str(HERE.parent / "cloud"), str(HERE.parents[1])]
os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
os.environ |= {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}

from local_cloud import LocalCloud  # noqa: E402 - the paths above
from workplace import Site, await_that  # noqa: E402

from comfy_utils import Workflow  # noqa: E402
from ground.comfyui import ComfyUI  # noqa: E402
from worker.outputs import window_ns  # noqa: E402

IMAGE: dict[str, Any] = {
    "class_type": "EmptyImage",
    "inputs": {"width": 16, "height": 16, "batch_size": 2, "color": 255},
}
ONE = {"class_type": "EmptyImage", "inputs": {**IMAGE["inputs"], "batch_size": 1}}
AUDIO = {"class_type": "EmptyAudio", "inputs": {"duration": 0.2, "sample_rate": 44100, "channels": 2}}
TEXT = {"class_type": "PrimitiveString", "inputs": {"value": "deep/in/name"}}
LATENT = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
MASK = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 16, "height": 16}}
VIDEO = {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 8.0}}
ANIMATED = {"fps": 6.0, "lossless": True, "quality": 80, "method": "default"}
DATA_SET = {"images": ["2", 0], "folder_name": "d", "filename_prefix": "i", "mode": "overwrite"}


class Row(NamedTuple):
    """A node, what it gets, what is before it, and what its receipt should have: files by pattern, keys of values."""

    node: str
    inputs: dict[str, Any]
    before: dict[str, Any]
    files: list[str]
    values: list[str] = []  # noqa: RUF012 - never changed
    warns: bool = False


ROWS = [
    Row("SaveImage", {"images": ["1", 0], "filename_prefix": "a/x"}, IMAGE, [r"a/x_00001_\.png", r"a/x_00002_\.png"]),
    Row("SaveImage", {"images": ["1", 0], "filename_prefix": ["2", 0]}, TEXT, [r"deep/in/name_0000\d_\.png"] * 2),
    Row("PreviewImage", {"images": ["1", 0]}, IMAGE, [r"temp/ComfyUI_temp_\w+_0000\d_\.png"] * 2),
    Row("SaveImageWebsocket", {"images": ["1", 0]}, IMAGE, [r"websocket/3_00001\.png", r"websocket/3_00002\.png"]),
    Row("SaveAnimatedWEBP", {"images": ["1", 0], "filename_prefix": "x", **ANIMATED}, IMAGE, [r"x_00001_\.webp"]),
    Row(
        "SaveAnimatedPNG",
        {"images": ["1", 0], "filename_prefix": "x", "fps": 6.0, "compress_level": 4},
        IMAGE,
        [r"x_00001_\.png"],
    ),
    Row(
        "SaveWEBM",
        {"images": ["1", 0], "filename_prefix": "x", "codec": "vp9", "fps": 8.0, "crf": 32.0},
        IMAGE,
        [r"x_00001_\.webm"],
    ),
    Row(
        "SaveVideo",
        {"video": ["2", 0], "filename_prefix": "v/x", "format": "auto", "codec": "auto"},
        VIDEO,
        [r"v/x_00001_\.mp4"],
    ),
    Row("SaveAudio", {"audio": ["2", 0], "filename_prefix": "x"}, AUDIO, [r"x_00001_?\.flac"]),
    Row("SaveAudioMP3", {"audio": ["2", 0], "filename_prefix": "x", "quality": "V0"}, AUDIO, [r"x_00001_?\.mp3"]),
    Row(
        "SaveAudioAdvanced",
        {"audio": ["2", 0], "filename_prefix": "x", "format": "flac"},
        AUDIO,
        [r"x_00001_?\.flac"],
    ),
    Row("PreviewAudio", {"audio": ["2", 0]}, AUDIO, [r"temp/\w+\.flac"]),
    Row("SaveLatent", {"samples": ["2", 0], "filename_prefix": "x"}, LATENT, [r"x_00001_\.latent"]),
    Row("MaskPreview", {"mask": ["2", 0]}, MASK, [r"temp/\w+\.png"]),
    Row("PreviewAny", {"source": ["2", 0]}, TEXT, [], ["text"]),
    Row("SaveText", {"text": ["2", 0], "filename_prefix": "x", "format": "txt"}, TEXT, [r"x_00001\.txt"], ["text"]),
    Row(
        "SaveImageAdvanced",
        {
            "images": ["1", 0],
            "filename_prefix": "x",
            "format": "png",
            "format.bit_depth": "8-bit",
            "format.input_color_space": "sRGB",
        },
        IMAGE,
        [r"x_0000\d_?\.png"] * 2,
    ),
    Row("SaveImageDataSetToFolder", DATA_SET, ONE, [r"d/i_00000\.png"]),
    Row(
        "SaveImageTextDataSetToFolder",
        {**DATA_SET, "texts": "a caption"},
        ONE,
        [r"d/i_00000\.png", r"d/i_00000\.txt"],
    ),
    Row(
        "ImageCompare",
        {"image_a": ["1", 0], "image_b": ["1", 0], "compare_view": ""},
        IMAGE,
        [r"temp/comfy\.compare\.[ab]_\w+\.png"] * 4,
    ),
    Row(
        "Image Save",
        {"images": ["1", 0], "output_path": "", "filename_prefix": "a/b/x"},
        IMAGE,
        [r"a/b/x_000\d\.png"] * 2,
    ),
    Row(
        "Image Save", {"images": ["1", 0], "output_path": "o", "filename_prefix": "x"}, IMAGE, [r"o/x_000\d\.png"] * 2
    ),
    Row("Image Save", {"images": ["1", 0], "output_path": "", "filename_prefix": "%x%/x"}, IMAGE, [], warns=True),
]


JOBS = 40
AFTER_ANOTHER: dict[str, dict[str, Any]] = {
    "SaveImage": {"images": ["1", 0], "filename_prefix": "x"},
    "Image Save": {"images": ["1", 0], "output_path": "", "filename_prefix": "x"},
}


def main() -> int:
    """Run every row; returns the exit code."""
    args = parser_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalCloud(Path(folder, "cloud")) as cloud:
        site = Site(cloud, Path(folder, "comfy"))
        try:
            nodes = [HERE / "blind_saver.py"]
            site.processes.append(start(args, site.folder / "ComfyUI", site.port, nodes, site.folder / "job-output"))
            site.start_worker()
            wrong = run_rows(site)
            for what, inputs in AFTER_ANOTHER.items():
                wrong += run_one_after_another(site, what, inputs)
        finally:
            site.end()
    print(f"{wrong} of {len(ROWS)} rows are not as they should be" if wrong else "all as it should be")
    return 1 if wrong else 0


def run_rows(site: Site) -> int:
    """Run and print the rows; returns how many are not as they should be."""
    there = comfy_of(site).object_info()
    wrong = 0
    for row in ROWS:
        if row.node not in there:
            print(f"- {row.node}: this ComfyUI does not have it")
            continue
        workflow: Workflow = {"1": IMAGE, "2": row.before, "3": {"class_type": row.node, "inputs": row.inputs}}
        site.await_result(site.send(workflow))
        job_id = site.send(workflow)
        result = site.await_result(job_id)
        files = sorted(output["s3_key"].removeprefix(f"output/{job_id}/") for output in result["outputs"])
        values = sorted({name for each in result["values"].values() for name in each})
        is_right = (
            result["status"] == "succeeded"
            and len(files) == len(row.files)
            and all(re.fullmatch(*pair) for pair in zip(row.files, files, strict=True))
            and values == row.values
            and bool(result["warnings"]) == row.warns
        )
        wrong += not is_right
        problem = (result["error"] or {}).get("message", "") or "; ".join(result["warnings"])
        print(
            f"{'  ' if is_right else '! '}{row.node:30} {', '.join(files) or '-'} | {', '.join(values) or '-'} | {problem}"
        )

    def left() -> list[Path]:
        roots = [site.folder / "job-output", site.folder / "ComfyUI/temp"]
        return [path for root in roots for path in root.rglob("*") if path.is_file()]

    await_that("no file is left on the disk", lambda: not left())
    return wrong


def run_one_after_another(site: Site, node: str, inputs: dict[str, Any]) -> int:
    """Run jobs that save under one name, each its own colour, and print how long the GPU had waited between them.

    Returns how many did not get their own picture.
    """
    image = {"width": 512, "height": 512, "batch_size": 1}
    ids = [
        site.send(
            {
                "1": {"class_type": "EmptyImage", "inputs": {**image, "color": 1000 * number}},
                "2": {"class_type": node, "inputs": inputs},
            }
        )
        for number in range(JOBS)
    ]
    pictures = set()
    for job_id in ids:
        outputs = site.await_result(job_id)["outputs"]
        pictures |= {site.s3.get_object(Bucket=site.bucket, Key=each["s3_key"])["Body"].read() for each in outputs}
    windows = sorted(filter(None, (window_ns(comfy_of(site).history(job_id) or {}) for job_id in ids)))
    gaps = [(after[0] - before[1]) / 1e6 for before, after in pairwise(windows)]
    ran = [(end - start) / 1e6 for start, end in windows]
    print(
        f"{JOBS} jobs with {node} of one name, {statistics.median(ran):.0f} ms each: {len(pictures)} pictures; "
        f"between two jobs {statistics.median(gaps):.1f} ms (median), {statistics.mean(gaps):.1f} ms (mean)"
    )
    return JOBS - len(pictures)


def comfy_of(site: Site) -> ComfyUI:
    """The site's ComfyUI."""
    return ComfyUI(f"127.0.0.1:{site.port}")


if __name__ == "__main__":
    sys.exit(main())
