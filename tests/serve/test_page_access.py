"""The chat page for everyone: by keyboard alone, by ear, dark and light, on a phone, with less motion. In a real Chromium."""

from __future__ import annotations

import pytest

from tests.serve.browser import Fake, Wait, chromium, delta, detailed, finished, opened, say, send, text_chunks


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


def test_the_whole_page_is_used_by_keyboard_alone(page, fake):
    fake.script += [text_chunks("one"), text_chunks("two"), text_chunks("three")]
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=one")
    finished(page)
    assert fake.requests[0]["messages"][0]["content"] == "line one\nline two"
    page.keyboard.press("Alt+r")
    page.wait_for_selector("text=two")
    finished(page)
    page.keyboard.press("Alt+u")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=three")
    finished(page)
    assert fake.requests[2]["messages"][0]["content"] == "line one\nline two!"
    page.keyboard.press("Alt+ArrowUp")
    assert "assistant" in page.evaluate("() => document.activeElement.className")
    page.keyboard.press("Alt+ArrowUp")
    assert "user" in page.evaluate("() => document.activeElement.className")
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.activeElement.id") == "message"
    page.keyboard.press("Alt+k")
    assert page.locator("#shortcuts dt").count() >= 12
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+l")
    assert page.evaluate("() => document.activeElement.className") == "open"


