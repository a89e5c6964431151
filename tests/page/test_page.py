"""The chat page in a real browser: what a person does, and what must never happen."""

import base64
import io
import re
import time

import pytest
from PIL import Image
from server_fakes import FakeEngine, until

SCENE = Image.new("RGB", (400, 200), (210, 225, 230))
SCENE.paste((200, 40, 40), (100, 50, 200, 150))
BOX = '<box label="apple">250,250,500,750</box>'


def png(picture=SCENE):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def file(data=None, name="scene.png", kind="image/png"):
    return {"name": name, "mimeType": kind, "buffer": data or png()}


def ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page, answers=1):
    wait(page, f"document.querySelectorAll('.assistant').length === {answers} && !document.querySelector('.streaming')")


def wait(page, condition):
    """Polls from here: the page's policy forbids the `eval` that playwright's own polling needs."""
    until(lambda: page.evaluate(condition))


def answer(page, number=-1):
    return page.locator(".assistant").nth(number).locator(".text").inner_text()


# ------------------------------------------------------------------------------------------------ talking


def test_shows_the_model_and_examples(site):
    page = site()
    assert page.inner_text("#model-name") == "tiny"
    assert "12.3M" in page.inner_text("#model-size") and "4.1M" in page.inner_text("#model-size")
    assert page.inner_text("#model-hash") == "0123456789ab"
    assert page.locator(".example").count() == 4 and page.is_visible("#empty")
    page.click(".example >> nth=0")
    done(page)
    assert not page.is_visible("#empty") and answer(page) == "Hello there."


def test_text_appears_as_it_is_made(site):
    page = site(FakeEngine(lambda m: "one two three four five six seven", pause=0.1))
    ask(page, "Count")
    seen = set()
    until(
        lambda: seen.add(answer(page)) or answer(page).endswith("seven") if page.query_selector(".assistant") else False
    )
    growing = sorted(text for text in seen if text)
    assert len(growing) >= 3, "the text came all at once"
    assert all("one two three four five six seven".startswith(text) for text in growing)
    done(page)
    assert re.search(r"9 tokens · \d+\.\d tokens/s", page.inner_text(".speed"))
    assert page.inner_text("#announcer") == "one two three four five six seven"


def test_enter_sends_and_shift_enter_starts_a_line(site):
    engine = FakeEngine()
    page = site(engine)
    assert page.is_disabled("#send")
    page.type("#prompt", "one")
    page.press("#prompt", "Shift+Enter")
    page.type("#prompt", "two")
    assert engine.submitted == []
    page.press("#prompt", "Enter")
    done(page)
    assert engine.submitted[0][0][-1]["content"][0]["text"] == "one\ntwo"
    assert page.input_value("#prompt") == ""


def test_conversation_goes_on_and_starts_anew(site):
    engine = FakeEngine(lambda m: f"answer {len(m)}")
    page = site(engine)
    ask(page, "first")
    done(page)
    ask(page, "second")
    done(page, 2)
    said = [(m["role"], m["content"][0]["text"]) for m in engine.submitted[1][0]]
    assert said == [("user", "first"), ("assistant", "answer 1"), ("user", "second")]
    page.click("#new-button")
    assert page.is_visible("#empty") and page.locator(".turn").count() == 0
    ask(page, "third")
    done(page)
    assert len(engine.submitted[2][0]) == 1


def test_stop_keeps_what_was_said_and_frees_the_engine(site):
    engine = FakeEngine(lambda m: "word " * 200, pause=0.05)
    page = site(engine)
    ask(page, "Talk")
    wait(page, "document.querySelector('.assistant .text')?.textContent.length > 8")
    assert page.is_visible("#stop") and not page.is_visible("#send")
    page.click("#stop")
    done(page)
    until(engine.submitted[0][2].aborted.is_set, 2)
    text = answer(page)
    assert text.startswith("word") and len(text) < 300 and "stopped" in page.inner_text(".speed")
    time.sleep(0.3)
    assert answer(page) == text and page.is_visible("#send")


def test_answer_again_and_settings(site):
    engine = FakeEngine()
    page = site(engine)
    page.click("#settings-button")
    page.fill("#temperature", "0.7")
    page.fill("#length", "32")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    ask(page, "Hello")
    done(page)
    assert (engine.submitted[0][1].temperature, engine.submitted[0][1].max_tokens) == (0.7, 32)
    page.click(".again")
    until(lambda: len(engine.submitted) == 2)
    done(page)
    assert engine.submitted[1][0] == engine.submitted[0][0] and page.locator(".turn").count() == 2


# ------------------------------------------------------------------------------------------------ pictures and boxes


def sent_picture(engine):
    (picture,) = [part["image"] for part in engine.submitted[-1][0][-1]["content"] if part["type"] == "image"]
    return picture


