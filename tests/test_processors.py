"""One thread computes on several processors: how many each uses, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import threading
import torch
from server import processors

def asked(step):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(step() or torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]

torch.set_num_threads(3)
assert processors.count() == 3
processors.share_out()
assert processors.count() == 3
found = [torch.get_num_threads(), asked(lambda: None)]
ready, done = threading.Event(), threading.Event()

def device():
    processors.use(3)
    ready.set()
    done.wait()
    found.append(torch.get_num_threads())

thread = threading.Thread(target=device)
thread.start()
ready.wait()
found += [torch.get_num_threads(), asked(lambda: None), asked(processors.use_one)]
done.set()
thread.join()
print(found)
"""


def test_only_who_asks_for_several_gets_them() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[1, 1, 1, 1, 1, 3]"
