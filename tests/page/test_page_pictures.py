"""Pictures in, and boxes and points drawn on them."""

import io
import os
import random
import time

import pytest
from page_acts import BOX, SCENE, Torrent, answer, ask, attach, done, file, png, sent, transfer
from PIL import Image
from server_fakes import FakeEngine, until

from puna.processor.grounding import format_box, format_point, parse_boxes, parse_points
from puna.serve.limits import Limits


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


def test_points_are_drawn_and_light_up_with_their_phrase(site):
    page = site(FakeEngine(lambda m: 'Its <point label="eye">500,250</point> and ' + BOX))
    attach(page)
    ask(page, "Where?")
    done(page)
    picture, dot = page.locator(".user .picture img").bounding_box(), page.locator(".dot").bounding_box()
    assert abs(dot["x"] + dot["width"] / 2 - (picture["x"] + picture["width"] * 500 / 999)) < 2
    assert abs(dot["y"] + dot["height"] / 2 - (picture["y"] + picture["height"] * 250 / 999)) < 2
    page.focus(".chip >> nth=0")  # by keyboard as by pointer
    assert "hot" in page.get_attribute(".dot", "class") and "hot" not in page.get_attribute("rect.box", "class")
    page.locator("rect.box").hover()
    assert "hot" in page.get_attribute(".chip >> nth=1", "class") and "hot" not in page.get_attribute(".dot", "class")


