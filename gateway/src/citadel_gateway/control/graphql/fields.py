"""Strawberry's decorators with a description and with types that a checker can follow."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import strawberry

F = TypeVar("F", bound=Callable[..., object])


class Decorator(Protocol):
    """Takes a resolver, gives what stands for it in the schema."""

    def __call__(self, function: F, /) -> F: ...


def field(description: str) -> Decorator:
    return cast("Decorator", strawberry.field(description=description))


def mutation(description: str) -> Decorator:
    return cast("Decorator", strawberry.mutation(description=description))


def subscription(description: str) -> Decorator:
    return cast("Decorator", strawberry.subscription(description=description))
