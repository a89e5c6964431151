"""Conversations kept in the browser: the list, the database, files out and in, and what must never be lost."""

import json

import pytest
from page_acts import BOX, answer, ask, attach, done, wait
from server_fakes import FakeEngine, until


def titles(page):
    return page.locator("#list .open").all_inner_texts()


def choose(page, number, action):
    """An action of a conversation's menu."""
    page.hover(f"#list li >> nth={number}")
    page.click(f"#list li >> nth={number} >> .more")
    page.click(f"#menu-{action}")


def kept(page):
    """What the browser's database holds, read past the page's own code."""
    return page.evaluate("""() => new Promise((resolve) => {
        const request = indexedDB.open("puna");
        request.onsuccess = () => {
            const out = {}, tx = request.result.transaction(["heads", "bodies", "pictures"]);
            for (const name of ["heads", "bodies", "pictures"])
                tx.objectStore(name).getAll().onsuccess = (event) => (out[name] = event.target.result);
            tx.oncomplete = () => (request.result.close(), resolve(out));
        };
    })""")


def test_conversations_live_through_a_reload(site):
    engine = FakeEngine(lambda m: f"Answer {len(m)}: {BOX}")
    page = site(engine)
    attach(page)
    ask(page, "Where is the apple?")
    done(page)
    page.click("#new-button")
    ask(page, "Another matter\nwith two lines")
    done(page)
    assert titles(page) == ["Another matter", "Where is the apple?"]
    page.reload()
    done(page)
    assert page.inner_text(".user .text") == "Another matter\nwith two lines", (
        "the open conversation was not found again"
    )
    page.click("#list .open >> nth=1")
    done(page)
    assert page.locator(".user .picture rect.box").count() == 1 and answer(page) == "Answer 1: apple"
    assert "first after" in page.inner_text(".speed") and "tokens" in page.inner_text(".speed")
    ask(page, "And now?")  # goes on where it was
    done(page, 2)
    kinds = [part["type"] for message in engine.submitted[-1][0] for part in message["content"]]
    assert kinds == ["image", "text", "text", "text"]
    assert titles(page)[0] == "Where is the apple?", "the newest is not first"


def test_rename_search_delete_and_undo(site):
    page = site(FakeEngine(lambda m: BOX))
    attach(page)
    ask(page, "first")
    done(page)
    page.click("#new-button")
    ask(page, "second")
    done(page)
    choose(page, 1, "rename")
    page.keyboard.type("Apples & <b>pears</b>")
    page.keyboard.press("Enter")
    wait(page, "document.querySelectorAll('#list .open')[1]?.textContent === 'Apples & <b>pears</b>'")
    choose(page, 1, "rename")
    page.keyboard.type("no")
    page.keyboard.press("Escape")
    page.fill("#search", "PEARS")
    assert titles(page) == ["Apples & <b>pears</b>"]
    page.fill("#search", "nothing like it")
    assert titles(page) == [] and page.is_visible("#none")
    page.fill("#search", "")
    choose(page, 1, "delete")
    wait(page, "document.querySelectorAll('#list .open').length === 1")
    assert kept(page)["pictures"] == [] and len(kept(page)["heads"]) == 1
    page.click("#toast button")
    wait(page, "document.querySelectorAll('#list .open').length === 2")
    done(page)
    assert page.locator(".user .picture rect.box").count() == 1, "the deleted one did not come back whole"
    assert len(kept(page)["pictures"]) == 1
    choose(page, 1, "delete")  # the open one: a blank page takes its place
    wait(page, "document.querySelectorAll('#list .open').length === 1")
    page.reload()
    wait(page, "document.querySelectorAll('#list .open').length === 1")
    assert titles(page) == ["second"]


def test_edit_and_answer_again_can_be_undone(site):
    engine = FakeEngine(lambda m: f"to {m[-1]['content'][-1]['text']}, {len(engine.submitted)}")
    page = site(engine)
    attach(page)
    ask(page, "one")
    done(page)
    ask(page, "two")
    done(page, 2)
    page.hover(".user >> nth=0")
    page.click(".user >> nth=0 >> .edit")
    assert page.input_value("#prompt") == "one" and page.locator(".thumb").count() == 1 and page.is_visible("#editing")
    ask(page, "one, better")
    done(page)
    assert answer(page) == "to one, better, 2" and len(engine.submitted[-1][0]) == 1
    assert page.locator(".user .picture").count() == 1 and not page.is_visible("#editing")
    page.click("#toast button")
    done(page, 2)
    assert page.locator(".user .text").all_inner_texts() == ["one", "two"] and answer(page) == "to two, 1"
    page.click(".assistant >> nth=1 >> .again")
    until(lambda: len(engine.submitted) == 4)
    done(page, 2)
    assert answer(page) == "to two, 3"
    page.click("#toast button")
    wait(page, "document.querySelectorAll('.assistant .text')[1]?.textContent.trim() === 'to two, 1'")
    page.reload()
    done(page, 2)
    assert answer(page) == "to two, 1"


