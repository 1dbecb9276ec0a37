"""Records that somebody edited: whatever JSON stands in them is taken, done anew or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_context

from maehpc import files
from maehpc.devices import MOST_THREADS, set_threads
from maehpc.errors import InputError
from maehpc.stages.context import StageFolder, vouched_files
from maehpc.stages.inputs import stage_output
from maehpc.stages.provenance import recorded_runs, recorded_threads
from maehpc.stages.verify import verify_results

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def record_with(value: Any) -> st.SearchStrategy[Any]:
    """Any JSON in place of a record, of what it holds, or of what that holds."""
    return st.sampled_from([value, {"files": value}, {"files": {"classifier.safetensors": value}}])


@given(ANYTHING.flatmap(record_with))
def test_a_stages_record_vouches_for_files_or_for_nothing(record: Any) -> None:
    with TemporaryDirectory() as folder:
        context = tiny_context(Path(folder))
        stage = context.experiment.stage("finetune", "digits")
        files.write_json(context.experiment.recipe, {})
        stage.mkdir(parents=True)
        (stage / "done.json").write_text(json.dumps(record))  # with NaN and Infinity, which Python reads too
        digest = record.get("digest", "") if isinstance(record, dict) else ""
        assert StageFolder(stage, digest).result() is None  # no file is there
        with pytest.raises(InputError, match=r"holds no finished finetune|does not match the digest"):
            stage_output(context, "finetune", "digits", "classifier.safetensors")
        assert any("finetune/digits" in problem["path"] for problem in verify_results(Path(folder)).problems)


@pytest.mark.parametrize(
    "found",
    [
        *(None, 3, "text", [], {}, {"a.safetensors": 1}),
        *({"a.safetensors": "", name: ""} for name in ("", "/", "/etc/passwd", "..", "../a", "b/c", "\0", "x" * 300)),
    ],
)
def test_what_vouches_for_nothing(found: Any) -> None:
    assert vouched_files({"digest": "", "files": found}) is None


def runs_with(value: Any) -> st.SearchStrategy[Any]:
    """Any JSON in place of the file, of its runs, of a run, of its machine, or of the threads."""
    return st.sampled_from(
        [
            value,
            {"runs": value},
            {"runs": [value]},
            {"runs": [{"machine": value}]},
            {"runs": [{"machine": {"threads": value}}]},
        ]
    )


@given((ANYTHING | st.integers(min_value=-2)).flatmap(runs_with))
def test_threads_are_taken_from_a_record_or_are_unknown(record: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "provenance.json"
        path.write_text(json.dumps(record))
        try:
            threads = recorded_threads(path)
        except InputError as error:
            assert str(path) in str(error)
            assert "restore" in str(error)
            return
        assert threads is None or 0 < threads <= MOST_THREADS
        assert all(isinstance(run, dict) for run in recorded_runs(path))


def test_more_threads_than_any_machine_has_are_refused() -> None:
    with pytest.raises(InputError, match=f"threads {10**30}: {MOST_THREADS} is the most"):
        set_threads(10**30)
