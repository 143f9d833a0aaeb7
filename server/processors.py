"""Who computes on how many of a CPU's processors.

torch computes with OpenMP, where each thread that uses several processors has a team of its own. GNU's lets the members
of a team wait for their next share of a product spinning, as long as all teams together have no more members than there
are processors; else it lays them to sleep at once. A forward over short texts is hundreds of small products, and to
wake a sleeper for each of them takes as long as the products. Where a server has its processors to itself, only its
device's thread should have a team, then: any other's, even of the thread that did nothing but load the backbone, makes
every batch half as long again. Where others compute on the same processors it is the other way round: who spins uses up
its turn, and is not running when it is waited for.
"""

import threading

import torch

_noted: list[int] = []


def count() -> int:
    """How many there are: as torch said before a process that serves shared them out, else as it says now."""
    return _noted[0] if _noted else torch.get_num_threads()


def share_out() -> None:
    """In a process that has its processors to itself: from here on every thread computes on one, unless it asks for
    more."""
    _noted[:] = [count()]
    use_one()


def use_one() -> None:
    """The calling thread computes on one processor, and so do those that compute for the first time after it."""
    torch.set_num_threads(1)


def keep_to_one() -> None:
    """The calling thread computes on one, where processors are shared out."""
    if _noted:
        use_one()


def use(number: int) -> None:
    """The calling thread computes on so many; it changes nothing for others."""
    torch.set_num_threads(number)
    torch.get_num_threads()  # from here on the thread keeps to its own number, else it would take the next that is set
    if number > 1 and _noted:  # which torch has noted for all that come later, too
        other = threading.Thread(target=use_one)
        other.start()
        other.join()
