"""The licence file that stands beside each source: attribution, what was changed, and the licence's text."""

from pathlib import Path

from puna.errors import PunaError
from puna.nursery.building.fetch import Packages
from puna.nursery.building.sources import Source

COMMON = Path("/usr/share/common-licenses")  # Debian keeps the full texts here
DEEDS = {
    "CC-BY-4.0": "Creative Commons Attribution 4.0 International: https://creativecommons.org/licenses/by/4.0/legalcode",
    "public domain": "In the public domain: no licence is needed.",
}
MIT = """MIT License

Copyright (c) {holder}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def text(source: Source, packages: Packages) -> str:
    """The licence's own words, from the source's package where it has them."""
    if source.text_of is None:
        return DEEDS[source.licence]
    if isinstance(source.text_of, tuple):
        package, path = source.text_of
        return (packages[package] / path).read_text("utf-8")
    if source.text_of.startswith("MIT "):
        return MIT.format(holder="Microsoft Corporation")
    path = COMMON / source.text_of
    if not path.is_file():
        raise PunaError(f"the text of {source.text_of} is not in {COMMON}: build on a Debian system")
    return path.read_text("utf-8")


def notice(source: Source, packages: Packages) -> str:
    """Content of the source's LICENCE.txt."""
    made_of = ", ".join(packages.pins[name].label for name in source.packages)
    head = [
        source.title,
        f"By {source.author}.",
        f"Licence: {source.licence}",
        f"Taken from {made_of}",
        f"Changes: {source.changes or 'none'}",
    ]
    return "\n".join(head) + "\n\n" + "-" * 80 + "\n\n" + text(source, packages).strip() + "\n"