def test_every_stop_of_the_tab_key_is_seen(page, fake):
    fake.script.append(text_chunks("a [link](https://example.org)\n\n```py\nx = 1\n```\n\n| a |\n|---|\n| b |"))
    say(page, "x")
    page.keyboard.press("Alt+i")
    page.locator(".skip").focus()
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const node = document.activeElement;
              if (node === document.body) return null;
              const style = getComputedStyle(node), box = node.getBoundingClientRect();
              const ring = style.outlineStyle !== "none" || getComputedStyle(node.parentElement).boxShadow !== "none";
              const name = node.id || node.getAttribute("aria-label") || node.textContent.trim().slice(0, 20);
              return [name, ring, box.width > 0 && box.height > 0];
            }"""
        )
        if stop is None:
            break
        stops.append(stop)
    assert [stop for stop in stops if not (stop[1] and stop[2])] == []
    names = [name for name, *_ in stops]
    for name in (
        "new",
        "message",
        "send",
        "model",
        "open-settings",
        "toggle-details",
        "theme",
        "Copy code",
        "link",
        "Table",
        "Copy answer",
    ):
        assert name in names, names


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The colour of each kind of text and of what is behind it, through a canvas: any CSS colour to sRGB.
COLOURS = """(selectors) => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour, under = null) => {
    context.clearRect(0, 0, 1, 1);
    for (const c of [under, colour]) if (c) { context.fillStyle = c; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
  };
  return selectors.flatMap((selector) => [...document.querySelectorAll(selector)].slice(0, 3).map((node) => {
    let back = [];
    for (let n = node; n; n = n.parentElement) back.push(getComputedStyle(n).backgroundColor);
    context.clearRect(0, 0, 1, 1);
    for (const c of back.reverse()) { context.fillStyle = c; context.fillRect(0, 0, 1, 1); }
    const behind = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
    return [selector, rgb(getComputedStyle(node).color), behind];
  }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(browser, fake, scheme):
    fake.script.append(
        [
            delta(reasoning_content="hm"),
            delta(content="[a](https://a.example) `c`\n\n> q\n\n```py\n# c\nif f(1): 'x' # y\nNone\n```\n"),
            *detailed(),
        ]
    )
    with opened(browser, fake.url, color_scheme=scheme) as page:
        say(page, "x")
        page.keyboard.press("Alt+i")
        page.wait_for_selector(".tokens")
        selectors = [".prose p", ".prose a", ".prose code", ".prose blockquote p", ".facts", ".reasoning summary",
                     ".turn.user .plain", "#title", "#hint", "#model", "#conversations .open",
                     "#details dt", "#details dd", ".bars .value", ".bars .chosen .name",
                     *(f".hl-{kind}" for kind in ("comment", "keyword", "string", "number", "constant", "call")),
                     *(f".legend .tint-{k}" for k in range(5)), "#send", "#new", "figcaption span"]  # fmt: skip
        pairs = page.evaluate(COLOURS, selectors)
        assert {selector for selector, *_ in pairs} == set(selectors)
        for selector, text, behind in pairs:
            low, high = sorted([luminance(text), luminance(behind)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, text, behind)
        dark = luminance(pairs[0][2]) < 0.2
        assert dark == (scheme == "dark")


def test_the_theme_follows_the_system_until_it_is_chosen(browser, fake):
    background = "() => getComputedStyle(document.body).backgroundColor"
    with opened(browser, fake.url, color_scheme="light") as page:
        light = page.evaluate(background)
        page.emulate_media(color_scheme="dark")
        dark = page.evaluate(background)
        assert dark != light
        page.emulate_media(color_scheme="light")
        page.locator("#theme").click()
        assert page.locator("#theme").get_attribute("aria-label") == "Colours: dark"
        assert page.evaluate(background) == dark
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.evaluate(background) == dark
        page.keyboard.press("Alt+t")
        assert page.locator("#theme").get_attribute("aria-label") == "Colours: light"
        page.keyboard.press("Alt+t")
        assert page.locator("#theme").get_attribute("aria-label") == "Colours: as the system"


WIDE = (
    "x" * 300 + "\n\n```\n" + "y" * 400 + "\n```\n\n|" + "column|" * 12 + "\n|" + "--|" * 12 + "\n|" + "value|" * 12
    + "\n\n$$" + " + ".join(f"x_{{{i}}}" for i in range(60)) + "$$\n\nhttps://example.org/" + "z" * 200
)  # fmt: skip
FITS = """() => {
  const thread = document.querySelector("#thread");
  return [document.documentElement.scrollWidth, document.body.scrollWidth, thread.scrollWidth - thread.clientWidth];
}"""


def test_nothing_scrolls_sideways_on_a_phone(browser, fake):
    with opened(browser, fake.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True) as page:
        fake.script += [text_chunks(WIDE, 60), detailed()]
        say(page, "w" * 200)
        say(page, "more")
        assert page.evaluate(FITS) == [360, 360, 0]
        page.locator("#toggle-details").tap()
        page.wait_for_selector(".tokens")
        assert page.evaluate(FITS) == [360, 360, 0]
        assert page.evaluate("() => document.querySelector('#details').scrollWidth <= 360")
        assert page.evaluate("() => document.querySelector('#page').inert")
        page.locator("#close-details").tap()
        page.locator("#open-settings").tap()
        assert page.evaluate("() => document.querySelector('#settings').scrollWidth <= 360")
        page.keyboard.press("Escape")
        assert not page.locator("#sidebar").is_visible()
        page.locator("#open-sidebar").tap()
        assert page.evaluate("() => document.activeElement.id") == "new"
        page.keyboard.press("Escape")
        page.wait_for_selector("#sidebar", state="hidden")
        assert page.evaluate("() => document.activeElement.id") == "open-sidebar"
        send_button = page.locator("#send").bounding_box()
        assert send_button["x"] + send_button["width"] <= 360


ROLES = {
    "button",
    "link",
    "textbox",
    "searchbox",
    "combobox",
    "listbox",
    "spinbutton",
    "checkbox",
    "img",
    "image",
    "option",
    "dialog",
    "canvas",
}


def test_everything_has_a_name_in_the_accessibility_tree(page, fake):
    fake.script.append([delta(reasoning_content="hm"), delta(content="- [x] a\n\n$x$\n\n```py\n1\n```\n"), *detailed()])
    say(page, "ask")
    page.keyboard.press("Alt+i")
    page.wait_for_selector(".tokens")
    session = page.context.new_cdp_session(page)

    def tree():
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "").strip()) for n in nodes if not n["ignored"]]

    seen = tree()
    page.keyboard.press("Alt+,")
    seen += tree()
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+k")
    seen += tree()
    assert [pair for pair in seen if pair[0] in ROLES and not pair[1]] == []
    roles = {role for role, _ in seen}
    assert {
        "main",
        "navigation",
        "complementary",
        "form",
        "article",
        "heading",
        "dialog",
        "spinbutton",
        "listbox",
    } <= roles
    assert ("navigation", "Conversations") in seen
    assert ("textbox", "Message") in seen
    assert ("complementary", "Answer details") in seen
    unlabelled = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select")]
          .filter((node) => !node.labels?.length && !node.ariaLabel).map((node) => node.outerHTML)"""
    )
    assert unlabelled == []


def test_a_screen_reader_hears_blocks_and_the_end_but_not_each_token(page, fake):
    page.evaluate(
        """() => {
          window.heard = [];
          new MutationObserver((changes) => changes.forEach((c) => c.addedNodes.forEach((n) => heard.push(n.textContent))))
            .observe(document.querySelector("#announcer"), {childList: true});
        }"""
    )
    text = "A first paragraph, long enough.\n\nWith $x^2$ in it.\n\n```python\na\nb\n```\n\nThe end."
    fake.script.append(text_chunks(text, 2))
    say(page, "read to me")
    page.wait_for_function("() => heard.some((line) => line.startsWith('The answer is complete'))")
    assert page.evaluate("() => heard") == [
        "Sent. The answer follows.",
        "A first paragraph, long enough.",
        "With x^2 in it.",
        "Python: code of 2 lines",
        "The end.",
        f"The answer is complete: {(len(text) + 1) // 2} tokens.",
    ]
    assert page.locator("#announcer").get_attribute("aria-live") == "polite"
    assert page.locator(".turn.assistant [aria-live]").count() == 0


def test_nothing_moves_where_less_motion_is_wanted(browser, fake):
    fake.script.append([delta(content="x"), Wait()])
    with opened(browser, fake.url, reduced_motion="reduce") as page:
        send(page, "go")
        page.wait_for_selector(".turn.running .prose p")
        moving = "() => document.getAnimations().filter((a) => a.playState === 'running').length"
        assert page.evaluate(moving) == 0
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate(moving) > 0
