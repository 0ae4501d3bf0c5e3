"""ComfyUI's own editor before a fleet: its files, what people keep, and how a browser comes in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import requests
import websocket
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from editor_walk import EDITOR_ANSWERS, EditorWalk
from gateway_tools import Client, Door
from workplace import LIMIT_S, await_that

from operate.gateway import editor_package
from operate.gateway.editor import Editor
from operate.gateway.editor_package import other_version
from operate.gateway.editor_shelf import SHELF, Browser, Found, may_replace, shelf_key
from operate.gateway.editor_web import is_route
from operate.gateway.files import NoSuchPlaceError
from operate.gateway.words import language_of

TOKEN = "a-token-that-nobody-guesses"


class Person(requests.Session):
    """A browser that has opened the page."""

    def __init__(self, url: str, **headers: str) -> None:
        super().__init__()
        self.url = url
        self.headers.update(headers)
        assert self.ask("GET", "/").ok

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        return self.request(method, self.url + path, timeout=LIMIT_S, **more)

    def save(self, text: str, name: str, **query: str) -> requests.Response:
        return self.ask("POST", f"/api/userdata/workflows%2F{name}", params=query, data=text)

    def load(self, name: str) -> str:
        return self.ask("GET", f"/api/userdata/workflows%2F{name}").text


@pytest.fixture(scope="module")
def other(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A second serve on the same environment, which wants a token."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(f"{TOKEN}\n")
    yield (made := Door(door.site, "serve-other", "--token-file", str(file)))
    made.kill()


# --- The page --------------------------------------------------------------------------------------------


def test_the_page_and_its_files_come_packed_and_once(client: Client) -> None:
    page = client.call("GET", "/")
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "<title>ComfyUI</title>" in page.text
    scripts = [name for name in client.get("/extensions") if name.startswith("/extensions/core/")]
    assert len(scripts) > 20
    assert client.call("GET", scripts[0]).ok
    hashed = page.text.partition('src="./assets/')[2].partition('"')[0]
    for path in ("/", f"/assets/{hashed}", "/object_info"):
        answer = client.call("GET", path)
        assert (answer.headers["Content-Encoding"], answer.status_code) == ("gzip", 200), path
        again = client.call("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b""), path
        plain = client.call("GET", path, headers={"Accept-Encoding": "identity"})
        assert "Content-Encoding" not in plain.headers
        assert plain.content == answer.content
    assert "immutable" in client.call("GET", f"/assets/{hashed}").headers["Cache-Control"]
    for path in ("/assets/../__init__.py", "/../../etc/passwd", "/assets/nothing.js", "/%2e%2e/x"):
        assert client.call("GET", path).status_code == 404


def test_what_the_editor_asks_of_a_server_is_answered(client: Client, door: Door) -> None:
    site = door.site
    for key, body in {
        "models/loras/s/a.safetensors": b"12",
        "models/loras/s/a.preview.png": b"png",
        "models/x.txt": b"",
    }.items():
        site.s3.put_object(Bucket=site.bucket, Key=key, Body=body)
    assert client.get("/settings")["Comfy.TutorialCompleted"] is True, "there are no templates to show"
    assert client.get("/templates/index.json") == client.get("/templates/index.zh.json") == []
    assert client.get("/internal/folder_paths")["loras"] == ["/home/ubuntu/comfy/ComfyUI/models/loras"]
    assert all(name.endswith(" [input]") for name in client.get("/internal/files/input"))
    assert client.get("/internal/files/output") == []
    folders = [each["name"] for each in client.get("/api/experiment/models")]
    assert {"checkpoints", "loras"} <= set(folders)
    assert "configs" not in folders

    def loras() -> list[dict[str, Any]]:
        return [each for each in client.get("/api/experiment/models/loras") if each["name"] == "s/a.safetensors"]

    (lora,) = await_that("the model is listed", loras)
    assert (lora["size"], lora["pathIndex"]) == (2, 0)
    preview = client.call("GET", "/api/experiment/models/preview/loras/0/s%2Fa.safetensors")
    assert (preview.content, preview.headers["Content-Type"]) == (b"png", "image/png")
    for path in ("loras/0/s%2Fnone.safetensors", "nope/0/x", "loras/0/..%2F..%2Finput%2Fx.png"):
        assert client.call("GET", f"/api/experiment/models/preview/{path}").status_code == 404
    assert client.call("GET", "/api/experiment/models/nope").status_code == 404


def test_custom_nodes_bring_their_web_files(client: Client, neighbour: Client, door: Door) -> None:
    await_that("they are stored", lambda: door.site.keys("editor/of-instances/"))
    script = "/extensions/a-pack/js/a.js"
    listed = await_that("they are listed", lambda: [one for one in client.get("/extensions") if "pack" in one])
    assert (
        listed == [one for one in neighbour.get("/extensions") if "core" not in one] == ["/extensions/a-pack/js/a.js"]
    )
    answer = client.call("GET", script)
    assert answer.content == neighbour.call("GET", script).content
    assert answer.headers["Content-Encoding"] in ("gzip", "deflate")
    assert "javascript" in answer.headers["Content-Type"]
    assert client.call("GET", script, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert client.call("GET", "/extensions/a-pack/js/b.css").text == "b { color: red }", (
        "no list has it, and pages need it"
    )
    for path in (".secret", "setup.py", "../__init__.py", "js/none.js"):
        assert client.call("GET", f"/extensions/a-pack/{path}").status_code == 404
    assert client.call("GET", "/answers.json").status_code == 404
    assert client.get("/global_subgraphs") == neighbour.get("/global_subgraphs") != {}
    assert client.get("/global_subgraphs/a1") == neighbour.get("/global_subgraphs/a1")
    assert client.call("GET", "/global_subgraphs/a2").status_code == 404
    for path in ("/pack/api/x", "/api/pack/api/x"):
        told = client.call("GET", path)
        assert (told.status_code, "the custom node a-pack" in told.json()["error"]["message"]) == (501, True)
    assert client.call("GET", "/pack/api/x/y").status_code == 404


@pytest.mark.parametrize(
    ("route", "path", "is_meant"),
    [("/a/b", "/a/b", True), ("/a/b", "/a/b/c", False), ("/a/{x}", "/a/b", True), ("/a/{x}", "/a/b/c", False),
     ("/a/{x:.*}", "/a/b/c", True), ("/a.b", "/axb", False), ("/(", "/(", True)],
)  # fmt: skip
def test_a_custom_nodes_route_is_known_again(route: str, path: str, is_meant: bool) -> None:
    assert is_route(route, path) is is_meant


def test_without_the_package_serve_says_how_to_have_an_editor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor_package, "_folder_of", lambda _: None)
    monkeypatch.setattr(editor_package, "_version", lambda _: None)
    editor = Editor("pro", cast(Any, None), cast(Any, None))
    page = asyncio.run(editor.page(make_mocked_request("GET", "/")))
    assert isinstance(page, web.Response)
    assert page.text is not None
    assert "There is no editor here: for one, pip install -r requirements-serve.txt" in page.text
    assert asyncio.run(editor.file(make_mocked_request("GET", "/templates/index.json"))) is None


def test_the_editor_does_not_open_before_there_is_something_to_edit_with() -> None:
    class NothingYet:
        """What a fleet knows whose first instance has not been there."""

        async def nodes(self) -> None:
            return None

    editor = Editor("pro", cast(Any, None), cast(Any, NothingYet()))
    with pytest.raises(web.HTTPFound) as sent:
        asyncio.run(editor.page(make_mocked_request("GET", "/")))
    assert sent.value.headers["Location"] == "/fleet"
    assert "post a job" in str(asyncio.run(editor.remark()))


@pytest.mark.parametrize(
    ("installed", "asked", "said"),
    [("1.49.6", "1.49.6", None), ("1.49.6", "1.58.1", "1.58.1"), (None, "1.58.1", None), ("1.49.6", None, None),
     ("1.49.6", "1; rm -rf /", None), ("1.49.6", 5, None)],
)  # fmt: skip
def test_an_editor_that_the_fleet_does_not_ask_for_is_told(
    installed: str | None, asked: Any, said: str | None
) -> None:
    assert other_version(installed, {"system": {"required_frontend_version": asked}}) == said
    assert other_version(installed, None) is other_version(installed, {"system": []}) is None


# --- What people keep ------------------------------------------------------------------------------------


def test_the_shelf_answers_as_a_comfyui_does(client: Client) -> None:
    real, ours = json.loads(EDITOR_ANSWERS.read_text()), json.loads(json.dumps(EditorWalk(client).go()))
    different = {name: (real.get(name), ours.get(name)) for name in real | ours if ours.get(name) != real.get(name)}
    assert different == {}


@pytest.mark.parametrize(
    "path", ["", "/", "..", "../x", "a/../../x", "/etc/x", "a\\b", "a\nb", "a/", "x" * 901, "\ud800", "a/\x00"]
)
def test_no_path_leads_off_the_shelf(path: str) -> None:
    with pytest.raises(NoSuchPlaceError):
        shelf_key(path)
    assert shelf_key("workflows/./ä b.json") == f"{SHELF}workflows/ä b.json"


@pytest.mark.parametrize(
    ("writer", "read", "modified_s", "may"),
    [
        ("other", None, 99.0, True),  # it is older than the page, so whoever opened that has seen it
        ("other", None, 101.0, False),
        ("other", "tag", 101.0, True),
        ("other", "older", 99.0, False),
        ("me", None, 101.0, True),
        ("me", "older", 101.0, True),  # written by way of another serve
    ],
)
def test_what_somebody_else_has_saved_is_replaced_by_who_has_seen_it(
    writer: str, read: str | None, modified_s: float, may: bool
) -> None:
    found = Found("tag", writer, modified_s)
    assert may_replace(found, Browser("me", 100.0), read) is may
    assert may_replace(found, None, None), "a script knows what it does"


def test_two_who_save_one_name_at_once_are_both_told_the_truth(door: Door) -> None:
    people = [Person(door.url) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        new = list(pool.map(lambda n: people[n].save(f"new {n}", "race.json", overwrite="false"), range(6)))
        assert sorted(answer.status_code for answer in new) == [200, 409, 409, 409, 409, 409]
        winner = next(n for n in range(6) if new[n].ok)
        assert {person.load("race.json") for person in people} == {f"new {winner}"}
        over = list(pool.map(lambda n: people[n].save(f"over {n}", "race.json"), range(6)))
    assert sorted(answer.status_code for answer in over) == [200, 409, 409, 409, 409, 409]
    second = next(n for n in range(6) if over[n].ok)
    assert all("Somebody else has saved this" in answer.reason for answer in over if not answer.ok)
    assert people[0].load("race.json") == f"over {second}"
    assert people[0].save("after reading it", "race.json").ok
    assert people[0].save("and again", "race.json").ok
    late = people[1]
    assert late.ask("DELETE", "/api/userdata/workflows%2Frace.json").status_code == 409
    assert late.load("race.json") == "and again"
    assert late.ask("DELETE", "/api/userdata/workflows%2Frace.json").status_code == 204
    assert people[0].save("it is gone", "race.json").ok


def test_several_serves_have_one_shelf(door: Door, other: Door) -> None:
    here, there = Person(door.url), Person(other.url, Authorization=f"Bearer {TOKEN}")
    assert here.save("one", "shared.json").ok
    assert there.save("unseen", "shared.json").status_code == 409
    assert there.load("shared.json") == "one"
    assert there.save("two", "shared.json").ok
    assert here.save("unseen", "shared.json").status_code == 409
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda n: (here, there)[n % 2].ask("POST", f"/settings/Test.{n}", json=n).raise_for_status(),
                range(16),
            )
        )
    kept = here.ask("GET", "/settings").json()
    assert [kept.get(f"Test.{n}") for n in range(16)] == list(range(16)), "no one's setting is lost"
    assert "shared.json" in there.ask("GET", "/api/userdata?dir=workflows").json()


def test_what_cannot_be_kept_is_refused_and_harms_nobody(client: Client) -> None:
    for path, body, status in (
        ("/settings/a", b"{", 400),
        ("/settings", b"[]", 400),
        ("/settings", b"[" * 100_000, 400),
        ("/settings", b'"' + b"x" * 1024 * 1024 + b'"', 413),
        ("/userdata/big", b"x" * (16 * 1024 * 1024 + 1), 413),
    ):
        assert client.call("POST", path, data=body).status_code == status, path
    assert isinstance(client.get("/settings"), dict)
    for method, path in (("POST", "/users"), ("GET", "/internal/logs"), ("GET", "/manager/queue/status")):
        answer = client.call(method, path)
        assert answer.status_code in (405, 501)


# --- Coming in -------------------------------------------------------------------------------------------


def test_a_browser_brings_the_token_once(other: Door) -> None:
    html = {"Accept": "text/html,*/*"}
    form = requests.get(other.url, headers=html | {"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.1"}, timeout=LIMIT_S)
    assert (form.status_code, form.headers["Cache-Control"]) == (401, "no-store")
    assert "令牌" in form.text
    assert TOKEN not in form.text
    wrong = requests.get(f"{other.url}/?token=another", headers=html, timeout=LIMIT_S)
    assert (wrong.status_code, "That is not the token" in wrong.text) == (401, True)
    for how in ("address", "form"):
        person = requests.Session()
        if how == "address":
            sent = person.get(f"{other.url}/?token={TOKEN}", headers=html, timeout=LIMIT_S, allow_redirects=False)
        else:
            sent = person.post(f"{other.url}/login", data={"token": TOKEN}, headers=html, timeout=LIMIT_S, allow_redirects=False)  # fmt: skip
        assert (sent.status_code, sent.headers["Location"]) == (303, "/"), how
        cookie = sent.headers["Set-Cookie"]
        assert TOKEN not in cookie
        assert all(word in cookie for word in ("HttpOnly", "SameSite=Strict", "Path=/"))
        assert person.get(f"{other.url}/queue", timeout=LIMIT_S).ok
        brought = "; ".join(f"{name}={value}" for name, value in person.cookies.items())
        line = f"ws://{other.address}/ws"
        websocket.create_connection(line, timeout=LIMIT_S, cookie=brought, origin=other.url).close()
        with pytest.raises(websocket.WebSocketBadStatusException, match=r"40[13]"):
            websocket.create_connection(line, timeout=LIMIT_S, cookie=brought, origin="http://evil.example")
        own = {"Origin": other.url, "Sec-Fetch-Site": "same-origin"}
        assert person.post(f"{other.url}/queue", json={}, headers=own, timeout=LIMIT_S).ok
        for foreign in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "null"}):
            answer = person.post(f"{other.url}/queue", json={}, headers=foreign, timeout=LIMIT_S)
            assert answer.status_code in (401, 403), "the cookie is for our own page"
    for cookies in ({"fleet-door": ""}, {"fleet-door": "0" * 64}, {"fleet-door": TOKEN}, {"fleet-door": "ü"}):
        sent = requests.get(f"{other.url}/queue", headers={"Cookie": "; ".join(f"{n}={v}" for n, v in cookies.items()).encode()}, timeout=LIMIT_S)  # fmt: skip
        assert sent.status_code == 401
    much = requests.post(f"{other.url}/login", data={"token": "x" * 10_000}, headers=html, timeout=LIMIT_S)
    assert much.status_code == 403


@pytest.mark.parametrize(
    ("asked", "accepted", "language"),
    [("", "", "en"), ("", "zh", "zh"), ("", "zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("", "en-US,zh;q=0.5", "en"), ("zh", "en", "zh"),
     ("fr", "fr;q=1, zh;q=0.3", "zh"), ("en", "zh", "en"), ("", "zh;q=0, de", "en"), ("", ";;q=,,", "en")],
)  # fmt: skip
def test_a_page_speaks_the_language_that_is_asked_for(asked: str, accepted: str, language: str) -> None:
    request = make_mocked_request("GET", f"/fleet?lang={asked}", headers={"Accept-Language": accepted})
    assert language_of(request) == language
