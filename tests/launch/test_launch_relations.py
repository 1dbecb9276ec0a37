"""Of jobs that hang together: who can never start, who was replaced, who is shown."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch_jobs import new_job, row

from maehpc.launch.relations import stuck, superseded, worth_showing
from maehpc.launch.slurm_formats import SlurmJob
from maehpc.launch.status import Row


def test_what_is_shown_without_all(tmp_path: Path) -> None:
    def rows(*states: str, **changes: Any) -> list[Row]:
        name = uuid.uuid4().hex
        stages = changes.pop("stages", ["pretrain", "finetune", "explain", "report"])
        return [row(new_job(tmp_path, name, stage), said) for stage, said in zip(stages, states, strict=False)]

    going = rows("done", "running", "waiting")
    over = rows("done", "done", "cancelled")
    wanting = rows("failed", "unknown")
    repaired = rows("failed", "done", stages=["pretrain", "pretrain"])
    other = rows("failed", "done", stages=["pretrain", "finetune"])
    assert worth_showing(going) == going
    assert worth_showing(over) == []
    assert worth_showing(wanting) == wanting
    assert worth_showing(repaired) == []
    assert superseded(repaired) == {repaired[0].job.path}
    assert worth_showing(other) == other[:1]
    together = [*going, *over, *wanting]
    assert worth_showing(together) == [*going, *wanting]


def test_who_never_starts_by_itself(tmp_path: Path) -> None:
    failed = new_job(tmp_path)
    second = new_job(tmp_path, after=(str(failed.path),))
    third = new_job(tmp_path, after=(str(second.path),))
    other = new_job(tmp_path, after=(str(new_job(tmp_path).path),))
    never = replace(row(second, "waiting"), said=SlurmJob("2", "PENDING", "DependencyNeverSatisfied"))
    rows = [row(other, "waiting"), row(third, "waiting"), never, row(failed, "failed")]
    assert stuck(rows) == {second.path, third.path}
    assert stuck([rows[0], rows[1], rows[3]]) == set()
