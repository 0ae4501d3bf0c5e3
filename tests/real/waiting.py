"""How long a real ComfyUI waits for the worker between two jobs, by the times in its own history.

    tests/.venv/bin/python tests/real/waiting.py ~/ComfyUI ~/ComfyUI/venv/bin/python [ARGUMENT...]

Arguments go to ComfyUI's main.py, such as --cpu. AWS is the local cloud, in a process of its own, behind a proxy that
adds 25 ms to each call; the group wants 20 instances, of which this one alone takes jobs yet. A gap is the time from
one job's end to the next one's start. Share is what the jobs ran of the time from the first one's start to the last
one's end. A job's time is mostly that of a node which sleeps, as ComfyUI does while a GPU works; with --busy it makes
and saves pictures instead, on the processors that the worker and AWS need, too. "straight" are the same jobs, posted
into ComfyUI's queue all at once: what it needs itself.

Every ten seconds ComfyUI collects its garbage between two jobs. That is its own, and kept out of what is measured.
Ends with 1 where the mean gap is 5 ms or more, or the share of jobs of 120 ms less than 0.97.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from server import HERE, parser_of, start

sys.path[:0] = [str(HERE.parent / "cloud"), str(HERE.parent / "bench"), str(HERE.parents[1])]

import bench_worker  # noqa: E402 - the paths above
from bench_tools import at_distance  # noqa: E402
from local_cloud import free_port  # noqa: E402
from places import CLOUD, ROOT  # noqa: E402

JOBS = {30: 60, 120: 40}
"""A job's milliseconds, and how many of them are sent."""
ROUND_TRIP_S = 0.025
WANTED = 20
SIDES = {30: 1024, 120: 2048}
"""A square picture that takes about so long to make and to save."""
SHARES = {120: 0.97}
MEAN_MS = 5.0
TIDY_S = 10.5


class Waited(NamedTuple):
    """How a series of jobs ran, in milliseconds."""

    runs: list[float]
    gaps: list[float]

    @property
    def share(self) -> float:
        """What they ran of the whole time."""
        return sum(self.runs) / (sum(self.runs) + sum(self.gaps))

    def line(self) -> str:
        """For people."""
        high = statistics.quantiles(self.gaps, n=10, method="inclusive")[8]
        return (
            f"{len(self.runs):3} jobs of {statistics.median(self.runs):4.0f} ms: between two median "
            f"{statistics.median(self.gaps):5.1f} ms, mean {statistics.mean(self.gaps):5.1f} ms, nine tenths below "
            f"{high:5.1f} ms, longest {max(self.gaps):4.0f} ms; share {self.share:.3f}"
        )


def measure(comfy: bench_worker.Comfy, job_ids: list[str]) -> Waited:
    """What the history says of these jobs."""
    runs = []
    for job_id in job_ids:
        told = {name: data["timestamp"] for name, data in comfy.history(job_id)["status"]["messages"]}
        runs.append((told["execution_start"], told["execution_success"]))
    runs.sort()
    gaps = [float(after[0] - before[1]) for before, after in pairwise(runs)]
    return Waited([float(end - start) for start, end in runs], gaps)


def let_it_tidy_up(comfy: bench_worker.Comfy) -> None:
    """Have the server collect its garbage now, so that what is measured ends before it does so again.

    It does so after a job, ten seconds after the last time or, where that is sooner, once it has idled till then; it
    takes a third of a second.
    """
    time.sleep(2 * TIDY_S)  # what was due is done, and long ago
    (job_id,) = comfy.post(0, 1)
    bench_worker.await_that(lambda: comfy.history(job_id))
    time.sleep(1)


def run_straight(comfy: bench_worker.Comfy, milliseconds: int, jobs: int) -> Waited:
    """Post them all into its queue."""
    ids = comfy.post(milliseconds, jobs)
    bench_worker.await_that(lambda: comfy.history(ids[-1]))
    return measure(comfy, ids)


def main() -> int:
    """Start all, and print; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--scripts", type=Path, default=ROOT, metavar="DIR", help="another checkout's worker")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="measure so often")
    parser.add_argument("--busy", action="store_true", help="with jobs that compute, on the worker's processors")
    args = parser.parse_args()
    is_well = True
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Path(scratch, "comfy"), Path(scratch, "base")
        (home / "ComfyUI").mkdir(parents=True)
        port = free_port()
        os.environ |= {"COMFY_ADDRESS": f"127.0.0.1:{port}", "COMFY_OUTPUT": f"{base}/output"}
        server = start(args, base, port, [HERE / "gpu_stand_in.py"])
        cloud = subprocess.Popen(
            [sys.executable, CLOUD / "aws_fixtures.py", f"{scratch}/cloud"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert cloud.stdout is not None
            comfy = bench_worker.Comfy(home)
            site = bench_worker.Site(home, comfy, cloud.stdout.readline().split()[0], args.scripts)
            site.make_group(WANTED)
            comfy.sleeper = "" if args.busy else "GpuStandIn"
            for milliseconds, count in [each for each in JOBS.items() for _ in range(args.times)]:
                comfy.side = SIDES[milliseconds] if args.busy else comfy.side
                let_it_tidy_up(comfy)
                print("straight ", run_straight(comfy, milliseconds, count).line(), flush=True)
                with at_distance(site.endpoint, ROUND_TRIP_S) as far, site.worker(far):
                    site.check(site.run(0, 2))  # so that everything is connected
                    let_it_tidy_up(comfy)
                    ids = site.run(milliseconds, count)
                site.check(ids)
                waited = measure(comfy, ids)
                print("by worker", waited.line(), flush=True)
                is_well = is_well and statistics.mean(waited.gaps) < MEAN_MS
                is_well = is_well and waited.share >= SHARES.get(milliseconds, 0)
        finally:
            for process in (server, cloud):
                process.terminate()
                process.wait(60)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