def test_uploaded_picture_and_its_box(site):
    engine = FakeEngine(lambda m: f"Here: {BOX}.", pause=0.02)
    page = site(engine)
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    ask(page, "Where is the apple?")
    done(page)
    assert sent_picture(engine).size == (400, 200)
    picture = page.locator(".user .picture img").bounding_box()
    rect = page.locator("rect.box").bounding_box()
    assert page.locator("rect.box").count() == 1 and page.locator("rect.box").get_attribute("data-label") == "apple"
    for side, expected in [
        (rect["x"], picture["x"] + picture["width"] * 250 / 999),
        (rect["y"], picture["y"] + picture["height"] * 250 / 999),
        (rect["width"], picture["width"] * 250 / 999), (rect["height"], picture["height"] * 500 / 999),
    ]:  # fmt: skip
        assert abs(side - expected) < 4, (side, expected)
    assert answer(page) == "Here: apple." and page.inner_text(".chip") == "apple"
    page.hover(".chip")
    assert "hot" in page.get_attribute("rect.box", "class") and page.is_visible(".tag.hot")
    page.hover("#prompt")
    assert "hot" not in page.get_attribute("rect.box", "class")
    page.locator("rect.box").hover()
    assert "hot" in page.get_attribute(".chip", "class")


def test_box_is_drawn_before_the_answer_ends(site):
    page = site(FakeEngine(lambda m: BOX + " and more words" * 20, pause=0.04))
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    ask(page, "Where?")
    page.wait_for_selector("rect.box")
    assert page.query_selector(".streaming") is not None
    assert "<box" not in answer(page)
    page.click("#stop")
    done(page)


def test_half_a_box_is_hidden_while_it_is_written(site):
    page = site(FakeEngine(lambda m: "Look: " + BOX, pause=0.06))
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    ask(page, "Where?")
    seen = set()
    until(
        lambda: (
            seen.add(answer(page)) or page.query_selector("rect.box") if page.query_selector(".assistant") else False
        )
    )
    assert not [text for text in seen if "<" in text], seen
    done(page)


def test_box_on_an_older_picture_shows_it_again(site):
    page = site(FakeEngine(lambda m: BOX if len(m) > 1 else "A scene."))
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    ask(page, "What is this?")
    done(page)
    ask(page, "Where is the apple?")
    done(page, 2)
    assert page.locator(".assistant .picture rect.box").count() == 1 and page.locator(".user rect.box").count() == 0


def test_hostile_boxes_draw_nothing(site):
    bad = "".join(f'<box label="b">{c}</box>' for c in ("900,1,2,3", "-1,0,5,5", "NaN,1,2,3", "1,2,3", "0,0,1000,5"))
    page = site(FakeEngine(lambda m: bad + BOX))
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    ask(page, "Where?")
    done(page)
    assert page.locator("rect.box").count() == 1 and page.locator(".chip").count() == 1
    assert "NaN,1,2,3" in answer(page)


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


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pasted_and_dropped_pictures(site, way):
    engine = FakeEngine()
    page = site(engine)
    data = base64.b64encode(png()).decode()
    hinted = page.evaluate(f"(a) => ({TRANSFER})(...a)", [way, data, "a.png", "image/png"])
    assert hinted == (way == "drop")
    page.wait_for_selector(".thumb img")
    assert not page.is_visible("#dropzone")
    page.click("#send")
    done(page)
    assert sent_picture(engine).getpixel((150, 100)) == (200, 40, 40)


def test_thumbnail_can_be_removed(site):
    engine = FakeEngine()
    page = site(engine)
    page.set_input_files("#file", [file(), file(name="b.png")])
    wait(page, "document.querySelectorAll('.thumb').length === 2")
    page.click(".thumb button >> nth=0")
    page.click(".thumb button >> nth=0")
    assert page.locator(".thumb").count() == 0 and page.is_disabled("#send")


def test_large_picture_is_shrunk_here(site):
    engine = FakeEngine()
    page = site(engine)
    page.set_input_files("#file", file(png(Image.new("RGB", (4032, 1008), (10, 200, 10)))))
    page.wait_for_selector(".thumb img")
    ask(page, "What?")
    done(page)
    assert sent_picture(engine).size == (2016, 504)


@pytest.mark.parametrize("wrong, says", [
    (file(b"hello", "notes.txt", "text/plain"), "not a PNG"), (file(b"<svg/>", "a.svg", "image/svg+xml"), "not a PNG"),
    (file(png()[:50], "cut.png"), "damaged"), (file(b"GIF89a", "x.gif", "image/gif"), "damaged"),
])  # fmt: skip
def test_unusable_files_are_refused_with_a_reason(site, wrong, says):
    page = site()
    page.set_input_files("#file", wrong)
    page.wait_for_selector("#notice:not([hidden])")
    assert says in page.inner_text("#notice") and wrong["name"] in page.inner_text("#notice")
    assert page.locator(".thumb").count() == 0 and page.is_disabled("#send")
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    assert not page.is_visible("#notice")


def test_model_that_cannot_see(site):
    page = site(app_options={"pictures": False})
    assert not page.is_visible("#attach") and page.locator(".example").count() == 2


# ------------------------------------------------------------------------------------------------ safety


