"""A file of weights tells how many heads it was trained with, and another number is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_context

from maehpc.errors import InputError
from maehpc.models import read_metadata
from maehpc.stages.finetune import finetune
from maehpc.stages.preflight import check
from maehpc.stages.pretrain import pretrain


def test_weights_of_other_heads_are_refused_by_every_stage(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    pretrain(context, "digits")
    finetune(context, "digits")
    folder = context.experiment.stage("pretrain", "digits")
    files = {
        folder / "encoder.safetensors": {"kind": "encoder", "heads": "2"},
        folder / "mae.safetensors": {"kind": "mae", "heads": "2", "decoder_heads": "2"},
        context.experiment.stage("finetune", "digits") / "classifier.safetensors": {"kind": "classifier", "heads": "2"},
    }
    for path, said in files.items():
        assert read_metadata(path) == said
        for stage in ("finetune", "probe"):
            other = tiny_context(tmp_path, f"encoder.weights={path}", "encoder.heads=4", name="other")
            with pytest.raises(InputError, match=r"trained with 2 attention heads .* has 4; set encoder\.heads to 2"):
                check(other, [stage])
    other = tiny_context(tmp_path, f"pretrain.weights={folder / 'mae.safetensors'}", "pretrain.decoder.heads=1")
    with pytest.raises(InputError, match=r"set pretrain\.decoder\.heads to 2"):
        check(other, ["pretrain"])
