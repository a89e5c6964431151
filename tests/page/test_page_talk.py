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


COUNT = "one two three four five six seven eight nine ten eleven twelve, and so on to twenty"


def test_text_appears_as_it_is_made(site):
    page = site(FakeEngine(lambda m: COUNT, pause=0.1))
    ask(page, "Count")
    seen = set()
    page.wait_for_selector(".assistant")
    until(lambda: seen.add(answer(page)) or answer(page).endswith("twenty"))
    growing = sorted(text for text in seen if text)
    assert len(growing) >= 3, "the text came all at once"
    assert all(COUNT.startswith(text) for text in growing)
    done(page)
    assert page.inner_text("#announcer") == COUNT


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


def test_settings_are_sent_and_kept(site):
    engine = FakeEngine()
    page = site(engine)
    page.click("#settings-button")
    for name, value in (("temperature", "0.7"), ("top_p", "0.9"), ("top_k", "40"), ("max_tokens", "32"), ("seed", "7")):
        page.fill(f"#{name}", value)
    page.fill("#system", "Answer in rhyme.")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    ask(page, "Hello")
    done(page)
    messages, sampling, _ = engine.submitted[0]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 40)
    assert (sampling.max_tokens, sampling.seed) == (32, 7)
    assert messages[0]["role"] == "system" and messages[0]["content"][0]["text"] == "Answer in rhyme."
    page.reload()
    done(page)
    assert page.evaluate("document.querySelector('#top_k').value") == "40"
    page.click(".again")
    until(lambda: len(engine.submitted) == 2)
    done(page)
    assert engine.submitted[1][:2] == engine.submitted[0][:2] and page.locator(".turn").count() == 2
    page.click("#settings-button")
    page.fill("#system", "")
    page.click("#settings >> text=Reset")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    done(page, 2)
    messages, sampling, _ = engine.submitted[2]
    assert messages[0]["role"] == "user" and (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 1, 0)


def test_only_settings_that_the_server_offers_are_shown(site):
    page = site(
        before="""
        const real = window.fetch;
        window.fetch = async (url, ...more) => {
            const response = await real(url, ...more);
            if (url !== "/v1/models") return response;
            const body = await response.json();
            body.data[0].sampling = ["temperature", "min_p", "repetition_penalty"];
            return new Response(JSON.stringify(body), { headers: { "content-type": "application/json" } });
        };
        window.asked = [];
    """
    )
    rows = page.evaluate("[...document.querySelectorAll('#rows input')].map((input) => input.id)")
    assert sorted(rows) == ["max_tokens", "min_p", "repetition_penalty", "temperature"]
    page.click("#settings-button")
    page.fill("#min_p", "0.1")
    page.keyboard.press("Escape")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Hello")
    body = asked.value.post_data_json
    assert body["min_p"] == 0.1 and "repetition_penalty" not in body and "top_p" not in body
    page.wait_for_timeout(200)
    page.complaints.clear()  # whether this server knows min_p is not the matter here


def test_model_card(site):
    page = site(permissions=["clipboard-read", "clipboard-write"])
    page.click("#model")
    text = page.inner_text("#card")
    assert "12,345,678" in text and "4,100,000" in text and "0123456789abcdef" * 4 in text and "1,000 tokens" in text
    page.click("#card .copy")
    wait(page, "document.querySelector('#announcer').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "0123456789abcdef" * 4


def test_numbers_of_an_answer(site):
    page = site(FakeEngine(lambda m: "one two three four five six seven", pause=0.1))
    ask(page, "Count")
    done(page)
    found = re.fullmatch(
        r"9 tokens · (\d+\.\d) tokens/s · first after (\d\.\d\d) s · 5 read", page.inner_text(".speed")
    )
    assert found and 4 < float(found[1]) < 11 and 0.09 < float(found[2]) < 3


def test_ten_megabytes_of_text_are_refused_and_nothing_is_lost(site):
    page = site()
    page.fill("#prompt", "mine")
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.setData("text", "x".repeat(10_000_000));
        const event = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
        window.taken = document.querySelector("#prompt").dispatchEvent(event);
    }""")
    assert page.evaluate("window.taken") is False
    assert "10,000,000 characters" in page.inner_text("#notice") and "400,000" in page.inner_text("#notice")
    assert page.input_value("#prompt") == "mine" and page.is_enabled("#send")


def test_a_draft_lives_through_a_reload(site):
    page = site()
    page.fill("#prompt", "half a thought")
    page.reload()
    wait(page, "document.querySelector('#prompt').value === 'half a thought'")


def test_a_server_with_keys(site):
    """The key is asked for once, sent on every request, and kept for this tab."""
    page = site(
        before="""
        const real = window.fetch;
        window.fetch = (url, options = {}) => {
            if (new Headers(options.headers).get("authorization") === "Bearer secret") return real(url, options);
            const error = { error: { message: "give a key", type: "x", param: null, code: "invalid_api_key" } };
            return Promise.resolve(new Response(JSON.stringify(error), { status: 401 }));
        };
    """
    )
    assert page.is_visible("#key-dialog") and page.inner_text("#model-name") == "no model"
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    wait(page, "document.querySelector('#model-name').textContent === 'tiny'")
    ask(page, "Hello")
    done(page)
    assert answer(page) == "Hello there."
    page.reload()
    wait(page, "document.querySelector('#model-name').textContent === 'tiny'")
    assert not page.is_visible("#key-dialog")


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


PARTIAL = (
    'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    'data: {"choices":[{"delta":{"content":"Half of it"}}]}\n\n'
)
FAILURES = {
    "offline": (lambda route: route.abort("internetdisconnected"), "can't be reached"),
    "500": (
        lambda route: route.fulfill(status=500, json={"error": {"message": "the server failed"}}),
        "The server failed.",
    ),
    "a proxy's page": (lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"), "status 502"),
    "cut off": (lambda route: route.fulfill(status=200, content_type="text/event-stream", body=PARTIAL), "broke off"),
    "500 in the middle": (
        lambda route: route.fulfill(
            status=200,
            content_type="text/event-stream",
            body=PARTIAL + 'data: {"error":{"message":"out of memory"}}\n\n',
        ),
        "Out of memory.",
    ),
}


def test_every_failure_keeps_the_message_and_can_be_retried(site):
    """F.4, case 85: refused, unreachable, or broken off in the middle."""
    engine = FakeEngine()
    page = site(engine)
    for number, (name, (fail, says)) in enumerate(FAILURES.items(), 1):
        page.route("**/v1/chat/completions", fail)
        ask(page, f"Hello {name}")
        page.wait_for_selector(".failure")
        assert says in page.inner_text(".failure"), name
        assert page.locator(".user .text").all_inner_texts()[-1] == f"Hello {name}"
        if name in ("cut off", "500 in the middle"):
            assert answer(page) == "Half of it", "what had come is gone"
        page.unroute("**/v1/chat/completions")
        page.reload()  # the failure is kept too
        page.wait_for_selector(".failure")
        page.click(".retry")
        until(lambda number=number: len(engine.submitted) == number)
        done(page, number)
        assert answer(page) == "Hello there." and page.locator(".failure").count() == 0
    page.complaints.clear()
