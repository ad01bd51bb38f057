import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from atst_fast.train.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 18)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
kept = keep_freed_memory()
# An aligned block needs a bit more room than a freed one of its size: it takes rounds until those lie side by side.
print(kept, given_back, min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_tensor_gets_the_pages_of_the_last_one():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, given_back, faults = done.stdout.split()
    assert kept == "True"
    assert int(faults) < 100 < int(given_back)
