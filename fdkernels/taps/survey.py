"""Runs a network once and notes which submodule returns which tensor."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fdkernels.taps.names import own_name
from fdkernels.taps.structures import tensors_in
from fdkernels.transforms import version_of

__all__ = ["Made", "Survey", "run_once"]


@dataclasses.dataclass
class Name:
    """A name by which a tensor could be tapped.

    Attributes:
        path: of the submodule, as the network itself has it.
        keys: the path of the tensor in what the submodule returns, `""` for the output itself.
        order: when the submodule returned it.
        only_hands_on: whether the submodule has no parts and returned what it was given, as dropout does in
            evaluation.
    """

    path: str
    keys: str
    order: int
    only_hands_on: bool

    @property
    def text(self) -> str:
        """As `FeatureTaps` takes it."""
        return f"{self.path}:{self.keys}" if self.keys else self.path

    @property
    def rank(self) -> tuple[bool, bool, bool, int, int]:
        """The smaller, the better it names the tensor: whole blocks, and not what is inside of them."""
        return (
            bool(self.keys),
            not self.path,
            self.only_hands_on,
            self.path.count("."),
            self.order,
        )


@dataclasses.dataclass
class Made:
    """A tensor that submodules returned.

    Attributes:
        tensor: of any shape.
        version: how often it had been modified in place when it was last returned.
        maker: the submodule that returned it first, or modified it.
        taken: the tensors, by `id`, that the maker was given.
        names: those of its final state.
        earlier_names: those of states that a submodule modified in place.
    """

    tensor: Tensor
    version: int | None
    maker: nn.Module
    taken: set[int]
    names: list[Name]
    earlier_names: list[Name]

    @property
    def is_changed_later(self) -> bool:
        """Whether it was modified in place by something else than a submodule, after all had returned it."""
        return version_of(self.tensor) != self.version

    @property
    def is_dropout(self) -> bool:
        """Whether only dropout names it, which draws in training, and does not modify what came before."""
        return isinstance(self.maker, _DropoutNd) and not self.maker.inplace


@dataclasses.dataclass
class Survey:
    """What happened in one forward pass.

    Attributes:
        made: the tensors that submodules returned, by `id`, in the order in which they got their final state.
        calls: how often each submodule ran; 0 for those that did not.
        returned: the tensors, by `id`, that each submodule returned.
        outputs: those of the network.
    """

    made: dict[int, Made]
    calls: Counter[str]
    returned: dict[str, set[int]]
    outputs: list[Tensor]


def run_once(model: nn.Module, example: Any) -> Survey:
    """Run the network in evaluation and without gradients, and leave it as it was.

    Args:
        model: any network.
        example: its input, a tuple of its inputs, or a dict of them by name.
    """
    survey = Survey({}, Counter(), {}, [])
    given = {id(tensor) for _, tensor in tensors_in(example)}
    paths = {module: own_name(path) for path, module in reversed(list(model.named_modules()))}
    handles = [
        module.register_forward_hook(_Note(survey, given, path), with_kwargs=True)
        for module, path in reversed(paths.items())
    ]
    survey.calls.update(dict.fromkeys(paths.values(), 0))
    try:
        with _in_evaluation(model), torch.no_grad(), torch.random.fork_rng(_gpus_of(model)), _uncompiled():
            if isinstance(example, tuple):
                output = model(*example)
            else:
                output = model(**example) if isinstance(example, Mapping) else model(example)
    finally:
        for handle in handles:
            handle.remove()
    survey.outputs = [tensor for _, tensor in tensors_in(output)]
    survey.made = dict(sorted(survey.made.items(), key=lambda item: item[1].names[0].order))
    return survey


class _Note:
    """The forward hook of a submodule."""

    def __init__(self, survey: Survey, given: set[int], path: str) -> None:
        self.survey, self.given, self.path = survey, given, path

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note what the submodule returned."""
        survey = self.survey
        survey.calls[self.path] += 1
        order = survey.calls.total()
        taken = {id(tensor) for _, tensor in tensors_in((args, kwargs))}
        works_in_place = bool(getattr(module, "inplace", False))
        has_parts = next(module.children(), None) is not None
        for keys, tensor in tensors_in(output):
            survey.returned.setdefault(self.path, set()).add(id(tensor))
            if id(tensor) in self.given:
                continue
            version = version_of(tensor)
            made = survey.made.get(id(tensor))
            if made is None:
                made = survey.made[id(tensor)] = Made(tensor, version, module, taken, [], [])
            elif made.version != version or (works_in_place and id(tensor) in taken):
                # In evaluation a dropout in place changes nothing, in training it will.
                made.version, made.maker, made.taken = version, module, taken
                made.earlier_names += made.names
                made.names = []
            hands_on = not has_parts and not works_in_place and id(tensor) in taken
            made.names.append(Name(self.path, keys, order, hands_on))


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Set the flags alone: a network may do more in `eval()` and `train()` of its own."""
    flags = {module: module.training for module in model.modules()}
    for module in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _uncompiled() -> AbstractContextManager[Any]:
    """Run a compiled network as it is: what it compiled now would not see taps that are set later."""
    if "torch._dynamo" not in sys.modules:  # its import takes seconds
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def _gpus_of(model: nn.Module) -> list[torch.device]:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return [device for device in devices if device.type == "cuda"]
