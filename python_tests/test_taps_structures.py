"""FeatureTaps: tensors within what a submodule returns, named by a path behind a colon."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fdkernels as fdk


class Pair(NamedTuple):
    fine: Any
    coarse: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    fine: Any
    coarse: Any
    note: str = "kept"


class ModelOutput(OrderedDict):
    """As that of transformers: a dataclass that is a dict of its fields which are not None."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        _, _, *rest = super().__reduce__()
        return type(self), (), *rest


def model_output(fine: Any, coarse: Any) -> ModelOutput:
    made = ModelOutput()
    made["fine"], made["coarse"] = fine, coarse
    return made


class Slots:
    """An object that no rule can rebuild."""

    __slots__ = ("coarse", "fine")

    def __init__(self, fine: Any, coarse: Any) -> None:
        self.fine, self.coarse = fine, coarse


# How two maps are put into a structure, the paths that lead to them, and how they are taken out of it.
STRUCTURES: dict[str, tuple[Callable[[Any, Any], Any], tuple[str, str], Callable[[Any], Any]]] = {
    "tuple": (lambda f, c: (f, c), ("0", "1"), lambda o: o),
    "tuple from its end": (lambda f, c: (f, None, c), ("-3", "-1"), lambda o: (o[0], o[2])),
    "list": (lambda f, c: [f, c], ("0", "-1"), lambda o: o),
    "dict": (lambda f, c: {"f": f, "c": c}, ("f", "c"), lambda o: (o["f"], o["c"])),
    "dict of integers": (lambda f, c: {0: f, 1: c}, ("0", "1"), lambda o: (o[0], o[1])),
    "dict with dots": (
        lambda f, c: {"layer.0": f, "layer": {"1": c}},
        ("layer.0", "layer.1"),
        lambda o: (o["layer.0"], o["layer"]["1"]),
    ),
    "defaultdict": (
        lambda f, c: defaultdict(list, f=[f], c=[c]),
        ("f.0", "c.0"),
        lambda o: (o["f"][0], o["c"][0], o["new"].append(1))[:2],
    ),
    "named tuple": (Pair, ("fine", "1"), lambda o: (o.fine, o.coarse)),
    "dataclass": (Frozen, ("fine", "coarse"), lambda o: (o.fine, o.coarse, {"kept": 1}[o.note])[:2]),
    "ModelOutput": (model_output, ("fine", "coarse"), lambda o: (o.fine, o["coarse"])),
    "nested": (
        lambda f, c: Frozen({"maps": [Pair(f, None), (c,)]}, 1),
        ("fine.maps.0.fine", "fine.maps.-1.0"),
        lambda o: (o.fine["maps"][0].fine, o.fine["maps"][1][0]),
    ),
    "object": (lambda f, c: types.SimpleNamespace(f=f, c=[c]), ("f", "c.0"), lambda o: (o.f, o.c[0])),
    "object with slots": (Slots, ("fine", "coarse"), lambda o: (o.fine, o.coarse)),
}
CANNOT_BE_REBUILT = {"object", "object with slots"}
each = pytest.mark.parametrize("kind", STRUCTURES)


class Encoder(nn.Module):
    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 4, 3, padding=1)
        self.coarse = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.make = make

    def forward(self, images: Tensor) -> Any:
        fine = self.fine(images)
        return self.make(fine, self.coarse(fine))


