"""Several reports in one page, a tab for each: every report is complete in itself and stays as it is.

On paper they stand one after the other.
"""

import re
from collections.abc import Mapping
from html import escape

from deepclust.report.html_document import render_document

GENERATOR = "deepclust tabs"  # by which a page of tabs is told from a report
MARK = f'<meta name="generator" content="{GENERATOR}">'
STYLE = """
:root{color-scheme:light dark;--line:#d9dde4;--on:#2563eb}
@media screen and (prefers-color-scheme:dark){:root{--line:#333942;--on:#6ea0ff}}
body{margin:0;font:16px/1.3 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{display:grid;height:100vh;height:100dvh;overflow:auto hidden;grid-template-rows:auto 1fr;
 grid-template-columns:repeat(var(--tabs),minmax(min-content,max-content)) minmax(0,1fr)}
main[hidden]{display:none}
input{position:absolute;opacity:0}
label{grid-row:1;padding:.5rem 1rem;cursor:pointer;border-bottom:2px solid var(--line)}
input:checked+label{border-color:var(--on);font-weight:600}input:focus-visible+label{outline:2px solid var(--on)}
iframe{display:none;grid-area:2/1/3/-1;position:sticky;left:0;width:100vw;height:100%;border:0}
input:checked+label+iframe{display:block}
@media(max-width:560px){label{padding:.35rem .5rem}}
@media screen{.printed{display:none}}
.printed+.printed{break-before:page}
"""
# Frames are cut off on paper. So what they show is copied into the page while it prints, apart from each other.
SCRIPT = """
(() => {
const tabs = document.querySelector('main');
addEventListener('beforeprint', () => {
  for (const {contentDocument: report} of document.querySelectorAll('iframe')) {
    const place = document.createElement('section'), style = document.createElement('style');
    place.className = 'printed';
    style.textContent = report.querySelector('style').textContent.replaceAll(':root', ':host');
    place.attachShadow({mode: 'open'}).append(style, document.importNode(report.body, true));
    document.body.append(place);
  }
  tabs.hidden = true;
});
addEventListener('afterprint', () => {
  for (const place of document.querySelectorAll('.printed')) place.remove();
  tabs.hidden = false;
});
})();
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
    body = f'<main style="--tabs:{len(pages)}">{"".join(tabs)}</main>'
    return render_document(
        body,
        title=title,
        style=STYLE,
        script=SCRIPT,
        script_hashes=hashes,  # frames inherit the policy of this page
        generator=GENERATOR,
    )


def set_base(page: str, folder: str) -> str:
    """Return the HTML of a report whose links to files begin at a folder, and whose links to sections stay in it."""
    if not folder:
        return page
    head, end, body = page.partition("</head>")
    linked = body.replace('<a href="#', '<a href="about:srcdoc#')
    return f'{head}<base href="{escape(folder)}">{end}{linked}'
