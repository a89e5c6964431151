"""Talking: what is sent, what is shown while it comes, settings, and what happens when something fails."""

import re
import time

from page_acts import answer, ask, done, wait
from server_fakes import FakeEngine, until


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
    page.fill("#max_tokens", "32")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    ask(page, "Hello")
    done(page)
    assert (engine.submitted[0][1].temperature, engine.submitted[0][1].max_tokens) == (0.7, 32)
    page.click(".again")
    until(lambda: len(engine.submitted) == 2)
    done(page)
    assert engine.submitted[1][0] == engine.submitted[0][0] and page.locator(".turn").count() == 2


# ------------------------------------------------------------------------------------------------ failures


def test_engine_failure_can_be_retried(site):
    engine = FakeEngine(lambda m: RuntimeError("no"))
    page = site(engine)
    ask(page, "Hello")
    page.wait_for_selector(".failure")
    assert "failed" in page.inner_text(".failure") and answer(page).strip() == "Half of"
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


