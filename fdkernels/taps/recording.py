"""What the hooks of taps record, and when a forward pass begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointFunction

from fdkernels.op.norm_act import OWN_TAP, own_tap
from fdkernels.op.tapped import Tap, TapSlot
from fdkernels.taps.early import EarlyMask
from fdkernels.taps.graph_sums import GraphSums, sums_in_graph
from fdkernels.taps.names import Place
from fdkernels.taps.structures import pick, replaced
from fdkernels.transforms import apply_plainly, in_transform, unwrap_dead, version_of


class Output(NamedTuple):
    """One output of a tapped submodule, and under `fused` what belongs to it.

    Attributes:
        features: the output [N, C, *S], as the rest of the network has it.
        placeholder, slot: as `fdkernels.op.autograd.Tap` returns and takes them.
        version: how often it had been modified in place when it was recorded; None if unknown.
        without_grad: whether it was computed in a block without gradients.
        is_cut_off: whether that block is reentrant checkpointing's: the network's output gets a gradient, but
            a loss of the features would get none.
    """

    features: Tensor
    placeholder: Tensor | None = None
    slot: TapSlot | None = None
    version: int | None = None
    without_grad: bool = False
    is_cut_off: bool = False


class Recording:
    """What was recorded in the running forward pass, or in the last one.

    A pass begins where a module that holds all tapped ones is called, and not by another such module; the
    network itself is one. Where the parts of a network are called one by one, their pass goes on until the
    features are read or cleared, or a part ends with an error.

    Attributes:
        names: of the tapped submodules.
        calls: `"once"`, `"last"` or `"all"`.
        fused: whether outputs go through `Tap`.
        outputs: of each submodule, of the calls that are kept.
        graph_sums: what a compiled graph made of outputs under `graph_mask`, and puts out in their place.
        counts: how often each submodule ran; under `"last"` whether it did.
        changed_by: the in-place module that took the output of each submodule, if one was seen.
        outermost: the path of the module whose call is the pass, or a part of it.
        is_running: whether that call goes on, or ended with an error.
        is_open: whether a part that is called by itself goes on with the pass.
        calls_itself: whether the outermost module called itself.
        why_missing: why a submodule may not have run; None before the first pass.
        is_compiled: whether the pass runs in a compiled graph.
        is_released: whether a loss in such a graph has let go of the outputs.
        with_grad: whether gradients were enabled where the pass began.
        graph_mask: the mask of whose region sums a compiled graph puts out in place of features, or None.
    """

    def __init__(self, names: tuple[str, ...], calls: str, fused: bool) -> None:
        self.names, self.calls, self.fused = names, calls, fused
        self.graph_mask: EarlyMask | None = None
        self.outermost, self.is_running = "", False
        self.clear()

    def clear(self) -> None:
        """Forget the pass."""
        self.outputs: list[list[Output]] = [[] for _ in self.names]
        self.graph_sums: list[list[GraphSums]] = [[] for _ in self.names]
        self.counts = [0] * len(self.names)
        self.changed_by: list[str | None] = [None] * len(self.names)
        self.is_open = self.calls_itself = self.with_grad = False
        self.is_compiled = self.is_released = False
        self.why_missing: str | None = None

    def release(self) -> None:
        """Let go of the outputs of a pass in a compiled graph; it stays the last pass."""
        if not self.is_compiled:
            return
        self.outputs = [[] for _ in self.names]
        self.is_released = True

    def check(self) -> None:
        """Refuse to hand out what is not of one pass, or not what the submodules returned; end the pass.

        Raises:
            RuntimeError: as `FeatureTaps.features` says.
        """
        in_parts, self.is_open = self.is_open, False
        if self.is_released:
            raise RuntimeError(
                "inside torch.compile a loss that takes the taps lets go of their features, which the graph "
                "then need not put out; read taps.features before the loss, inside the compiled function as "
                "well, and give the loss that list"
            )
        missing = [name for name, count in zip(self.names, self.counts, strict=True) if not count]
        if missing:
            raise RuntimeError(self._describe_missing(missing))
        if self.calls_itself and self.calls != "last":
            raise RuntimeError(
                "the tapped network called itself, and every call began a pass of its own; "
                "with calls='last' the taps keep the last call"
            )
        if self.calls == "once" and max(self.counts) > 1:
            raise RuntimeError(self._describe_repeated(in_parts))
        self.check_unchanged()
        for name, outputs in zip(self.names, self.outputs, strict=True):
            if torch.is_grad_enabled() and any(output.is_cut_off for output in outputs):
                raise RuntimeError(describe_without_grad(name))

    def check_unchanged(self) -> None:
        """Refuse outputs that were written over."""
        for index, (name, outputs) in enumerate(zip(self.names, self.outputs, strict=True)):
            by = self.changed_by[index]
            for output in outputs:
                now = version_of(output.features)
                if by is not None if output.version is None or now is None else output.version != now:
                    raise RuntimeError(_describe_changed(name, by))

    def _describe_missing(self, missing: Sequence[str]) -> str:
        if self.why_missing is None:
            reason = f"run the network before reading features; not run yet: {missing}"
        else:
            why = "it ended with an error, or still runs" if self.is_running else self.why_missing
            reason = (
                "features must be of one forward pass, but the last one did not run all tapped modules: "
                f"{why}; not run yet: {missing}"
            )
        # Whether torch.compile has compiled anything in this process; it does not say what.
        counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", {})
        if not counters.get("stats"):
            return reason
        return (
            f"{reason}. A network that torch.compile ran before the taps were set, or one of its class, "
            "does not see them: set taps before the first compiled call, or after torch.compiler.reset(), or "
            "tap inside the compiled function"
        )

    def _describe_repeated(self, in_parts: bool) -> str:
        ran = [
            f"{name!r} ran {count} times"
            for name, count in zip(self.names, self.counts, strict=True)
            if count > 1
        ]
        since = " since the features were last read (taps.clear() begins a new pass)" if in_parts else ""
        return (
            f"tapped modules must run once in a forward pass, but {', '.join(ran)}{since}; with calls='last' "
            "the taps keep the last call, with calls='all' each call as a layer of its own"
        )


def describe_without_grad(name: str) -> str:
    """Say what is wrong with features that have no gradient although the network's output has one."""
    return (
        f"the features of {name!r} were computed without gradients, those of other taps or the output of the "
        "network with; under torch.utils.checkpoint set use_reentrant=False"
    )


