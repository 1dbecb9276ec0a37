"""Checkpoints: whole or absent, checked, passed over when damaged, nothing executed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from maehpc.errors import RunError
from maehpc.training.checkpoints import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    Checkpoint,
    DamagedError,
    list_checkpoints,
    newest_whole,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    save_checkpoint,
)


def state(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(step, {"w": torch.randn(5, 3, generator=generator)}, {"0.exp_avg": torch.ones(2) * step})


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(7), "digest", keep=2)
    found, digest = read_checkpoint(tmp_path / "step-00000007")
    assert (found.step, digest) == (7, "digest")
    assert torch.equal(found.model["w"], state(7).model["w"])
    assert torch.equal(found.optimizer["0.exp_avg"], state(7).optimizer["0.exp_avg"])


def test_the_newest_are_kept_in_the_order_of_steps_not_of_names(tmp_path: Path) -> None:
    for step in (5, 99999999, 100000000):
        save_checkpoint(tmp_path, state(step), "digest", keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    found = newest_whole(tmp_path, "digest", pytest.fail)
    assert found is not None
    assert found.step == 100000000


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "empty": lambda path: truncate(path, 0),
    "half": lambda path: truncate(path, path.stat().st_size // 2),
    "ten bytes short": lambda path: truncate(path, path.stat().st_size - 10),
    "first bit": lambda path: flip(path, 0),
    "last bit": lambda path: flip(path, -1),
    "missing": lambda path: path.unlink(),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"step": 2})),
}


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, MANIFEST])
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_told_and_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), "digest", keep=2)
    newest = tmp_path / "step-00000002"
    DAMAGES[damage](newest / name)
    with pytest.raises(DamagedError):
        read_checkpoint(newest)
    told: list[str] = []
    found = newest_whole(tmp_path, "digest", told.append)
    assert found is not None
    assert found.step == 1
    assert len(told) == 1
    assert "step-00000002" in told[0]


def test_no_damaged_checkpoint_stands_in_the_way_of_a_new_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), "digest", keep=2)
    truncate(tmp_path / "step-00000001" / MODEL, 3)
    save_checkpoint(tmp_path, state(1), "digest", keep=2)
    assert read_checkpoint(tmp_path / "step-00000001")[0].step == 1


def test_checkpoints_that_were_refused_do_not_push_out_new_ones(tmp_path: Path) -> None:
    for step in (1000, 2000):
        save_checkpoint(tmp_path, state(step), "theirs", keep=2)
    for step in (100, 200, 300):
        save_checkpoint(tmp_path, state(step), "ours", keep=2)
    found = newest_whole(tmp_path, "ours", lambda sentence: None)
    assert found is not None
    assert found.step == 300
    assert [path.name for path in list_checkpoints(tmp_path)][:2] == ["step-00000200", "step-00000300"]


def test_a_stray_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), "d", keep=2)
    (tmp_path / "step-00000002 (copy)").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_another_recipes_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), "theirs", keep=2)
    told: list[str] = []
    assert newest_whole(tmp_path, "ours", told.append) is None
    assert "another recipe" in told[0]


def test_a_refused_write_leaves_the_older_checkpoint_and_no_leftover(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), "digest", keep=1)
    blocked = Checkpoint(2, {"w": torch.zeros(1)}, {})
    (tmp_path / "elsewhere").write_text("a file where a folder is needed")
    with pytest.raises(RunError, match="elsewhere"):
        save_checkpoint(tmp_path / "elsewhere" / "checkpoints", blocked, "digest", keep=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["elsewhere", "step-00000001"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_bitwise(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def steps(model: nn.Linear, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(step))).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = nn.Linear(4, 3)
    halves = nn.Linear(4, 3)
    halves.load_state_dict(whole.state_dict())
    first = kind(halves.parameters(), lr=0.01, **options)
    steps(whole, kind(whole.parameters(), lr=0.01, **options), 0, 6)
    steps(halves, first, 0, 3)
    save_checkpoint(tmp_path, Checkpoint(3, dict(halves.state_dict()), optimizer_tensors(first)), "d", keep=1)

    found, _ = read_checkpoint(tmp_path / "step-00000003")
    resumed = nn.Linear(4, 3)
    resumed.load_state_dict(found.model)
    second = kind(resumed.parameters(), lr=0.01, **options)
    restore_optimizer(second, found.optimizer)
    steps(resumed, second, 3, 6)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
