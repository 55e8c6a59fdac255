"""Decide which pixels of a mask are foreground, or refuse to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdkernels.segmentation.data.picture import Picture, luminance

# Of a mask that is nearly black and white: mid-grey pixels, as a fraction of the foreground pixels, and
# pixels in flat patches, as a fraction of those that are neither background nor foreground.
GREY = 0.2
_FLAT = 0.2
_FEW = 8  # at most so many values may be labels; a message lists as many


def parse_mask_values(text: str, name: str = "mask_values") -> list[tuple[int, int]]:
    """Read a list of values and ranges such as "1", "1,2" or "128-255", as (first, last).

    Args:
        text: the list.
        name: of the argument, for messages.

    Raises:
        ValueError: it is no such list.
    """
    ranges = []
    for part in text.split(","):
        first, dash, last = (number.strip() for number in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(
                f'{name} must be numbers and ranges such as "1", "1,2" or "128-255", got "{text}"'
            )
        ranges.append((int(first), int(last or first)))
    return ranges


def foreground(picture: Picture, path: Path, named: str | None = None) -> np.ndarray:
    """Compute the foreground of a mask, bool [H, W].

    Args:
        picture: the stored values.
        path: the file, for messages.
        named: values that are foreground, as `parse_mask_values` reads them; None to conclude from the
            values, see `read_mask`.

    Raises:
        ValueError: the values do not say which of them are foreground, or `named` does not apply.
    """
    if picture.is_float:
        raise ValueError(f"{path} must contain integers, got mode F")
    if picture.values.dtype.kind == "i" and (lowest := picture.values.min(initial=0)) < 0:
        raise ValueError(f"{path} must not contain values below 0, got {lowest}")
    values = _without_equal_channels(picture.values)
    if named is not None:
        return _named(values, path, named)
    if picture.palette is not None:
        found = _of_palette(picture, path)
    elif picture.white_is_zero and picture.top > 1:
        raise ValueError(
            f"{path} stores white as 0 (WhiteIsZero): its foreground may be what is not 0, or what is "
            f"shown light; {_ask(values)}"
        )
    else:
        found = _of_values(values, picture.top, picture.lossy, path)
        found = ~found if picture.white_is_zero else found
    if picture.alpha is not None:
        _check_alpha(found, picture.alpha, path)
    return found


def _without_equal_channels(values: np.ndarray) -> np.ndarray:
    """Reduce colours [H, W, 3] to grey [H, W] if all channels are equal."""
    if values.ndim == 3 and (values == values[..., :1]).all():
        return values[..., 0]
    return values


def _named(values: np.ndarray, path: Path, named: str) -> np.ndarray:
    if values.ndim == 3:
        raise ValueError(
            f"{path} must have grey values or a palette for mask_values {named}, got colours: "
            f"{_listed(values)}"
        )
    found = np.zeros(values.shape, bool)
    for first, last in parse_mask_values(named):
        found |= (values >= first) & (values <= last)
    return found


def _of_palette(picture: Picture, path: Path) -> np.ndarray:
    """Decide by the colours, where the stored values do not say the opposite."""
    used = np.unique(picture.values)
    shown = picture.colours(path)
    if len(np.unique(shown.reshape(-1, 3), axis=0)) < len(used):
        raise ValueError(
            f"{path} shows several of its values in the same colour: {_listed(picture.values)}; "
            f"{_ask(picture.values)}"
        )
    hint = f"as a palette it stores {_listed(picture.values)}; {_ask(picture.values)}"
    found = _of_values(_without_equal_channels(shown), 255, picture.lossy, path, hint)
    try:
        stored = _of_values(picture.values, picture.top, picture.lossy, path)
    except ValueError:  # the order of the palette means nothing
        return found
    if not np.array_equal(found, stored):
        raise ValueError(
            f"{path} has a palette that shows 0 light: its foreground may be what is not 0, or what is shown "
            f"light; {_ask(picture.values)}"
        )
    return found


def _of_values(values: np.ndarray, top: int, lossy: bool, path: Path, hint: str | None = None) -> np.ndarray:
    """Decide by grey [H, W] or colours [H, W, 3], of which `top` is white; `hint` says what else to do."""
    codes = values if values.ndim == 2 else _codes(values)  # [H, W], 0 is black
    found = np.flatnonzero(np.bincount(codes.ravel())) if codes.dtype == np.uint8 else np.unique(codes)
    if np.count_nonzero(found) <= 1:
        nonzero: np.ndarray = codes != 0
        return nonzero
    if top <= 65535:
        light = (values if values.ndim == 2 else luminance(values)) > top / 2  # [H, W]
        if _nearly_black_and_white(values, codes, light, top, few=found.size <= _FEW and not lossy):
            return light
    kind = "colours" if values.ndim == 3 else "grey values"
    raise ValueError(
        f"{path} must have 0 for background and one other value for foreground, or be nearly black and "
        f"white, got {found.size} {kind}: {_listed(values)}; {hint or _ask(values)}"
    )


def _codes(colours: np.ndarray) -> np.ndarray:
    """Number colours [H, W, 3] so that equal ones have equal numbers, int64 [H, W]; black is 0."""
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    codes: np.ndarray = (red << 32) | (green << 16) | blue
    return codes


def _nearly_black_and_white(
    values: np.ndarray, codes: np.ndarray, light: np.ndarray, top: int, few: bool
) -> bool:
    """Tell a picture of black and white, blurred or compressed, from labels of several values.

    Blur and compression leave few grey pixels, all of them on edges, no two by two of them alike. Labels
    leave flat patches; where they are thin, pixels that have no darker or no lighter neighbour.

    Args:
        values: grey [H, W] or colours [H, W, 3].
        codes: [H, W], equal where the values are.
        light: [H, W], above half of white.
        top: white.
        few: there are so few values that each must stand on edges.
    """
    whole = values if values.ndim == 3 else values[..., None]  # [H, W, C]
    black, white = (whole <= top / 4).all(-1), (whole >= 3 * top / 4).all(-1)
    middle = np.count_nonzero(~(black | white))
    if not light.any() or middle > GREY * np.count_nonzero(light):
        return False
    ends = (codes == 0) | (whole == top).all(-1)
    if few and not _on_edges(whole.sum(-1, dtype=np.int64), ends):
        return False
    flat = np.zeros(codes.shape, bool)
    flat[:-1, :-1] = _alike(codes)
    noise = ~ends  # pixels that are neither background nor foreground
    for side in (light, ~light):
        patches, counts = np.unique(codes[flat & side], return_counts=True)
        if not patches.size:
            continue
        commonest = patches[counts.argmax()]
        noise &= codes != commonest
        clipped = np.count_nonzero(flat & side & ends & (codes != commonest))
        if clipped > _FLAT * counts.max():
            return False
    return bool(np.count_nonzero(flat & noise) <= _FLAT * np.count_nonzero(noise))


def _alike(codes: np.ndarray) -> np.ndarray:
    """Return whether each two by two pixels have one value, bool [H - 1, W - 1]."""
    corner = codes[:-1, :-1]
    alike: np.ndarray = (corner == codes[1:, :-1]) & (corner == codes[:-1, 1:]) & (corner == codes[1:, 1:])
    return alike


def _on_edges(grey: np.ndarray, ends: np.ndarray) -> bool:
    """Return whether every pixel but the `ends` has a darker and a lighter one among its eight neighbours."""
    padded = np.pad(grey, 1, mode="edge")
    height, width = grey.shape
    around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    darker, lighter = np.minimum.reduce(around) < grey, np.maximum.reduce(around) > grey
    return bool((ends | (darker & lighter)).all())


def _check_alpha(found: np.ndarray, alpha: np.ndarray, path: Path) -> None:
    """Refuse a mask whose alpha channel holds a shape that its colours do not.

    Raises:
        ValueError: colours are the same all over and alpha is not, or foreground is transparent.
    """
    if (alpha == alpha.flat[0]).all():
        return
    if not found.any() or found.all():
        raise ValueError(
            f"{path} has its shape in the alpha channel alone, the colours are the same all over; save the "
            "shape as black and white"
        )
    if hidden := np.count_nonzero(found & (alpha == 0)):
        raise ValueError(
            f"{path} has {hidden} foreground pixels that its alpha channel makes transparent; save it "
            "without alpha"
        )


def _listed(values: np.ndarray) -> str:
    """List the values or colours of a mask, at most eight."""
    found = np.unique(values) if values.ndim == 2 else np.unique(values.reshape(-1, 3), axis=0)
    shown = [str(value if values.ndim == 2 else tuple(value.tolist())) for value in found]
    if len(shown) > _FEW:
        return f"{', '.join(shown[: _FEW - 1])} ... {shown[-1]}"
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def _ask(values: np.ndarray) -> str:
    if values.ndim == 3:
        return "save it with black for background and white for foreground"
    return "say which values are foreground with --mask-values, such as --mask-values 1, 1,2 or 128-255"


__all__ = ["GREY", "foreground", "parse_mask_values"]
