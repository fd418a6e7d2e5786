"""Several reports in one page, a tab for each: every report is complete in itself and stays as it is."""

import re
from collections.abc import Mapping
from html import escape

MARK = '<meta name="generator" content="deepclust tabs">'  # by which a page of tabs is told from a report
STYLE = """
:root{color-scheme:light dark;--line:#d9dde4;--on:#2563eb}
@media screen and (prefers-color-scheme:dark){:root{--line:#333942;--on:#6ea0ff}}
html,body{height:100%;margin:0}
body{display:flex;flex-wrap:wrap;align-content:flex-start;
 font:16px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
input{position:absolute;opacity:0}
label{height:2.6rem;padding:.5rem 1rem;box-sizing:border-box;cursor:pointer;border-bottom:2px solid var(--line)}
input:checked+label{border-color:var(--on);font-weight:600}input:focus-visible+label{outline:2px solid var(--on)}
iframe{display:none;order:1;width:100%;height:calc(100% - 2.6rem);border:0}
input:checked+label+iframe{display:block}
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{mark}
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{tabs}
</body>
</html>
"""
TAB = (
    '<input type="radio" name="tab" id="tab{number}"{checked}><label for="tab{number}">{label}</label>'
    '<iframe title="{label}" srcdoc="{page}"></iframe>'
)


def join_reports(pages: Mapping[str, tuple[str, str]], *, title: str) -> str:
    """Return one page with a tab for each report; the first one is shown first.

    pages: by what the tab is called, the HTML of a report and its folder, from where the page is going to be (ending in
    a slash, empty for the same folder); its links begin there.
    """
    tabs, hashes = [], []
    for number, (label, (page, folder)) in enumerate(pages.items()):
        hashes += re.findall(r"'sha256-[^']+'", page[: page.find("</head>")])
        checked = " checked" * (number == 0)
        tabs.append(
            TAB.format(number=number, checked=checked, label=escape(label), page=escape(set_base(page, folder)))
        )
    scripts = f"; script-src {' '.join(dict.fromkeys(hashes))}" if hashes else ""  # of the frames, which inherit it
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}"
    return PAGE.format(policy=policy, mark=MARK, title=escape(title), style=STYLE, tabs="\n".join(tabs))


def set_base(page: str, folder: str) -> str:
    """Return the HTML of a report whose links to files begin at a folder, and whose links to sections stay in it."""
    if not folder:
        return page
    head, end, body = page.partition("</head>")
    linked = body.replace('<a href="#', '<a href="about:srcdoc#')
    return f'{head}<base href="{escape(folder)}">{end}{linked}'
