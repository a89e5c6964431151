"""Rendered text: markdown as it grows, hostile answers, and what it costs."""

from page_acts import answer, ask, attach, done
from server_fakes import FakeEngine


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
    attach(page)
    ask(page, "Where?")
    done(page)
    assert page.inner_text(".chip") == page.inner_text(".tag") == "<img src=x onerror=window.hacked=1>"
    assert page.evaluate("window.hacked") is None


def test_policy_blocks_markup_scripts_and_styles(site):
    page = site()
    assert page.complaints == []
    tried = """(make) => { try { make(); return "done" } catch (error) { return error.name } }"""
    for attempt in (
        "() => { document.querySelector('#log').innerHTML = '<b>x</b>' }",
        "() => { document.createElement('script').textContent = 'window.hacked = 1' }",
        "() => { document.write('<b>x</b>') }",
        "() => { document.createElement('iframe').srcdoc = '<b>x</b>' }",
    ):
        assert page.evaluate(f"({tried})({attempt})") == "TypeError", attempt
    page.evaluate("""() => {
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.body.append(style);
    }""")
    assert page.evaluate("window.hacked") is None and page.is_visible("#prompt") and page.locator("#log b").count() == 0
    assert len(page.complaints) == 5 and all("Content Security Policy" in text or "Trusted" in text for text in page.complaints)
    page.complaints.clear()
