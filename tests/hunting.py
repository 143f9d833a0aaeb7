"""How many cases a test that hunts tries: a slice of them in every run, and as many as FUZZ_CASES asks for."""

import os

FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "0"))
"""Damaged uploads in all. Requests are half as many; `make fuzz` sets it."""

MOST_FINDINGS = 10
"""That one test keeps and tells; each holds on to what it failed on."""


def cases(few: int, share: float) -> int:
    """A test's number: `few`, or its share of what is asked for."""
    return max(few, int(FUZZ_CASES * share))
