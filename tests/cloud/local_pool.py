"""Launching hooks and warm pools of the local cloud, which moto does not play.

As AWS has it (Auto Scaling user guide, "Use lifecycle hooks with a warm pool"): an instance that comes into the pool is
stopped as soon as it runs, whatever its user data does then, which cloud-init runs at a first boot only. With a
launching hook it waits before that, in Warmed:Pending:Wait, until the action is completed or the time is up; and so does
every instance that is to go into service, from the pool or new, in Pending:Wait.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from local_cloud import LocalCloud

LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"


class Wait(NamedTuple):
    """An instance that waits for its launching hook."""

    state: Any
    hook_name: str
    heartbeat_s: float
    deadline: float


class Launches:
    """What is on its way into service or into the pool. Called under the cloud's lock."""

    def __init__(self, cloud: LocalCloud) -> None:
        self.cloud = cloud
        self.pools: dict[str, list[Any]] = defaultdict(list)
        self.waits: dict[str, Wait] = {}

    def tick(self, group: Any) -> None:
        """Fill or empty the group's pool, and let hooks run out."""
        wanted = int(group.warm_pool.min_size or 0) if group.warm_pool else 0
        pool = self.pools[group.name]
        if len(pool) < wanted:
            for state in self.cloud.new_instances(group, wanted - len(pool)):
                group.instance_states.remove(state)
                pool.append(state)
                self.cloud.boot(state, "Warmed:Stopped")
                self.begin(state, "Warmed:Pending")
        for state in pool[wanted:]:
            pool.remove(state)
            self.waits.pop(state.instance_id, None)
            self.cloud.terminate(state.instance_id)
        for wait in list(self.waits.values()):
            if time.monotonic() > wait.deadline:
                self.proceed(wait.state)

    def begin(self, state: Any, phase: str) -> None:
        """The instance runs now: it waits for the hook, or goes on."""
        name = state.auto_scaling_group_name
        hooks = [hook for hook in self.cloud.hooks(name) if hook.lifecycle_transition == LAUNCHING]
        state.lifecycle_state = f"{phase}:Wait"
        if hooks:
            heartbeat_s = float(hooks[0].heartbeat_timeout)
            self.waits[state.instance_id] = Wait(state, hooks[0].name, heartbeat_s, time.monotonic() + heartbeat_s)
        else:
            self.proceed(state)

    def from_pool(self, group: Any, count: int) -> int:
        """Start up to so many of the pool's instances; returns how many."""
        ready = [state for state in self.pools[group.name] if state.lifecycle_state == "Warmed:Stopped"][:count]
        for state in ready:
            self.pools[group.name].remove(state)
            group.instance_states.append(state)
            self.cloud.machines[state.instance_id].power_on()
            self.begin(state, "Pending")
        return len(ready)

    def proceed(self, state: Any) -> None:
        """Past the hook, or there is none."""
        self.waits.pop(state.instance_id, None)
        if not state.lifecycle_state.startswith("Warmed:"):
            state.lifecycle_state = "InService"
            return
        state.lifecycle_state = "Warmed:Pending:Proceed"

        def stop() -> None:
            self.cloud.machines[state.instance_id].power_off()
            state.lifecycle_state = "Warmed:Stopped"

        threading.Thread(target=stop, daemon=True).start()

    def wait_of(self, parameters: dict[str, str]) -> Wait | None:
        """The wait that a call speaks of."""
        wait = self.waits.get(parameters["InstanceId"])
        return wait if wait and wait.hook_name == parameters["LifecycleHookName"] else None

    def beat(self, wait: Wait) -> None:
        """More time."""
        self.waits[wait.state.instance_id] = wait._replace(deadline=time.monotonic() + wait.heartbeat_s)
