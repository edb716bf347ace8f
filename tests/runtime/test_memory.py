"""What a worker frees stays at hand within a piece of work, and goes back to the system between two."""

import subprocess
import sys

import pytest

WORK = """
import resource
from raypipe.runtime.memory import WorkingMemory, _resident_bytes

def batch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [b"x" * (16 << 20) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

memory = WorkingMemory()
pages = [batch() for _ in range(5)]
memory.settle()
at_rest = _resident_bytes()
gaps = [bytes(100_000) for _ in range(6000)][::2]  # 600 MB, and half of it between what stays
full = _resident_bytes()
del gaps
memory.settle()
print(pages[0], max(pages[1:]), full - at_rest, _resident_bytes() - at_rest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
def test_a_worker_takes_its_pages_once_and_gives_back_what_it_no_longer_needs():
    said = subprocess.run([sys.executable, "-c", WORK], check=True, capture_output=True, text=True).stdout
    first, later, full, rest = map(int, said.split())
    assert first > 20_000, "96 MB of pages"
    assert later < first / 20
    assert full > 280e6
    assert rest < full / 4
