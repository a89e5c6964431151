"""Pictures in, and boxes and points drawn on them."""

import pytest
from page_acts import BOX, answer, ask, attach, done, file, png, sent, transfer, wait
from PIL import Image
from server_fakes import FakeEngine, until


def test_uploaded_picture_and_its_box(site):
    engine = FakeEngine(lambda m: f"Here: {BOX}.", pause=0.02)
    page = site(engine)
    attach(page)
    ask(page, "Where is the apple?")
    done(page)
    assert sent(engine)[0].size == (400, 200)
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
    attach(page)
    ask(page, "Where?")
    page.wait_for_selector("rect.box")
    assert page.query_selector(".streaming") is not None
    assert "<box" not in answer(page)
    page.click("#stop")
    done(page)


def test_half_a_box_is_hidden_while_it_is_written(site):
    page = site(FakeEngine(lambda m: "Look: " + BOX, pause=0.06))
    attach(page)
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
    attach(page)
    ask(page, "What is this?")
    done(page)
    ask(page, "Where is the apple?")
    done(page, 2)
    assert page.locator(".assistant .picture rect.box").count() == 1 and page.locator(".user rect.box").count() == 0


def test_hostile_boxes_draw_nothing(site):
    bad = "".join(f'<box label="b">{c}</box>' for c in ("900,1,2,3", "-1,0,5,5", "NaN,1,2,3", "1,2,3", "0,0,1000,5"))
    page = site(FakeEngine(lambda m: bad + BOX))
    attach(page)
    ask(page, "Where?")
    done(page)
    assert page.locator("rect.box").count() == 1 and page.locator(".chip").count() == 1
    assert "NaN,1,2,3" in answer(page)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pasted_and_dropped_pictures(site, way):
    engine = FakeEngine()
    page = site(engine)
    assert transfer(page, way, png()) == (way == "drop")
    page.wait_for_selector(".thumb img")
    assert not page.is_visible("#dropzone")
    page.click("#send")
    done(page)
    assert sent(engine)[0].getpixel((150, 100)) == (200, 40, 40)


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
    assert sent(engine)[0].size == (2016, 504)


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
    attach(page)
    assert not page.is_visible("#notice")


def test_model_that_cannot_see(site):
    page = site(app_options={"pictures": False})
    assert not page.is_visible("#attach") and page.locator(".example").count() == 2


