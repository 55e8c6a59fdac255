from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from fdkernels.segmentation.data import SegmentationDataset
from fdkernels.segmentation.data.monuseg import find, patient_of
from fdkernels.segmentation.data.polygons import fill_regions, read_regions
from fdkernels.segmentation.data.reading import load_pair, read_mask
from real_data import FOLDER, needs
from tiny_data import imagescope, make_tiny

REAL = FOLDER / "monuseg"
TRAINING, TEST = "MoNuSeg 2018 Training Data", "MoNuSegTestData"


@pytest.fixture
def root(tmp_path):
    return make_tiny("monuseg", tmp_path / "monuseg")


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("TCGA-A7-A13E-01Z-00-DX1", "TCGA-A7-A13E"),
        ("TCGA-HC-7209-01A-01-TS1", "TCGA-HC-7209"),
        ("TCGA-18-5592", "TCGA-18-5592"),
        ("TCGA-18", "TCGA-18"),
        ("slide_7", "slide_7"),
    ],
)
def test_the_patient_is_in_the_first_three_fields_of_the_barcode(name, patient):
    assert patient_of(name) == patient


def test_both_folders_of_the_download_are_found_together_or_alone(root):
    both = find(root).samples
    training, test = find(root / TRAINING).samples, find(root / TEST).samples
    assert both == training + test
    assert (len(training), len(test)) == (7, 3)
    assert {sample.image.parent.name for sample in training} == {"Tissue Images"}
    assert all(sample.masks == (sample.image.with_suffix(".xml"),) for sample in test)


def test_the_training_folders_can_be_beside_the_test_folder(root):
    for part in ("Tissue Images", "Annotations"):
        shutil.move(root / TRAINING / part, root / part)
    (root / TRAINING).rmdir()
    assert len(find(root).samples) == 10


def test_both_compressions_of_tiff_are_read(root):
    compressions = set()
    for sample in find(root).samples:
        with Image.open(sample.image) as image:
            compressions.add(image.info["compression"])
    assert compressions == {"tiff_lzw", "packbits"}


def test_an_annotation_without_a_polygon_is_a_problem(root):
    sample = find(root).samples[0]
    sample.masks[0].write_text(imagescope([np.zeros((2, 2))]), "utf-8")
    with pytest.raises(ValueError, match=f"{sample.image.name} has a mask without foreground"):
        find(root)


def test_a_bomb_among_the_annotations_is_rejected(root):
    sample = find(root).samples[0]
    bomb = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><Annotations>&y;</Annotations>'
    sample.masks[0].write_text(bomb, "utf-8")
    with pytest.raises(ValueError, match=f"{sample.masks[0].name} cannot be read, it defines entities"):
        find(root)


def test_nothing_is_written_beside_the_data(root):
    before = sorted(root.rglob("*"))
    SegmentationDataset(find(root).samples)[0]
    assert sorted(root.rglob("*")) == before


@pytest.fixture(scope="module")
def real():
    return find(REAL).samples


@needs("monuseg")
def test_the_real_images_are_found_in_both_forms(real):
    assert len(real) == len(list(REAL.rglob("*.tif"))) == len(list(REAL.rglob("*.xml")))
    for sample in real:
        assert sample.masks[0].stem == sample.image.stem
        assert sample.image.name.startswith(f"{sample.patient}-")


@needs("monuseg")
@pytest.mark.parametrize(
    ("patient", "regions"),
    [
        ("TCGA-CH-5767", 294),
        ("TCGA-B0-5710", 359),
        ("TCGA-A7-A13E", 314),
        ("TCGA-HT-8564", 249),
        ("TCGA-AO-A0J2", 356),
        ("TCGA-HC-7209", 325),
    ],
)
def test_the_real_annotations_hold_as_many_nuclei_as_counted(real, patient, regions):
    samples = [sample for sample in real if sample.patient == patient]
    for sample in samples or pytest.skip(f"{patient} is not in this subset"):
        assert len(read_regions(sample.masks[0])) == regions


@needs("monuseg")
def test_the_real_foreground_is_a_tenth_to_a_quarter_and_darker_than_the_rest(real):
    for sample in real:
        image, mask = load_pair(sample)
        inside = np.array(mask) > 0
        grey = np.array(image.convert("L"))
        assert image.size == (1000, 1000)
        assert 0.10 <= inside.mean() <= 0.25
        assert grey[~inside].mean() - grey[inside].mean() > 20


@needs("monuseg")
def test_the_real_masks_are_those_of_scikit_image_but_for_rounding(real):
    draw = pytest.importorskip("skimage.draw", reason="the extra demo is not installed")
    for sample in real:
        regions = read_regions(sample.masks[0])
        expected = np.zeros((1000, 1000), bool)
        for region in regions:
            rows, columns = draw.polygon(region.corners[:, 1], region.corners[:, 0], expected.shape)
            expected[rows, columns] = True
        mask = fill_regions(regions, (1000, 1000))
        assert np.array_equal(mask, read_mask(sample.masks[0], (1000, 1000)))
        assert np.count_nonzero(mask != expected) < 10  # pixel centres within an ulp of an outline
