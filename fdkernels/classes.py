"""Masks of several classes: what they may hold, and what each class is set against.

A mask becomes one plane a class, [N, K, *S0] with weights in [0, 1], and each entry of the loss sets one
region of the pixels against another: a class against the rest, or against another class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdkernels import checks
from fdkernels.transforms import innermost

__all__ = ["BINARY", "MODES", "Classes", "Planes", "check_class_mask"]

MODES = ("binary", "multiclass", "multilabel")


class Classes(NamedTuple):
    """What the values of a mask mean.

    Args:
        mode: `"binary"`, foreground and background; `"multiclass"`, each pixel is of one class;
            `"multilabel"`, classes may overlap.
        num_classes: K; needed for masks of class indices, else read from the mask.
        include_background: whether class 0 has a loss of its own. It is part of the rest in any case.
        pairs: the classes (i, j) to set against each other; None sets each class against the rest.
    """

    mode: str = "binary"
    num_classes: int | None = None
    include_background: bool = True
    pairs: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(
        cls,
        mode: str,
        num_classes: int | None,
        include_background: bool,
        pairs: Sequence[tuple[int, int]] | None,
    ) -> Classes:
        """The checked classes of a call, by the arguments of `feature_discrepancy_loss`.

        Raises:
            TypeError: a wrong type.
            ValueError: a name, number or combination that has no meaning.
        """
        checks.one_of("mode", mode, MODES)
        if num_classes is not None and (isinstance(num_classes, bool) or not isinstance(num_classes, int)):
            raise TypeError(f"num_classes must be an integer or None, got {type(num_classes).__name__}")
        if not isinstance(include_background, bool):
            raise TypeError(f"include_background must be a bool, got {type(include_background).__name__}")
        if mode == "binary":
            for name, value, usual in (
                ("num_classes", num_classes, (None, 1, 2)),
                ("include_background", include_background, (True,)),
                ("pairs", pairs, (None,)),
            ):
                if value not in usual:
                    raise ValueError(f"{name}={value} needs mode='multiclass' or 'multilabel', got 'binary'")
            return BINARY
        fewest = 2 if mode == "multiclass" else 1
        if num_classes is not None and num_classes < fewest:
            raise ValueError(f"num_classes must be at least {fewest} for mode={mode!r}, got {num_classes}")
        return cls(mode, num_classes, include_background, _checked_pairs(pairs, include_background))

    @property
    def is_binary(self) -> bool:
        """Whether there is one entry a sample, foreground against background."""
        return self.mode == "binary"

    def sides(
        self, regions: Tensor, join: Callable[[Tensor, Tensor], Tensor] = torch.add
    ) -> tuple[Tensor, Tensor]:
        """What each entry has as foreground and as background, of values [R, ...] of the regions.

        Args:
            regions: [R, ...].
            join: makes the values of two disjoint sets of regions those of both, for [R, ...] each.

        Returns:
            [E, ...] twice. The rest of a class is the other regions joined, never a difference.
        """
        if self.pairs is not None:
            classes = regions if self.mode == "multiclass" else regions.chunk(2)[0]
            return (
                torch.stack([classes[i] for i, _ in self.pairs]),
                torch.stack([classes[j] for _, j in self.pairs]),
            )
        if self.mode == "multiclass":
            classes, rest = regions, _others_joined(regions, join)
        else:
            classes, rest = regions.chunk(2)
        first = 0 if self.include_background else 1
        return classes[first:], rest[first:]


BINARY = Classes()


def _others_joined(regions: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All regions but each one, joined, of values [R, ...].

    In a circle these are the R - 1 that follow it, which doubling joins in few operations: neither matrix
    products nor cumulative sums, which torch refuses on a GPU where algorithms must be deterministic.
    """
    wanted, done, parts = regions.shape[0] - 1, 0, []
    length, following = 1, regions.roll(-1, 0)  # the `length` regions that follow each, joined
    while done < wanted:
        if wanted & length:
            parts.append(following.roll(-done, 0) if done else following)
            done += length
        if done < wanted:
            following = join(following, following.roll(-length, 0))
            length *= 2
    others = parts[0]
    for part in parts[1:]:
        others = join(others, part)
    return others


