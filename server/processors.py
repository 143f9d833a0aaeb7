"""Who computes on how many of a CPU's processors.

torch computes with OpenMP, where each thread that uses several processors has a team of its own. A forward over short
texts is hundreds of small products, and after each of them the members of a team wait for each other: for the one whose
processor somebody else uses just now, and for those that have been laid to sleep to wake up, which takes as long as the
product. So threads that compute side by side each keep to their share of the processors.
"""

from functools import cache

import torch


@cache
def count() -> int:
    """How many there are, as torch said when it was asked for the first time: what `use` sets, it says from then on."""
    return torch.get_num_threads()


def use(number: int) -> None:
    """The calling thread computes on so many, and so do those that compute for the first time after it; it changes
    nothing for others."""
    count()
    # Asked, a thread keeps to its own number from there on, else it would take the next that is set.
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
        torch.get_num_threads()


def use_one() -> None:
    """The calling thread computes on one: it does little, beside those that do much."""
    use(1)
