"""English text that ships with Python: haystacks and passages without a download."""

from __future__ import annotations

import importlib
import inspect
import warnings
from functools import cache

# Topics of the language reference that are mostly sentences; tables of numbers and codes would hide a needle.
TOPICS = (
    "execmodel objects assignment compound debugger class import naming exceptions specialnames customization "
    "context-managers function attribute-access calls comparisons try with yield raise"
).split()
DOCUMENTED_MODULES = (
    "argparse asyncio.events bdb calendar cmd codecs collections configparser concurrent.futures contextlib "
    "csv dataclasses datetime decimal difflib doctest email.message enum fractions functools gettext glob heapq "
    "http.cookiejar inspect ipaddress itertools json locale logging mailbox multiprocessing.pool optparse pathlib "
    "pdb pickletools platform plistlib pprint random re sched shelve shutil smtplib socket socketserver "
    "statistics string subprocess tarfile tempfile textwrap threading timeit tokenize traceback types "
    "typing unittest.mock urllib.parse urllib.request uuid warnings weakref xml.dom.minidom zipfile"
).split()
SHORTEST_DOCSTRING = 200


@cache
def language_reference() -> str:
    """Chapters of the Python language reference, as `help()` prints them."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in TOPICS if name in topics)


@cache
def library_docstrings() -> str:
    """The longer docstrings of the standard library's modules, classes and functions, without repetition."""
    found: dict[str, None] = {}
    for name in DOCUMENTED_MODULES:
        module = importlib.import_module(name)
        for member in [module, *vars(module).values()]:
            for thing in [member, *(vars(member).values() if inspect.isclass(member) else ())]:
                text = _docstring(thing)
                if isinstance(text, str) and len(text) >= SHORTEST_DOCSTRING:
                    found[inspect.cleandoc(text)] = None
    return "\n\n".join(found)


def _docstring(thing: object) -> object:
    with warnings.catch_warnings():
        # Python 3.11's typing.io and typing.re warn when they are looked at.
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(thing, "__doc__", None)


def passages(tokens: list[int], *, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly; they overlap where the text is short.

    Raises ValueError for a text shorter than one window.
    """
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, a passage needs {length}")
    room = len(tokens) - length
    starts = [round(index * room / max(1, count - 1)) for index in range(count)]
    return [tokens[start : start + length] for start in starts]
