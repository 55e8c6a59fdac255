"""Every block of the page of recipes runs, trains α, and is short."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import fdkernels as fdk
from client_packages import client

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BLOCK = re.compile(
    r"^## (?P<title>[^\n]*)|^<!-- (?P<marks>[^\n]*) -->\n```python\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
CLIENTS = {"accelerate", "dynamic_network_architectures", "ignite", "monai", "segmentation_models_pytorch"}
CLIENTS |= {"timm", "torchvision", "transformers"}


class Recipe(NamedTuple):
    title: str
    marks: dict[str, list[str]]
    code: str


def recipes() -> list[Recipe]:
    text, title, found = PAGE.read_text(encoding="utf-8"), "", []
    for match in BLOCK.finditer(text):
        title = match["title"] or title
        if match["code"]:
            parts = (part.split(": ") for part in match["marks"].split("; "))
            marks = {key: values.split(", ") for key, values in parts}
            # The lines of the code are those of the page.
            found.append(
                Recipe(title, marks, "\n" * text.count("\n", 0, match.start("code")) + match["code"])
            )
    return found


RECIPES = recipes()
CASES = [
    pytest.param(recipe, id=recipe.title, marks=[pytest.mark.clients] if "needs" in recipe.marks else [])
    for recipe in RECIPES
    if "torchrun" not in recipe.marks
]


class Pictures(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return {"image": image, "mask": (image[:1] > 0.5).float()}


def what_a_reader_has() -> dict[str, Any]:
    """What `<!-- setup: ... -->` above a block may name."""
    return {
        "images": torch.rand(2, 3, 64, 64),
        "masks": (torch.rand(2, 1, 64, 64) > 0.5).float(),
        "classes": torch.randint(0, 4, (2, 64, 64)),
        "model": fdk.models.create("unet", in_channels=3, num_classes=1, base_channels=4),
        "dataset": Pictures(),
    }


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:(lightning|monai|timm|torch|ignite)")
def test_a_recipe_runs_and_trains_alpha(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in recipe.marks.get("needs", []):
        client(package)
    given = what_a_reader_has()
    names = {name: given[name] for name in recipe.marks["setup"]}
    exec(compile(recipe.code, str(PAGE), "exec"), names)
    crit = names["crit"]
    assert crit.layer_losses.isfinite().all()
    assert (crit.alpha > 0).all()


def test_recipes_are_short_and_say_what_they_need():
    titles = {recipe.title for recipe in RECIPES}
    assert len(RECIPES) > len(titles) > 9
    for recipe in RECIPES:
        assert len(recipe.code.strip().splitlines()) < 40, recipe.title
        imported = set(re.findall(r"^(?:import|from) (\w+)", recipe.code, re.MULTILINE))
        assert imported & CLIENTS <= set(recipe.marks.get("needs", [])), recipe.title


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_torchrun_keeps_one_alpha_on_all_ranks(tmp_path):
    (recipe,) = (recipe for recipe in RECIPES if "torchrun" in recipe.marks)
    (tmp_path / "train.py").write_text(recipe.code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]  # what `torchrun` calls
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", *recipe.marks["torchrun"]]
    for _ in range(3):
        run = subprocess.Popen(
            [*torchrun, *options, "train.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = run.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the ranks, too
            raise
        # On a busy machine a rank may abort in a thread of gloo as it exits, when all is done (torch 2.13).
        if "terminate called without an active exception" not in errors:
            break
    assert run.returncode == 0, output + errors
    ranks = re.findall(r"rank (\d): alpha (\[.*\])", output)
    assert sorted(rank for rank, _ in ranks) == ["0", "1"], output
    assert len({alpha for _, alpha in ranks}) == 1
    assert "[0.0" in ranks[0][1]
    assert "[0.0," not in ranks[0][1]
    assert "Warning" not in errors, errors