class Net(nn.Module):
    """An encoder that returns a structure, and a head that takes it apart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make, _, self.take = STRUCTURES[kind]
        self.encoder, self.head = Encoder(make), nn.Conv2d(10, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine, coarse = self.take(self.encoder(images))
        return self.head(torch.cat([fine, nn.functional.interpolate(coarse, scale_factor=2)], 1))


def images() -> Tensor:
    return torch.randn(2, 1, 8, 8)


@each
def test_paths_name_the_tensors_of_a_structure(kind):
    net, x = Net(kind), images()
    fine, coarse = STRUCTURES[kind][1]
    with fdk.FeatureTaps(net, [f"encoder:{coarse}", "encoder.fine", f"encoder:{fine}"]) as taps:
        net(x)
        first, second, third = taps.features
    assert first.shape == (2, 6, 4, 4)
    assert third is second


@each
def test_fused_taps_within_a_structure_give_the_gradients_of_plain_ones(kind):
    net, x, mask = Net(kind).double(), images().double(), torch.rand(2, 8, 8)
    names = [f"encoder:{path}" for path in STRUCTURES[kind][1]]
    results, tapped = [], []
    for fused in (False, True):
        with fdk.FeatureTaps(net, names, fused=fused) as taps:
            seen = []
            handle = net.head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            out = net(x)
            handle.remove()
            tapped.append([type(features.grad_fn).__name__ for features in taps.features])
            loss = fdk.feature_discrepancy_loss(taps if fused else taps.features, mask, eps=0.1)
        results.append(torch.autograd.grad(out.square().mean() + loss, list(net.parameters())))
        assert seen[0].grad_fn is not None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    fuses = kind not in CANNOT_BE_REBUILT
    assert tapped == [["ConvolutionBackward0"] * 2, ["TapBackward" if fuses else "ConvolutionBackward0"] * 2]


@each
def test_the_network_goes_on_with_a_structure_of_the_same_type_and_the_first_is_left_alone(kind):
    net = Net(kind)
    before: list[Any] = []
    after: list[Any] = []
    net.encoder.register_forward_hook(lambda *arguments: before.append(arguments[2]))
    fine = STRUCTURES[kind][1][0]
    with fdk.FeatureTaps(net, [f"encoder:{fine}"], fused=True) as taps:
        net.encoder.register_forward_hook(lambda *arguments: after.append(arguments[2]))
        net(images())
    assert type(after[0]) is type(before[0])
    assert net.take(after[0])[0] is taps.features[0]
    assert net.take(after[0])[1] is net.take(before[0])[1]
    assert (net.take(before[0])[0] is taps.features[0]) == (kind in CANNOT_BE_REBUILT)


@pytest.mark.parametrize("kind", ["tuple from its end", "list", "dict", "named tuple", "dataclass", "nested"])
def test_paths_compile_into_one_graph(kind):
    net, x = Net(kind), images()
    names = [f"encoder:{path}" for path in STRUCTURES[kind][1]]
    torch.compiler.reset()
    fast = torch.compile(net, backend="aot_eager", fullgraph=True)
    with fdk.FeatureTaps(fast, names) as taps:
        for _ in range(2):
            fast(x)
            torch.testing.assert_close(taps.features[0], net.encoder.fine(x))


def test_a_structure_without_a_path_is_refused_with_the_names_it_could_have():
    net = Net("nested")
    message = (
        r"must return one tensor, got Frozen from 'encoder'; name one of its tensors: "
        r"'encoder:fine\.maps\.0\.fine' \[2, 4, 8, 8\], 'encoder:fine\.maps\.1\.0' \[2, 6, 4, 4\]$"
    )
    with fdk.FeatureTaps(net, ["encoder"]), pytest.raises(TypeError, match=message):
        net(images())
    message = r"got list from 'encoder:fine\.maps'; name .*: 'encoder:fine\.maps\.0\.fine' \[2"
    with fdk.FeatureTaps(net, ["encoder:fine.maps"]), pytest.raises(TypeError, match=message):
        net(images())
    with (
        fdk.FeatureTaps(net, ["encoder:coarse"]),
        pytest.raises(TypeError, match="got int from 'encoder:coarse'; no tensor was found in it"),
    ):
        net(images())


@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_names_that_the_error_lists_can_be_tapped(kind):
    net = Net(kind)
    with fdk.FeatureTaps(net, ["encoder"]), pytest.raises(TypeError) as error:
        net(images())
    names = [part for part in str(error.value).split("'") if part.startswith("encoder:")]
    if kind == "object with slots":
        assert names == []
        return
    with fdk.FeatureTaps(net, names) as taps:
        net(images())
        assert [features.shape[1] for features in taps.features] == [4, 6]


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("tuple", "2", r"the tuple that the submodule returns there has no '2'; it has '0', '1'$"),
        ("list", "-3", "the list that .* has no '-3'; it has '0', '1'"),
        ("list", "fine", "the list that .* has no 'fine'; it has '0', '1'"),
        ("tuple", "count", "has no 'count'"),
        ("dict", "x", "the dict that .* has no 'x'; it has 'f', 'c'"),
        ("named tuple", "middle", "the Pair that .* has no 'middle'; it has 'fine', 'coarse'"),
        ("dataclass", "middle", "the Frozen that .* has no 'middle'; it has 'fine', 'coarse', 'note'"),
        ("nested", "fine.maps.0.x", "the Pair that .* has no 'x'; it has 'fine', 'coarse'"),
        ("object", "x", "the SimpleNamespace that .* has no 'x'; it has 'f', 'c'"),
        ("tuple", "0.0", "the Tensor that .* has no '0'; it is a tensor itself"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_the_keys_there_are(kind, path, message):
    net = Net(kind)
    name = f"encoder:{path}"
    with (
        fdk.FeatureTaps(net, [name]),
        pytest.raises(ValueError, match=f"names must lead to a tensor, but '{name}' does not: .*{message}"),
    ):
        net(images())


def test_wrong_names_with_a_path_are_refused_at_once():
    net = Net("tuple")
    with pytest.raises(ValueError, match=r"got 'encodr:0', which it does not have; did you mean 'encoder"):
        fdk.FeatureTaps(net, ["encodr:0"])
    with pytest.raises(ValueError, match=r"'encoder:' ends with it, take 'encoder' or, say, 'encoder:0'"):
        fdk.FeatureTaps(net, ["encoder:"])


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["plain", "wrapped"])
def test_the_network_itself_can_be_tapped(wrap):
    net = Net("tuple")
    wrapped = wrap(net)
    with fdk.FeatureTaps(wrapped, ["", "encoder:0"], fused=True) as taps:
        for _ in range(2):
            out = wrapped(images())
            assert taps.features[0] is out
    wrapped = wrap(net.encoder)
    with fdk.FeatureTaps(wrapped, [":1", ":0"]) as taps:
        for _ in range(2):
            fine, coarse = wrapped(images())
            assert taps.features[0] is coarse
            assert taps.features[1] is fine


def test_a_change_in_place_of_a_part_is_refused_with_what_to_tap_instead():
    class InPlace(Net):
        def __init__(self) -> None:
            super().__init__("tuple")
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.encoder(x)[0])

    net = InPlace()
    with fdk.FeatureTaps(net, ["encoder:0"]) as taps:
        net(images())
        with pytest.raises(RuntimeError, match=r"the output of 'encoder:0' was modified .* tap 'act'"):
            _ = taps.features
    with fdk.FeatureTaps(net, ["act", "encoder:1"]) as taps:
        net(images())
        assert taps.features[0].min() >= 0


def test_a_submodule_may_hold_a_colon_in_its_name():
    net = nn.Sequential()
    net.add_module("a:b", nn.Conv2d(1, 4, 3))
    with fdk.FeatureTaps(net, ["a:b"]) as taps:
        net(images())
        assert taps.features[0].shape == (2, 4, 6, 6)


def test_an_object_that_refers_to_what_holds_it_and_to_much_else_is_listed_once():
    class Circular(Net):
        def forward(self, x: Tensor) -> Any:
            out = types.SimpleNamespace(maps=self.encoder(x), torch=torch, net=self)
            out.shared = [types.SimpleNamespace(up=out, maps=out.maps) for _ in range(40)]
            return out

    net = Circular("tuple")
    message = (
        r"got SimpleNamespace from ''; name one of its tensors: ':maps\.0' \[.*\], ':maps\.1' \[2, 6, 4, 4\]$"
    )
    with fdk.FeatureTaps(net, [""]), pytest.raises(TypeError, match=message):
        net(images())
