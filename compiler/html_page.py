"""A page of its own: no network, no script, no other file, and a policy that says so."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from string import Template

# A page that states its own policy can be opened anywhere: only its style sheet applies, nothing is loaded.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-$hash'"/>
<meta name="viewport" content="width=device-width"/>
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, style: str, body: str) -> str:
    """The text of the page; `body` is HTML, `title` is text. Well-formed as XML if the body is."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return PAGE.substitute(title=escape(title), style=style, hash=digest, body=body)
