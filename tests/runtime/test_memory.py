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


SMALL = """
from raypipe.runtime.memory import _resident_bytes, keep_heap_small

taken = keep_heap_small()
for size in (8 << 20, 31 << 20):  # what is freed would raise the threshold to its size
    held = bytes(size)
    del held
at_rest = _resident_bytes()
blocks = [b"x" * (2 << 20) for _ in range(50)][::2]  # a gap behind each
full = _resident_bytes()
del blocks
print(int(taken), full - at_rest, _resident_bytes() - at_rest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
def test_a_heap_that_is_kept_small_keeps_no_large_block_that_was_freed():
    said = subprocess.run([sys.executable, "-c", SMALL], check=True, capture_output=True, text=True).stdout
    taken, full, rest = map(int, said.split())
    assert taken == 1, "mallopt took both thresholds"
    # Half of the blocks have gone back already, and then all.
    assert 45e6 < full < 65e6
    assert rest < 5e6
