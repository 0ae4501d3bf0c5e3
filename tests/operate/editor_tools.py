"""A person at ComfyUI's editor: a real browser, moved by mouse and keys, and what is seen in it."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import Error as PlaywrightError
from workplace import LIMIT_S

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AS_WITH_A_COMFYUI = re.compile(
    r"/user\.css$|/userdata/user\.css$|dir=subgraphs|dir=workflows|comfy\.templates\.json$|\.index\.json$|api\.comfy\.org"
    r"|ComfyApp graph accessed before initialization"
)
"""Errors that the editor's console has before a ComfyUI as well: it asks for files that nobody has made, for its maker's
news, and complains of itself. Seen on 0.33."""
HERE_ONLY = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
"""The browser reaches nothing but this machine."""
PLACE = """([type, name]) => {
  const node = app.graph._nodes.find((node) => node.type === type), view = app.canvas.ds
  const widget = node.widgets?.find((widget) => widget.name === name)
  const x = node.pos[0] + node.size[0] * 0.6, y = node.pos[1] + (widget ? widget.last_y + 10 : node.size[1] * 0.7)
  const box = app.canvas.canvas.getBoundingClientRect()
  return [(x + view.offset[0]) * view.scale + box.left, (y + view.offset[1]) * view.scale + box.top]
}"""
"""Where a widget of a node is on the screen, or the node itself."""
DROP = """async ([x, y, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)), moved = new DataTransfer()
  moved.items.add(new File([bytes], name, { type: 'image/png' }))
  for (const kind of ['dragenter', 'dragover', 'drop']) {
    const how = { bubbles: true, cancelable: true, clientX: x, clientY: y, dataTransfer: moved }
    document.elementFromPoint(x, y).dispatchEvent(new DragEvent(kind, how))
    await new Promise((done) => setTimeout(done, 50))
  }
}"""
"""Let a file fall there, as a browser tells of it."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The Chromium of this machine. Where there is none the test is skipped, and says how to get one."""
    found = os.environ.get("CHROMIUM") or next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium here: apt-get install chromium, or name one by CHROMIUM=/path")
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(
            executable_path=found, args=[*sandbox, "--disable-dev-shm-usage", "--disable-gpu", HERE_ONLY]
        )
        yield browser
        browser.close()


class Designer:
    """Somebody with a browser of their own."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.url = url
        self.complaints: list[str] = []
        context = browser.new_context(viewport={"width": 1280, "height": 760}, locale="en-US")
        context.set_default_timeout(LIMIT_S * 1000)
        self.page: Page = context.new_page()
        self.page.on(
            "console", lambda message: self._hear(message.type, message.text, message.location.get("url", ""))
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self._await_editor()

    def _hear(self, kind: str, text: str, url: str) -> None:
        if kind == "error" and not AS_WITH_A_COMFYUI.search(f"{text} {url}"):
            self.complaints.append(f"{text} {url}")

    def _await_editor(self) -> None:
        self.sees("window.app?.vueAppReady && app.graph?._nodes && app.extensionManager")

    def sees(self, what: str) -> None:
        """Wait until something holds in the page."""
        try:
            self.page.wait_for_function(what)
        except PlaywrightError as error:
            raise AssertionError(
                f"{self.page.url} does not come to {what}: {error}; it said {self.complaints}"
            ) from error

    def open(self, name: str) -> None:
        """Open a saved workflow from the list at the side."""
        self.page.keyboard.press("w")
        self.page.get_by_role("treeitem", name=name).click()
        self.sees(f"app.extensionManager.workflow.activeWorkflow?.key === '{name}.json'")
        self.page.keyboard.press("w")
        self.sees("document.querySelectorAll('[role=treeitem]').length === 0")
        self.sees(
            "app.graph._nodes.every((node) => !node.widgets?.length || node.widgets.some((each) => each.last_y))"
        )

    def change(self, node: str, widget: str, value: str) -> None:
        """Change a value by hand."""
        self.page.mouse.dblclick(*self.page.evaluate(PLACE, [node, widget]))
        field = self.page.locator(".graphdialog input, .graphdialog textarea, .graphdialog .value").last
        field.fill(value)
        field.press("Enter")
        self.sees(f"app.graph._nodes.some((node) => node.type === '{node}' && node.widgets.some((each) => String(each.value) === '{value}'))")  # fmt: skip

    def run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def sees_progress(self) -> None:
        self.sees("app.graph._nodes.some((node) => node.progress > 0 && node.progress < 1)")

    def sees_picture(self) -> str:
        """The address of the picture in the SaveImage node."""
        self.sees("app.graph._nodes.find((node) => node.type === 'SaveImage').imgs?.[0]?.naturalWidth > 0")
        return str(self.page.evaluate("app.graph._nodes.find((node) => node.type === 'SaveImage').imgs[0].src"))

    def drop(self, node: str, name: str, picture: bytes) -> None:
        """Let a picture fall on a node."""
        x, y = self.page.evaluate(PLACE, [node, ""])
        self.page.mouse.move(x, y)
        self.page.evaluate(DROP, [x, y, name, base64.b64encode(picture).decode()])
        self.sees(f"app.graph._nodes.some((node) => node.type === '{node}' && node.widgets.some((each) => each.value === '{name}'))")  # fmt: skip

    def save(self) -> None:
        """Save what is open under its name."""
        self.page.keyboard.press("Control+s")

    def gallery(self, count: int) -> None:
        """See that so many pictures are in the gallery, and shown."""
        self.page.keyboard.press("a")
        shown = "[...document.querySelectorAll('img')].filter((each) => /view\\?filename/.test(each.src) && each.naturalWidth > 0)"
        self.sees(f"new Set({shown}.map((each) => new URL(each.src).searchParams.get('subfolder'))).size >= {count}")
        self.page.keyboard.press("a")

    def come_back(self) -> None:
        """Load the page anew."""
        self.page.reload()
        self._await_editor()

    def picture_of_the_screen(self, name: str) -> None:
        """Keep what is seen, where SCREENS names a folder for it: the docs' pictures are made so."""
        if folder := os.environ.get("SCREENS"):
            self.page.screenshot(path=Path(folder) / name)
