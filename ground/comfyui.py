"""A ComfyUI server and its protocol; its behaviour is stated where relied on."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from comfy_utils import EXPORT, InvalidWorkflowError, Workflow, is_link, new_job_id
from ground.answers import (
    OutputFile,
    error_of,
    is_interrupted,
    job_error,
    json_of,
    refusal_of,
    well_formed_entry,
    well_formed_node_errors,
    without_secrets,
)

logger = logging.getLogger(__name__)

SYSTEM_STATS_KEY = "input/jobs/serve/system_stats"
"""Where the /system_stats of the instance that came last lies: `fleet.py serve` shows it."""
EDITOR_FILES_KEY = "editor/of-instances/web.zip"
"""Where what the editor needs of custom nodes lies: see worker/editor_files.py."""


class ComfyGoneError(Exception):
    """ComfyUI does not answer, or has lost the job by a restart: worth another try."""


class ComfyAbsentError(ComfyGoneError):
    """Nobody listens on ComfyUI's port: it has ended, or not begun."""


class ComfySlowError(ComfyGoneError):
    """ComfyUI took the call but does not answer it now: a node may keep its whole interpreter busy."""


class ComfyStalledError(ComfyGoneError):
    """ComfyUI answers but nothing moves: its executor is dead, and only a restart helps."""


class UnsendableError(Exception):
    """A call that cannot be put into words, so that no server has a part in it."""


class WorkflowRefusedError(Exception):
    """ComfyUI refused the workflow; carries the `error` of the result."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


class JobTimeoutError(Exception):
    """The job ran longer than it may; it has been interrupted."""


class JobStoppedError(Exception):
    """The caller asked to stop; the job has been interrupted."""


class JobCancelledError(JobStoppedError):
    """The job's sender has cancelled it. A `should_stop` raises it, and `run` interrupts the job as for any stop."""


class Finished(NamedTuple):
    """A job that ended: its history entry, and what was said besides.

    `node_errors` are those of branches dropped when it was accepted. `blocked` is the text of an
    `execution_error` although the history says success: an ExecutionBlocker held a branch back.
    """

    entry: dict[str, Any]
    node_errors: dict[str, Any]
    blocked: str | None


