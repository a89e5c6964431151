"""Keyboard, screen readers, narrow screens, dark and light."""

import re

import pytest
from page_acts import BOX, ask, attach, done, file, png
from PIL import Image
from server_fakes import FakeEngine


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
            return [e.id || e.className, ring || getComputedStyle(document.querySelector("#composer")).boxShadow.includes("1px")];
        }""")
        reached[name] = ring
    wanted = {"search", "import", "side-close", "side-button", "model", "settings-button", "theme-button", "new-button"}
    assert wanted | {"attach", "prompt", "example", "keys-button"} <= set(reached)
    assert all(reached.values()), f"no visible focus: {[name for name, ring in reached.items() if not ring]}"
