"""Pairs for the critic: a function that compiles, and the same one with a slip that does not."""

import ast
import random
import string
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .corpus import BOS, Document
from .errors import LabError
from .seeds import derive_seed


TRIES = 100  # slips tried on a function before another function is taken


class Side(NamedTuple):
    """One side of every pair, each `[pairs, seq]`: bytes after a BOS, and where they are."""

    tokens: Tensor
    valid: Tensor


def compiles(source: str) -> bool:
    """The reward: does Python's own parser accept it? Nothing is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(source, "<pair>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
    return True


def functions(documents: Sequence[Document], most_bytes: int) -> list[str]:
    """Every short enough function of the documents, dedented, once."""
    found: dict[str, None] = {}
    for document in documents:
        for source in _functions_of(document):
            if len(source.encode()) <= most_bytes and compiles(source):
                found[source] = None
    if not found:
        raise LabError(
            f"no function of at most {most_bytes} bytes in the corpus; raise critic.max_bytes"
        )
    return list(found)


def _functions_of(document: Document) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.data)
    except (SyntaxError, ValueError):  # the library ships files that are wrong on purpose
        return
    lines = document.data.decode("utf-8", errors="replace").splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"


def make_pairs(sources: Sequence[str], count: int, length: int, seed: int) -> tuple[Side, Side]:
    """`count` pairs `(compiles, does not)`; pair `i` is a function of `seed` and `i`."""
    good, bad = [], []
    for index in range(count):
        rng = random.Random(derive_seed("pair", seed, index))
        for _ in range(TRIES):
            source = rng.choice(sources)
            broken = slip(source, rng)
            if not compiles(broken):
                break
        else:
            raise LabError("found no change that breaks these functions; give a larger corpus")
        good.append(source)
        bad.append(broken)
    return _side(good, length), _side(bad, length)


def slip(source: str, rng: random.Random) -> str:
    """One slip of the fingers: a byte lost, doubled, exchanged, or two in the wrong order."""
    place = rng.randrange(len(source) - 1)
    before, here, after = source[:place], source[place], source[place + 1 :]
    kind = rng.choice(("lose", "double", "change", "swap"))
    if kind == "lose":
        return before + after
    if kind == "double":
        return before + here + here + after
    if kind == "change":
        return before + rng.choice(string.printable) + after
    return before + after[0] + here + after[1:]


def _side(sources: Sequence[str], length: int) -> Side:
    tokens = torch.full((len(sources), length), BOS)
    valid = torch.zeros(len(sources), length, dtype=torch.bool)
    for row, source in enumerate(sources):
        data = source.encode()[: length - 1]
        tokens[row, 1 : 1 + len(data)] = torch.tensor(list(data))
        valid[row, 1 : 1 + len(data)] = True
    return Side(tokens, valid)