def photo(width, height, turned=False):
    """A picture with a red thing at 25-50 % across and 25-75 % down as a person sees it, and its bytes."""
    picture = Image.new("RGB", (width, height), (210, 225, 230))
    picture.paste((200, 40, 40), (width // 4, height // 4, width // 2, height * 3 // 4))
    buffer, exif = io.BytesIO(), Image.Exif()
    if turned:  # stored lying on its side, with the note that a viewer turns it by
        picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
    picture.save(buffer, "jpeg", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "width, height, turned", [(64, 64, False), (900, 2400, False), (3000, 1000, False), (1200, 600, True)]
)
def test_a_box_lies_on_the_thing_itself(site, width, height, turned):
    """Pixels of a screenshot: the red thing fills the drawn box, whatever the picture's shape, size or EXIF turn."""
    page = site(FakeEngine(lambda m: '<box label="">250,250,500,750</box>'), reduced_motion="reduce")
    attach(page, file(photo(width, height, turned), "photo.jpg", "image/jpeg"))
    ask(page, "Where?")
    done(page)
    rect = page.locator("rect.box").bounding_box()
    page.evaluate("document.querySelectorAll('.marks').forEach((svg) => (svg.style.visibility = 'hidden'))")
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    red = Image.eval(shot.split()[1], lambda green: 255 if green < 120 else 0)  # green is high everywhere but there
    picture = page.locator(".user .picture img").bounding_box()
    frame = [
        round(v)
        for v in (picture["x"], picture["y"], picture["x"] + picture["width"], picture["y"] + picture["height"])
    ]
    left, top, right, bottom = red.crop(frame).getbbox()
    thing = [left + frame[0], top + frame[1], right + frame[0], bottom + frame[1]]
    drawn = [rect["x"], rect["y"], rect["x"] + rect["width"], rect["y"] + rect["height"]]
    assert all(abs(a - b) <= 4 for a, b in zip(thing, drawn, strict=True)), (thing, drawn)


BAD = (
    "900,1,2,3",
    "5,9,2,3",
    "-1,0,5,5",
    "NaN,1,2,3",
    "1,2,3",
    "0,0,1000,5",
    "1e2,0,5,5",
    "0x1,2,3,4",
    "1,2,3,4,5",
    "5,5,5,5",
    "",
)


def test_hostile_boxes_draw_nothing(site):
    bad = " ".join(f'<box label="b">{c}</box>' for c in BAD)
    page = site(FakeEngine(lambda m: bad + BOX + '<point label="p">1000,5</point><point label="p">1,2,3</point>'))
    attach(page)
    ask(page, "Where?")
    done(page)
    assert (
        page.locator("rect.box").count() == 1
        and page.locator(".chip").count() == 1
        and page.locator(".dot").count() == 0
    )
    assert "NaN,1,2,3" in answer(page) and '<point label="p">1000,5</point>' in answer(page)


def test_ten_thousand_boxes_are_harmless(site):
    many = "".join(f'<box label="b{i}">{i % 900},{i % 800},{i % 900 + 9},{i % 800 + 9}</box> ' for i in range(10_000))
    page = site(Torrent(lambda m: many, letters=4000))
    attach(page)
    begun = time.monotonic()
    ask(page, "Where?")
    until(lambda: page.query_selector(".assistant") and not page.query_selector(".streaming"), 120)
    print(f"10,000 boxes in {time.monotonic() - begun:.1f} s")
    assert page.locator("rect.box").count() == 256 and page.locator(".tag").count() == 256
    assert page.locator(".chip").count() == 10_000
    page.hover(".chip >> nth=0")
    assert page.locator("rect.box.hot").count() == 1


def test_the_page_reads_places_as_the_processor_does(site):
    """grounding.js against processor/grounding.py on the same texts: made ones, and bent ones."""
    rand = random.Random(0)
    parts = [
        '<box label="',
        '<point label="',
        "a",
        "&quot;",
        "&amp;lt;",
        '">',
        "1",
        "99",
        "1000",
        ",",
        " ",
        "\u3000",
        "\ufeff",
        "\x1c",
        "\u0663",
        "</box>",
        "</point>",
        "<",
        ">",
        '"',
        "\n",
        "5,6",
        "1,2,3,4",
        "-",
    ]
    good = [format_box("a<b", (1, 2, 30, 40)), format_point('"', 5, 6), '<box label="x"> 1 ,\n2, 3,4\u3000</box>']
    texts = []
    for _ in range(4000):
        text = "".join(rand.choices(parts + good * 2, k=rand.randint(1, 12)))
        at = rand.randrange(len(text))
        texts.append(text if rand.random() < 0.5 else text[:at] + rand.choice(parts) + text[at + rand.randint(0, 2) :])
    page = site()
    read = page.evaluate(
        """async (texts) => {
        const { places } = await import("/page/grounding.js");
        return texts.map((text) => places(text).map((p) => [p.kind, p.label, p.x1, p.y1, p.x2, p.y2]));
    }""",
        texts,
    )
    found = 0
    for text, ours in zip(texts, read, strict=True):
        boxes = [["box", b.label, *b.coordinates] for b in parse_boxes(text)]
        points = [["point", p.label, p.x, p.y, p.x, p.y] for p in parse_points(text)]
        assert [p for p in ours if p[0] == "box"] == boxes and [p for p in ours if p[0] == "point"] == points, text
        found += len(ours)
    assert found > 1000


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


def test_several_pictures_one_taken_back(site):
    engine = FakeEngine(lambda m: BOX)
    page = site(engine)
    red, blue = (png(Image.new("RGB", (60, 40), colour)) for colour in ("red", "blue"))
    attach(page, file(red), file(blue, "b.png"), file(name="c.png"))
    page.click(".thumb button >> nth=0")
    ask(page, "Which?")
    done(page)
    first, second = sent(engine)
    assert first.getpixel((5, 5)) == (0, 0, 255) and second.size == SCENE.size
    boxes = page.evaluate(
        "[...document.querySelectorAll('.user .picture')].map((f) => f.querySelectorAll('rect.box').length)"
    )
    assert boxes == [0, 1], "boxes belong to the newest picture"
    ask(page, "And now?")  # pictures stay with their message
    done(page, 2)
    assert sum(part["type"] == "image" for m in engine.submitted[1][0] for part in m["content"]) == 2


def test_large_picture_is_shrunk_here(site):
    engine = FakeEngine()
    page = site(engine)
    page.set_input_files("#file", file(png(Image.new("RGB", (4032, 1008), (10, 200, 10)))))
    page.wait_for_selector(".thumb img")
    ask(page, "What?")
    done(page)
    assert sent(engine)[0].size == (2016, 504)


def test_ten_megabytes_are_pasted(site):
    """A photograph of noise: nothing compresses it, so it has to be shrunk and written anew until it fits."""
    engine = FakeEngine()
    page = site(engine)
    side = 1900
    data = png(Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)))
    assert len(data) > 10_000_000
    transfer(page, "paste", data)
    page.wait_for_selector(".thumb img")
    ask(page, "What?")
    done(page)
    (picture,) = sent(engine)
    assert picture.size == (side, side)
    url = page.evaluate("document.querySelector('.user .picture img').src")
    assert url.startswith("data:image/jpeg") and len(url) * 0.75 <= 2 * 2**20


def test_the_servers_pixel_limit_is_kept(site):
    engine = FakeEngine()
    page = site(engine, {"limits": Limits(picture_pixels=100_000)})
    attach(page, file(png(Image.new("RGB", (1000, 500)))))
    ask(page, "What?")
    done(page)
    width, height = sent(engine)[0].size
    assert 90_000 < width * height <= 100_000 and abs(width - 2 * height) <= 2


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
