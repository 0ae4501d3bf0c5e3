"""What jobs leave on an instance's disk.

    tests/.venv/bin/python tests/bench/bench_disk.py [JOBS]

Each job saves a picture, shows two and writes a third one of a fixed name outside its folder. 1,000 jobs by default.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "cloud"), str(HERE.parents[1])]
os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
os.environ |= {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}

from local_cloud import LocalCloud  # noqa: E402 - the paths above
from workplace import Site, image_workflow  # noqa: E402

MORE = {
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    "5": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    "6": {
        "class_type": "SaveImageDataSetToFolder",
        "inputs": {"images": ["2", 0], "folder_name": "d", "filename_prefix": "i", "mode": "overwrite"},
    },
}


def main() -> None:
    """Run the jobs and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=int, nargs="?", default=1000)
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder, LocalCloud(Path(folder, "cloud")) as cloud:
        site = Site(cloud, Path(folder, "comfy"), SCALE_COOLDOWN="2")
        try:
            site.start_comfyui()
            site.start_worker()
            began = time.monotonic()
            ids = [site.send(image_workflow(more=MORE)) for _ in range(jobs)]
            results = [site.await_result(job_id) for job_id in ids]
            took_s = time.monotonic() - began
            site.await_empty_queue()
            files = sum(len(result["outputs"]) for result in results)
            good = sum(result["status"] == "succeeded" for result in results)
            print(f"{good} of {jobs} jobs succeeded in {took_s:.0f} s, with {files} files")
            for name in ("job-output", "ComfyUI/temp", "ComfyUI/input"):
                left = [path for path in Path(site.folder, name).rglob("*") if path.is_file()]
                print(f"left in {name}: {len(left)} files, {sum(path.stat().st_size for path in left)} bytes")
        finally:
            site.end()


if __name__ == "__main__":
    main()
