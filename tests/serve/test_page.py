"""The chat page in a real Chromium: what a person does with it. Access: test_page_access.py; content: test_page_text.py.

Each test opens the page in a context of its own; `opened` fails it for any error, dialog or request elsewhere.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.serve.browser import (
    WEB,
    Cut,
    Fake,
    Refuse,
    Wait,
    chromium,
    delta,
    detailed,
    finish,
    finished,
    module,
    opened,
    say,
    send,
    text_chunks,
    usage,
)
from tests.serve.small import running, small_app


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def fake():
    fake = Fake()
    yield fake
    fake.close()


@pytest.fixture
def page(browser, fake):
    with opened(browser, fake.url) as page:
        yield page


def answers(page) -> list[str]:
    return page.locator(".turn.assistant > .body > .prose").all_text_contents()


def test_an_answer_streams_in_and_only_its_last_block_is_drawn_again(page, fake):
    wait, more = Wait(), Wait()
    fake.script.append(
        [*text_chunks("First **block**.\n\nSecond")[:-2], wait, delta(content=" goes on"), more, *text_chunks(".")]
    )
    send(page, "hello")
    page.wait_for_selector(".turn.assistant p >> text=Second")
    page.evaluate("() => { document.querySelector('.turn.assistant .prose p').mine = true; }")
    assert page.locator("#stop").is_visible()
    assert not page.locator("#send").is_visible()
    wait.event.set()
    page.wait_for_selector("text=Second goes on")
    page.wait_for_selector("#speed >> text=/tokens/")
    more.event.set()
    finished(page)
    assert page.locator(".turn.assistant .prose p").count() == 2
    assert page.evaluate("() => document.querySelector('.turn.assistant .prose p').mine") is True
    assert page.locator(".turn.assistant strong").inner_text() == "block"
    assert page.locator("#send").is_visible()
    body = fake.requests[0]
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["model"], body["stream"], body["details"]) == ("dsv3-tiny", True, True)
    assert body["stream_options"] == {"include_usage": True}


def test_escape_stops_an_answer_and_the_server_learns_of_it(page, fake):
    fake.script.append([*text_chunks("Half an answer")[:-2], Wait()])
    send(page, "go")
    page.wait_for_selector("text=Half an answer")
    page.keyboard.press("Escape")
    finished(page)
    assert page.locator(".turn.assistant .note").inner_text() == "Stopped."
    assert fake.gone.wait(5)
    say(page, "next")
    assert [m["content"] for m in fake.requests[1]["messages"]] == ["go", "Half an answer", "next"]


def test_the_stop_button_stops(page, fake):
    fake.script.append([*text_chunks("abc")[:-2], Wait()])
    send(page, "go")
    page.wait_for_selector("text=abc")
    page.locator("#stop").click()
    finished(page)
    assert page.locator("#send").is_visible()


def test_editing_a_message_grows_a_branch_and_both_stay(page, fake):
    fake.script += [text_chunks("one"), text_chunks("two"), text_chunks("three")]
    say(page, "first")
    say(page, "second")
    user = page.locator(".turn.user").first
    user.hover()
    user.get_by_label("Edit message").click()
    user.get_by_role("textbox").fill("first, again")
    user.get_by_role("textbox").press("Enter")
    page.wait_for_selector("text=three")
    finished(page)
    assert fake.requests[2]["messages"] == [{"role": "user", "content": "first, again"}]
    assert answers(page) == ["three"]
    assert page.locator(".turn.user .versions").inner_text().split() == ["2", "of", "2"]
    page.get_by_label("Previous version").click()
    assert answers(page) == ["one", "two"]
    page.get_by_label("Next version").click()
    assert answers(page) == ["three"]


def test_retrying_an_answer_keeps_the_old_one(page, fake):
    fake.script += [text_chunks("one"), text_chunks("two")]
    say(page, "ask")
    page.get_by_label("Retry answer").click()
    page.wait_for_selector("text=two")
    finished(page)
    assert fake.requests[0]["messages"] == fake.requests[1]["messages"]
    page.get_by_label("Previous version").click()
    assert answers(page) == ["one"]
    say(page, "on")
    assert [m["content"] for m in fake.requests[2]["messages"]] == ["ask", "one", "on"]


def test_conversations_last_over_a_reload_and_are_listed_renamed_and_deleted(page, fake):
    fake.script += [text_chunks("# Title\n\nkept $x^2$"), text_chunks("other")]
    say(page, "about tides")
    page.get_by_role("button", name="New conversation").click()
    say(page, "about winds")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert answers(page) == ["other"]
    names = page.locator("#conversations .open")
    assert names.all_inner_texts() == ["about winds", "about tides"]
    names.nth(1).click()
    page.wait_for_selector(".turn.assistant math")
    names.nth(1).hover()
    page.get_by_label("Rename about tides").click()
    page.get_by_label("New name of about tides").fill("Tides")
    page.keyboard.press("Enter")
    page.wait_for_selector("#title >> text=Tides")
    names.nth(1).hover()
    page.get_by_label("Delete Tides").click()
    page.locator("#confirm-yes").click()
    page.wait_for_selector("#conversations li >> nth=1", state="detached")
    assert names.all_inner_texts() == ["about winds"]
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert names.all_inner_texts() == ["about winds"]


def test_an_answer_that_a_reload_cut_off_is_kept_and_says_so(page, fake):
    fake.script.append([delta(content="begun"), Wait()])
    send(page, "go")
    page.wait_for_selector("text=begun")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator(".turn.assistant .note").inner_text().startswith("Cut off")


def test_an_answer_goes_on_while_another_conversation_is_open(page, fake):
    wait = Wait()
    fake.script += [[delta(content="slow "), wait, *text_chunks("end")], text_chunks("quick")]
    send(page, "long")
    page.wait_for_selector("text=slow")
    page.keyboard.press("Alt+n")
    say(page, "short")
    assert answers(page) == ["quick"]
    page.locator("#conversations .open", has_text="long").click()
    page.wait_for_selector(".turn.assistant.running >> text=slow")
    wait.event.set()
    finished(page)
    assert answers(page) == ["slow end"]


def test_export_and_import_give_the_conversation_back(page, fake, tmp_path):
    fake.script += [text_chunks("**one**"), text_chunks("two")]
    say(page, "ask")
    page.get_by_label("Retry answer").click()
    page.wait_for_selector("text=two")
    finished(page)
    with page.expect_download() as download:
        page.get_by_label("Export all conversations").click()
    path = tmp_path / "export.json"
    download.value.save_as(path)
    page.locator("#conversations .open").hover()
    page.get_by_label("Delete ask").click()
    page.locator("#confirm-yes").click()
    page.wait_for_selector("#conversations li", state="detached")
    page.locator("#import-file").set_input_files(path)
    page.wait_for_selector(".turn.assistant >> text=two")
    page.get_by_label("Previous version").click()
    assert page.locator(".turn.assistant strong").inner_text() == "one"
    path.write_text(
        json.dumps({"format": "dsv3-conversations", "conversations": [{"title": {"toString": 1}, "nodes": {}}]})
    )
    page.locator("#import-file").set_input_files(path)
    page.wait_for_selector('.notice >> text=/"title" must be text/')


def test_errors_say_what_happened_and_can_be_tried_again(browser, fake):
    steps = [
        ([Refuse(429, "Too many requests.", {"Retry-After": "3"})], "Too many requests. Try again in 3 s."),
        ([Refuse(503, "The model is loading")], "The model is loading"),
        ([delta(content="par"), Cut()], "closed the connection"),
        ([delta(content="par"), {"error": {"message": "a fault in this sequence"}}], "a fault in this sequence"),
    ]
    with opened(browser, fake.url, expected=["Failed to load resource"]) as page:
        for script, words in steps:
            fake.script.append(script)
            say(page, "ask")
            assert words in page.locator(".turn.assistant .notice").last.inner_text()
            assert page.locator("#announcer").inner_text().count(words) >= 1
        fake.script.append(text_chunks("better"))
        page.get_by_role("button", name="Try again").last.click()
        page.wait_for_selector("text=better")
        finished(page)
        assert "par" in fake.requests[-1]["messages"][-2]["content"]


def test_a_key_is_asked_for_sent_and_forgotten_with_the_tab(browser, fake):
    fake.key = "secret-key-1"
    with opened(browser, fake.url, expected=["Failed to load resource"]) as page:
        page.wait_for_selector("#settings[open]")
        assert page.evaluate("() => document.activeElement.id") == "key"
        page.keyboard.type("secret-key-1")
        page.keyboard.press("Escape")
        page.wait_for_selector("#model option", state="attached")
        say(page, "hello")
        assert answers(page) == ["ok"]
        assert fake.keys[-1] == "Bearer secret-key-1"
        kept = page.evaluate(
            """async () => {
              const done = (request) => new Promise((ok) => { request.onsuccess = () => ok(request.result); });
              const database = await done(indexedDB.open("dsv3"));
              const stores = [...database.objectStoreNames].map((name) => database.transaction(name).objectStore(name));
              const all = await Promise.all(stores.map((store) => done(store.getAll())));
              database.close();
              return JSON.stringify([all, {...localStorage}, document.cookie]);
            }"""
        )
        assert "hello" in kept
        assert "secret-key" not in kept


def test_system_prompt_and_sampling_go_into_the_request_and_invalid_values_do_not(page, fake):
    page.locator("#open-settings").click()
    page.get_by_label("System prompt").fill("Answer in verse.")
    for label, value in [("Temperature", "0.3"), ("Top p", "0.9"), ("Top k", "40"), ("Most tokens", "64"), ("Seed", "7"),
                         ("Presence", "0.5"), ("Frequency", "9"), ("Repetition", "1.1")]:  # fmt: skip
        page.get_by_label(label, exact=True).fill(value)
    wrong = page.get_by_label("Frequency", exact=True)
    assert wrong.get_attribute("aria-invalid") == "true"
    assert page.locator("#sampling-frequency_penalty-hint").inner_text() == "From -2 to 2"
    page.get_by_role("button", name="Done").click()
    page.locator("#model").select_option("dsv3-mini")
    say(page, "hello")
    body = fake.requests[0]
    assert body["messages"][0] == {"role": "system", "content": "Answer in verse."}
    sent = {
        name: value
        for name, value in body.items()
        if name not in ("messages", "stream", "stream_options", "details", "model")
    }
    assert body["model"] == "dsv3-mini"
    expected = {"temperature": 0.3, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": 7, "presence_penalty": 0.5}
    assert sent == expected | {"repetition_penalty": 1.1}
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.get_by_role("button", name="New conversation").click()
    page.keyboard.press("Alt+,")
    assert page.get_by_label("Temperature").input_value() == "0.3"
    page.get_by_role("button", name="Server's defaults").click()
    page.keyboard.press("Escape")
    say(page, "again")
    assert "temperature" not in fake.requests[1]


def test_the_panel_shows_the_numbers_of_the_stream(page, fake):
    fake.script.append(detailed())
    say(page, "sky?")
    assert (
        page.locator(".turn.assistant .facts").inner_text()
        == "6 tokens · 41.5 tokens/s · 32 cached · 72% of drafts accepted"
    )
    page.get_by_label("Details of this answer").click()
    numbers = page.locator("#details .numbers").inner_text()
    for words in ("6 tokens", "41.5 tokens/s", "2.0 s", "First token", "40 tokens", "32 tokens, 80%", "4.6% of 1,000"):
        assert words in numbers
    drafts = page.locator("#details section").first.inner_text()
    assert "72%, 13 of 18" in drafts
    assert "90%, 9 of 10" in drafts
    assert "50%, 4 of 8" in drafts
    options = page.locator(".tokens [role=option]")
    assert options.count() == 6
    assert "".join(options.all_text_contents()) == "The sky is blue.↵\n"
    assert [options.nth(i).get_attribute("class") for i in range(5)] == [
        "tint-0",
        "tint-2",
        "tint-0",
        "tint-4",
        "tint-1",
    ]
    options.nth(3).hover()
    told = page.locator(".token-info").inner_text()
    assert "Token 4, probability 10%" in told
    assert "other" in told
    assert "68%" in told  # of the alternative


def test_tokens_are_walked_by_keyboard_and_told_in_words(page, fake):
    fake.script.append(detailed())
    say(page, "sky?")
    page.keyboard.press("Alt+i")
    assert page.evaluate("() => document.activeElement.id") == "details-title"
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tokens").get_attribute("aria-activedescendant") == "token-3"
    assert page.locator("[aria-selected=true]").inner_text() == " blue"
    assert "Token 4" in page.locator(".token-info").inner_text()
    page.keyboard.press("End")
    assert page.locator("[aria-selected=true]").get_attribute("aria-label") == "new line"
    page.keyboard.press("Home")
    assert page.locator("[aria-selected=true]").inner_text() == "The"
    page.locator(".experts summary").click()
    words = page.locator(".experts .words").all_inner_texts()
    assert words[0] == "Layer 1: 0, 5, 7, 14. Layer 2: 1, 3, 8, 10. Layer 3: 4, 6, 11, 13."
    assert words[1].startswith("Layer 1: 16 of 16 used, most often 0. Layer 2:")
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    assert page.evaluate("() => document.activeElement.id") == "toggle-details"


def test_the_maps_of_experts_are_painted_and_the_panel_lasts_over_a_reload(page, fake):
    fake.script.append(detailed())
    say(page, "sky?")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.keyboard.press("Alt+i")
    page.wait_for_selector(".experts canvas")
    painted = page.evaluate(
        """() => [...document.querySelectorAll(".experts canvas")].map((map) => {
          const {data} = map.getContext("2d").getImageData(0, 0, map.width, map.height);
          return [map.width, map.height, data.filter((v, k) => k % 4 === 3 && v > 0).length];
        })"""
    )
    assert painted[0] == [16, 3, 12]
    assert painted[1][:2] == [16, 3]
    assert painted[1][2] > 30


def test_reasoning_is_folded_with_its_length_and_time(page, fake):
    wait = Wait()
    thoughts = [delta(reasoning_content="First I think. "), wait, delta(reasoning_content="Then **more**.")]
    fake.script.append([*thoughts, delta(content="Done."), finish(), {"choices": [], "usage": usage(5, 9, 0, 7)}])
    send(page, "why?")
    page.wait_for_selector("summary >> text=Thinking, 4 words so far")
    wait.event.set()
    finished(page)
    assert page.locator(".reasoning").get_attribute("open") is None
    summary = page.locator(".reasoning summary").inner_text()
    assert summary.startswith("Thought for ")
    assert summary.endswith(", 7 tokens")
    page.locator(".reasoning summary").click()
    assert page.locator(".reasoning strong").inner_text() == "more"
    assert "First" not in answers(page)[-1]
    say(page, "and?")
    assert fake.requests[1]["messages"][1] == {"role": "assistant", "content": "Done."}


def test_tool_calls_are_shown_with_their_arguments(page, fake):
    parts = ['{"city": ', '"Hangzhou"}']
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": parts[0]}}
    fake.script.append(
        [
            delta(tool_calls=[first]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": parts[1]}}]),
            finish("tool_calls"),
        ]
    )
    say(page, "weather?")
    assert "Calls get_weather" in page.locator(".calls figcaption").inner_text()
    assert '"city": "Hangzhou"' in page.locator(".calls pre").inner_text()


def test_copying_gives_the_source(browser, fake):
    with opened(browser, fake.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        fake.script.append(text_chunks("Look:\n\n```python\nx = 1\ny = 2\n```\n"))
        say(page, "code")
        page.get_by_label("Copy code").click()
        page.wait_for_selector("#announcer >> text=Copied")
        assert page.evaluate("() => navigator.clipboard.readText()") == "x = 1\ny = 2"
        page.get_by_label("Copy answer").click()
        page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('Look:')")


AT_END = """() => {
  const {scrollHeight, scrollTop, clientHeight} = document.querySelector("#thread");
  return scrollHeight - scrollTop - clientHeight < 2;
}"""


def test_a_reader_who_scrolled_away_is_left_in_peace(page, fake):
    wait = Wait()
    long = "\n\n".join(f"Paragraph {i}" for i in range(60))
    fake.script.append([*text_chunks(long, 50)[:-2], wait, *text_chunks("\n\nThe last.")])
    send(page, "much")
    page.wait_for_selector("text=Paragraph 59")
    page.locator("#thread").hover()
    page.mouse.wheel(0, -3000)
    page.wait_for_selector("#to-end:not([hidden])")
    before = page.evaluate("() => document.querySelector('#thread').scrollTop")
    wait.event.set()
    finished(page)
    assert page.evaluate("() => document.querySelector('#thread').scrollTop") == before
    page.locator("#to-end").click()
    page.wait_for_selector("#to-end", state="hidden")
    page.wait_for_function(AT_END)


def test_a_long_conversation_lays_out_only_what_is_near(page, fake, tmp_path):
    """300 turns: what is out of sight is skipped by content-visibility, and typing still works."""
    nodes, children, chosen, parent = {}, {}, {}, "root"
    for i in range(300):
        nodes[f"n{i}"] = {
            "id": f"n{i}",
            "parent": parent,
            "role": "assistant" if i % 2 else "user",
            "content": f"**{i}** " * 30,
            "finish": "stop",
        }
        children[parent], chosen[parent] = [f"n{i}"], f"n{i}"
        parent = f"n{i}"
    conversation = {"title": "long", "nodes": nodes, "children": children, "chosen": chosen}
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"format": "dsv3-conversations", "conversations": [conversation]}))
    page.locator("#import-file").set_input_files(path)
    page.wait_for_selector(".turn >> nth=299")
    shown = """() => [...document.querySelectorAll(".turn .body")]
      .filter((node) => node.checkVisibility({contentVisibilityAuto: true})).length"""
    assert 0 < page.evaluate(shown) < 60
    page.wait_for_function(AT_END)
    page.evaluate("() => { document.querySelector('.turn').mine = true; }")
    say(page, "on")
    assert len(fake.requests[0]["messages"]) == 301
    assert page.locator(".turn").count() == 302
    assert page.evaluate("() => document.querySelector('.turn').mine"), "turns that were there were drawn again"


def test_two_tabs_see_each_others_conversations(page, fake):
    other = page.context.new_page()
    other.goto(fake.url)
    other.wait_for_selector("html[data-ready]")
    say(page, "from the first tab")
    other.locator("#conversations .open", has_text="from the first tab").click()
    other.wait_for_selector(".turn.assistant >> text=ok")
    fake.script.append(text_chunks("more of it"))
    say(page, "second")
    other.wait_for_selector(".turn.assistant >> text=more of it")


def test_what_two_tabs_say_at_once_in_one_conversation_both_stays(page, fake):
    say(page, "first")
    other = page.context.new_page()
    other.goto(fake.url)
    other.wait_for_selector("html[data-ready]")
    other.locator("#conversations .open", has_text="first").click()
    other.wait_for_selector(".turn.assistant >> text=ok")
    wait = Wait()
    fake.script += [[*text_chunks("half of")[:-2], wait, *text_chunks(" it")], text_chunks("to the second tab")]
    send(page, "from the first tab")
    page.wait_for_selector("text=half of")
    say(other, "from the second tab")
    wait.event.set()
    finished(page)
    page.wait_for_selector(".turn.user .versions")
    for tab in (page, other):
        tab.reload()
        tab.wait_for_selector("html[data-ready]")
        tab.wait_for_selector(".turn.user .versions")
        said = set()
        for way in ("Previous version", "Next version"):
            if tab.get_by_label(way).is_enabled():
                tab.get_by_label(way).click()
            said.add(tuple(answers(tab)))
        assert said == {("ok", "half of it"), ("ok", "to the second tab")}


def test_a_whole_answer_is_not_lost_to_another_tabs_half_of_it(page):
    merged = module(
        page,
        "tree.js",
        """(tree) => {
          const mine = tree.createConversation();
          const asked = tree.addTurn(mine, tree.ROOT, "user", "q");
          Object.assign(tree.addTurn(mine, asked.id, "assistant", "half"), { finish: "interrupted" });
          const theirs = structuredClone(mine);
          const whole = Object.values(theirs.nodes).find((node) => node.role === "assistant");
          Object.assign(whole, { content: "half and half", finish: "stop" });
          Object.assign(theirs, { title: "Named", named: true });
          const back = structuredClone(theirs);
          const gained = [tree.merge(mine, theirs), tree.merge(mine, theirs), tree.merge(back, mine)];
          const said = (conversation) => tree.path(conversation).map((node) => node.content).join();
          return [gained, said(mine), said(back), mine.title];
        }""",
    )
    assert merged == [[True, False, False], "q,half and half", "q,half and half", "Named"]


def test_without_storage_the_page_works_and_says_that_nothing_is_kept(browser, fake):
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('no', 'SecurityError'); }});"
    )
    page = context.new_page()
    page.goto(fake.url)
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#storage-note").is_visible()
    say(page, "hello")
    page.get_by_role("button", name="New conversation").click()
    page.locator("#conversations .open").click()
    page.wait_for_selector(".turn.assistant >> text=ok")
    context.close()


def test_the_sources_hold_no_way_for_text_to_become_markup_or_script():
    """Beside the policy: the code itself knows no sink. Files are of a size to be read."""
    sinks = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser"]
    sinks += ["createContextualFragment", "setHTMLUnsafe", 'setAttribute("style', "style.cssText", "srcdoc=", "import("]
    files = sorted(path for path in WEB.iterdir() if path.suffix in (".js", ".css", ".html"))
    assert {"index.html", "chat.js", "chat.css", "markdown.js", "maths.js"} <= {path.name for path in files}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500, path
        if path.suffix == ".js":
            code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("//"))
            assert not [sink for sink in sinks if sink in code], path
            assert text.startswith("//"), f"{path} has no header"
        assert "http://" not in text.replace("http://www.w3.org/", "").replace('"http:"', ""), path
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert "style=" not in page
    assert "<style" not in page
    assert page.count("<script") == page.count("<script src=") + page.count('<script type="module" src=')


def test_a_machine_without_chromium_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install chromium"), chromium():
        pass


def test_the_page_talks_to_the_real_server(browser):
    """A tiny random model: its words mean nothing, but tokens, drafts, cache and experts are real."""
    with running(small_app()) as url, opened(browser, url) as page:
        page.wait_for_selector("#model option", state="attached")
        page.keyboard.press("Alt+,")
        page.get_by_label("Most tokens").fill("24")
        page.get_by_label("Seed").fill("1")
        page.keyboard.press("Escape")
        for text in ("hello world, the quick brown fox. " * 8, "once upon a time"):
            say(page, text)
        assert page.locator(".turn.assistant .notice").count() == 0
        assert "token" in page.locator(".turn.assistant .facts").last.inner_text()
        page.keyboard.press("Alt+i")
        page.wait_for_selector(".experts canvas")
        assert page.locator(".tokens [role=option]").count() >= 1
        numbers = page.locator("#details .numbers").inner_text()
        assert "From the cache" in numbers
        assert page.locator(".token-info .bars li").count() >= 2
        assert "MoE layer" in page.locator(".experts").inner_text()
