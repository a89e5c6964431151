"""Screenshots of the page for the documentation, from any running server with any model.

    puna serve runs/first --port 8000 &
    python tests/page/shots.py http://127.0.0.1:8000 --out docs/pictures
        page-empty.png  page-streaming.png  page-boxes.png  page-settings.png  page-phone.png  page-dark.png

The picture shown and the question come from the grounding task (a composed scene of the test split), or from
--picture and --question. Answers come at the model's own pace, except in page-streaming.png: there a pause is put
between events, so that a fast model can be caught in the middle of its answer, and the speed, which would be wrong,
is hidden.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from page_browser import open_browser  # noqa: E402

SLOWLY = """
const real = window.fetch.bind(window);
window.fetch = async (...request) => {
  const response = await real(...request);
  if (!String(request[0]).includes("completions") || !response.ok) return response;
  const slow = new TransformStream({
    async transform(chunk, out) {
      for (const event of new TextDecoder().decode(chunk).split(/(?<=\\n\\n)/)) {
        await new Promise((done) => setTimeout(done, PAUSE));
        out.enqueue(new TextEncoder().encode(event));
      }
    },
  });
  return new Response(response.body.pipeThrough(slow), { status: response.status, headers: response.headers });
};
"""


def scene(folder: Path, number: int) -> tuple[Path, str]:
    """A picture and a question of the grounding task's test split."""
    from puna.tasks.grounding import Grounding

    item = Grounding().item(number, "test")
    parts = item.messages[0]["content"]
    picture = next(part["image"] for part in parts if part["type"] == "image").open().convert("RGB")
    path = folder / "scene.png"
    picture.save(path)
    return path, next(part["text"] for part in parts if part["type"] == "text").strip()


class Shots:
    def __init__(self, browser, options: argparse.Namespace, picture: Path, question: str):
        self.browser, self.url, self.out = browser, options.url, options.out
        self.first, self.text, self.letters = options.first, options.text, options.letters
        self.picture, self.question = picture, question

    def page(self, width=1120, height=760, scheme="light", scale=1.5, pause=0):
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
        )
        if pause:
            context.add_init_script(SLOWLY.replace("PAUSE", str(pause)))
        page = context.new_page()
        page.goto(self.url)
        page.wait_for_selector(".example")
        return page

    def save(self, page, name: str) -> None:
        page.wait_for_timeout(400)  # let what moves come to rest
        page.screenshot(path=self.out / f"page-{name}.png")
        print(self.out / f"page-{name}.png")

    def ask(self, page, text: str, picture: bool = False, wait: bool = True) -> None:
        if picture:
            page.set_input_files("#file", self.picture)
            page.wait_for_selector(".thumb img")
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
        if wait:
            page.wait_for_selector(".streaming", state="detached", timeout=120_000)

    def all(self) -> None:
        page = self.page()
        self.save(page, "empty")
        for text in (self.first, self.text):  # so that the list holds something
            self.ask(page, text)
            page.click("#new-button")
        self.ask(page, self.question, picture=True)
        if page.locator("rect.box").count() == 0:
            print(f"note: the answer to {self.question!r} holds no box; another --item may", file=sys.stderr)
        self.save(page, "boxes")
        page.click("#settings-button")
        self.save(page, "settings")
        page = self.page(height=560, pause=300)
        self.ask(page, self.first)
        self.ask(page, self.text, wait=False)
        page.wait_for_selector(".streaming")
        while (
            page.query_selector(".streaming")
            and len(page.locator(".assistant .text").last.inner_text().strip()) < self.letters
        ):
            page.wait_for_timeout(20)  # not wait_for_function: the page's policy forbids the `eval` it needs
        page.evaluate("document.querySelectorAll('.speed').forEach((speed) => (speed.hidden = true))")
        page.screenshot(path=self.out / "page-streaming.png")
        print(self.out / "page-streaming.png")
        dark = self.page(scheme="dark")
        self.ask(dark, self.text)
        self.ask(dark, self.question, picture=True)
        self.save(dark, "dark")
        phone = self.page(360, 740, scale=2)
        self.ask(phone, self.question, picture=True)
        self.save(phone, "phone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--picture", type=Path, help="a picture of your own, with --question")
    parser.add_argument("--question", default="Where is the apple?")
    parser.add_argument("--text", default="What is 47 + 35?", help="the question without a picture")
    parser.add_argument(
        "--first", default="What is the capital of Peru?", help="what is asked before that, in the streaming picture"
    )
    parser.add_argument(
        "--letters", type=int, default=6, help="take the streaming picture after so many letters of the answer"
    )
    parser.add_argument("--item", type=int, default=0, help="which test scene to show")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        picture, question = (
            (options.picture, options.question) if options.picture else scene(Path(folder), options.item)
        )
        with open_browser() as browser:
            Shots(browser, options, picture, question).all()


if __name__ == "__main__":
    main()
