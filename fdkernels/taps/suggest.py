"""Suggests where to tap a network: the last map of each resolution, on the way down and on the way up."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fdkernels.geometry import check_aspect
from fdkernels.taps.structures import tensors_in
from fdkernels.taps.survey import Survey, run_once

__all__ = ["SuggestedTap", "TapSuggestions", "suggest_taps"]

# So many names a line of the table lists of those left out for one reason.
_MOST = 6

_Size = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SuggestedTap:
    """A tensor worth tapping.

    Attributes:
        name: as `FeatureTaps` takes it.
        shape: [N, C, *S], or [N, *S, C] where the channels are last.
        stride: how many pixels of the input are one of the map, in each dimension.
        channels: C.
        bytes: of the map, for the batch of the example.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[float, ...]
    channels: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class TapSuggestions:
    """What `suggest_taps` found; printed, a table.

    Attributes:
        taps: in the order in which they run.
        left_out: why any other submodule, or tensor of one, is none, by name.
        channel_dim: what the loss takes: 1, or -1 where the channels of the maps are last.
        network: the network's class.
        example: the shape of the example [N, C, *S].
    """

    taps: tuple[SuggestedTap, ...]
    left_out: dict[str, str]
    channel_dim: int
    network: str
    example: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """The names, ready for `FeatureTaps`."""
        return [tap.name for tap in self.taps]

    def __str__(self) -> str:
        last = "; the channels are last: pass channel_dim=-1" if self.channel_dim == -1 else ""
        of = f"{self.network} for an input of {list(self.example)}"
        lines = [f"{len(self.taps)} taps of {of}, in the order in which they run{last}", ""]
        rows = [("name", "shape", "stride", "channels", "bytes")]
        for tap in self.taps:
            stride = "x".join(f"{along:.3g}" for along in tap.stride)
            rows.append((tap.name, str(list(tap.shape)), stride, str(tap.channels), f"{tap.bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.ljust(width) if index < 2 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.left_out.items():
            by_reason[reason.partition(", '")[0]].append(name or '""')
        lines += ["", "left out:"] if by_reason else []
        for reason, names in by_reason.items():
            more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
            lines.append(f"  {reason}: {', '.join(names[:_MOST])}{more}")
        return "\n".join(lines)


def suggest_taps(model: nn.Module, example: Any, max_taps: int | None = None) -> TapSuggestions:
    """List the submodules of a network that are worth tapping for the loss.

    ::

        suggested = fdk.suggest_taps(model, images)
        print(suggested)
        taps = fdk.FeatureTaps(model, suggested.names)

    Suggested is the last map of each resolution: on the way down to the coarsest one, there, and on the way
    up. A map is named by the largest block that returns it, by the in-place activation that modifies it last,
    and with the path of the tensor where a submodule returns several. Maps within a block that returns
    another resolution, or logits, count only where there are no others.

    Left out, with a reason, are logits, maps of one pixel, sequences without a spatial shape, what changes in
    place where no submodule can be named, and what runs several times in a forward pass. Of maps with
    channels first and last the kind that has more resolutions is taken: a call of the loss takes one kind.

    The network runs once, in evaluation and without gradients, and keeps the outputs of all submodules for
    that time: take a small batch. Its mode, its buffers, its hooks and torch's random numbers stay as they
    were. Submodules that run in training alone are not seen.

    Args:
        model: any network.
        example: its input [N, C, *S] with 1 to 3 spatial dimensions; or a tuple of its inputs, or a dict of
            them by name, of which the first with 3 to 5 dimensions is the image.
        max_taps: how many to suggest at most, spread evenly over the order in which they run; of one it is
            the coarsest.

    Raises:
        TypeError: `max_taps` is not an integer.
        ValueError: the example holds no image, or `max_taps` is below 1.
    """
    if max_taps is not None:
        if isinstance(max_taps, bool) or not isinstance(max_taps, int):
            raise TypeError(f"max_taps must be an integer or None, got {type(max_taps).__name__}")
        if max_taps < 1:
            raise ValueError(f"max_taps must be at least 1, got {max_taps}")
    image = _image_of(example)
    survey = run_once(model, example)
    left_out: dict[str, str] = {}
    maps = _maps_of(survey, tuple(image.shape), left_out)
    first = [each for each in maps if each.channel_dim == 1]
    last = [each for each in maps if each.channel_dim == -1]
    chosen, others, kind = _choose(survey, first), _choose(survey, last), "first"
    if len({each.level for each in others}) > len({each.level for each in chosen}):
        first, last, chosen, kind = last, first, others, "last"
    for each in last:
        left_out[each.name] = f"the channels are {'last' if kind == 'first' else 'first'}, unlike others"
    _say_why_not(survey, first, chosen, left_out)
    if max_taps is not None and len(chosen) > max_taps:
        kept = _spread(chosen, max_taps)
        for each in chosen:
            if each not in kept:
                left_out[each.name] = f"max_taps={max_taps} leaves no room"
        chosen = kept
    suggested = [
        SuggestedTap(
            each.name, tuple(each.tensor.shape), each.stride, each.tensor.shape[each.channel_dim],
            each.tensor.numel() * each.tensor.element_size(),
        )
        for each in chosen
    ]  # fmt: skip
    left_out = {name: reason for name, reason in left_out.items() if name not in {t.name for t in suggested}}
    channel_dim = -1 if kind == "last" else 1
    return TapSuggestions(tuple(suggested), left_out, channel_dim, type(model).__name__, tuple(image.shape))


@dataclasses.dataclass(eq=False)
class _Map:
    """A tensor that shows the image and can be tapped.

    Attributes:
        name, path: of the tap, and of its submodule.
        tensor: [N, C, *S] or [N, *S, C].
        channel_dim: 1 or -1.
        stride: of each dimension to the image.
        level: how often each dimension was halved.
    """

    name: str
    path: str
    tensor: Tensor
    channel_dim: int
    stride: tuple[float, ...]
    level: _Size


def _image_of(example: Any) -> Tensor:
    for _, tensor in tensors_in(example):
        if 3 <= tensor.dim() <= 5:
            return tensor
    raise ValueError(
        "example must be, or hold, an image [N, C, *S] with 1 to 3 spatial dimensions, got "
        + (str(list(example.shape)) if isinstance(example, Tensor) else type(example).__name__)
    )


def _maps_of(survey: Survey, image: _Size, left_out: dict[str, str]) -> list[_Map]:
    """The maps that can be tapped, in the order in which they were made; why others cannot."""
    spatial = {key: _spatial(made.tensor, image) for key, made in survey.made.items()}
    sizes = {key: found for key, found in spatial.items() if not isinstance(found, str)}
    levels = _levels({key: size for key, (_, size) in sizes.items()}, image[2:])
    heads = _heads(survey, levels)
    if heads.issuperset(levels):  # an encoder whose maps look like deep supervision
        heads = set()
    maps = []
    for key, made in survey.made.items():
        names = sorted(made.names, key=lambda name: name.rank)
        once = [name for name in names if survey.calls[name.path] == 1]
        found = spatial[key]
        best = (once or names)[0]
        if isinstance(found, str):
            reason = found
        elif key in heads:
            reason = "logits"
        elif made.is_changed_later:
            reason = "modified in place afterwards by no submodule"
        elif made.is_dropout:
            reason = "dropout, which draws in training"
        elif not once:
            reason = f"runs {survey.calls[best.path]} times in a forward pass"
        else:
            stride = tuple(s0 / s for s0, s in zip(image[2:], found[1], strict=True))
            maps.append(_Map(best.text, best.path, made.tensor, found[0], stride, levels[key]))
            names.remove(best)
            reason = f"the tensor of another name, {best.text!r}"
        for name in made.earlier_names:
            left_out[name.text] = f"modified in place afterwards, {best.text!r}"
        for name in names:
            left_out[name.text] = reason
    for path, count in survey.calls.items():
        if not count:
            left_out[path] = "did not run"
    return maps


def _spatial(tensor: Tensor, image: _Size) -> tuple[int, _Size] | str:
    """The axis of the channels, and the size; or why the tensor does not show the image."""
    shape, full = tuple(tensor.shape), image[2:]
    reason = ""
    if not tensor.is_floating_point():
        reason = f"holds {str(tensor.dtype).removeprefix('torch.')}"
    elif len(shape) != len(image):
        reason = "a sequence without a spatial shape" if len(shape) == 3 else "no spatial shape"
    elif shape[0] != image[0]:
        reason = f"a batch of {shape[0]}, not of {image[0]}"
    elif 0 in shape:
        reason = "empty"
    if reason:
        return reason
    # Of the two readings the one whose strides are more alike; channels first, unless it is far off.
    first, last = shape[2:], shape[1:-1]
    channel_dim, size = (-1, last) if _spread_of(full, last) < 0.7 * _spread_of(full, first) else (1, first)
    if math.prod(size) == 1:
        return "one pixel"
    return (channel_dim, size) if _shows(size, full) else "not the aspect of the image"


def _shows(size: _Size, full: _Size) -> bool:
    """Whether the loss takes a map of that size, beside one of the image's."""
    layers = [torch.empty((1, 1, *each), device="meta") for each in (full, size)]
    try:
        check_aspect(layers[0], layers, "same")
    except ValueError:
        return False
    return True


def _spread_of(full: _Size, size: _Size) -> float:
    strides = [s0 / s for s0, s in zip(full, size, strict=True)]
    return max(strides) / min(strides)


def _levels(sizes: dict[int, _Size], full: _Size) -> dict[int, _Size]:
    """How often each dimension was halved, followed from map to map in the order in which they were made.

    Convolutions without padding take borders away, so that the stride alone does not tell.
    """
    level: _Size = (0,) * len(full)
    before, known, levels = full, {full: level}, {}
    for key, size in sizes.items():
        if size in known:
            level = known[size]
        else:
            steps = [round(math.log2(s0 / s)) for s0, s in zip(before, size, strict=True)]
            level = tuple(along + step for along, step in zip(level, steps, strict=True))
        known[size] = levels[key] = level
        before = size
    return levels


def _heads(survey: Survey, levels: dict[int, _Size]) -> set[int]:
    """The tensors that are logits: outputs that are no features, and what likewise ends in K channels."""
    outputs = [tensor for tensor in survey.outputs if id(tensor) in levels]
    if not outputs or _are_features(outputs, survey, levels):
        return set()
    channels = {tensor.shape[1] for tensor in outputs}
    heads = {id(tensor) for tensor in outputs}
    *_, last = [key for key in levels if key not in heads] or heads
    # The network itself may end with a function, such as an interpolation.
    by_function = any(not name.path for tensor in outputs for name in survey.made[id(tensor)].names[:1])
    if by_function and survey.made[last].tensor.shape[1] in channels:
        heads.add(last)
    for key, made in survey.made.items():
        if key not in levels or made.tensor.shape[1] not in channels:
            continue
        reduces = isinstance(made.maker, _ConvNd) and made.maker.in_channels > made.maker.out_channels
        hands_on = next(made.maker.parameters(), None) is None and not heads.isdisjoint(made.taken)
        if reduces or hands_on:
            heads.add(key)
    return heads


def _are_features(outputs: Sequence[Tensor], survey: Survey, levels: dict[int, _Size]) -> bool:
    """Whether a network returns features: a pyramid of maps, or the widest of its coarsest resolution."""
    of_outputs = {levels[id(tensor)] for tensor in outputs}
    if len(of_outputs) > 1:
        is_coarser = all(sum(level) > 0 for level in of_outputs)
        return is_coarser or len({tensor.shape[1] for tensor in outputs}) > 1
    level = of_outputs.pop()
    beside = [survey.made[key].tensor.shape[1] for key, other in levels.items() if other == level]
    coarsest = max(map(sum, levels.values()))
    return sum(level) == coarsest and all(tensor.shape[1] >= max(beside) for tensor in outputs)


def _choose(survey: Survey, maps: Sequence[_Map]) -> list[_Map]:
    """The last map of each resolution on the way down, at the coarsest one, and on the way up."""
    if not maps:
        return []
    order = {each: index for index, each in enumerate(maps)}
    levels = {id(each.tensor): each.level for each in maps}
    foreign = {each: len(_foreign(survey, levels, each)) for each in maps}
    coarsest = max(maps, key=lambda each: sum(each.level)).level  # the first of those
    fewest = min(foreign[each] for each in maps if each.level == coarsest)
    bottom: list[_Map] = []  # from the first map there until the network goes on to another resolution
    for each in maps:
        if each.level == coarsest and foreign[each] == fewest:
            bottom.append(each)
        elif bottom and each.level != coarsest and foreign[each] <= fewest:
            break
    turn = bottom[-1]
    down = [each for each in maps if order[each] < order[bottom[0]] and each.level != coarsest]
    up = [each for each in maps if order[each] > order[turn] and each.level != coarsest]
    chosen = [turn]
    for side in (down, up):
        of_level: dict[_Size, list[_Map]] = defaultdict(list)
        for each in side:
            of_level[each.level].append(each)
        for alike in of_level.values():
            least = min(foreign[each] for each in alike)
            chosen.append([each for each in alike if foreign[each] == least][-1])
    return sorted(chosen, key=order.__getitem__)


def _foreign(survey: Survey, levels: dict[int, _Size], inner: _Map) -> list[str]:
    """The submodules that hold a map and return none of its resolution that can be tapped."""
    parts = inner.path.split(".")
    holders = [".".join(parts[:count]) for count in range(1, len(parts))]
    return [
        holder
        for holder in holders
        if holder in survey.returned
        and all(levels.get(key) != inner.level for key in survey.returned[holder])
    ]


def _say_why_not(
    survey: Survey, maps: Sequence[_Map], chosen: Sequence[_Map], left_out: dict[str, str]
) -> None:
    levels = {id(each.tensor): each.level for each in maps}
    order = {each: index for index, each in enumerate(maps)}
    for each in maps:
        if each in chosen:
            continue
        alike = [other for other in chosen if other.level == each.level]
        later = [other for other in alike if order[other] > order[each]]
        foreign = _foreign(survey, levels, each)
        is_outer = any(len(_foreign(survey, levels, other)) < len(foreign) for other in alike)
        if later and not is_outer:
            left_out[each.name] = f"before the last of its resolution, {later[0].name!r}"
        elif foreign:
            left_out[each.name] = f"within what returns another resolution or logits, {foreign[-1]!r}"
        elif alike:
            left_out[each.name] = f"another stands for its resolution, {alike[-1].name!r}"
        else:
            left_out[each.name] = "between maps of the coarsest resolution"


def _spread(chosen: Sequence[_Map], count: int) -> list[_Map]:
    if count == 1:
        return [max(chosen, key=lambda each: sum(each.level))]
    return [chosen[round(index * (len(chosen) - 1) / (count - 1))] for index in range(count)]