class ComfyUI:
    """A ComfyUI server. Its history decides what became of a job; the websocket is for progress and speed.

    Several threads may run jobs at the same time: the server runs them one after the other, and one websocket
    tells of all of them. Where it is refused, cut or mute, jobs go on all the same: queue and history tell of them.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._session: Any = None
        self._line: _Line | None = None
        self._line_lock = threading.Lock()
        self._next_line_at = 0.0  # so long no websocket is tried, because the last one was of no use
        self._no_line_said = False
        self._queue: dict[str, Any] = {}
        self._queue_asked_at = -math.inf
        self._queue_lock = threading.Lock()

    def is_ready(self) -> bool:
        """Whether the server answers."""
        try:
            return bool(self._call("GET", "/system_stats").status_code == 200)
        except ComfyGoneError:
            return False

    def run(
        self,
        workflow: Workflow,
        prompt_id: str,
        *,
        timeout_s: float,
        extra_data: Mapping[str, Any] | None = None,
        stall_s: float = math.inf,
        on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        should_withdraw: Callable[[], bool] = lambda: False,
        before_first_submit: Callable[[], None] = lambda: None,
        on_submitted: Callable[[Any], None] = lambda _: None,
        on_picture: Callable[[str, memoryview, str], None] | None = None,
        again: bool = False,
    ) -> Finished:
        """Run a workflow to its end and return its history entry.

        `extra_data` goes along with it, and none of its secrets comes back in what is returned or raised.
        A job with this id that the server already has is adopted, not run twice, unless `again` says
        that its end is known and it is to run once more. One that was interrupted before we came had been
        given back to be run again, and is. `before_first_submit` is called where the server knows nothing of
        the job, so that nothing in its cache names a file of an earlier try. `on_progress` hears its events, the
        first being `execution_start`: behind other jobs it may wait for long, and neither runs out of time nor
        stalls. `on_submitted` hears the number at which the server has put it into its queue, None where it may have done
        so. `on_picture` hears of each picture that comes over the websocket, previews and those of SaveImageWebsocket,
        which node sent it, and whether it is a "png" or "jpg"; it is called in the thread that reads, and all have come
        when this returns. `should_stop` is asked every second, `should_withdraw` as long as it has not started. Raises
        WorkflowRefusedError, ComfyGoneError, ComfyStalledError (no event for `stall_s` while it is said to run, or
        no answer for so long), JobTimeoutError and JobStoppedError (both after interrupting the job or taking it out
        of the queue).
        """
        watch = _Watch(prompt_id, timeout_s, stall_s, on_progress, should_stop, should_withdraw)
        watch.on_picture = on_picture
        node_errors: dict[str, Any] = {}
        try:
            known = again or self.history(prompt_id) is not None or self.place(prompt_id) is not None
            entry = self._await_end(watch) if known and not again else None
            if not known:
                before_first_submit()
            if entry is None or is_interrupted(entry):
                if should_stop() or should_withdraw():
                    raise JobStoppedError
                self._refuse_deadly_links(workflow)
                watch.line = self._listen(watch)
                client_id = watch.line.client_id if watch.line else new_job_id()
                with suppress(ComfySlowError):  # whether it was accepted, history and queue will tell
                    watch.number, node_errors = self._submit(workflow, prompt_id, client_id, extra_data)
                on_submitted(watch.number)
                entry = self._await_end(watch)
                watch.hear_out()
                if watch.line is not None and not watch.has_heard:
                    self._note_no_line("it said nothing of a job that ran")
                if watch.number is None and is_interrupted(entry):
                    raise ComfyGoneError(f"ComfyUI on {self.address} has not taken the job")
        except (JobTimeoutError, JobStoppedError):
            self.cancel(prompt_id)
            raise
        finally:
            if watch.line is not None:
                watch.line.watches.pop(prompt_id, None)
        blocked = watch.error_event if error_of(entry) is None else None
        return Finished(*without_secrets((entry, node_errors, blocked), extra_data))

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The job's history entry; None while it is pending, running or unknown."""
        entry = self._json("GET", f"/history/{prompt_id}").get(prompt_id)
        return well_formed_entry(entry) if isinstance(entry, dict) else None

    def jobs(self) -> list[str]:
        """The ids of the jobs in the queue, the one that runs first."""
        queue = self._json("GET", "/queue")
        items = [item for place in ("running", "pending") for item in queue.get(f"queue_{place}") or []]
        return [str(item[1]) for item in items if isinstance(item, list) and len(item) > 1]

    def place(self, prompt_id: str, age_s: float = 0) -> str | None:
        """Where the job stands in the queue, "running", "pending", or None; as seen `age_s` ago at most."""
        with self._queue_lock:  # many ask at the same time, and one answer does for all
            if not time.monotonic() < self._queue_asked_at + age_s:
                asked_at = time.monotonic()
                self._queue = self._json("GET", "/queue")
                self._queue_asked_at = asked_at
            queue = self._queue
        for place in ("running", "pending"):
            items = queue.get(f"queue_{place}")
            if not isinstance(items, list):
                raise ComfySlowError(f"ComfyUI on {self.address} does not say what is in its queue")
            if any(isinstance(item, list) and prompt_id in item[1:2] for item in items):
                return place
        return None

    def cancel(self, prompt_id: str) -> None:
        """Take the job out of the queue, or interrupt it if it runs. Best effort; no other job is touched."""
        with suppress(ComfyGoneError):
            self._call("POST", "/queue", {"delete": [prompt_id]})
            if self.place(prompt_id) == "running":  # asked, because old servers interrupt whatever runs
                self._call("POST", "/interrupt", {"prompt_id": prompt_id})

    def forget(self, prompt_id: str) -> None:
        """Take the job out of the history."""
        self._call("POST", "/history", {"delete": [prompt_id]})

    def _refuse_deadly_links(self, workflow: Workflow) -> None:
        """Raise InvalidWorkflowError for a link to no node, given by an input that its node does not declare.

        The server takes such a workflow, and the thread that runs jobs ends with it (seen in 0.3.64 and 0.33.0): it
        would stand there until a stall is noticed. What no output needs does not run, and harms nobody.
        """
        deadly = [
            (node_id, name)
            for node_id, node in workflow.items()
            for name, value in node.get("inputs", {}).items()
            if is_link(value) and value[0] not in workflow
        ]
        if not deadly:
            return
        nodes = self.object_info()
        needed = [
            node_id for node_id, node in workflow.items() if nodes.get(node["class_type"], {}).get("output_node")
        ]
        for node_id in needed:  # which grows
            links = [value[0] for value in workflow[node_id].get("inputs", {}).values() if is_link(value)]
            needed += [other for other in dict.fromkeys(links) if other in workflow and other not in needed]
        for node_id, name in deadly:
            class_type = workflow[node_id]["class_type"]
            declared = nodes.get(class_type, {}).get("input") or {}
            is_declared = any(name.split(".")[0] in (declared.get(kind) or {}) for kind in ("required", "optional"))
            if node_id in needed and not is_declared:
                raise InvalidWorkflowError(
                    f"node {node_id} {class_type}: its input {name:.80} is linked to a node that is not there, and "
                    "unknown to it besides: take it out"
                )

    def _withdraw(self, watch: _Watch) -> None:
        """Take the job out of the queue and raise JobStoppedError, unless it has started just now."""
        with suppress(ComfyGoneError):
            self._call("POST", "/queue", {"delete": [watch.prompt_id]})
            if self.place(watch.prompt_id) is not None or self.history(watch.prompt_id) is not None:
                watch.note_start()
                return
        raise JobStoppedError

    def free(self) -> None:
        """Ask the server to unload models and free memory before the next job."""
        self._call("POST", "/free", {"unload_models": True, "free_memory": True})

    def object_info(self) -> dict[str, Any]:
        """Every installed node class with its inputs, and the installed models as their allowed values.

        A class in whose place the server puts another is there as {"replaced_by": what it says of that}, unless it
        is installed. create_env.sh (provision/image.sh) stores the same.
        """
        nodes = self._json("GET", "/object_info", timeout_s=60)
        answer = self._call("GET", "/node_replacements")  # since ComfyUI 0.14
        replaced = answer.json() if answer.status_code == 200 else {}
        return {name: {"replaced_by": by} for name, by in replaced.items()} | nodes

    def system_stats(self) -> dict[str, Any]:
        """What machine it is, and which versions run there."""
        stats: dict[str, Any] = self._json("GET", "/system_stats", timeout_s=60)
        return stats

    def fetch(self, path: str) -> bytes | None:
        """What stands at a path, None where nothing does."""
        answer = self._call("GET", path)
        return answer.content if answer.status_code == 200 else None

    def download(self, file: OutputFile, target: Path) -> None:
        """Save a file the server made."""
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        try:
            asked = self._call("GET", "/view", params=query, stream=True)
        except UnsendableError as error:  # it is the server that named it so
            raise ComfyGoneError(f"ComfyUI on {self.address} names a file that nobody can ask for: {error}") from None
        with asked as answer:
            if answer.status_code != 200:
                raise ComfyGoneError(
                    f"ComfyUI on {self.address} does not have {file.filename} (HTTP {answer.status_code})"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                for chunk in answer.iter_content(1 << 20):
                    out.write(chunk)

    def _submit(
        self, workflow: Workflow, prompt_id: str, client_id: str, extra_data: Mapping[str, Any] | None
    ) -> tuple[Any, dict[str, Any]]:
        body: dict[str, Any] = {"prompt": workflow, "prompt_id": prompt_id, "client_id": client_id}
        if extra_data:  # null would end its executor
            body["extra_data"] = dict(extra_data)
        try:
            answer = self._call("POST", "/prompt", body, timeout_s=60)
        except UnsendableError as error:
            raise InvalidWorkflowError(f"this workflow cannot be written as JSON: {error}") from None
        said = without_secrets(json_of(answer), extra_data)
        if answer.status_code == 200:
            if not isinstance(said, dict):
                raise ComfySlowError(f"ComfyUI on {self.address} took the job, but answered with no JSON object")
            if said.get("prompt_id") != prompt_id:
                raise ComfyGoneError(f"ComfyUI gave the job another id than {prompt_id}: it is too old")
            return said.get("number"), well_formed_node_errors(said.get("node_errors"))
        if answer.status_code == 400 and isinstance(said, dict):
            raise WorkflowRefusedError(refusal_of(said))
        if answer.status_code > 500:  # by something before it, mostly, so that nobody knows
            raise ComfySlowError(f"ComfyUI on {self.address} answered HTTP {answer.status_code}")
        message = f"ComfyUI answered HTTP {answer.status_code} to this workflow: {EXPORT}"
        text = without_secrets(answer.text, extra_data)
        raise WorkflowRefusedError(job_error("invalid_workflow", message, detail=text[:4096]))

    def _await_end(self, watch: _Watch) -> dict[str, Any]:
        """Wait for the history entry of the run being watched."""
        while True:
            watch.check()
            if not watch.has_started and watch.should_withdraw():
                self._withdraw(watch)
            if not watch.has_news():
                continue
            if watch.is_mute():
                self._note_no_line("it says nothing of a job that runs")
            try:
                entry = self.history(watch.prompt_id) if watch.line else None
                if entry is not None and watch.number is not None and entry["prompt"][0] == watch.number:
                    return entry
                # First the queue, then the history: a job that has left the one is in the other already.
                place = self.place(watch.prompt_id, 0 if watch.line else POLL_S / 2)
                if place is None:
                    entry = self.history(watch.prompt_id)
            except ComfySlowError:
                watch.note_answer(False)
                continue
            watch.note_answer(True)
            if place is not None:
                watch.note_place(place)
            elif entry is not None and watch.number in (None, entry["prompt"][0]):
                return entry
            else:
                raise ComfyGoneError(f"ComfyUI on {self.address} no longer has the job: it was restarted")

    def _listen(self, watch: _Watch) -> _Line | None:
        """The websocket, opened anew where it has died, which from now on tells the watch of its job.

        None where there is none: then it is not tried again for a while.
        """
        import websocket

        with self._line_lock:
            if self._line is not None and self._line.watch(watch):
                return self._line
            if time.monotonic() < self._next_line_at:
                return None
            client_id = new_job_id()  # a fresh one: the server may forget a second socket of the same id
            try:
                socket = websocket.create_connection(
                    f"ws://{self.address}/ws?clientId={client_id}",
                    timeout=5,
                    skip_utf8_validation=True,  # json does it, and in no time
                )
            except (websocket.WebSocketException, OSError) as error:
                if isinstance(error, ConnectionRefusedError):
                    raise ComfyAbsentError(
                        f"ComfyUI on {self.address} does not answer: nobody listens there"
                    ) from error
                self._note_no_line(f"{error}")
                return None
            socket.settimeout(None)
            self._line = _Line(socket, client_id)
            return self._line if self._line.watch(watch) else None

    def _note_no_line(self, reason: str) -> None:
        """Take in that the websocket is of no use, and say so once."""
        self._next_line_at = time.monotonic() + LINE_AGAIN_S
        if (line := self._line) is not None:
            line.cut()
        if not self._no_line_said:
            self._no_line_said = True
            what = f"ComfyUI on {self.address} has no websocket for us"
            logger.warning("%s: jobs are followed by its queue and history. It said: %.200s", what, reason)

    def _json(self, method: str, path: str, timeout_s: float = 10) -> dict[str, Any]:
        answer = self._call(method, path, timeout_s=timeout_s)
        value = json_of(answer) if answer.status_code == 200 else None
        if not isinstance(value, dict):
            raise ComfySlowError(
                f"ComfyUI on {self.address} answered HTTP {answer.status_code} to {path}, and no JSON object"
            )
        return value

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 10,
        stream: bool = False,
    ) -> Any:
        """What the server answers. Raises UnsendableError where it is never asked, so has no part in it."""
        import requests

        if self._session is None:
            self._session = requests.Session()
            self._session.trust_env = False  # ComfyUI is never behind a proxy
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
            request = self._session.prepare_request(
                requests.Request(
                    method,
                    f"http://{self.address}{path}",
                    data=data,
                    headers={"Content-Type": "application/json"} if data is not None else None,
                    params=params,
                )
            )
        except (TypeError, ValueError, RecursionError) as error:  # requests' own are ValueErrors, too
            raise UnsendableError(str(error)) from error
        try:
            return self._session.send(request, timeout=(5, timeout_s), stream=stream)
        except requests.ReadTimeout as error:
            raise ComfySlowError(f"ComfyUI on {self.address} has not answered in {timeout_s:.0f} s") from error
        except requests.RequestException as error:
            if is_refused(error):
                raise ComfyAbsentError(f"ComfyUI on {self.address} does not answer: nobody listens there") from error
            raise ComfySlowError(f"ComfyUI on {self.address} does not answer: {error}") from error