def _checked_pairs(
    pairs: Sequence[tuple[int, int]] | None, include_background: bool
) -> tuple[tuple[int, int], ...] | None:
    if pairs is None:
        return None
    try:
        found = tuple((i, j) for i, j in pairs)
    except TypeError:
        raise TypeError(f"pairs must be a list of pairs (i, j) of class numbers, got {pairs!r}") from None
    except ValueError:
        raise ValueError(f"pairs must hold two class numbers each, got {list(pairs)}") from None
    if not found:
        raise ValueError(
            "pairs must hold at least one pair of classes, got none; None is each against the rest"
        )
    for i, j in found:
        if any(isinstance(one, bool) or not isinstance(one, int) for one in (i, j)):
            raise TypeError(f"pairs must hold integers, got {(i, j)}")
        if i == j or min(i, j) < 0:
            raise ValueError(f"pairs must hold two different classes from 0 on, got {(i, j)}")
        if not include_background and 0 in (i, j):
            raise ValueError(f"pairs must not name class 0 with include_background=False, got {(i, j)}")
    return found


class Planes(NamedTuple):
    """A checked mask as the op takes it.

    Attributes:
        values: [N, K, *S0]; K = 1 under `"binary"`.
        ignored: the value of ignored pixels in `values`; None where ignored pixels are 0 in every plane, or
            none are ignored.
        selects: whether pixels may be ignored.
    """

    values: Tensor
    ignored: float | None
    selects: bool


def check_class_mask(
    mask: Tensor, layers: Sequence[Tensor], classes: Classes, ignore_index: float | None
) -> Planes:
    """Check a mask of several classes, and make one plane of each class.

    Args:
        mask: `"multiclass"`: class indices [N, *S0] or [N, 1, *S0], or [N, K, *S0] with values in [0, 1];
            `"multilabel"`: [N, K, *S0].
        layers: the features, as `checks.as_layers` returns them.
        classes: not binary.
        ignore_index: the value of the pixels to leave out, or None; in [N, K, *S0] a pixel is left out
            where any class has it.

    Raises:
        TypeError: the type or dtype of `mask` or `ignore_index` is wrong.
        ValueError: shape, device, or (where readable) values are wrong.
    """
    checks.check_mask_tensor(mask, layers)
    rank = layers[0].dim()
    of_indices = _num_classes_of_indices(mask, rank, classes)
    if of_indices is not None:
        indices = mask.squeeze(1) if mask.dim() == rank else mask
        return _planes_of_indices(indices, of_indices, classes, ignore_index)
    K = mask.shape[1]
    if classes.num_classes not in (None, K):
        raise ValueError(
            f"mask must have one channel for each of num_classes={classes.num_classes} classes, "
            f"[N, {classes.num_classes}, *S], got {K} in {list(mask.shape)}"
        )
    _check_pairs_exist(classes, K)
    ignored = None
    if ignore_index is not None:
        checks.check_ignore_index(ignore_index, mask.dtype)
        ignored = (mask == ignore_index).any(1, keepdim=True)  # [N, 1, *S0]
    if checks.values_are_readable(mask) and mask.numel():
        _check_plane_values(mask, ignored, classes, ignore_index)
    if ignored is None or ignore_index is None:
        return Planes(mask, None, selects=False)
    if classes.mode == "multiclass":
        return Planes(torch.where(ignored, 0, mask), None, selects=True)
    return Planes(torch.where(ignored, ignore_index, mask), ignore_index, selects=True)


