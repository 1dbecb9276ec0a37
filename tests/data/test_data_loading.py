from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from maehpc.data import Pack, open_split, prepare
from maehpc.data.loading import ResidentSplit, StreamedSplit
from maehpc.recipes import DataSettings

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture
def pack(arrays, save_npz, tmp_path: Path) -> Pack:
    return prepare(str(save_npz(arrays)), 28, tmp_path)


def test_the_limit_is_in_bytes_and_inclusive(pack: Pack):
    size = 30 * 6 * 5 * 3
    assert isinstance(open_split(pack, "train", DataSettings(resident_bytes=size), CPU), ResidentSplit)
    assert isinstance(open_split(pack, "train", DataSettings(resident_bytes=size - 1), CPU), StreamedSplit)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident_bytes", [1, 1 << 30])
def test_batches_are_the_pack_s_images(pack: Pack, arrays, resident_bytes: int, device: str):
    settings = DataSettings(resident_bytes=resident_bytes)
    for split in ("train", "val", "test"):
        opened = open_split(pack, split, settings, torch.device(device))
        indices = torch.randperm(len(opened), generator=torch.Generator().manual_seed(0))
        batch = opened.batch(indices)
        assert batch.dtype == torch.uint8
        assert batch.device.type == device
        assert batch.is_contiguous()
        expected = arrays[f"{split}_images"][indices.numpy()].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(batch.cpu().numpy(), expected)
        assert opened.labels.dtype == torch.int64
        assert opened.labels.device.type == device
        np.testing.assert_array_equal(opened.labels.cpu().numpy(), arrays[f"{split}_labels"][:, 0])
        assert len(opened) == len(expected)


@pytest.mark.parametrize("resident_bytes", [1, 1 << 30])
def test_edges(pack: Pack, resident_bytes: int):
    split = open_split(pack, "val", DataSettings(resident_bytes=resident_bytes), CPU)
    assert split.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 6, 5)
    assert torch.equal(split.batch(torch.tensor([2, 2]))[0], split.batch(torch.tensor([2]))[0])
    for outside in (-1, 6):
        with pytest.raises(IndexError, match="holds images 0 to 5"):
            split.batch(torch.tensor([0, outside]))


def test_a_batch_is_the_caller_s_own(pack: Pack):
    split = open_split(pack, "val", DataSettings(), CPU)
    before = split.batch(torch.tensor([0])).clone()
    split.batch(torch.tensor([0])).zero_()
    assert torch.equal(split.batch(torch.tensor([0])), before)
    assert before.any()
