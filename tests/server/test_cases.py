"""The ledger of serving-and-evaluation.md F.4: each of its 85 cases has a test whose name or id begins with its number.

1 to 20 test_cases_http.py · 21 to 34 and 68 to 72 test_cases_sampling.py · 35 to 67 test_cases_messages.py · 73 to 81
test_cases_engine.py, 77 in test_server_stop.py · 82 to 85, what a model says on the page, in tests/page.
"""

import importlib
import re

MODULES = ("test_cases_http", "test_cases_sampling", "test_cases_messages", "test_cases_engine", "test_server_stop")
ON_THE_PAGE = {82, 83, 84, 85}


def numbers(module):
    """The cases that a module's tests are for, by their functions' names and their rows' ids."""
    for name, test in vars(module).items():
        if not name.startswith("test_"):
            continue
        if found := re.match(r"test_(\d\d)_", name):
            yield int(found[1])
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "parametrize":
                ids = [row.id for row in mark.args[1] if isinstance(getattr(row, "id", None), str)]
                yield from (int(id[:2]) for id in ids if re.match(r"\d\d-", id))


def test_every_case_has_a_test():
    covered = {number for name in MODULES for number in numbers(importlib.import_module(name))}
    assert covered == set(range(1, 86)) - ON_THE_PAGE
