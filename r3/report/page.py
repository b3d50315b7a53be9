"""Building blocks of a self-contained HTML page that loads nothing, runs nothing, and reads in light and dark.

Text that comes from a run, and so perhaps from a model, passes `text` before it is put on a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# Okabe and Ito's colours; in the dark the lighter ones of the same hue.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #ffffff; --card: #f4f6f8; --line: #d5dae0;
  --link: #0a5c96; --warn: #8a3c00; --warn-card: #fff4ea;
  --live: #d55e00; --replayed: #0072b2; --third: #009e73; --fourth: #cc79a7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a3adb8; --page: #14171b; --card: #1e2329; --line: #3a424c;
    --link: #7cc4f0; --warn: #f0b070; --warn-card: #2b2219;
    --live: #e69f00; --replayed: #56b4e9; --third: #2fc79c; --fourth: #dd9dc0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1rem 4rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .2rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0; }
p { margin: .3rem 0; max-width: 48rem; } .soft, figcaption { color: var(--soft); }
a { color: var(--link); } nav { margin: .8rem 0 1.2rem; } nav a { margin-right: .9rem; display: inline-block; }
ul { margin: .3rem 0; padding-left: 1.2rem; max-width: 52rem; } li { margin: .15rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .55rem .8rem; }
.card b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.card span { color: var(--soft); font-size: .82rem; line-height: 1.3; display: block; }
.warn { border-left: 4px solid var(--warn); background: var(--warn-card); padding: .5rem .9rem; margin: .8rem 0;
  border-radius: 0 .4rem .4rem 0; }
.warn h2, .warn h3 { color: var(--warn); font-size: 1rem; margin: 0; padding: 0; border: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.4rem 1.2rem;
  margin-top: .9rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .82rem; line-height: 1.4; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
svg image { image-rendering: pixelated; }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: .5rem; margin-top: .7rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--card); white-space: normal; vertical-align: bottom; z-index: 1; }
th { font-weight: 600; } tbody th { font-weight: 400; } tr > th:first-child { text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
.words th, .words td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top;
  min-width: 7rem; }
.tokens { max-height: 44rem; } .tokens th:nth-child(2) { text-align: left; }
.tokens th:last-child, td.layers { text-align: left; white-space: normal; min-width: 8rem; }
.whole { white-space: nowrap; }
td.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 17rem; width: 40%;
  color: var(--soft); font-family: ui-monospace, monospace; font-size: .8rem; }
td.text mark { color: var(--ink); background: none; font-weight: 700; border: 1px solid var(--live);
  border-radius: .2rem; padding: 0 .15rem; }
summary { cursor: pointer; margin-top: 1rem; } summary h2 { display: inline; border: 0; }
code { font-family: ui-monospace, monospace; font-size: .88em; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""

# Even if text slipped through unescaped: no script runs, and nothing is loaded.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# Control characters, surrogates, and what changes the direction of text: shown as escapes.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")

_NUMBER = re.compile(r"\d[\d.]*e-\d+")


def text(value: object) -> str:
    """Any text, safe to put on a page, also within a quoted attribute; characters that hide are made visible."""
    return escape(_HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value)))


def sampled_text(value: object) -> str:
    """A piece of what a model wrote, on one line: line breaks and tabs are marked."""
    return text(str(value).replace("\r\n", "\n").replace("\n", "↵").replace("\t", "⇥"))


def document(title: str, body: str) -> str:
    """A whole page; `title` is plain text, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}</body>\n</html>\n"
    )


def section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>\n{content}</section>\n'


def folded(name: str, title: str, content: str) -> str:
    """A section that is closed until it is asked for."""
    return f'<details id="{name}"><summary><h2>{title}</h2></summary>\n{content}</details>\n'


def grid(panels: Iterable[str]) -> str:
    inner = "".join(panels)
    return f'<div class="grid">\n{inner}</div>\n' if inner else ""


def panel(title: str, picture: str, caption: str) -> str:
    """A chart under its title; all three are HTML."""
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{caption}</figcaption></figure>\n"


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts, whose numbers stay in one piece."""
    whole = (_NUMBER.sub(r'<span class="whole">\g<0></span>', text(line)) for line in lines)
    return "<ul>" + "".join(f"<li>{line}</li>" for line in whole) + "</ul>\n" if lines else ""


def warning(title: str, lines: Sequence[str], *, label: str) -> str:
    """A box of plain texts that should be seen; nothing without them."""
    if not lines:
        return ""
    return f'<div class="warn" role="note" aria-label="{text(label)}"><h2>{text(title)}</h2>{bullets(lines)}</div>\n'


def cards(found: Iterable[tuple[str, str]]) -> str:
    """Key figures: value and what it is, both plain."""
    inner = "".join(f'<div class="card"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in found)
    return f'<div class="cards">{inner}</div>\n' if inner else ""


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, words: bool = False, note: str = ""
) -> str:
    """Plain headings and cells, the first of a row heading it; scrolls within itself, also by keyboard."""
    body = (
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    return raw_table(headings, body, label=label, kind="words" if words else "", note=note)


def raw_table(headings: Sequence[str], rows: Iterable[str], *, label: str, kind: str = "", note: str = "") -> str:
    """As `table`, of rows that are HTML."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    above = f'<p class="soft">{text(note)}</p>\n' if note else ""
    return (
        f'{above}<div class="scroll {kind}" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def links(found: Iterable[tuple[str, str]]) -> str:
    """Links to sections of the page, by (id, title)."""
    inner = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return f'<nav aria-label="Sections">{inner}</nav>\n' if inner else ""
