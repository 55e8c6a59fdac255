"""Records the features of any network's submodules, by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fdkernels import checks
from fdkernels.conventions import MASK_RESIZES
from fdkernels.taps.early import AskedSizes, EarlyMask, TakesMask
from fdkernels.taps.graph_sums import GraphSums
from fdkernels.taps.names import Place, find, in_place_around, last_of, own_name
from fdkernels.taps.recording import Change, Enter, Keep, Leave, Recording, describe_without_grad

__all__ = ["FeatureTaps"]

CALLS = ("once", "last", "all")


class FeatureTaps:
    """Record the outputs of named submodules for the loss.

    ::

        with fdk.FeatureTaps(model, ["enc1", "enc2", "bottleneck"]) as taps:
            logits = model(images)
            loss = segmentation_loss(logits, mask) + crit(taps.features, mask)

    The features are the outputs themselves, not copies, and part of the graph. The network is not changed:
    leaving the block (or `close()`) removes the hooks, and so does deleting the taps. Use the network's own
    submodule names, also for one wrapped by DistributedDataParallel, FSDP or torch.compile; the network
    itself is `""`.

    Where a submodule returns a tuple, list, dict, named tuple, dataclass or any object, the path behind a
    colon leads to the tensor, by keys, indices and attributes joined by dots: `"encoder:1"`, `"encoder:-1"`,
    `"backbone:features.2"`, or `":out"` for what the network itself returns. A name that leads to no tensor
    is an error of the forward pass, which lists those that do.

    What is read is of one forward pass, or an error:

    - A pass begins where the network, or a module that holds all tapped ones, is called. Features of the
      pass before are dropped then, so that a module that the pass skips, or does not reach because of an
      error, is named as missing.
    - Where the parts of a network are called one by one, a pass goes on until the features are read or
      `clear()` is called.
    - A module that runs several times in a pass is refused, unless `calls` says what to keep. What
      torch.utils.checkpoint computes again in backward does not count.
    - The output of a tapped module must not be modified in place afterwards, as by the
      `nn.ReLU(inplace=True)` behind a batch norm: tap that activation. Inside torch.compile a change is
      seen only where a sibling of the tapped module (or of a module that holds it) makes it.
    - Under torch.utils.checkpoint set `use_reentrant=False`: with True the features have no gradient, and
      reading them for a loss is refused.
    - torch.compile sees taps that are set before the first compiled call. Compile network and loss
      together and give the loss the taps, `crit(taps, mask)`: the features then stay inside the graph, and
      no second loss can take the taps. Where the network is compiled alone, give it the mask:
      `with taps.mask(mask, sums_only=True)`. A graph that puts the features out, to have `taps.features`
      readable, takes up to 1.4 times as long on a CPU.
    - A network with taps can be copied, averaged, pickled and saved at any time: the copy has no taps. A
      copy of the taps themselves has no network, and says so when it is read.

    With `fused=True` pass the taps themselves, `crit(taps, mask)` or `feature_discrepancy_loss(taps,
    mask)`, not their features. The numbers are the same, and backward saves two transfers of each map: one
    pass reads the upstream gradient of a tapped output and writes its sum with the loss's gradient, as
    `fdkernels.tap` does. This serves the first such call of a forward pass; later calls, calls inside
    torch.compile or torch.func's transforms, and calls with a mask that requires a gradient or with
    `channel_dim=-1` use the features instead, and so do tensors within objects other than those named above,
    of which no copy can be made to go on with. A change in place is then an error of the forward pass.

    Args:
        model: any network.
        names: submodule names as in `model.named_modules()`, with the path of a tensor behind a colon where a
            submodule returns several; `features` keeps their order.
        fused: add the upstream gradient in the backward pass of the loss.
        calls: what to keep of a module that runs several times in a forward pass: `"once"` refuses it,
            `"last"` keeps the last call, `"all"` keeps each call as a layer of its own, in order.

    Attributes:
        names: the names, as a tuple.

    Raises:
        ValueError: no names, a name twice, or one that the network does not have; unknown `calls`. In the
            forward pass: a path that what the submodule returns does not have.
        TypeError: in the forward pass: a name that leads to something else than a tensor.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], *, fused: bool = False, calls: str = "once"
    ) -> None:
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of submodule names, got the string {names!r}")
        self.names = tuple(names)
        if not self.names:
            raise ValueError("names must hold at least one submodule name, got none")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must differ from one another, got {list(self.names)}")
        checks.one_of("calls", calls, CALLS)
        modules, places = find(model, self.names)
        self._recording = Recording(self.names, calls, fused)
        self._handles = _set_hooks(self._recording, modules, places)
        self._is_copy = False
        # What ends the tapped modules; weak, as the taps do not keep a network alive.
        ends = [last_of(modules[place.path]) for place in places]
        self._takers = [weakref.ref(end) for end in ends if fused and isinstance(end, TakesMask)]
        self._early: EarlyMask | None = None
        self._asked = AskedSizes()
        weakref.finalize(self, _remove, self._handles).atexit = False

    @property
    def features(self) -> list[Tensor]:
        """The features of the last forward pass, [N, C, *S] each, in the order of `names`.

        With `calls="all"` the calls of one module follow each other.

        Raises:
            RuntimeError: a submodule did not run in that pass, or several times with `calls="once"`; or its
                output has been modified in place since, as by the in-place activation that follows it; or
                a loss inside torch.compile took the taps; or a compiled network ran under
                `taps.mask(..., sums_only=True)`.
        """
        self._check()
        if any(self._recording.graph_sums):
            raise RuntimeError(
                "with taps.mask(mask, sums_only=True) a compiled network keeps its features in its graph; "
                "leave sums_only out to read them"
            )
        return [output.features for outputs in self._recording.outputs for output in outputs]

    def _check(self) -> None:
        if self._is_copy:
            raise RuntimeError(
                "these taps are a copy, which has no network; set taps on the copied network: "
                f"FeatureTaps(network, {list(self.names)})"
            )
        self._recording.check()

    def features_for_loss(self) -> list[Tensor]:
        """`features`, [N, C, *S] each, of which a graph that holds network and loss then lets go.

        What a graph puts out cannot share passes with what reads it, and gets a gradient of zeros. Of a graph
        that put out sums they are stand-ins, whose values are not to be read.
        """
        graph_sums = self.graph_sums()
        if graph_sums is not None:
            return [layer.stand_in() for layer in graph_sums]
        features = self.features
        if torch.compiler.is_compiling():
            self._recording.release()
        return features

    def graph_sums(self) -> list[GraphSums] | None:
        """The region sums [2, N, C_l] that a compiled network made, in the order of `features`; else None.

        Raises:
            RuntimeError: as for `features`.
        """
        recording = self._recording
        found = [of_call for of_module in recording.graph_sums for of_call in of_module]
        if not found or any(recording.outputs):
            return None
        self._check()
        return found

    def take_placeholders(self) -> tuple[Any, ...] | None:
        """The slots and the placeholders of the fused taps as `FromTaps` takes them, once a forward pass.

        Returns:
            A list of slots, followed by the placeholders [2, N, C_l]; None where the loss takes the features
            themselves.

        Raises:
            RuntimeError: some features were computed without gradients, others with.
        """
        recorded = self._recording.outputs
        outputs = [output for outputs in recorded for output in outputs]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if all(output.placeholder is None for output in outputs):
            return None
        for name, of_module in zip(self.names, recorded, strict=True):
            if any(output.without_grad for output in of_module):
                raise RuntimeError(describe_without_grad(name))
        if any(output.placeholder is None and output.features.requires_grad for output in outputs):
            return None
        self._recording.outputs = [
            [output._replace(placeholder=None, slot=None) for output in of_module] for of_module in recorded
        ]
        return [output.slot for output in outputs], *(output.placeholder for output in outputs)

    @contextmanager
    def mask(
        self,
        mask: Tensor,
        *,
        mask_resize: str = "area",
        ignore_index: float | None = None,
        sums_only: bool = False,
    ) -> Iterator[None]:
        """Give the mask before the forward pass, for region sums from the pass that writes the features.

        ::

            fdk.fuse_norms(model)
            taps = fdk.FeatureTaps(model, model.tap_names, fused=True)
            with taps.mask(mask):
                logits = model(images)
            loss = segmentation_loss(logits, mask) + crit(taps)

        The sums of tapped blocks that end in a `NormAct` are made as their features are written, where taps
        are fused and the loss, on the CPU, is of two regions and resizes the mask as said here; other layers
        are read by the loss as ever. The numbers are the same.

        A network that is compiled by itself runs torch's own normalisations. With `sums_only` it computes the
        sums inside its graph and puts out these in place of the features, which costs a step on a CPU up to
        2 % in place of 40 %. Only a loss of two regions that takes the taps and this mask can then be
        computed, without second derivatives. Without torch.compile, and where the loss is compiled with the
        network, it changes nothing.

        Args:
            mask: [N, 1, *S0] or [N, *S0], as the loss takes it; `crit(taps)` takes this one.
            mask_resize, ignore_index: as of the loss. `"area"` is right for all conventions but `"released"`,
                whose is `"max"`.
            sums_only: whether a compiled network need not put out its features.

        Raises:
            TypeError: the mask is no tensor.
            ValueError: unknown `mask_resize`.
        """
        checks.one_of("mask_resize", mask_resize, MASK_RESIZES)
        mask = checks.mask_as_tensor(mask)
        self._early = early = EarlyMask(mask, mask_resize, ignore_index, self._asked.of(mask))
        compiling = torch.compiler.is_compiling()
        takers = [] if compiling else _alive(self._takers)
        for taker in takers:
            taker.take_mask(early)
        self._recording.graph_mask = early if sums_only and not compiling else None
        try:
            yield
        finally:
            self._recording.graph_mask = None
            for taker in takers:
                taker.take_mask(None)

    @property
    def given_mask(self) -> Tensor | None:
        """The mask of the last `with taps.mask(mask)`, [N, 1, *S0] or [N, *S0], until `clear()`."""
        return None if self._early is None else self._early.mask

    def early_mask(self, values: Tensor, mask_resize: str, ignore_index: float | None) -> EarlyMask | None:
        """The mask that was given early, if it is that of a loss, [N, 1, *S0], and is resized likewise."""
        early = self._early
        return early if early is not None and early.is_of(values, mask_resize, ignore_index) else None

    def clear(self) -> None:
        """Drop the recorded features and the mask; the next call begins a new pass."""
        self._recording.clear()
        self._early = None

    def close(self) -> None:
        """Remove the hooks; the recorded features stay readable."""
        _remove(self._handles)

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> tuple[tuple[str, ...], str, bool]:
        return self.names, self._recording.calls, self._recording.fused

    def __setstate__(self, state: tuple[tuple[str, ...], str, bool]) -> None:
        self.names = state[0]
        self._recording = Recording(*state)
        self._handles = []
        self._is_copy = True
        self._takers, self._early, self._asked = [], None, AskedSizes()


def _alive(refs: Sequence[weakref.ref[Any]]) -> list[TakesMask]:
    return [taker for ref in refs if (taker := ref()) is not None]


def _set_hooks(
    recording: Recording, modules: dict[str, nn.Module], places: Sequence[Place]
) -> list[RemovableHandle]:
    """Set hooks on tapped modules, on those that hold them, and on those that may change their outputs."""
    paths = [place.path for place in places]
    holders = [{path.rsplit(".", up)[0] for up in range(1, path.count(".") + 1)} | {""} for path in paths]
    whole, watched = set.intersection(*holders), sorted(set.union(*holders, paths))
    handles = [
        modules[path].register_forward_pre_hook(Enter(recording, path, path in whole)) for path in watched
    ]
    for index, place in enumerate(places):
        handles.append(modules[place.path].register_forward_hook(Keep(recording, index, place)))
        for changer in in_place_around(modules, place.path):
            hook = Change(recording, index, own_name(changer))
            handles.append(modules[changer].register_forward_pre_hook(hook))
    handles += [
        modules[path].register_forward_hook(Leave(recording, path, path in whole)) for path in watched
    ]
    return handles


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
