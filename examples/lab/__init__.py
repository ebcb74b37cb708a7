"""A small laboratory around `wmtp`: one idea per file, all of it plain PyTorch."""
