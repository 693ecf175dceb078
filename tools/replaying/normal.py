"""Texts without names, paths, addresses and line numbers, which differ from run to run."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Words of C, and of OpenMP's pragmas; `_is_fixed` recognizes all other words that stay.
_C = (
    "auto bool break case char const continue default do double else enum extern float for goto if"
    " inline int long register restrict return short signed sizeof static struct switch typedef"
    " union unsigned void volatile while"
)
_DIRECTIVES = "include define defined ifdef ifndef elif endif pragma math string h"
_OPENMP = "omp simd parallel barrier reduction num_threads private shared collapse schedule"
_WORDS = frozenset(f"{_C} {_DIRECTIVES} {_OPENMP}".split())
# A comment, a string, a number, a name, or any other sign. A number may end in letters.
_TOKEN = re.compile(
    r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
    r"|\.?\d(?:[eEpP][+-]|[\w.])*|[A-Za-z_]\w*|\n[ \t]*#[^\n]*|\n|[ \t]+|.",
    re.DOTALL,
)
_NAME = re.compile(r"[A-Za-z_]\w*\Z")
_DEFINED = re.compile(r"\b([A-Za-z_]\w*)\s*\([^;{}()]*(?:\([^;{}()]*\)[^;{}()]*)*\)\s*\{")


def normal_c(text: str) -> str:
    """A text in C whose variables and functions are numbered in the order of appearance.

    Numbers, operators, order, and functions of libraries stay. Comments and spaces do not.
    """
    own = {name for name in _DEFINED.findall(text) if name not in _WORDS}
    text = "\n" + text
    called = {m[1] for m in re.finditer(r"\b([A-Za-z_]\w*)\s*\(", text)} - own
    numbers: dict[str, str] = {}

    def said(token: str) -> str:
        if token.startswith(("/*", "//")):
            return ""
        if token.strip(" \t") == "":
            return " "
        if not _NAME.match(token) or _is_fixed(token, called):
            return token
        return numbers.setdefault(token, f"v{len(numbers)}")

    joined = "".join(said(m[0]) for m in _TOKEN.finditer(text))
    lines = (re.sub(r" +", " ", line).strip() for line in joined.split("\n"))
    return "\n".join(line for line in lines if line)


def _is_fixed(name: str, called: set[str]) -> bool:
    """Whether a name belongs to C or a library: a word, a macro, a function."""
    return (
        name in _WORDS
        or name in called
        or name.isupper()
        or name.startswith("__")
        or name.endswith("_t")
    )


_WHERE = re.compile(r"[^\s'\"(]*?([^/\s'\"(]+\.py):\d+")


def normal_words(text: str) -> str:
    """A text in words without paths of this machine, addresses, and numbers of lines."""
    text = text.replace(str(ROOT), "")
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    text = re.sub(r"/tmp/[^\s'\"]*", "/tmp", text)
    return _WHERE.sub(r"\1", text)


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]
