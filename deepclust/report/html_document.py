"""The frame of every page that deepclust writes: one HTML file that loads nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="generator" content="{generator}">
<title>{title}</title>
<style>{style}</style>
</head>
<body{body_class}>
{body}
</body>
</html>
"""


def render_document(
    body: str,
    *,
    title: str,
    style: str,
    script: str = "",
    script_hashes: Sequence[str] = (),
    generator: str = "deepclust",
    body_class: str = "",
) -> str:
    """Return a page, in which the browser loads nothing from elsewhere and runs no script but the given ones.

    Args:
        body: HTML.
        title: text.
        style: CSS.
        script: JavaScript at the end of the body.
        script_hashes: of the scripts of pages within this one, as `hash_script` gives them.
        generator: the program, which tells kinds of pages apart.
        body_class: the class attribute of the body, if it has one.
    """
    hashes = [*([hash_script(script)] if script else []), *script_hashes]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy += f"; script-src {' '.join(dict.fromkeys(hashes))}" if hashes else ""
    return DOCUMENT.format(
        policy=policy,
        generator=generator,
        title=escape(title),
        style=style,
        body_class=f' class="{body_class}"' if body_class else "",
        body=f"{body}\n<script>{script}</script>" if script else body,
    )


def hash_script(script: str) -> str:
    """Return the source expression of a content security policy that allows this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
