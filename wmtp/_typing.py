"""Runtime checks of shapes and dtypes: the one place that knows jaxtyping and beartype.

``typed`` checks every eager call of a public function. Under ``torch.compile`` and ``torch.export``
the undecorated function is traced: the checkers inspect frames, which Dynamo refuses, and shapes are
guarded there anyway. Where Dynamo gives up on the caller, as it does when the traced function raises,
the call is repeated in eager mode with Dynamo still watching the frames inside: it is told to leave
these alone, for a traced checker refuses arguments that are right. ``JAXTYPING_DISABLE=1`` in the
environment turns the checks off.
"""

import functools
import inspect
import random
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from jaxtyping import TypeCheckError, config
from torch import Tensor

from wmtp import _checks


_P = ParamSpec("_P")
_R = TypeVar("_R")

# How many kinds of call a function remembers to be right.
_REMEMBERED = 1024


class ArgumentError(TypeCheckError, _checks.ArgumentError):
    """What ``jaxtyping`` has found, and what ``_checks`` would where it is switched off."""


def typed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check a function's annotated shapes and dtypes on every eager call.

    A violation raises ``ArgumentError``, a ``TypeError`` and a ``ValueError``, that names the argument,
    what was expected and what came. The verdict depends on the types, shapes and dtypes alone, so a call
    like one that was right before is not checked again.
    """
    checker = functools.cache(lambda: _checker_of(function))
    right: set[Hashable] = set()

    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            kind = (len(args), *map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
            known = kind in right
        except TypeError:  # something whose type does not say it all, or a symbolic size
            return checker()(*args, **kwargs)
        if known:
            return function(*args, **kwargs)
        out = checker()(*args, **kwargs)
        if len(right) >= _REMEMBERED:
            right.clear()
        right.add(kind)
        return out

    @functools.cache
    def untraced() -> Callable[_P, _R]:
        compiler: Any = torch.compiler
        return compiler.disable(checked)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling() or config.jaxtyping_disable:
            return function(*args, **kwargs)
        # Dynamo is slow to import: what nobody has imported need not be kept away.
        if "torch._dynamo" in sys.modules:
            return untraced()(*args, **kwargs)
        return checked(*args, **kwargs)

    return call


def _checker_of(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Made at the first call: the checkers take longer to import and to build than all else."""
    from beartype import BeartypeConf, beartype
    from jaxtyping import jaxtyped  # pyright: ignore[reportUnknownVariableType]

    outside = threading.local()

    @functools.wraps(function)
    def undisturbed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        random.setstate(outside.state)
        try:
            return function(*args, **kwargs)
        finally:
            outside.state = random.getstate()

    # The numeric tower lets a caller write `gamma=1` where a float is annotated.
    checker = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))(undisturbed)
    names = tuple(inspect.signature(function).parameters)

    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # beartype draws from Python's generator, where a caller may draw the order of the data.
        outside.state = random.getstate()
        try:
            return checker(*args, **kwargs)
        finally:
            random.setstate(outside.state)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = dict(zip(names, args, strict=False)) | kwargs
        # Annotations say nothing of layouts, and a nested tensor has no shape to look at.
        _checks.ordinary(**{name: x for name, x in given.items() if isinstance(x, Tensor)})
        try:
            return alone(*args, **kwargs)
        except TypeCheckError as error:
            # One member of a sequence is looked at, drawn at random, so that the blame can be
            # missed; the function's own checks look at all of them.
            if "typechecking parameter" not in str(error):
                function(*args, **kwargs)
            raise ArgumentError(str(error)) from error.__cause__

    return call


def _kind(x: object) -> Hashable:
    """All that a check of types can look at."""
    if isinstance(x, Tensor):
        if x.is_nested:
            raise TypeError
        return type(x), x.shape, x.dtype, x.layout
    if isinstance(x, str):
        return x
    if isinstance(x, tuple | list):
        items = cast(Sequence[object], x)
        return type(items), *map(_kind, items)
    if isinstance(x, Sequence) and not isinstance(x, range):
        raise TypeError
    return type(x)
