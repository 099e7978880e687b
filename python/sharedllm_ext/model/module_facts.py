"""Whether modules are still what they were, at a small part of the price of examining them again."""

import dataclasses
import weakref
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .layer_math import version_of

# attributes of nn.Module itself are the first fields of a module
_MACHINERY = tuple(vars(nn.Module()))
_OWN = len(_MACHINERY)
_CHILDREN = itemgetter("_modules")
_PARAMETERS, _BUFFERS = itemgetter("_parameters"), itemgetter("_buffers")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
_DTYPE, _VERSION = attrgetter("dtype"), attrgetter("_version")
_SIMPLE = frozenset((int, float, str, bool, type(None), torch.dtype, torch.device))
_CONTAINERS = (PreTrainedConfig, dict, list, tuple, set, frozenset)
_PLAIN = frozenset((nn.Parameter, Tensor, type(None)))


@dataclasses.dataclass(frozen=True)
class ModuleFacts:
    """What some modules and those below them are, as far as that decides what their forward computes.

    That is: classes, names and order of the modules, their forward hooks and other attributes, the values of their
    configurations, and of parameters and buffers class, address, shape, strides, dtype, and how often they were changed
    in place. A change through ``parameter.data`` alone is not seen, unless the address becomes another one.

    Each is looked up for all modules at once, in one call of the interpreter: 0.4 ms for 500 modules, where code that
    asks one module after the other takes several times as long.

    Attributes:
        modules: classes, names and hooks.
        tensors: of parameters and buffers.
        attributes: the objects that other attributes are, by ``id``.
        contents: of those attributes that are configurations or containers.
    """

    modules: tuple[Any, ...]
    tensors: tuple[Any, ...]
    attributes: tuple[int, ...]
    contents: tuple[Any, ...]
    # plain values themselves, and weak references to what may be large or know the modules: no other object may get
    # the ids of attributes unnoticed
    _held: tuple[Any, ...]
    _watched: tuple["weakref.ref[Any]", ...]
    # where in the attributes contents are
    _places: tuple[int, ...]

    @classmethod
    def of(cls, roots: Iterable[nn.Module]) -> "ModuleFacts | None":
        """Of modules as they are now; ``None`` if some are built otherwise or hold tensors that tell less."""
        modules, fields = _below(roots)
        tensors = _facts_of_tensors(fields)
        if tensors is None or any(tuple(own)[:_OWN] != _MACHINERY for own in fields):
            return None
        values = _attributes_of(modules, fields)
        each = list({id(value): value for value in values}.values())
        others = [value for value in each if type(value) not in _SIMPLE]
        placed = {id(value): place for place, value in enumerate(values) if isinstance(value, _CONTAINERS)}
        places = tuple(placed.values())
        return cls(
            _facts_of_modules(modules, fields),
            tensors,
            tuple(map(id, values)),
            _contents(values, places),
            tuple(value for value in each if type(value) in _SIMPLE),
            tuple(weakref.ref(value) for value in others if type(value).__weakrefoffset__),
            places,
        )

    def hold_for(self, roots: Iterable[nn.Module]) -> bool:
        """Whether modules are as these were."""
        modules, fields = _below(roots)
        if self.modules != _facts_of_modules(modules, fields):
            return False
        values = _attributes_of(modules, fields)
        if self.attributes != tuple(map(id, values)):
            return False
        if any(ref() is None for ref in self._watched):
            return False
        return self.contents == _contents(values, self._places) and self.tensors == _facts_of_tensors(fields)


def _below(roots: Iterable[nn.Module]) -> tuple[list[Any], list[dict[str, Any]]]:
    """These modules and all below them, and their fields."""
    modules, fields = list(roots), []
    # the list grows while it is read
    for module in modules:
        own = module.__dict__
        fields.append(own)
        if own["_modules"]:
            modules += [child for child in own["_modules"].values() if child is not None]
    return modules, fields


def _facts_of_modules(modules: list[Any], fields: list[dict[str, Any]]) -> tuple[Any, ...]:
    children = list(map(_CHILDREN, fields))
    names = tuple(chain.from_iterable(children))
    # the number of a hook is not given twice
    hooks = tuple((index, *map(tuple, pair)) for index, pair in enumerate(map(_HOOKS, fields)) if pair[0] or pair[1])
    # how many attributes and children each has
    return tuple(map(type, modules)), names, tuple(map(len, fields)), tuple(map(len, children)), hooks


def _attributes_of(modules: list[Any], fields: list[dict[str, Any]]) -> list[Any]:
    values: list[Any] = []
    for module, own in zip(modules, fields, strict=True):
        # the weight tells the sizes of a linear module, which is most of them
        if type(module) is not nn.Linear:
            values += tuple(own.values())[_OWN:]
    return values


def _facts_of_tensors(fields: list[dict[str, Any]]) -> tuple[Any, ...] | None:
    places = chain(map(_PARAMETERS, fields), filter(None, map(_BUFFERS, fields)))
    tensors = list(chain.from_iterable(map(dict.values, places)))
    kinds = tuple(map(type, tensors))
    if not _PLAIN.issuperset(kinds):
        return None
    there = [tensor for tensor in tensors if tensor is not None]
    where = tuple(map(Tensor.data_ptr, there)), tuple(map(Tensor.size, there)), tuple(map(Tensor.stride, there))
    # tensors made in inference mode do not count their changes
    counting = not any(map(Tensor.is_inference, there))
    versions = tuple(map(_VERSION, there)) if counting else tuple(map(version_of, there))
    return kinds, *where, tuple(map(_DTYPE, there)), versions


def _contents(values: list[Any], places: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(_facts_of_value(values[place]) for place in places)


def _facts_of_value(value: Any) -> Any:
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_facts_of_value, value))
    if isinstance(value, dict):
        return tuple(value), tuple(map(_facts_of_value, value.values()))
    if isinstance(value, PreTrainedConfig):
        return _facts_of_value(value.__dict__)
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_facts_of_value, value))
    # of other objects it matters which one it is
    return (value.data_ptr() or id(value), version_of(value)) if isinstance(value, Tensor) else id(value)