def _num_classes_of_indices(mask: Tensor, rank: int, classes: Classes) -> int | None:
    """K of a mask of class indices, None for planes, by the shape alone; ValueError where no shape fits."""
    K, shape = classes.num_classes, list(mask.shape)
    has_channels = mask.dim() == rank
    if classes.mode == "multiclass":
        if not has_channels or (mask.shape[1] == 1 and K != 1):
            if K is None:
                raise ValueError(
                    f"num_classes must be given for a mask of class indices, got None and a mask {shape}"
                )
            return K
        return None
    if not has_channels or (mask.shape[1] == 1 and K not in (None, 1)):
        raise ValueError(
            f"mask must have one channel for each class, [N, K, *S], for mode='multilabel', got {shape}; "
            "class indices take mode='multiclass'"
        )
    return None


def _check_pairs_exist(classes: Classes, K: int) -> None:
    if classes.mode == "multiclass" and K < 2:
        raise ValueError(f"mask must have at least 2 channels for mode='multiclass', got {K}")
    for pair in classes.pairs or ():
        if max(pair) >= K:
            raise ValueError(f"pairs must name classes from 0 to {K - 1}, got {pair}")
    if not classes.include_background and K < 2:
        raise ValueError("include_background=False leaves no class of 1 channel")


def _planes_of_indices(indices: Tensor, K: int, classes: Classes, ignore_index: float | None) -> Planes:
    """One plane of bytes for each class of indices [N, *S0]; what is no index is no weight in any plane."""
    _check_pairs_exist(classes, K)
    if ignore_index is not None:
        checks.check_ignore_index(ignore_index, indices.dtype)
    if indices.dtype == torch.bool:
        indices = indices.to(torch.uint8)
    checked = checks.values_are_readable(indices) and indices.numel() > 0
    if checked:
        _check_indices(innermost(indices).detach(), K, ignore_index)
    numbers = torch.arange(K, device=indices.device).view(1, K, *[1] * (indices.dim() - 1))
    of_class = indices.unsqueeze(1) == numbers  # [N, K, *S0]
    ignored = None if ignore_index is None else (indices == ignore_index).unsqueeze(1)
    if ignored is not None:
        of_class = of_class & ~ignored
    planes = of_class.view(torch.uint8)
    if not checked:
        known = of_class.any(1, keepdim=True)
        planes = torch.where(known if ignored is None else known | ignored, planes, 255)
    return Planes(planes, None, selects=ignore_index is not None)


def _check_indices(indices: Tensor, K: int, ignore_index: float | None) -> None:
    if ignore_index is not None:
        indices = indices.masked_fill(indices == ignore_index, 0)
    low, high = (bound.item() for bound in indices.aminmax())
    whole = not indices.dtype.is_floating_point or bool((indices == indices.round()).all())
    if whole and low >= 0 and high < K:
        return
    but = "" if ignore_index is None else f" beside ignore_index={ignore_index}"
    if not whole:
        raise ValueError(
            f"mask must hold class indices from 0 to {K - 1}{but} for mode='multiclass', got values that are "
            "no whole numbers; soft classes have one channel each, [N, K, *S]"
        )
    hint = "" if ignore_index is not None else "; name the value of pixels to leave out with ignore_index"
    raise ValueError(
        f"mask must hold class indices from 0 to {K - 1}{but} for num_classes={K}, got values from {low} to "
        f"{high}{hint}"
    )


def _check_plane_values(
    mask: Tensor, ignored: Tensor | None, classes: Classes, ignore_index: float | None
) -> None:
    values = innermost(mask).detach()
    if ignored is not None:
        values = torch.where(innermost(ignored), 0, values)
    checks.check_mask_values(values, None, None, ignore_index)
    if classes.mode != "multiclass":
        return
    most = float(values.sum(1, dtype=torch.float64).max())
    if most > 1 + values.shape[1] * checks.mask_tolerance(values.dtype):
        raise ValueError(
            "mask must give each pixel one class for mode='multiclass', so that its channels add up to at "
            f"most 1, got {most:.6g}; classes that overlap take mode='multilabel'"
        )
