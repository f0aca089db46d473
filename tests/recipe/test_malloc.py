import subprocess
import sys

SCRIPT = """
import resource
import sys
import torch
from gralora.recipe.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.set_num_threads(1)


def work():
    blocks = [torch.ones(2**24) for _ in range(2)]  # of 64 MiB: glibc never learns to keep more than 32


work()
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_not_fetched_again_page_by_page():
    faults = {
        which: int(subprocess.run([sys.executable, "-c", SCRIPT, which], check=True, capture_output=True).stdout)
        for which in ("kept", "as usual")
    }
    assert faults["kept"] < 0.5 * faults["as usual"]
