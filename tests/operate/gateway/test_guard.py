"""Who may come in, and how much may come: one who floods, or means ill, is refused, and the others are served."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests
import websocket
from gateway_tools import Client, Door
from workplace import LIMIT_S, await_that, image_workflow

from comfy_utils import SettingsError
from operate.gateway.comfy_socket import MOST_UNSENT
from operate.gateway.comfy_socket import Client as SocketClient
from operate.gateway.files import NoSuchPlaceError, key_of, place_of_key
from operate.gateway.guard import is_loopback
from operate.gateway.serve import choose_address

JOB = "0f8fad5b-d9cb-469f-a165-70867728950e"
TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture(scope="module")
def closed(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A serve that wants a token."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(f"{TOKEN}\n")
    yield (made := Door(door.site, "serve-closed", "--token-file", str(file)))
    made.kill()


# --- Who -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/queue", "/api/history", "/view?filename=x", "/upload/image", "/nothing"])
def test_nothing_is_said_without_the_token(closed: Door, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": f"Basic {TOKEN}"}):
        answer = requests.get(closed.url + path, headers=headers, timeout=LIMIT_S)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthorized")
    assert "another" not in closed.log.read_text()


def test_the_token_is_taken_from_header_and_address(closed: Door) -> None:
    assert requests.get(f"{closed.url}/features", headers={"Authorization": f"bearer {TOKEN}"}, timeout=LIMIT_S).ok
    assert requests.get(f"{closed.url}/features?token={TOKEN}", timeout=LIMIT_S).ok
    with pytest.raises(websocket.WebSocketBadStatusException, match="401"):
        websocket.create_connection(f"ws://{closed.address}/ws", timeout=LIMIT_S)
    websocket.create_connection(f"ws://{closed.address}/ws?token={TOKEN}", timeout=LIMIT_S).close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://HOST"}, 200),
        ({"Origin": "http://127.0.0.1"}, 200),  # without a port it is not compared, as in ComfyUI
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 200),  # a sandboxed page, as in ComfyUI
        ({"Origin": "http://[evil"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "fleet.example", "Origin": "https://other.example"}, 200),
    ],
)
def test_a_page_of_another_site_cannot_use_a_door_on_this_machine(
    door: Door, headers: dict[str, str], status: int
) -> None:
    filled = {name: value.replace("HOST", door.address) for name, value in headers.items()}
    assert requests.get(f"{door.url}/features", headers=filled, timeout=LIMIT_S).status_code == status
    assert requests.options(f"{door.url}/prompt", headers=filled, timeout=LIMIT_S).status_code == status


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("a.localhost", True),
     ("0.0.0.0", False), ("10.0.0.1", False), ("fleet.example", False), ("localhost.evil.example", False), (None, False)],
)  # fmt: skip
def test_what_this_machine_is(host: str | None, is_ours: bool) -> None:
    assert is_loopback(host) is is_ours


def test_others_are_let_in_only_where_that_was_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--host 0\.0\.0\.0 lets others in.*--token-file.*--no-auth"):
        choose_address("0.0.0.0", 1, None, no_auth=False)
    assert choose_address("0.0.0.0", 1, None, no_auth=True).token is None
    token = tmp_path / "token"
    for text in ("", "short", "x" * 20 + "\n" + "y" * 20, "ключ" * 8):
        token.write_text(text)
        with pytest.raises(SettingsError, match="has no token in it: write one line of at least 16 characters"):
            choose_address("0.0.0.0", 1, token, no_auth=False)
    with pytest.raises(SettingsError, match="cannot be read"):
        choose_address("127.0.0.1", 1, tmp_path / "absent", no_auth=False)
    token.write_text("0123456789abcdef\n")
    assert choose_address("0.0.0.0", 1, token, no_auth=False).token == "0123456789abcdef"


def test_a_port_that_is_taken_is_told_with_what_helps(door: Door) -> None:
    port = door.address.rpartition(":")[2]
    ran = door.site.run("./fleet.py", "serve", "--port", port)
    assert ran.returncode == 1
    assert f"127.0.0.1:{port} is taken, perhaps by a ComfyUI: choose another port" in ran.stderr
    ran = door.site.run("./fleet.py", "serve", "--env", "nowhere", "--port", "0")
    assert ran.returncode == 1
    assert "queue" in ran.stderr


def test_without_aiohttp_it_says_how_to_get_it(door: Door) -> None:
    hide = "import sys; sys.modules['aiohttp'] = None; import fleet; sys.exit(fleet.main(['serve']))"
    ran = door.site.run("python3", "-c", hide)
    assert (ran.returncode, ran.stderr) == (
        2,
        "fleet.py serve needs aiohttp: pip install -r requirements-serve.txt\n",
    )


# --- Paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "subfolder", "name"),
    [
        ("output", "", "object_info.json.gz"),
        ("output", "i-0123456789abcdef0", "parse_job.log"),
        ("output", JOB, "result.json"),
        ("output", JOB, "progress.json"),
        ("output", f"{JOB}/.", "attempts.json"),
        ("output", f"{JOB}/../i-0123456789abcdef0", "parse_job.log"),
        ("output", "..", "models"),
        ("output", "/", "x"),
        ("output", JOB, "a\\b"),
        ("output", JOB, "a\nb"),
        ("output", JOB, "\ud800"),
        ("output", JOB, "x" * 1000),
        ("output", JOB, ""),
        ("output", "", JOB),
        ("temp", "", "x.png"),
        ("temp", JOB, "../result.json"),
        ("input", "jobs", f"{JOB}.json"),
        ("input", "./jobs/serve/posted", "x"),
        ("input", "jobs//serve", "x"),
        ("input", "..", "x"),
        ("models", "checkpoints", "x.safetensors"),
    ],
)
def test_no_path_leads_to_what_is_not_for_clients(place: str, subfolder: str, name: str) -> None:
    with pytest.raises(NoSuchPlaceError):
        key_of(place, subfolder, name)


def test_paths_lead_to_a_jobs_files_and_back() -> None:
    for key, place in {
        f"output/{JOB}/x.png": {"filename": "x.png", "subfolder": JOB, "type": "output"},
        f"output/{JOB}/a/b/x.png": {"filename": "x.png", "subfolder": f"{JOB}/a/b", "type": "output"},
        f"output/{JOB}/temp/x.png": {"filename": "x.png", "subfolder": JOB, "type": "temp"},
    }.items():
        assert place_of_key(key) == place
        assert key_of(place["type"], place["subfolder"], place["filename"]) == key
    assert key_of("input", "a//b/.", "x.png") == "input/a/b/x.png"
    assert place_of_key("output/i-1/x.log") is None


# --- How much --------------------------------------------------------------------------------------------


def is_well(client: Client) -> None:
    """Whether it still does its work, within a time that any machine has."""
    assert client.post(image_workflow()).status_code == 200
    assert client.get("/features")


def test_a_hundred_megabytes_are_refused_before_they_have_come(client: Client, door: Door) -> None:
    host, port = door.address.split(":")
    for length in (100_000_000, None):
        connection = http.client.HTTPConnection(host, int(port), timeout=LIMIT_S)
        connection.putrequest("POST", "/prompt")
        connection.putheader("Content-Type", "application/json")
        if length:
            connection.putheader("Content-Length", str(length))
        else:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        chunk = b"x" * 1_000_000
        with suppress(OSError):  # it has said what it has to say
            for _ in range(100):
                connection.send(chunk if length else b"%x\r\n%s\r\n" % (len(chunk), chunk))
        with suppress(ConnectionError, http.client.HTTPException):
            assert connection.getresponse().status == 413
        connection.close()
    is_well(client)
    assert memory_mb(door) < 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
     b'{"prompt": {"nodes": [], "links": []}}', b'{"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}, "number": "x"}',
     b'{"prompt": {"1": {"class_type": "SaveImage", "inputs": {"a": NaN}}}}', b'{"prompt": 5}', b'{"prompt": null}',
     b'{"prompt": {"1": {"class_type": "PreviewAny", "inputs": {}}}, "extra_data": 5}',
     b'{"prompt": {"1": {"class_type": "PreviewAny", "inputs": {}}}, "partial_execution_targets": 5}'],
)  # fmt: skip
def test_what_is_no_prompt_gets_a_400_in_the_right_form(client: Client, body: bytes) -> None:
    answer = client.call("POST", "/prompt", data=body)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"type", "message", "details", "extra_info"}
    assert isinstance(answer.json()["node_errors"], dict)


@pytest.mark.parametrize("path", ["/free", "/internal/logs", "/api/assets", "/manager/queue/status", "/customnode/x"])
def test_what_no_fleet_has_is_told_and_not_pretended(client: Client, path: str) -> None:
    for method in ("GET", "POST"):
        answer = client.call(method, path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (501, "not_on_a_fleet")


def test_bodies_that_are_nothing_harm_nobody(client: Client) -> None:
    for path in ("/queue", "/history", "/interrupt", "/api/jobs/cancel"):
        for body in (b"{", b"[]", b"7", b'{"delete": 5, "job_ids": 5, "prompt_id": {}}', b'{"delete": [5, {}, "x"]}'):
            assert client.call("POST", path, data=body).status_code in (200, 400), (path, body)
    assert client.call("POST", "/upload/image", data=b"x").status_code == 400
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.call("POST", "/upload/image", data=b"--y\r\n\r\n", headers=headers).status_code == 400
    is_well(client)


def test_sockets_that_say_nothing_are_bounded_and_closed(door: Door) -> None:
    narrow = Door(door.site, "serve-narrow", changes={"MOST_CONNECTIONS": 80, "SILENT_S": 5.0})
    host, port = narrow.address.split(":")
    silent = [socket.create_connection((host, int(port)), timeout=LIMIT_S) for _ in range(80)]

    def is_full() -> bool:
        return requests.get(f"{narrow.url}/features", timeout=LIMIT_S).status_code == 503

    await_that("one more is refused", is_full)
    await_that("they were closed, and others are served", lambda: not is_full())
    assert silent[0].recv(1) == b""
    for each in silent:
        each.close()
    narrow.kill()


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    class Deaf:
        """A websocket whose other side takes nothing."""

        def __init__(self) -> None:
            self.ours, self.theirs = socket.socketpair()

        async def send_str(self, _: str) -> None:
            await asyncio.Event().wait()

        def get_extra_info(self, _: str) -> socket.socket:
            return self.ours

    async def flood() -> None:
        deaf = Deaf()
        client = SocketClient(deaf)  # type: ignore[arg-type]
        for _ in range(MOST_UNSENT):
            client.send("x")
        deaf.theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            deaf.theirs.recv(1)
        client.send("one too many")
        await asyncio.sleep(0)
        client.send("one more")
        assert deaf.theirs.recv(1) == b"", "the connection is cut"

    asyncio.run(flood())


def test_a_flood_of_jobs_is_taken_or_refused_and_none_is_lost(client: Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.post(image_workflow()), range(60)))
    assert {answer.status_code for answer in answers} <= {200, 503}
    taken = [answer.json()["prompt_id"] for answer in answers if answer.status_code == 200]
    assert taken
    for job_id in taken:
        assert client.history(job_id)["status"]["status_str"] == "success"


def test_secrets_go_to_the_job_and_nowhere_else(client: Client, door: Door) -> None:
    secret = "sk-this-is-a-secret"
    more = {"extra_data": {"api_key_comfy_org": secret, "extra_pnginfo": {"workflow": {"id": "w"}}}}
    job_id = client.run(image_workflow(), **more)
    entry = client.history(job_id)
    assert entry["prompt"][3]["extra_pnginfo"] == {"workflow": {"id": "w"}}
    site = door.site
    (file,) = entry["outputs"]["3"]["images"]
    assert b"workflow" in client.view(file).content, "pictures carry their workflow"
    told = json.dumps([client.get("/history"), client.get("/queue"), client.get(f"/api/jobs/{job_id}")])
    stored = "".join(
        site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read().decode("utf-8", "replace")
        for key in [*site.keys("input/"), *site.keys(f"output/{job_id}/")]
    )
    assert secret not in told + stored + door.log.read_text() + site.log()
    assert job_id in stored


def test_it_ends_in_order_when_it_is_told_to(door: Door) -> None:
    other = Door(door.site, "serve-ending")
    client = Client(other.address)
    client.listen()
    job_id = client.run(image_workflow())
    other.process.terminate()
    other.process.wait(LIMIT_S)
    assert other.process.returncode == 0
    with suppress(websocket.WebSocketException, OSError):
        while client.next():
            pass
    assert Client(door.address).history(job_id)["status"]["completed"]


def memory_mb(door: Door) -> float:
    """What the process holds."""
    text = Path(f"/proc/{door.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def test_nothing_went_wrong_that_nobody_was_told_of(door: Door) -> None:
    """Last in this file: what serve has logged in all of it."""
    lines = door.log.read_text().splitlines()[1:]
    assert [line for line in lines if "Traceback" in line or "ERROR" in line] == []