def test_an_answer_goes_on_while_another_conversation_is_read(site):
    engine = FakeEngine(lambda m: "slow words " * 8 if m[-1]["content"][0]["text"] == "slow" else "quick", pause=0.1)
    page = site(engine)
    ask(page, "slow")
    wait(page, "document.querySelector('.assistant .text')?.textContent.includes('slow')")
    page.click("#new-button")
    ask(page, "quick")
    done(page)
    assert answer(page) == "quick" and page.locator(".writing").count() == 1
    wait(page, "!document.querySelector('.writing')")
    page.click("#list .open >> nth=1")
    wait(page, "document.querySelector('.user .text').textContent === 'slow'")  # it is read from the browser's database
    done(page)
    assert answer(page) == ("slow words " * 8).strip()


def test_a_closed_page_keeps_what_had_come(site):
    engine = FakeEngine(lambda m: "word " * 900, pause=0.02)
    page = site(engine)
    ask(page, "Talk")
    wait(page, "document.querySelector('.assistant .text')?.textContent.length > 20")
    until(lambda: kept(page)["bodies"][0]["turns"][-1]["text"] != "", 20)  # written down while it grows
    page.reload()
    page.wait_for_selector(".failure")
    assert "broke off" in page.inner_text(".failure") and answer(page).startswith("word word")
    engine.script, engine.pause = (lambda m: "Better now."), 0
    page.click(".retry")
    wait(page, "document.querySelector('.assistant .text').textContent === 'Better now.'")


def download(page, click):
    with page.expect_download() as got:
        click()
    return got.value.path().read_text()


def put(page, text, name="chats.json"):
    page.set_input_files("#import-file", {"name": name, "mimeType": "application/json", "buffer": text.encode()})


def test_export_and_import(site):
    page = site(FakeEngine(lambda m: BOX))
    attach(page)
    ask(page, "first")
    done(page)
    page.click("#new-button")
    ask(page, "second")
    done(page)
    page.hover("#list li >> nth=1")
    page.click("#list li >> nth=1 >> .more")
    one = json.loads(download(page, lambda: page.click("#menu-export")))
    assert [chat["title"] for chat in one["chats"]] == ["first"]
    text = download(page, lambda: page.click("#export"))
    everything = json.loads(text)
    assert everything["format"] == "puna-chats" and [chat["title"] for chat in everything["chats"]] == [
        "second",
        "first",
    ]
    picture = everything["chats"][1]["turns"][0]["pictures"][0]
    assert picture["url"].startswith("data:image/png;base64,") and (picture["width"], picture["height"]) == (400, 200)
    for _ in range(2):
        choose(page, 0, "delete")
    wait(page, "document.querySelectorAll('#list .open').length === 0")
    put(page, text)
    wait(page, "document.querySelectorAll('#list .open').length === 2")
    page.click("#list .open >> nth=1")
    done(page)
    wait(page, "document.querySelectorAll('.user .picture rect.box').length === 1")  # once the picture is decoded
    assert answer(page) == "apple"
    again = json.loads(download(page, lambda: page.click("#export")))
    assert again["chats"] == everything["chats"]


def bad_file(change):
    turn = {"role": "user", "text": "hi", "pictures": []}
    chat = {"title": "t", "named": False, "created": 1, "changed": 1, "system": "", "turns": [turn]}
    data = {"format": "puna-chats", "version": 1, "chats": [json.loads(json.dumps(chat)), chat]}
    change(data, chat, turn)
    return json.dumps(data)


