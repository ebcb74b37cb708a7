"""The mutants of one file: mutmut's operators, applied where mutmut itself does not go.

mutmut runs its mutants behind trampolines, for which it leaves decorated functions out. Here every
public function is decorated, and a trampoline would break ``torch.compile`` and the signatures. So
only its operators are used, on whole files.

What is not mutated: annotations, decorators, docstrings, error messages and what else stands in a
``raise``, the names that the checks put into their messages, the ``Example`` code, and definitions
outside functions other than plain numbers.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """A file with one change.

    Attributes:
        key: a name that outlives edits elsewhere in the file.
        line: where the change begins.
        before: the lines that change, without indentation.
        after: what they become.
        source: the whole file.
    """

    key: str
    line: int
    before: str
    after: str
    source: str


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its lines, none twice."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
    from mutmut.mutation.mutators import mutation_operators

    wrapper = MetadataWrapper(cst.parse_module(source))
    module, parents = wrapper.module, wrapper.resolve(ParentNodeProvider)
    places = wrapper.resolve(PositionProvider)
    skipped = (cst.Annotation, cst.Decorator, cst.Raise, cst.Import, cst.ImportFrom)

    def ancestors(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        while node is not module:
            yield node
            node = parents[node]

    def is_mutated(node: cst.CSTNode) -> bool:
        above = list(ancestors(node))
        if any(isinstance(one, skipped) for one in above):
            return False
        if isinstance(node, cst.BaseString):
            in_check = any(
                isinstance(one, cst.Call) and "_checks" in module.code_for_node(one.func)
                for one in above
            )
            return not in_check and not isinstance(parents[node], cst.Expr)
        return any(isinstance(one, cst.FunctionDef) for one in above) or isinstance(
            node, cst.BaseNumber
        )

    nodes: list[cst.CSTNode] = []

    class Collect(cst.CSTVisitor):
        def on_visit(self, node: cst.CSTNode) -> bool:
            nodes.append(node)
            return True

    module.visit(Collect())
    healthy = ast.dump(ast.parse(source))
    seen = {healthy}
    for node in sorted(
        (n for n in nodes if n in places and is_mutated(n)), key=lambda n: places[n].start.line
    ):
        for kind, operator in mutation_operators:
            if not isinstance(node, kind):
                continue
            for changed in operator(node):
                mutated = module.deep_replace(node, changed).code  # pyright: ignore
                try:
                    tree = ast.dump(ast.parse(mutated))
                except SyntaxError:
                    continue
                if tree not in seen:
                    seen.add(tree)
                    yield _described(file, source, mutated)


def _described(file: str, source: str, mutated: str) -> Mutant:
    old, new = source.splitlines(), mutated.splitlines()
    blocks = [
        block
        for block in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if block[0] != "equal"
    ]
    first, last = blocks[0], blocks[-1]
    before = " ".join(line.strip() for line in old[first[1] : last[2]])
    after = " ".join(line.strip() for line in new[first[3] : last[4]])
    # Told apart from an equal line elsewhere by what stands above it.
    above = next((x for x in reversed(old[: first[1] + 1]) if x.startswith(("def ", "class "))), "")
    text = "\n".join((file, above, before, after))
    same_before = source.splitlines()[: first[1]].count(old[first[1]]) if old else 0
    key = hashlib.sha1(f"{text}\n{same_before}".encode()).hexdigest()[:10]
    return Mutant(key, first[1] + 1, before, after, mutated)
