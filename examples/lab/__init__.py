"""A small laboratory around `wmtp`: one idea per file, all of it plain PyTorch."""

import os


# Before torch is loaded: threads that wait for each other by spinning are ten times slower than
# threads that sleep as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