URL = "data:image/png;base64,iVBORw0KGgo="
WRONG = {
    "the file is not JSON": lambda: "{",
    "not exported": lambda: "[]",
    "version is 2": lambda: bad_file(lambda d, c, t: d.update(version=2)),
    "no list of conversations": lambda: bad_file(lambda d, c, t: d.update(chats={})),
    "conversation 2: title": lambda: bad_file(lambda d, c, t: c.update(title=["<img onerror=1>"])),
    "conversation 2 has no list": lambda: bad_file(lambda d, c, t: c.update(turns="x")),
    "turn 1: role": lambda: bad_file(lambda d, c, t: t.update(role="system")),
    "turn 1: text": lambda: bad_file(lambda d, c, t: t.update(text=7)),
    "picture 1 is no PNG": lambda: bad_file(
        lambda d, c, t: t.update(pictures=[{"url": "https://example.org/a.png", "width": 1, "height": 1}])
    ),
    "picture 2 is no PNG": lambda: bad_file(
        lambda d, c, t: t.update(pictures=[
            {"url": URL, "width": 1, "height": 1}, {"url": "data:text/html;base64,AAAA", "width": 1, "height": 1},
        ])
    ),
    "width and height": lambda: bad_file(lambda d, c, t: t.update(pictures=[{"url": URL, "width": -1, "height": 1e9}])),
}  # fmt: skip


def test_a_wrong_file_changes_nothing(site):
    page = site()
    ask(page, "mine")
    done(page)
    before = kept(page)
    for says, text in WRONG.items():
        put(page, text())
        wait(page, f"document.querySelector('#toast').textContent.includes({json.dumps(says)})")
        assert "Nothing was changed" in page.inner_text("#toast")
    assert kept(page) == before and titles(page) == ["mine"]
    put(page, bad_file(lambda d, c, t: c.update(title="<img src=x onerror=window.hacked=1>")))  # strange, but a title
    wait(page, "document.querySelectorAll('#list .open').length === 3")
    assert page.evaluate("window.hacked") is None and page.locator("#list img").count() == 0


def test_a_full_disk_is_told_and_loses_nothing(site):
    engine = FakeEngine(lambda m: f"answer {len(m)} " * 40, context=100_000)
    page = site(engine)
    ask(page, "first")
    done(page)
    until(lambda: [turn.get("failed") for turn in kept(page)["bodies"][0]["turns"]] == [None, None])
    page.evaluate("""() => {
        window.put = IDBObjectStore.prototype.put;
        IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError") };
    }""")
    attach(page)
    ask(page, "second")
    done(page, 2)
    wait(page, "document.querySelector('#notice').textContent.includes('storage is full')")
    wait(page, "document.querySelectorAll('.unsaved').length === 1")
    page.click("#new-button")
    page.click("#list .open >> nth=0")  # still there, whole, though the disk has only the first half
    done(page, 2)
    assert page.locator(".user .picture").count() == 1 and len(kept(page)["bodies"][0]["turns"]) == 2
    whole = json.loads(download(page, lambda: page.click("#export")))
    assert len(whole["chats"][0]["turns"]) == 4, "what could not be kept cannot be exported either"
    page.evaluate("() => { IDBObjectStore.prototype.put = window.put }")
    ask(page, "third")
    done(page, 3)
    wait(page, "!document.querySelector('.unsaved')")
    until(lambda: len(kept(page)["bodies"][0]["turns"]) == 6 and len(kept(page)["pictures"]) == 1)


def test_without_storage_the_page_works_and_says_so(site):
    page = site(before="Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no') } })")
    assert "keeps nothing" in page.inner_text("#notice")
    ask(page, "first")
    done(page)
    page.click("#new-button")
    ask(page, "second")
    done(page)
    page.click("#list .open >> nth=1")
    done(page)
    assert page.inner_text(".user .text") == "first"


def test_two_tabs_agree(site):
    page = site()
    ask(page, "first")
    done(page)
    other = page.context.new_page()
    other.goto(page.url)
    done(other)
    ask(other, "second")
    done(other, 2)
    done(page, 2)  # the same conversation, open in both: the first tab shows what the second said
    other.click("#new-button")
    ask(other, "third")
    done(other)
    wait(page, "document.querySelectorAll('#list .open').length === 2")
    assert page.locator(".assistant").count() == 2


@pytest.mark.parametrize("width", [360])
def test_the_list_on_a_phone(site, width):
    page = site(viewport={"width": width, "height": 700}, has_touch=True)
    assert not page.is_visible("#side") and page.evaluate("document.querySelector('#side').inert")
    ask(page, "first")
    done(page)
    page.click("#side-button")
    page.wait_for_timeout(300)
    assert page.is_visible("#side") and page.is_visible("#scrim")
    page.click("#list .open")
    assert not page.is_visible("#scrim")
    page.click("#side-button")
    page.keyboard.press("Escape")
    assert not page.is_visible("#scrim")
