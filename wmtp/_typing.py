"""Runtime checks of shapes and dtypes: the one place that knows jaxtyping and beartype.

``typed`` checks every eager call of a public function. Under ``torch.compile`` and ``torch.export``
the undecorated function is traced: the checkers inspect frames, which Dynamo refuses, and shapes are
guarded there anyway. Where Dynamo gives up on the caller, as it does when the traced function raises,
the call is repeated in eager mode with Dynamo still watching the frames inside: it is told to leave
these alone, for a traced checker refuses arguments that are right. ``JAXTYPING_DISABLE=1`` in the
environment turns the checks off.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped  # pyright: ignore[reportUnknownVariableType]


_P = ParamSpec("_P")
_R = TypeVar("_R")

# The numeric tower lets a caller write `gamma=1` where a float is annotated.
_checker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check a function's annotated shapes and dtypes on every eager call.

    A violation raises ``jaxtyping.TypeCheckError``, a ``TypeError``, that names the argument, what
    was expected and what came.
    """
    checked = jaxtyped(typechecker=_checker)(function)

    @functools.cache
    def untraced() -> Callable[_P, _R]:
        compiler: Any = torch.compiler
        return compiler.disable(checked)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        # Dynamo is slow to import: what nobody has imported need not be kept away.
        if "torch._dynamo" in sys.modules:
            return untraced()(*args, **kwargs)
        return checked(*args, **kwargs)

    return call