def is_refused(error: BaseException | None) -> bool:
    """Whether at the bottom of an error there is a port where nobody listens."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None


POLL_S = 0.2
"""Between two looks at the queue where no websocket tells of a job."""
LINE_AGAIN_S = 60.0
"""So long no websocket is tried after one that was of no use."""
PONG_S = 5.0
"""So long a websocket that has said nothing may take to show that it is alive."""
SILENCE_S = 2.0
"""Seconds without news of a job after which history and queue are asked."""
QUEUED_SILENCE_S = 10.0
"""The same of one that stood in the queue when it was asked: there may be many, and each question costs the one that
runs."""
HEAR_OUT_S = 10.0
"""So long pictures may be under way when a job has ended: the server sends as fast as we write them."""
LAST_WORD_S = 0.05
"""So long after a job's last event comes the word that its history is written."""


class _Line:
    """One websocket and the thread that reads it, always, because a server waits for a client that does not."""

    def __init__(self, socket: Any, client_id: str) -> None:
        self.client_id = client_id
        self.watches: dict[str, _Watch] = {}
        self._socket = socket
        self._is_open = True
        self._heard = threading.Event()
        self._lock = threading.Lock()
        self._at_work: tuple[_Watch, str] | None = None  # the node whose pictures come
        threading.Thread(target=self._read, name="websocket", daemon=True).start()

    def watch(self, watch: _Watch) -> bool:
        """Tell the watch of its job from now on; False where the line is dead."""
        with self._lock:
            if self._is_open:
                self.watches[watch.prompt_id] = watch
            return self._is_open

    def is_alive(self) -> bool:
        """Whether the server answers on this line: one that has gone without a word is only silent, too."""
        import websocket

        self._heard.clear()
        with suppress(websocket.WebSocketException, OSError):
            self._socket.ping()
            if self._heard.wait(PONG_S):
                return True
        self.cut()
        return False

    def cut(self) -> None:
        """Hear no more; whoever listens is told."""
        with suppress(OSError):
            self._socket.abort()

    def _pass_on(self, frame: memoryview) -> None:
        """Hand on a picture: 1 for what it is and 1 or 2 for JPEG or PNG, four bytes each, then the picture itself.

        Each comes right after its `progress` event. Servers send it otherwise only to clients that ask for it.
        """
        suffix = {1: "jpg", 2: "png"}.get(int.from_bytes(frame[4:8]))
        if int.from_bytes(frame[:4]) == 1 and suffix and self._at_work is not None:
            watch, node_id = self._at_work
            if watch.on_picture is not None:
                watch.on_picture(node_id, frame[8:], suffix)

    def _read(self) -> None:
        import websocket

        try:
            while True:
                opcode, frame = self._socket.recv_data(control_frame=True)
                self._heard.set()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    break
                if opcode == websocket.ABNF.OPCODE_BINARY:
                    self._pass_on(memoryview(frame))
                elif opcode == websocket.ABNF.OPCODE_TEXT and frame:
                    event = json.loads(frame)
                    watch = self.watches.get(_job_of_event(event))
                    if watch is not None:
                        watch.events.put(event)
                        if event["type"] in ("executing", "progress"):
                            self._at_work = (watch, str(event["data"].get("node")))
        except (websocket.WebSocketException, OSError, ValueError, RecursionError):
            pass  # what it would have told history and queue tell, too
        with self._lock:
            self._is_open = False
        for watch in list(self.watches.values()):
            watch.events.put(None)
        with suppress(websocket.WebSocketException, OSError):
            self._socket.close()


