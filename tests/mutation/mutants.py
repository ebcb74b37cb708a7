"""The mutants of one file: mutmut's operators, applied where mutmut itself does not go.

mutmut runs its mutants behind trampolines, for which it leaves decorated functions out. Here every
public function is decorated, and a trampoline would break ``torch.compile`` and the signatures. So
only its operators are used, on whole files.

What is not mutated: annotations, decorators, docstrings, error messages and what else stands in a
``raise``, the names that the checks put into their messages, and definitions outside functions other
than plain numbers. Of calls only the keyword arguments and the last positional one are left out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple


# `x = None` and `f(None)` break at the next operation: they find nothing, and would raise the score.
_LEFT_OUT = {"operator_assignment", "operator_dict_arguments"}


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
    import libcst as cst  # pyright: ignore[reportMissingImports]
    from libcst.metadata import (  # pyright: ignore[reportMissingImports]
        MetadataWrapper,
        ParentNodeProvider,
        PositionProvider,
    )
    from mutmut.mutation.mutators import (  # pyright: ignore[reportMissingImports]
        mutation_operators,
    )

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
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def replaced(node: cst.CSTNode, changed: cst.CSTNode) -> str:
        """The whole file with another node."""
        begin, end = (starts[x.line - 1] + x.column for x in (places[node].start, places[node].end))
        if type(changed) is type(node) and hasattr(node, "lpar"):
            # Parentheses around a node are not in its place.
            changed = changed.with_changes(lpar=[], rpar=[])
        return source[:begin] + module.code_for_node(changed) + source[end:]

    seen = {ast.dump(ast.parse(source))}
    for node in sorted(
        (n for n in nodes if n in places and is_mutated(n)), key=lambda n: places[n].start.line
    ):
        for kind, operator in mutation_operators:
            if not isinstance(node, kind) or operator.__name__ in _LEFT_OUT:
                continue
            changes = _removals(node) if isinstance(node, cst.Call) else operator(node)
            for changed in list(changes)[: 1 if isinstance(node, cst.BaseString) else None]:
                mutated = replaced(node, changed)
                try:
                    tree = ast.dump(ast.parse(mutated))
                except SyntaxError:
                    continue
                if tree not in seen:
                    seen.add(tree)
                    yield _described(file, source, mutated)


def _removals(call: Any) -> Iterator[Any]:
    """A call without one of its keyword arguments, or without its last positional one."""
    if len(call.args) < 2:
        return
    places = [i for i, arg in enumerate(call.args) if arg.keyword]
    first = places[0] if places else len(call.args)
    for i in [first - 1, *places] if first else places:
        yield call.with_changes(args=[*call.args[:i], *call.args[i + 1 :]])


def _described(file: str, source: str, mutated: str) -> Mutant:
    old, new = source.splitlines(), mutated.splitlines()
    shorter = min(len(old), len(new))
    first = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    same = next((i for i in range(shorter - first) if old[-1 - i] != new[-1 - i]), shorter - first)
    before = " ".join(line.strip() for line in old[first : len(old) - same])
    after = " ".join(line.strip() for line in new[first : len(new) - same])
    # Told apart from an equal line elsewhere by the function, and within it by counting.
    above = [i for i in range(first + 1) if old[i].startswith(("def ", "class "))]
    top = above[-1] if above else 0
    number = [line.strip() for line in old[top:first]].count(old[first].strip())
    text = "\n".join((file, old[top], before, after, str(number)))
    return Mutant(hashlib.sha1(text.encode()).hexdigest()[:10], first + 1, before, after, mutated)
