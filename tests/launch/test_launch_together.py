"""Jobs that are one pool for several experiments: each of those knows them."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launch_jobs import job_record, new_job, row, start
from real_jobs import accept, ended
from submit_jobs import kill_with_ranks, request
from tiny import tiny_recipe

from maehpc.errors import InputError, MaehpcError
from maehpc.experiment import Experiment
from maehpc.launch import chain, control, local, plan
from maehpc.launch.control import cancel, resume
from maehpc.launch.named import Meant, find, find_jobs, jobs_below, newest_job
from maehpc.launch.record import Heartbeat, JobFolder
from maehpc.launch.relations import superseded, worth_showing
from maehpc.launch.snapshot import Snapshot, take_snapshot
from maehpc.launch.states import State
from maehpc.launch.status import Row
from maehpc.launch.words import parts, together

NAMES = ("a", "b", "c")
RECIPE = tiny_recipe().model_dump(mode="json")


def pool(root: Path, *names: str, numbers: dict[str, int] | None = None, **changes: Any) -> JobFolder:
    """A pool for several experiments, in the folder of the first."""
    also = dict.fromkeys(names[1:], changes.pop("recipe", RECIPE))
    return new_job(root, names[0], "explain", also=also, numbers=numbers or {}, **changes)


def meant(word: str, results: Path) -> list[JobFolder]:
    """The jobs of a word; none where it means nothing."""
    try:
        return find_jobs(word, results)
    except InputError:
        return []


# Names


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sets(st.sampled_from(NAMES), min_size=1).map(lambda names: ("explain", tuple(sorted(names)))),
            st.sampled_from(NAMES).map(lambda name: ("pretrain", (name,))),
        ),
        max_size=8,
    )
)
@example([("explain", ("b", "c")), ("explain", ("a", "c")), ("explain", ("a", "c")), ("pretrain", ("c",))])
def test_jobs_of_an_experiment_come_as_they_were_submitted(submissions: list[tuple[str, tuple[str, ...]]]) -> None:
    with TemporaryDirectory() as folder:
        results = Path(folder)
        one = request(results)
        made: list[tuple[str, tuple[str, ...], JobFolder]] = []
        for stage, names in submissions:
            members = tuple(replace(one.members[0], experiment=Experiment(results / name)) for name in names)
            wish = replace(one, stage=stage, members=members[:1], also=members[1:])
            (step,) = plan.steps_of(wish, Snapshot(results / ".code", "0" * 64))
            (job,) = chain._create(wish, step, (), chain._Made())
            assert chain._difference(job.record(), step.records[0]) is None  # the same submission is met again
            made.append((stage, names, job))
        for name in NAMES:
            mine = [(stage, job) for stage, names, job in made if name in names]
            assert meant(name, results) == [job for _, job in mine]
            assert meant(f"{name}/explain", results) == [job for stage, job in mine if stage == "explain"][-1:]
            for number, (stage, job) in enumerate(mine, 1):
                assert meant(f"{name}/{number}", results) == meant(f"{name}/{number:04d}-{stage}", results) == [job]
            assert meant(f"{name}/{len(mine) + 1}", results) == []


def test_a_dry_run_counts_pools_too(tmp_path: Path) -> None:
    results = tmp_path / "results"
    pool(results, "a", "study", numbers={"study": 3})
    (shown,) = plan.preview(request(results))
    assert shown.label == "study/0004-pretrain"
    wish = request(results)
    (step,) = plan.steps_of(wish, Snapshot(results / ".code", "0" * 64))
    (job,) = chain._create(wish, step, (), chain._Made())
    assert job.label == shown.label


def test_a_pool_is_found_by_the_folder_of_each_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    before = new_job(results, "b", "finetune")
    both = pool(results, "a", "b", "c", numbers={"b": 2, "c": 1})
    after = new_job(results, "d", "finetune")
    (results / "c").mkdir()  # has no jobs of its own
    (results / "e" / "ledger").mkdir(parents=True)
    assert find(str(results / "b"), tmp_path / "elsewhere") == Meant((before, both), "b")
    assert find(str(results / "c"), tmp_path / "elsewhere") == Meant((both,), "c")
    assert find(str(both.path), results) == Meant((both,), None)
    assert find(str(results), results) == Meant((both, before, after), None)
    assert jobs_below(results) == [both, before, after]
    monkeypatch.chdir(results / "c")
    assert find(".", results) == Meant((both,), "c")
    monkeypatch.chdir(tmp_path)
    assert find("results/c", Path("results")) == Meant((both,), "c")
    assert newest_job("b", results) == both
    for word in ("e", "e/explain", "c/2", "c/finetune", "b/0001-explain", str(results / "e")):
        assert meant(word, results) == [], word


def test_a_pool_without_numbers_is_older_than_what_has_one(tmp_path: Path) -> None:
    own = new_job(tmp_path, "b", "explain")
    old, older = pool(tmp_path, "a", "b"), pool(tmp_path, "a", "b")
    assert find_jobs("b", tmp_path) == [old, older, own]
    assert find_jobs("b/explain", tmp_path) == [own]


def test_an_experiment_called_nearly_so_is_named_though_its_only_job_lies_elsewhere(tmp_path: Path) -> None:
    pool(tmp_path, "first", "second", numbers={"second": 1})
    with pytest.raises(InputError, match=r"there is no job 'secund/1'.* second"):
        find_jobs("secund/1", tmp_path)


def test_a_damaged_record_hides_no_other_job(tmp_path: Path) -> None:
    bad, good = pool(tmp_path, "a", "b", numbers={"b": 1}), pool(tmp_path, "a", "b", numbers={"b": 2})
    (bad.path / "job.json").write_text("{")
    assert find_jobs("b", tmp_path) == [good]
    assert find_jobs("a", tmp_path) == [bad, good]


# Status


def test_a_pool_is_replaced_once_every_experiment_has_a_later_job(tmp_path: Path) -> None:
    both = row(pool(tmp_path, "a", "b", numbers={"b": 2}), State.FAILED)
    earlier = row(new_job(tmp_path, "b", "explain"), State.DONE)
    of_a = row(new_job(tmp_path, "a", "explain"), State.DONE)
    assert superseded([both, earlier, of_a]) == {earlier.job.path}
    assert worth_showing([both, earlier, of_a]) == [both]
    assert superseded([both, earlier, of_a], "a") == {both.job.path}
    assert superseded([both, earlier, of_a], "b") == {earlier.job.path}
    other = row(pool(tmp_path, "c", "b", numbers={"b": 3}, recipe={**RECIPE, "seed": 7}), State.DONE)
    assert superseded([both, of_a, other]) == set()
    of_b = row(pool(tmp_path, "c", "b", numbers={"b": 4}), State.DONE)
    assert superseded([of_b, both, of_a]) == {both.job.path}
    assert worth_showing([both, of_a, of_b]) == []


def test_who_shares_a_pool_in_words(tmp_path: Path) -> None:
    assert together(None) == together(job_record(tmp_path, stage="explain")) == ""
    two = pool(tmp_path, "a", "b").record()
    assert together(two) == "one pool explains a and b"
    assert together(two, ["b"]) == "one pool explains b and a"
    six = pool(tmp_path, *"abcdef").record()
    assert together(six) == "one pool explains a, b, c, d, e and f"
    many = pool(tmp_path, *"abcdefgh").record()
    assert together(many, ["h"]) == "one pool explains h, a, b, c, d and 3 more"


def test_progress_of_the_experiments_that_were_asked_for(tmp_path: Path) -> None:
    beat = Heartbeat(
        sequence=1,
        phase="explain",
        parts={"a/digits": (1, 10), "b/digits": (2, 10), "b/retina": (3, 30), "bb/digits": (4, 10)},
        rates={"b/digits": 4.0},
        failures={"a/digits": 1, "b/retina": 2},
    )
    running = row(pool(tmp_path, "a", "b", "bb"), State.RUNNING, beat)
    of_a, of_b, of_bb = (
        ["a/digits 1/10, 1 failure"],
        ["b/digits 2/10, 4 images/s, 0:00:02 left", "b/retina 3/30, 2 failures"],
        ["bb/digits 4/10"],
    )
    assert parts(running) == [*of_a, *of_b, *of_bb]
    assert (parts(running, ["a"]), parts(running, ["b"]), parts(running, ["bb"])) == (of_a, of_b, of_bb)
    assert parts(running, ["a", "bb"]) == [*of_a, *of_bb]
    single = replace(running, job=new_job(tmp_path, "b", "explain"))
    single = replace(single, record=single.job.record())
    assert len(parts(single, ["b"])) == 4  # a data set of a single experiment may be a path
    alone = beat.model_copy(update={"parts": {}, "failures": {"b/retina": 2}})
    assert parts(replace(running, heartbeat=alone), ["a"]) == []
    assert parts(replace(running, heartbeat=alone), ["b"]) == ["b/retina, 2 failures"]


# Ending and going on


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    """A results folder of this machine's; controllers of its jobs and their ranks are ended afterwards."""
    yield tmp_path / "results"
    for job in jobs_below(tmp_path / "results"):
        for one in job.submissions():
            pid = local.controller_of(one.intent.token)
            if pid is not None:
                kill_with_ranks(pid)