def _job_of_event(event: Any) -> str:
    """Which job an event is of; "" where it is of none, or has not the form in which events are read."""
    data = event.get("data") if isinstance(event, dict) and isinstance(event.get("type"), str) else None
    job_id = data.get("prompt_id") if isinstance(data, dict) else None
    return job_id if isinstance(job_id, str) else ""


class _Watch:
    """One run of a job, as far as its websocket tells of it."""

    def __init__(
        self,
        prompt_id: str,
        timeout_s: float,
        stall_s: float,
        on_progress: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        should_withdraw: Callable[[], bool],
    ) -> None:
        import queue

        self.prompt_id = prompt_id
        self.timeout_s = timeout_s
        self.stall_s = stall_s
        self.on_progress = on_progress
        self.should_stop = should_stop
        self.should_withdraw = should_withdraw
        self.events: Any = queue.SimpleQueue()  # None: the line is dead
        self.line: _Line | None = (
            None  # None: there is none, or the job was adopted; then only history and queue tell
        )
        self.number: Any = None  # the run's number in the history; None: any run will do
        self.error_event: str | None = None
        self.has_started = False
        self.has_heard = False  # an event of this job
        self.on_picture: Callable[[str, memoryview, str], None] | None = None
        self._has_heard_all = False
        self._ended = False
        self._ended_at = 0.0
        self._has_asked = False
        self._slow_since: float | None = None  # history and queue do not answer
        self._started = self._asked = self._moved = time.monotonic()

    def check(self) -> None:
        """Raise what ends the watch: a stop, the time limit, a stall."""
        now = time.monotonic()
        if self.should_stop():
            raise JobStoppedError
        if self.has_started and now > self._started + self.timeout_s:
            raise JobTimeoutError
        if self._slow_since is not None and now > self._slow_since + self.stall_s:
            raise ComfyStalledError(f"ComfyUI has answered nothing for {self.stall_s:.0f} s")
        if self.line is not None and self.has_heard and now > self._moved + self.stall_s:
            if self.line.is_alive():
                raise ComfyStalledError(f"ComfyUI has said nothing of the running job for {self.stall_s:.0f} s")
            self._moved = now

    def note_start(self) -> None:
        """Take in that the job runs: from now on it may run out of time, and stall."""
        if not self.has_started:
            self.has_started = True
            self._started = self._moved = time.monotonic()
            self.on_progress({"type": "execution_start", "data": {"prompt_id": self.prompt_id}})

    def is_mute(self) -> bool:
        """Whether the job has run for a while and the line has not said so."""
        silent_s = time.monotonic() - self._moved
        return self.line is not None and self.has_started and not self.has_heard and silent_s > SILENCE_S

    def note_answer(self, came: bool) -> None:
        """Take in whether history and queue have answered."""
        self._slow_since = None if came else self._slow_since or time.monotonic()

    def note_place(self, place: str) -> None:
        """Take in that the job is still in the queue."""
        if place == "running":
            self.note_start()
        if time.monotonic() > self._ended_at + SILENCE_S:  # the error of an ExecutionBlocker does not end the run
            self._ended = False

    def has_news(self) -> bool:
        """Wait for an event, up to a second, and say whether history and queue are to be asked."""
        import queue

        is_over = False
        if self.line is None:
            time.sleep(POLL_S)
            is_over = True
        else:
            try:
                event = self.events.get(timeout=LAST_WORD_S if self._ended else 1 if self.has_started else 0.2)
            except queue.Empty:
                is_over = self._ended
            else:
                if event is None:
                    self.line = None
                    return False
                self._moved = time.monotonic()
                # Said of failures, too, and only once the history is written: it is time to ask.
                is_over = event["type"] == "executing" and event["data"].get("node") is None
                self._has_heard_all = self._has_heard_all or is_over
                self._take(event)
        is_queued = self.number is not None and not self.has_started and self._has_asked
        if is_over or time.monotonic() > self._asked + (QUEUED_SILENCE_S if is_queued else SILENCE_S):
            self._asked, self._has_asked = time.monotonic(), True
            return True
        return False

    def hear_out(self) -> None:
        """Wait for what is still to come over the line of a job that has ended, where pictures do."""
        limit = time.monotonic() + HEAR_OUT_S
        while self.on_picture and self.line is not None and not self._has_heard_all and time.monotonic() < limit:
            self.has_news()

    def _take(self, event: dict[str, Any]) -> None:
        self.has_heard = True
        self.note_start()
        if event["type"] in ("executing", "progress", "progress_state", "executed"):
            self.on_progress(event)
        elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            self._ended = True
            self._ended_at = time.monotonic()
            if event["type"] == "execution_success":
                self.on_progress(event)
            if event["type"] == "execution_error":
                data = event["data"]
                self.error_event = (
                    f"node {data.get('node_id')} {data.get('node_type')}: {data.get('exception_message')}"
                )
