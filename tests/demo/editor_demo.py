#!/usr/bin/env python3
"""What demo.sh --editor does: a fleet on this machine, at zero instances, and ComfyUI's own editor before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "tests/cloud", "tests/operate"))

from demo import (
    BUCKET,
    DemoError,
    fill_base_folder,
    make_base_folder,
    run_on_base,
    scratch_folder,
    start_comfyui,
    tell,
)
from demo import with_permissions_of as allow
from drawn import portrait, retouch
from local_cloud import LocalCloud, free_port
from PIL import Image

COOLDOWN_S = 45
"""So long an instance idles before it leaves: a newcomer sees both, that the next job is quick and that it goes."""


def show_editor(folder: Path, port: int) -> int:
    """Make the fleet, serve it until somebody ends that, and take all away again; returns serve's exit code."""
    with LocalCloud(folder / "cloud") as cloud:
        base = folder / "base"
        make_base_folder(base)
        env = base / "env"
        env.write_text(env.read_text().replace("SCALE_COOLDOWN=5", f"SCALE_COOLDOWN={COOLDOWN_S}"))
        if not os.environ.get("COMFYUI_DIR"):
            fill_base_folder(base)
        Image.radial_gradient("L").convert("RGB").save(base / "ComfyUI/input/example.png")
        machine = cloud.make_base(base)
        keeper, operator, sender = (
            allow(cloud, who, name, base, machine.environment())
            for who, name in (("operator", "base"), ("operator", "pro"), ("sender", "pro"))
        )
        run_on_base(base, keeper, "./create_env.sh", "base", "--move-data", "--yes")
        start_comfyui(machine)
        run_on_base(base, operator, "./create_env.sh", "pro")
        s3 = cloud.client("s3")
        for name, text in (("portrait", portrait()), ("retouch", retouch("example.png"))):
            s3.put_object(Bucket=BUCKET, Key=f"editor/user/workflows/{name}.json", Body=text)
        tell(
            "\nThe fleet has no instance, and two saved workflows. Open the address below in a browser, press w for the"
        )
        tell(
            "workflows, open portrait, and press Run: the first instance boots, works, and leaves when it has idled for"
        )
        tell(f"{COOLDOWN_S} s. How the fleet stands is at /fleet. Ctrl-C ends all of it.\n")
        command = ["./fleet.py", "serve", "--env", "pro", "--port", str(port)]
        tell(f"$ {' '.join(command)}")
        serving = subprocess.Popen(command, cwd=base, env=sender, start_new_session=True)
        try:
            return serving.wait()
        finally:
            if serving.poll() is None:
                serving.terminate()
                serving.wait()


def main() -> int:
    """Show it; 0 where somebody has ended it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so that all processes are ended
    port = int(sys.argv[1]) or free_port()
    try:
        with scratch_folder() as folder:
            try:
                return show_editor(folder, port)
            except KeyboardInterrupt:
                tell("\nEnded: nothing of it is left.")
                return 0
    except DemoError as error:
        print(f"\ndemo.sh: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
