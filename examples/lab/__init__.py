"""A small laboratory around `wmtp`: one idea per file, all of it plain PyTorch."""

import os


# Before torch is loaded: by default threads spin for long while they wait for each other, which
# makes a step many times slower as soon as anything else runs on the machine. A short spin costs
# an idle machine nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
