"""The HTML of a report: a page that needs nothing from elsewhere, tables, pictures."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto;
       max-width: 72rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; } .under { color: #595959; margin-top: .2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .9rem; max-width: 17rem; }
.card b { display: block; font-size: 1.5rem; } .card span { color: #595959; font-size: .85rem; }
.bad { border-color: #d55e00; } .bad b { color: #b04a00; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e8e8e8; }
td { white-space: nowrap; }
.words td { white-space: normal; vertical-align: top; }
th { color: #595959; font-weight: 600; vertical-align: bottom; }
th.l, td.l { text-align: left; } td.w { text-align: left; color: #b04a00; }
tr.ours td { font-weight: 600; background: #f1f6fa; } tr.first td { border-top: 1px solid #999; }
td b.most { color: #b04a00; font-weight: 700; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } .wide { overflow-x: auto; }
figcaption { color: #595959; font-size: .87rem; max-width: 60rem; }
code { background: #f4f4f4; padding: .05rem .3rem; border-radius: 3px; }
"""


def text(value: Any) -> str:
    """A value as text of a page.

    Example:
        >>> text("a < b")
        'a &lt; b'
    """
    return html.escape(str(value))


def document(title: str, parts: Iterable[str]) -> str:
    """A page.

    Args:
        title: as text.
        parts: as HTML.
    """
    head = f"<meta charset='utf-8'><title>{text(title)}</title><style>{STYLE}</style>"
    head += "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    body = "".join(parts)
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def picture(svg: bytes, caption: str) -> str:
    """A picture within the page.

    Args:
        svg: the file.
        caption: as text, below it and in place of it.
    """
    said, data = text(caption), base64.b64encode(svg).decode()
    image = f"<img alt='{said}' src='data:image/svg+xml;base64,{data}'>"
    return f"<figure>{image}<figcaption>{said}</figcaption></figure>"


def words(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what is to be said of them.

    Args:
        rows: of HTML.
    """
    return f"<div class='words'>{table(('', ''), list(rows), left=2)}</div>"


def table(headers: Sequence[str], rows: Sequence[Any], *, left: int) -> str:
    """A table.

    Args:
        headers: as text.
        rows: of cells of HTML, or (cells, class); the last cell is words.
        left: how many columns, the first ones, are not numbers.
    """
    lines = []
    for row in rows:
        cells, kind = row if isinstance(row[0], tuple) else (row, "")
        marks = ["l" if i < left else "w" if i + 1 == len(cells) else "" for i in range(len(cells))]
        inner = "".join(f"<td class='{m}'>{c}</td>" for m, c in zip(marks, cells, strict=True))
        lines.append(f"<tr class='{kind}'>{inner}</tr>")
    top = "".join(f"<th class='{'l' * (i < left)}'>{text(h)}</th>" for i, h in enumerate(headers))
    top = f"<thead><tr>{top}</tr></thead>" if any(headers) else ""
    return f"<div class='wide'><table>{top}<tbody>{''.join(lines)}</tbody></table></div>"
