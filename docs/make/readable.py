"""A hook of MkDocs for what Markdown alone does not give.

Formulas become MathML, which browsers draw themselves, without a script from another host. What may be wider than a
phone can be scrolled, and is reached by the keyboard for that: formulas, tables and code.
"""

import html
import re

from latex2mathml import converter

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
# Inside the code: what the theme's script finds on the element itself it takes away on phones.
_CODE = re.compile(r"(<pre[^>]*>(?:<span></span>)?<code[^>]*>)(.*?)(</code></pre>)", re.DOTALL)
_LONG = 48  # characters of a formula within a line that may not fit a phone


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Questions become headings, so that the search and the list of contents find them."""
    if page.file.src_uri != "faq.md":
        return markdown
    return re.sub(r"^\*\*(.+\?(?: Why\?)?)\*\*$", r"### \1\n", markdown, flags=re.MULTILINE)


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML with its formulas converted."""

    def converted(match: re.Match) -> str:
        tag, kind, source = match.groups()
        formula = converter.convert(html.unescape(source), display="block" if kind == "[" else "inline")
        if tag == "span" and len(source) < _LONG:
            return formula
        return f'<{tag} class="formula" tabindex="0">{formula}</{tag}>'

    content = _FORMULA.sub(converted, content)
    content = _TABLE.sub(r'<div class="table" tabindex="0">\g<0></div>', content)
    return _CODE.sub(r'\1<span tabindex="0">\2</span>\3', content)


def on_post_page(output: str, **_: object) -> str:
    """The whole page; the theme's search is a dialog without a name."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')
