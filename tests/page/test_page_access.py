"""Keyboard, screen readers, narrow screens, dark and light."""

import re

import pytest
from page_acts import BOX, ask, attach, done, file, png
from PIL import Image
from server_fakes import FakeEngine, until


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
        for name in ("#send", "#attach", "#side-button", "#new-button", "#theme-button"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 36, name

    fits()
    attach(page, file(png(Image.new("RGB", (1500, 300)))))
    fits()
    ask(page, "w" * 200)
    done(page)
    assert page.locator("rect.box").count() == 1
    fits()


def test_everything_is_reached_by_keyboard_and_named(site):
    page = site()
    unnamed = """() => [...document.querySelectorAll("button:not([hidden]), textarea, input:not([type=file])")]
        .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    reached = {}
    for _ in range(24):
        page.keyboard.press("Tab")
        name, ring = page.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e);
            const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
            const frame = getComputedStyle(document.querySelector("#composer")).boxShadow; // the message's own ring
            return [e.id || e.className, ring || frame.includes("1px")];
        }""")
        reached[name] = ring
    wanted = {"search", "import", "side-close", "side-button", "model", "settings-button", "theme-button", "new-button"}
    assert wanted | {"attach", "prompt", "example", "keys-button"} <= set(reached)
    assert all(reached.values()), f"no visible focus: {[name for name, ring in reached.items() if not ring]}"


def test_shortcuts_do_what_they_say(site):
    engine = FakeEngine()
    page = site(engine)
    ask(page, "first words")
    done(page)
    page.keyboard.press("Alt+r")
    until(lambda: len(engine.submitted) == 2)
    done(page)
    page.keyboard.press("Alt+e")
    assert page.input_value("#prompt") == "first words" and page.is_visible("#editing")
    page.keyboard.press("Escape")
    assert page.input_value("#prompt") == "" and not page.is_visible("#editing")
    page.press("#prompt", "ArrowUp")
    assert page.input_value("#prompt") == "first words"
    page.keyboard.press("Escape")
    for key, dialog in (("Alt+s", "#settings"), ("Alt+k", "#shortcuts")):
        page.keyboard.press(key)
        assert page.is_visible(dialog)
        page.keyboard.press("Alt+n")  # a dialog is open: nothing behind it moves
        assert page.locator(".turn").count() == 2
        page.keyboard.press("Escape")
        assert not page.is_visible(dialog)
    page.keyboard.press("Alt+c")
    assert page.evaluate("document.querySelector('#side').inert") is True
    page.keyboard.press("Alt+c")
    assert "open" in page.evaluate("document.activeElement.className")
    page.keyboard.press("Alt+m")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Alt+n")
    assert page.is_visible("#empty")
    listed = page.evaluate("[...document.querySelectorAll('#keys kbd')].map((key) => key.textContent)")
    assert {"Enter", "Esc", "N", "C", "M", "P", "R", "E", "S", "K"} <= set(listed)


def test_a_screen_reader_hears_beginning_and_end_not_every_token(site):
    page = site(FakeEngine(lambda m: "word " * 300, pause=0.002))
    page.evaluate("""() => {
        window.heard = [];
        const spot = document.querySelector("#announcer");
        new MutationObserver(() => window.heard.push(spot.textContent)).observe(spot, { childList: true });
    }""")
    ask(page, "Talk")
    done(page)
    heard = page.evaluate("window.heard")
    assert heard[0] == "Answering" and len(heard) == 2
    assert heard[1].startswith("word word") and heard[1].endswith("… The answer goes on.") and len(heard[1]) < 450
    assert page.get_attribute("#log", "role") == "log" and page.get_attribute("#log", "aria-live") == "off"
    assert page.get_attribute(".assistant", "aria-busy") == "false"


RICH = (
    "# Title\n\n- [x] a\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx = 1\n```\n\n> [q](https://example.org) `c`\n\n"
    + BOX
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(site, scheme):
    """axe-core's rules (WCAG 2 A and AA and its best practices) on every state of the page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = site(FakeEngine(lambda m: RICH), color_scheme=scheme, reduced_motion="reduce")

    def clean(state):
        found = axe.run(page).response["violations"]
        told = [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found]
        assert told == [], f"{state}: {told}"

    clean("empty")
    attach(page)
    clean("a picture waits")
    ask(page, "Where?")
    done(page)
    page.mouse.move(0, 0)
    clean("answered")
    for opener, dialog in (("#settings-button", "#settings"), ("#model", "#card"), ("#keys-button", "#shortcuts")):
        page.click(opener)
        clean(dialog)
        page.keyboard.press("Escape")
    page.focus(".open")
    page.click(".more")
    clean("menu")
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 360, "height": 700})
    clean("phone")
    page.complaints.clear()