def failed(job: JobFolder) -> JobFolder:
    """It has run on this host and failed."""
    accept(job, "1", "local")
    number = start(job, "1")
    path = job.path / "attempts" / f"{number:04d}.json"
    path.write_text(path.read_text().replace('"n1"', f'"{os.uname().nodename}"'))
    ended(job, "failed")
    return job


def test_ending_a_pool_ends_it_for_all_and_is_told_so(results: Path) -> None:
    both = pool(results, "a", "b", numbers={"b": 1}, profile={"kind": "local"})
    after = new_job(results, "b", "report", profile={"kind": "local"}, after=(str(both.path),))
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen([*words, token]) for token in ("pools-token", "reports-token")]
    try:
        for job, process, token in zip((both, after), processes, ("pools-token", "reports-token"), strict=True):
            accept(job, str(process.pid), "local", token)
        told: list[str] = []
        cancel(find_jobs("b/explain", results), results, told.append)
        assert [process.wait(10) for process in processes] == [-15, -15]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert both.cancelled and after.cancelled
    assert told == [
        "a/0001-explain: asked to end (it was waiting); one pool explains a and b, and ends for all of them",
        "b/0001-report: asked to end, since it waits for a job that will not succeed",
    ]


def test_resuming_an_experiment_passes_over_a_pool_whose_place_was_taken_there(results: Path) -> None:
    both = failed(pool(results, "a", "b", numbers={"b": 1}, profile={"kind": "local"}))
    again = failed(pool(results, "c", "b", numbers={"b": 2}, profile={"kind": "local"}))
    ended(again, "done")
    told: list[str] = []
    assert resume([both, again], results, told.append, every=True, of="b") == []
    assert told == ["there is nothing to resume: no job has failed, was cancelled, is held or unknown"]
    with pytest.raises(InputError, match="c/0001-explain is done"):
        resume(find_jobs("b/explain", results), results, told.append)


