"""FeatureDiscrepancyLoss: copies share its process group, files leave it out and say so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fdkernels as fdk

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Iterator[Any]:
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


PICKLES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_file,
}
FEATURES, MASK = torch.randn(3, 4, 8, 8), torch.rand(3, 8, 8)


def make(group: Any) -> fdk.FeatureDiscrepancyLoss:
    return fdk.FeatureDiscrepancyLoss(1, alpha_init=0.5, group=group, exchange="shuffle")


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda crit: AveragedModel(crit).module])
def test_a_copy_shares_the_group(group, how):
    crit = make(group)
    twin = how(crit)
    assert twin.group is crit.group is group
    pairing = torch.tensor([1, 2, 0])
    torch.testing.assert_close(twin(FEATURES, MASK, pairing=pairing), crit(FEATURES, MASK, pairing=pairing))


def test_a_deep_copy_has_parameters_of_its_own(group):
    holder = nn.ModuleDict({"one": make(group), "other": make(None)})
    holder["same"] = holder["one"]
    twin = copy.deepcopy(holder)
    assert twin["same"] is twin["one"]
    with torch.no_grad():
        twin["one"].alpha.fill_(0.25)
    assert holder["one"].alpha.item() == 0.5
    assert twin["other"].group is None


@pytest.mark.parametrize("how", PICKLES)
def test_a_file_leaves_the_group_out_and_a_call_says_so(group, how):
    crit = make(group)
    twin = PICKLES[how](nn.Sequential(crit))[0]
    assert crit.group is group
    assert twin.group is None
    with pytest.raises(RuntimeError, match=r"loaded from a pickle, which cannot hold the .*crit\.group = "):
        twin(FEATURES, MASK)
    assert twin(FEATURES, MASK, group=group).isfinite()
    again = copy.deepcopy(twin)
    for value in (group, None):
        again.group = value
        assert again(FEATURES, MASK).isfinite()
        assert again.group is value


@pytest.mark.parametrize("how", PICKLES)
def test_a_criterion_without_a_group_goes_through_a_file_as_it_is(how):
    crit = make(None)
    twin = PICKLES[how](crit)
    pairing = torch.tensor([1, 2, 0])
    torch.testing.assert_close(twin(FEATURES, MASK, pairing=pairing), crit(FEATURES, MASK, pairing=pairing))