HOSTILE = (
    "<img src=x onerror=\"window.hacked=1\"> <script>window.hacked=1</script> </div></article> "
    "[a](javascript:alert(1)) <svg onload=window.hacked=1> <box label=\"<b onclick=hacked()>\">1,2,3,4</box> "
    "**<i>bold</i>** `<u>code</u>`"
)  # fmt: skip


def test_hostile_text_stays_text(site):
    page = site(FakeEngine(lambda m: HOSTILE + "\n```\n<script>window.hacked=1</script>\n```"))
    ask(page, HOSTILE)
    done(page)
    assert page.evaluate("window.hacked") is None
    assert (
        page.locator(
            ".turn script, .turn img:not(.face), .turn svg[onload], .turn a, .turn i, .turn b, .turn u"
        ).count()
        == 0
    )
    assert '<img src=x onerror="window.hacked=1">' in answer(page) and "<i>bold</i>" in answer(page)
    assert page.inner_text(".user .text") == HOSTILE
    assert page.inner_text(".assistant pre") == "<script>window.hacked=1</script>"


def test_hostile_label_stays_text(site):
    label = "&lt;img src=x onerror=window.hacked=1&gt;"
    page = site(FakeEngine(lambda m: f'<box label="{label}">100,100,300,300</box>'))
    page.set_input_files("#file", file())
    page.wait_for_selector(".thumb img")
    ask(page, "Where?")
    done(page)
    assert page.inner_text(".chip") == page.inner_text(".tag") == "<img src=x onerror=window.hacked=1>"
    assert page.evaluate("window.hacked") is None


def test_policy_blocks_inline_script_and_style(site):
    page = site()
    assert page.complaints == []
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.body.append(script, style);
    }""")
    assert page.evaluate("window.hacked") is None and page.is_visible("#prompt")
    assert len(page.complaints) == 2 and all("Content Security Policy" in text for text in page.complaints)
    page.complaints.clear()


# ------------------------------------------------------------------------------------------------ failures


def test_engine_failure_can_be_retried(site):
    engine = FakeEngine(lambda m: RuntimeError("no"))
    page = site(engine)
    ask(page, "Hello")
    page.wait_for_selector(".failure")
    assert "failed" in page.inner_text(".failure") and answer(page) == "Half of "
    engine.script = lambda messages: "Better now."
    page.click(".retry")
    wait(page, "document.querySelector('.assistant .text').textContent === 'Better now.'")
    assert page.locator(".turn").count() == 2 and page.locator(".failure").count() == 0


def test_refusal_says_why(site):
    page = site(FakeEngine(context=300))
    ask(page, "long " * 60)
    page.wait_for_selector(".failure")
    assert "context" in page.inner_text(".failure")
    page.wait_for_timeout(100)
    assert any("400" in text for text in page.complaints)  # the browser's own note on the status
    page.complaints.clear()


def test_server_gone_says_so(site):
    page = site()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello")
    page.wait_for_selector(".failure")
    assert "can't be reached" in page.inner_text(".failure")
    page.unroute("**/v1/chat/completions")
    page.click(".retry")
    wait(page, "document.querySelector('.assistant .text').textContent === 'Hello there.'")
    page.complaints.clear()


# ------------------------------------------------------------------------------------------------ looks


def shade(page):
    numbers = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    return sum(map(int, numbers[:3])) / 3


def test_dark_and_light(site):
    page = site(color_scheme="dark")
    assert shade(page) < 60
    page.click("#theme-button")
    assert shade(page) > 200
    page.reload()
    page.wait_for_selector(".example")
    assert shade(page) > 200, "the choice was forgotten"
    assert shade(site(color_scheme="light")) > 200


@pytest.mark.parametrize("width", [360, 320, 768])
def test_narrow_screens_never_scroll_sideways(site, width):
    text = "x" * 300 + " `" + "y" * 200 + "`\n```\n" + "z" * 300 + "\n```\n" + BOX.replace("apple", "a" * 90)
    page = site(FakeEngine(lambda m: text), viewport={"width": width, "height": 640})

    def fits():
        both = "[document.documentElement, document.querySelector('#main')]"
        wide = f"() => {both}.map((e) => e.scrollWidth - e.clientWidth)"
        assert page.evaluate(wide) == [0, 0]
        for name in ("#send", "#attach", "#new-button", "#theme-button"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 36, name

    fits()
    page.set_input_files("#file", file(png(Image.new("RGB", (1500, 300)))))
    page.wait_for_selector(".thumb img")
    fits()
    ask(page, "w" * 200)
    done(page)
    assert page.locator("rect.box").count() == 1
    fits()


def test_reachable_by_keyboard_and_named(site):
    page = site()
    unnamed = """() => [...document.querySelectorAll("button:not([hidden]), textarea, input:not([type=file])")]
        .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert page.get_attribute("#announcer", "aria-live") == "polite"
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"settings-button", "theme-button", "new-button", "attach", "prompt", "example"} <= reached