def test_a_pool_that_is_named_twice_is_resumed_once(results: Path) -> None:
    code = take_snapshot(results)
    both = failed(
        pool(
            results,
            *("a", "b"),
            numbers={"b": 1},
            profile={"kind": "local", "device": "cpu", "threads": 1},
            code=str(code.path),
            code_digest=code.digest,
            tasks_per_node=1,
            nodes=1,
        )
    )
    words = [sys.executable, "-m", "maehpc.cli.main", "resume", "b", "a", "--results", str(results)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    accepted = both.submissions()[-1].accepted
    assert accepted is not None
    assert done.stdout == (
        f"a/0001-explain: submitted again as job {accepted.job_id} (it was failed); one pool explains a and b\n"
    )
    assert len(both.submissions()) == 2


@contextmanager
def at_work(job: JobFolder) -> Iterator[JobFolder]:
    """A local job whose controller lives for the length of the block."""
    token = f"token-of-{job.label}-{uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", local.MODULE, str(job.path), token]
    )
    try:
        accept(job, str(process.pid), "local", token)
        yield job
    finally:
        process.kill()
        process.wait()


def test_a_pool_is_not_resumed_beside_a_job_that_explains_one_of_its_experiments(results: Path) -> None:
    here: dict[str, Any] = {"profile": {"kind": "local"}}
    both = failed(pool(results, "a", "b", numbers={"b": 1}, **here))
    told: list[str] = []

    def refusal(job: JobFolder, **words: Any) -> str:
        with pytest.raises(MaehpcError) as caught:
            resume([job], results, told.append, **words)
        assert told == [] and len(job.submissions()) == 1
        return str(caught.value)

    with at_work(new_job(results, "b", "explain", **here)) as own:
        accepted = own.submissions()[-1].accepted
        assert accepted is not None
        expected = (
            f"a/0001-explain would work on b/digits as b/0001-explain (job {accepted.job_id}, waiting) does already; "
            "wait for that one, or end it with `maehpc cancel b/0001-explain`"
        )
        assert refusal(both) == refusal(both, every=True, of="a") == expected
        done = subprocess.run(
            [sys.executable, "-m", "maehpc.cli.main", "resume", "a", "--results", str(results)],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr, done.stdout) == (2, f"maehpc: {expected}\n", "")
        # By its path, from elsewhere.
        with pytest.raises(InputError, match="would work on b/digits"):
            resume([both], results.parent / "elsewhere", told.append)
    assert "snapshot" in refusal(both)  # nothing stands in its way but that there is no code here
    for word, changes in {
        "another data set": {"recipe": {**RECIPE, "datasets": ["breastmnist"]}},
        "behind it": {"after": (str(both.path),)},
    }.items():
        with at_work(new_job(results, "b", "explain", **here, **changes)):
            assert "snapshot" in refusal(both), word
    with at_work(new_job(results, "b", "finetune", **here)), at_work(new_job(results, "c", "explain", **here)):
        assert "snapshot" in refusal(both)
    alone = failed(new_job(results, "b", "explain", **here))
    with at_work(pool(results, "c", "b", **here)):
        assert "would work on b/digits as c/0002-explain" in refusal(alone)