def _describe_changed(name: str, by: str | None) -> str:
    if by is not None:
        instead = f"{by!r}, which modifies it, or give {by!r} inplace=False"
    else:
        block = name.partition(":")[0].rpartition(".")[0]
        around = f" or the block {block!r}" if block else ""
        instead = f"what modified it (such as an in-place activation){around}, or set inplace=False"
    return f"the output of {name!r} was modified in place after it was recorded; tap {instead}"


class _Hook:
    """A hook of taps. Copies of the network, and files with it, have one without effect in its place."""

    def __reduce__(self) -> tuple[type[_CopiedHook], tuple[()]]:
        return _CopiedHook, ()


class _CopiedHook:
    """What stands for a hook of taps in the copy of a network: features belong to the original.

    Files of networks that were saved whole name this class: it stays where it is.
    """

    def __call__(self, *_: object) -> None:
        """Do nothing."""


class Enter(_Hook):
    """The forward pre-hook of a tapped module, or of one that holds tapped ones.

    Args:
        recording: of the taps.
        path: of the module.
        whole: whether the module holds all tapped ones.
    """

    def __init__(self, recording: Recording, path: str, whole: bool) -> None:
        self.recording, self.path, self.whole = recording, path, whole

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Begin a pass, or go on with it, unless a module that holds this one runs."""
        if _in_backward():
            return
        recording = self.recording
        # A call that ended with an error is not told to a hook, but its end shows here: what is called now
        # is no part of that module. (torch tells it to hooks with always_call, each of which makes
        # torch.compile compile anew.)
        if recording.is_running and _holds(recording.outermost, self.path):
            return
        if self.whole or recording.is_running or not recording.is_open:
            recording.clear()
            recording.why_missing = (
                "it skipped them"
                if self.whole
                else "a part of the network was called by itself, which begins a pass of its own"
            )
        if not recording.is_open:
            recording.with_grad = torch.is_grad_enabled()
            recording.is_compiled = torch.compiler.is_compiling()
        recording.is_open = recording.is_running = True
        recording.outermost = self.path


class Leave(_Hook):
    """The forward hook that goes with `Enter`."""

    def __init__(self, recording: Recording, path: str, whole: bool) -> None:
        self.recording, self.path, self.whole = recording, path, whole

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """End the pass, or a part of it, if this module was the outermost."""
        recording = self.recording
        if _in_backward() or self.path != recording.outermost:
            return
        if not recording.is_running:
            recording.calls_itself = True
        recording.is_running = False
        if self.whole:
            recording.is_open = False
        if recording.fused and not torch.compiler.is_compiling():
            recording.check_unchanged()


class Keep(_Hook):
    """The forward hook of a tapped module.

    Args:
        recording: of the taps.
        index: of the tap.
        place: of the tapped tensor.
    """

    def __init__(self, recording: Recording, index: int, place: Place) -> None:
        self.recording, self.index, self.place = recording, index, place

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Record the tensor [N, C, *S]; under `fused` return the output that the network goes on with."""
        recording, index = self.recording, self.index
        if _in_backward():
            return None
        features = pick(output, self.place.keys, self.place.name)
        if not torch.compiler.is_compiling() and getattr(module, "_is_replica", False):
            raise RuntimeError(
                "taps must see the whole batch, but nn.DataParallel runs a replica of the network on each of "
                "several devices; use DistributedDataParallel"
            )
        # Where the number does not matter a compiled graph must not depend on it.
        recording.counts[index] = 1 if recording.calls == "last" else recording.counts[index] + 1
        if recording.calls == "once" and recording.counts[index] > 1:
            recording.outputs[index] = []  # nothing can read them
            return None
        if recording.calls != "all":
            recording.outputs[index], recording.graph_sums[index] = [], []
        if recording.graph_mask is not None and torch.compiler.is_compiling():
            graph_sums = sums_in_graph(features, recording.graph_mask)
            if graph_sums is not None:  # of the features as they are here, whatever changes them later
                recording.graph_sums[index].append(graph_sums)
                return None
        # A compiled graph and torch.func's transforms have no autograd nodes of ours.
        plain = torch.compiler.is_compiling() or in_transform()
        recorded, goes_on = None, None
        if recording.fused and features.requires_grad and not plain:
            recorded, goes_on = self._tap(output, features)
        if recorded is None:
            without_grad = not torch.is_grad_enabled()
            is_cut_off = without_grad and recording.with_grad and _in_reentrant_checkpoint()
            recorded = Output(features, None, None, version_of(features), without_grad, is_cut_off)
        recording.outputs[index].append(recorded)
        if recording.calls != "all":
            recording.changed_by[index] = None
        return goes_on

    def _tap(self, output: Any, features: Tensor) -> tuple[Output | None, Any]:
        """Put what `Tap` makes of the features [N, C, *S] in their place; None where that cannot be done."""
        own = own_tap(features)
        if own is not None:
            delattr(features, OWN_TAP)  # one loss alone can take it
            return Output(features, own.placeholder, own.slot, own.version), None
        slot = TapSlot()
        tapped, placeholder = apply_plainly(Tap, unwrap_dead(features), slot)
        goes_on = replaced(output, self.place.keys, tapped)
        if goes_on is None:
            return None, None
        return Output(tapped, placeholder, slot, version_of(tapped)), goes_on


class Change(_Hook):
    """The forward pre-hook of an in-place module that may change the output of a tapped one.

    Args:
        recording: of the taps.
        index: of the tapped module.
        name: of the in-place module.
    """

    def __init__(self, recording: Recording, index: int, name: str) -> None:
        self.recording, self.index, self.name = recording, index, name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Note the name if the module gets what was recorded."""
        if _in_backward() or not inputs or not getattr(module, "inplace", False):
            return
        if isinstance(module, _DropoutNd) and not module.training:
            return
        for output in self.recording.outputs[self.index]:
            if output.features is inputs[0]:
                self.recording.changed_by[self.index] = self.name


def _holds(outer: str, path: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _in_backward() -> bool:
    """Whether autograd is running: a submodule then computes what torch.utils.checkpoint did not keep."""
    if torch.compiler.is_compiling():
        return False
    running: int = torch._C._current_graph_task_id()  # noqa: SLF001 - torch's only name for it
    return running != -1


def _in_reentrant_checkpoint() -> bool:
    """Whether torch.utils.checkpoint runs the submodule with use_reentrant=True: only its frame tells."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe()  # noqa: SLF001 - public in the documentation of sys, but for its name
    while frame.f_back is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame.f_code is CheckpointFunction.forward.__code__
