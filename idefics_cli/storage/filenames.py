"""Names: how they stand in ids and messages, and which ones mean images, addresses or hidden files.

Nothing here looks at the file system.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from urllib.parse import unquote

# All common image formats, even those that cannot be decoded: such a file becomes an error row with a reason.
IMAGE_SUFFIX = re.compile(
    r"""\.(
    apng|avifs?|bmp|bw|cur|dds|dib|eps|fits?|gif|hei[cf]|hif|icns|ico|j2[ck]|jfif|jp2|jpc|jpe?g?|jpf|jpx|jxl|mpo|msp
    |pbm|pcx|pfm|pgm|png|pnm|ppm|psd|qoi|ras|rgba?|sgi|svg|tga|tiff?|webp|wmf|xbm|xpm
    )$""",
    re.VERBOSE | re.IGNORECASE,
)
SYSTEM_NAMES = frozenset(
    {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "@eadir"}
)

WEB_ADDRESS = re.compile(r"\s*(https?|ftps?):", re.IGNORECASE)
REMOTE_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
FILE_ADDRESS = re.compile(r"\s*file:(?://(?:localhost(?=/))?)?", re.IGNORECASE)
DATA_ADDRESS = re.compile(r"\s*data:", re.IGNORECASE)
ADDRESS = re.compile(  # no path of a local file
    "|".join(each.pattern for each in (WEB_ADDRESS, DATA_ADDRESS, FILE_ADDRESS, REMOTE_ADDRESS)), re.IGNORECASE
)
SECRET_PARTS = re.compile(r"^(?P<scheme>\s*[a-z][a-z0-9+.-]+://)[^/?#]*@|[?#].*$", re.IGNORECASE | re.DOTALL)

# An escaped byte in an id: one that is not valid UTF-8, or a backslash that would read as such an escape.
ESCAPED_BYTE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
SURROGATES = range(0xDC80, 0xDD00)  # how os.fsdecode carries the bytes 0x80 to 0xff of a name that is not UTF-8

SHOWN_CHARACTERS = 200
TERMINAL_CONTROL = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def escape_name(name: str) -> str:
    """A name from the file system as text that JSON and Parquet hold.

    Names that are UTF-8 stay as they are. A byte that is not UTF-8 becomes `\\xNN`; a backslash of the name itself that
    would read as such an escape becomes `\\x5c`, so that the name can be told from the text.
    """
    escaped = ESCAPED_BYTE.sub(lambda match: r"\x5c" + match.group()[1:], name) if "\\" in name else name
    if not escaped.isascii():
        escaped = "".join(rf"\x{ord(c) - 0xDC00:02x}" if ord(c) in SURROGATES else c for c in escaped)
    return escaped


def unescape_name(text: str) -> str:
    """The name that `escape_name` made `text` from."""

    def restored(escape: re.Match[str]) -> str:
        byte = int(escape[1], 16)
        return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)

    return ESCAPED_BYTE.sub(restored, text)


def is_utf8(text: str) -> bool:
    """Whether `text` can be encoded: half of a surrogate pair cannot."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


def shown(text: str) -> str:
    """`text` quoted for a message: on one line, of characters that can be written, and not endless."""
    return repr(shortened(text))


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def printable(text: str) -> str:
    """With control characters, which names may hold, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def json_for_terminal(text: str) -> str:
    """JSON that means the same, without characters that a terminal obeys or that turn the direction of writing."""
    return TERMINAL_CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def listed(names: Iterable[str]) -> str:
    """Names for a message, quoted."""
    return ", ".join(map(shown, names)) or "none at all"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shown_address(address: str) -> str:
    """A remote address without what may be secret in it: its user and password, and its query."""
    return escape_name(SECRET_PARTS.sub(lambda match: match["scheme"] or "", address))


def shown_place(name: str) -> str:
    """A path, or an address without what may be secret in it."""
    return shown_address(name) if REMOTE_ADDRESS.match(name) else escape_name(name)


def address_refusal(address: str) -> str | None:
    """Why nothing is opened at this address, and what to do instead; None: it may be one of a remote file system."""
    name = shown(shown_address(address))
    if WEB_ADDRESS.match(address):
        return f"{name} is a web address: download it first, for example with img2dataset"
    if found := FILE_ADDRESS.match(address):
        return f"{name} is the address of a local file: write the path {shown(unquote(address[found.end() :]))}"
    return f"{name} holds data: write it to a file first" if DATA_ADDRESS.match(address) else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out: hidden ones, and those that operating systems make."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_unit_folder(name: str) -> bool:
    """Whether an output of this name is a folder of numbered parts: it ends in a slash, or there is a folder."""
    address = name.partition("?")[0] if REMOTE_ADDRESS.match(name) else name
    return address.endswith("/") or os.path.isdir(name)