def test_nothing_that_explains_is_submitted_beside_a_pool_of_the_experiment(results: Path) -> None:
    def check(stage: str, **changes: Any) -> None:
        wish = request(results, stage, ("b",), **changes)
        chain._refuse_other_pools(wish, plan.steps_of(wish, Snapshot(results / ".code", "0" * 64)))

    both = pool(results, "a", "b", profile={"kind": "local"})
    with at_work(both):
        for stage in ("explain", "pipeline"):
            with pytest.raises(InputError, match="a/0001-explain explains b already"):
                check(stage)
        check("explain", overrides=("datasets=[breastmnist]",))
        check("explain", after=(both,))
        check("finetune")
    check("explain")


STATES = st.sampled_from([State.FAILED, State.DONE, State.WAITING, State.RUNNING, State.HELD, State.UNKNOWN])
JOBS = st.lists(
    st.tuples(
        st.sampled_from(["explain", "finetune"]),
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True),
        st.lists(st.sampled_from(["digits", "breastmnist", "mine.npz", "./mine.npz"]), min_size=1, max_size=2),
        st.sets(st.integers(0, 3)),
        STATES,
    ),
    min_size=2,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(JOBS)
def test_who_is_in_the_way_of_whom(jobs: list[tuple[str, list[str], list[str], set[int], State]]) -> None:
    with TemporaryDirectory() as folder:
        rows: list[Row] = []
        for stage, names, datasets, after, state in jobs:
            recipe = {**RECIPE, "datasets": datasets}
            before = tuple(str(rows[place].job.path) for place in after if place < len(rows))
            also = dict.fromkeys(names[1:], recipe)
            rows.append(row(new_job(Path(folder), names[0], stage, recipe=recipe, also=also, after=before), state))

        def waits(late: int, early: int) -> bool:
            return any(place == early or waits(place, early) for place in jobs[late][3] if place < late)

        def shared(one: int, other: int) -> bool:
            fills = [
                {(name, text.removeprefix("./")) for name in names for text in datasets}
                for _, names, datasets, *_ in (jobs[one], jobs[other])
            ]
            return jobs[one][0] == jobs[other][0] and bool(fills[0] & fills[1])

        for one in range(len(jobs)):
            expected = [
                other
                for other in range(len(jobs))
                if other != one
                and jobs[other][4] in (State.WAITING, State.RUNNING, State.HELD)
                and shared(one, other)
                and not waits(one, other)
                and not waits(other, one)
            ]
            if expected:
                with pytest.raises(InputError, match=f" as {rows[expected[0]].job.label} "):
                    control._refuse_beside_another(rows[one], rows)
            else:
                control._refuse_beside_another(rows[one], rows)
