"""How many processors each thread computes on, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import threading
import torch
from server import processors

found = []

def computes(step, *steps):
    ready, go_on = threading.Event(), threading.Event()

    def work():
        step()
        ready.set()
        go_on.wait()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    for other in steps:
        other()
    go_on.set()
    thread.join()

torch.set_num_threads(3)
computes(lambda: processors.use(2), lambda: computes(processors.use_one), lambda: computes(lambda: processors.use(3)))
print(found, torch.get_num_threads(), processors.count())
"""


def test_each_thread_keeps_to_its_own_number() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[1, 3, 2] 3 3"
