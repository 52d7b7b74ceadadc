"""A plugin of mypy: what a node of a torch.fx graph was given is `Any`.

torch declares an argument of a node as a union of twenty types, down to slices, and a target as a callable or a string.
Code that walks a graph has asked for the target before it reads an argument, which mypy cannot follow. So here
`node.args` reads as a tuple of `Any`, `node.kwargs` as a dict of `Any`, and `node.target` as `Any`. All other types
stay as strict as they are; without the plugin, each module that walks graphs would have to switch off whole kinds of
errors.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

NODE = "torch.fx.node.Node."


def _anything() -> AnyType:
    return AnyType(TypeOfAny.special_form)


def _args(context: AttributeContext) -> Type:
    if context.is_lvalue:
        return context.default_attr_type
    return context.api.named_generic_type("builtins.tuple", [_anything()])


def _kwargs(context: AttributeContext) -> Type:
    if context.is_lvalue:
        return context.default_attr_type
    return context.api.named_generic_type(
        "builtins.dict", [context.api.named_generic_type("builtins.str", []), _anything()]
    )


def _target(context: AttributeContext) -> Type:
    return context.default_attr_type if context.is_lvalue else _anything()


class _Fx(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return {NODE + "args": _args, NODE + "kwargs": _kwargs, NODE + "target": _target}.get(fullname)


def plugin(version: str) -> type[Plugin]:
    return _Fx
