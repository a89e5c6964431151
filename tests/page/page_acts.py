"""What the tests of the page do again and again, as a person would."""

import base64
import io
import time

from PIL import Image
from server_fakes import FakeEngine, FakeEvent, until

SCENE = Image.new("RGB", (400, 200), (210, 225, 230))
SCENE.paste((200, 40, 40), (100, 50, 200, 150))
BOX = '<box label="apple">250,250,500,750</box>'


def png(picture=SCENE):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def file(data=None, name="scene.png", kind="image/png"):
    return {"name": name, "mimeType": kind, "buffer": data or png()}


def wait(page, condition):
    """Polls from here: the page's policy forbids the `eval` that playwright's own polling needs."""
    until(lambda: page.evaluate(condition))


def ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page, answers=1):
    wait(page, f"document.querySelectorAll('.assistant').length === {answers} && !document.querySelector('.streaming')")


def answer(page, number=-1):
    return page.locator(".assistant").nth(number).locator(".text").inner_text()


def attach(page, *files):
    before = page.locator(".thumb").count()
    page.set_input_files("#file", list(files) or [file()])
    wait(page, f"document.querySelectorAll('.thumb').length === {before + (len(files) or 1)}")


def sent(engine, number=-1):
    """The pictures of the last message of a request."""
    return [part["image"] for part in engine.submitted[number][0][-1]["content"] if part["type"] == "image"]


TRANSFER = """(type, data, name, kind) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: kind }));
    const make = (event) => type === "paste"
      ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
      : new DragEvent(event, { dataTransfer: transfer, bubbles: true, cancelable: true });
    const target = type === "paste" ? document.querySelector("#prompt") : document.querySelector("#main");
    if (type === "drop") { target.dispatchEvent(make("dragenter")); target.dispatchEvent(make("dragover")); }
    const hinted = !document.querySelector("#dropzone").hidden;
    target.dispatchEvent(make(type));
    return hinted;
}"""


def transfer(page, way, data, name="a.png", kind="image/png"):
    """Paste or drop a file; returns whether the page said that it may be dropped here."""
    return page.evaluate(f"(a) => ({TRANSFER})(...a)", [way, base64.b64encode(data).decode(), name, kind])


class Torrent(FakeEngine):
    """Answers with `script(messages)` to the end, `letters` a token, `pause` seconds apart."""

    def __init__(self, script, letters=5, pause=0.0):
        super().__init__(script, pause, context=10**9)
        self.letters = letters

    def _make(self, handle, answer, sampling):
        for number, at in enumerate(range(0, len(answer), self.letters)):
            if handle.aborted.is_set():
                break
            if self.pause:
                time.sleep(self.pause)
            handle.events.put(FakeEvent(answer[at : at + self.letters], number))
        handle.events.put(FakeEvent("", None, "stop"))
        handle.events.put(None)
