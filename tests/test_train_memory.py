"""keep_freed_memory: what one step frees is there for the next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from vitfast.train import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    kept = [torch.ones(10 << 20) for _ in range(5)]  # 40 MiB each: over 32 MiB glibc never keeps a block of its own accord

for _ in range(10):  # the heap takes some steps to settle
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True, env=env)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_step_takes_the_pages_of_the_one_before() -> None:
    assert faults("keep") < faults("as it is") / 10
