"""Batch scripts: those of golden/, whole whatever stands in names and settings; what sbatch is told, and refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_jobs import job_record

from maehpc.errors import InputError
from maehpc.launch.profile import SlurmProfile, list_profiles, load_profile, parse_profile
from maehpc.launch.record import ArrayMember, JobRecord
from maehpc.launch.sbatch import clean_environment, refusal
from maehpc.launch.script import script_text

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = [name for name in list_profiles() if isinstance(load_profile(name), SlurmProfile)]
ROOT = Path("/shared/results")
CODE = ROOT / ".code" / "0123456789abcdef"
CONTAINER = {
    "kind": "apptainer",
    "image": "/shared/images/maehpc.sif",
    "mounts": ["/data:/data:ro"],
    "arguments": ["--no-home"],
    "host_python": "/usr/bin/python3",
}
APPTAINER: dict[str, Any] = {"gpus_per_node": 4, "device": "cuda"}
EVERYTHING: dict[str, Any] = {
    "partition": "a,b",
    "account": "abc",
    "qos": "long",
    "gpus_per_node": 4,
    "gpu_type": "a100",
    "gpu_request": "gres",
    "tasks_per_node": 2,
    "cpus_per_task": 8,
    "mem_per_gpu_gb": 60.5,
    "constraint": "[rack1|rack2]",
    "exclude": "n[1-3]",
    "nodelist": "n[4-9]",
    "reservation": "course",
    "exclusive": True,
    "modules": ["python/3.11", "cuda/12"],
    "setup": ['source "$HOME/venv/bin/activate"', "ulimit -c 0 # it's off"],
    "environment": {"A": "it's $HOME", "B": ""},
    "interface": "ib0",
    "scratch": "/local/$SLURM_JOB_ID",
    "requeue": {"enabled": False},
    "mail_user": "me@example.org",
    "mail_type": "END,FAIL",
    "sbatch": {"hint": "nomultithread", "nice": 5, "overcommit": True, "spread_job": False},
    "srun": ["--cpu-bind=cores"],
    "python": "/opt/py/bin/python",
}


def slurm(**fields: Any) -> SlurmProfile:
    profile = parse_profile({"kind": "slurm", **fields})
    assert isinstance(profile, SlurmProfile)
    return profile


def record(profile: SlurmProfile, **changes: Any) -> JobRecord:
    facts = {
        "nodes": profile.nodes,
        "tasks_per_node": profile.ranks_per_node,
        "time_min": profile.time_min,
        "profile": profile.model_dump(mode="json"),
        "code": str(CODE),
        "directory": "/home/me/study",
        **changes,
    }
    return job_record(ROOT, "study", **facts)


def golden_scripts() -> dict[str, str]:
    """Every golden file's name and what it should hold; the interpreter has the name of this one alone."""
    python = "/shared/venv/bin/python"
    job = ROOT / "study" / "jobs" / "0001-pretrain"
    scripts = {}
    for name in SHIPPED:
        profile = load_profile(name)
        assert isinstance(profile, SlurmProfile)
        scripts[name] = script_text(job, record(profile), profile, "TOKEN")
    mini = load_profile("mini")
    assert isinstance(mini, SlurmProfile)
    folders = tuple(str(ROOT / f"study-seed-{seed}" / "jobs" / "0002-finetune") for seed in range(3))
    of_array = record(mini, stage="finetune", array=ArrayMember(index=0, folders=folders))
    scripts["mini-array"] = script_text(Path(folders[0]), of_array, mini, "array-TOKEN", "aftercorr:12", 3)
    pool = job.with_name("0003-explain")
    of_pool = record(mini, stage="explain", workers_per_node=2, tasks_per_node=1)
    scripts["mini-pool"] = script_text(pool, of_pool, mini, "TOKEN")
    fewer = of_pool.model_copy(update={"min_nodes": 3})
    scripts["mini-pool-fewer"] = script_text(pool, fewer, mini, "TOKEN")
    apptainer, everything = slurm(**APPTAINER, container=CONTAINER), slurm(**EVERYTHING)
    scripts["apptainer"] = script_text(job, record(apptainer), apptainer, "TOKEN")
    inside = slurm(**APPTAINER, container={**CONTAINER, "after_inside": True})
    scripts["apptainer-inside"] = script_text(job, record(inside), inside, "TOKEN")
    scripts["everything"] = script_text(job, record(everything), everything, "TOKEN", "afterok:12:13")
    return {name: text.replace(sys.executable, python) for name, text in scripts.items()}


@pytest.mark.parametrize(
    "name", [*SHIPPED, "mini-array", "mini-pool", "mini-pool-fewer", "apptainer", "apptainer-inside", "everything"]
)
def test_the_scripts_are_those_of_the_golden_files(name: str) -> None:
    path, text = GOLDEN / f"{name}.sh", golden_scripts()[name]
    if os.environ.get("MAEHPC_GOLDEN") == "write":
        path.write_text(text)
    assert path.is_file() and path.read_text() == text, (
        f"{path} differs; if the new script is meant, run: MAEHPC_GOLDEN=write pytest {Path(__file__).name}"
    )
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(golden_scripts())


def options(text: str) -> dict[str, str]:
    """sbatch's options as it reads them."""
    found = {}
    for line in re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE):
        (word,) = shlex.split(line)
        name, _, value = word.removeprefix("--").partition("=")
        found[name] = value
    return found


def test_what_every_script_must_say() -> None:
    profile = slurm()
    text = script_text(ROOT / "study" / "jobs" / "0001-pretrain", record(profile), profile, "TOKEN")
    given = options(text)
    assert given["comment"] == "maehpc:TOKEN"
    assert given["signal"] == "USR2@120"
    assert given["open-mode"] == "append"
    assert "requeue" in given and "no-requeue" not in given
    assert not {"wckey", "partition", "account", "gpus-per-node", "mem", "dependency", "array"} & given.keys()
    assert "--kill-on-bad-exit=1" in text
    assert ".pkl" not in text and "submitit.core" not in text
    lines = text.splitlines()
    last = lines.index("# teardown")
    assert lines[last + 1] == "code=$?"
    assert lines[-1].startswith("exec ") and lines[-1].endswith('"$code"')
    assert all(
        not line or line.startswith("#") for line in lines[lines.index("export SUBMITIT_EXECUTOR=slurm") + 2 : last]
    )


@pytest.mark.slow
def test_the_environment_of_submitit_does_not_move_the_signal(tmp_path: Path) -> None:
    program = (
        "from maehpc.launch.script import script_text; import test_launch_script as t; p = t.slurm(); "
        "print(script_text(t.ROOT, t.record(p), p, 'x'))"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = os.environ | {"SUBMITIT_PREEMPT_SIGNAL": "USR1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert options(done.stdout)["signal"] == "USR2@120"


PRINTABLE = st.characters(exclude_characters="/%", exclude_categories=["Cc", "Cs", "Zl", "Zp"])
TEXT = st.text(PRINTABLE, min_size=1)
NAMES = TEXT.filter(lambda name: name.strip() != "" and not name.startswith("."))


@settings(deadline=None)
@given(name=NAMES, account=NAMES, comment=NAMES)
def test_what_sbatch_reads_is_what_was_meant(name: str, account: str, comment: str) -> None:
    profile = slurm(account=account, sbatch={"admin-comment": comment})
    job = ROOT / name / "jobs" / "0001-pretrain"
    text = script_text(job, record(profile, experiment=name), profile, "TOKEN")
    given = options(text)
    assert given["account"] == account
    assert given["admin-comment"] == comment
    assert given["output"] == f"{job}/logs/%j_0_log.out"
    assert re.fullmatch(r"maehpc-[A-Za-z0-9._-]*", given["job-name"])
    (srun,) = [line for line in text.split("\n") if line.startswith("srun ")]
    assert shlex.split(srun)[-1] == str(job)
    assert shlex.split(text.rstrip("\n").split("\n")[-1])[-2:] == [str(job), "$code"]


@settings(deadline=None, max_examples=25)
@given(name=NAMES, values=st.lists(NAMES, max_size=3), value=NAMES)
def test_the_shell_gives_the_ranks_what_was_meant(
    name: str, values: list[str], value: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The script runs in a real shell; only srun is another program, which writes down what it was given."""
    folder = tmp_path_factory.getbasetemp() / "shell"
    folder.mkdir(exist_ok=True)
    srun = folder / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\0" "$VALUE" "$PYTHONPATH" "$TMPDIR" "$@" > "${0%/*}/told"\nexit 7\n')
    srun.chmod(0o755)
    after = folder / "after"
    after.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "${0%/*}/ended"\nexit "${!#}"\n')
    after.chmod(0o755)
    profile = slurm(environment={"VALUE": value}, srun=values, scratch="/local/$USERS_OWN", python=str(after))
    job = ROOT / name / "jobs" / "0001-pretrain"
    text = script_text(job, record(profile, experiment=name), profile, "TOKEN")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "USERS_OWN": "mine", "PYTHONPATH": "/site"}
    done = subprocess.run(["bash"], input=text, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (7, "")
    told = (folder / "told").read_text().split("\0")[:-1]
    assert told[:3] == [value, f"{CODE}:/site", "/local/mine"]
    at = told.index("--kill-on-bad-exit=1")
    assert told[at + 1 :] == [*values, str(after), "-u", "-m", "maehpc.launch.worker", str(job)]
    assert (folder / "ended").read_text().split("\0")[:-1] == ["-m", "maehpc.launch.after", str(job), "7"]


def test_a_signal_to_the_shell_does_not_end_it_before_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/bash\ntouch {tmp_path}/began\nsleep 1\nexit 3\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "after").write_text('#!/bin/bash\nkill -TERM $$\necho "ended $4"\n')
    (tmp_path / "after").chmod(0o755)
    profile = slurm(python=str(tmp_path / "after"))
    text = script_text(ROOT, record(profile), profile, "TOKEN")
    script = tmp_path / "script.sh"
    script.write_text(text)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        assert shell.poll() is None
    shell.terminate()
    out, _ = shell.communicate(timeout=20)
    assert (out, shell.returncode) == ("ended 3\n", 0)


def test_a_path_that_no_container_can_mount_is_refused() -> None:
    for path in ("/a:b", "/a,b"):
        for kind in ("apptainer", "pyxis"):
            profile = slurm(container={"kind": kind, "image": "x"})
            with pytest.raises(InputError, match="colon"):
                script_text(ROOT, record(profile, results=path), profile, "TOKEN")


def test_sbatch_sees_nothing_of_an_allocation_around_it() -> None:
    profile = slurm(partition="gpu")
    text = script_text(ROOT, record(profile), profile, "TOKEN")
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "HOME": "/home/me"}
    dropped = dict.fromkeys(
        (
            *("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_MEM_PER_NODE", "SLURM_CONF_SERVER"),
            *("SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "SBATCH_PARTITION", "SBATCH_ARRAY_INX", "SBATCH_SIGNAL"),
            *("SBATCH_NO_REQUEUE", "SUBMITIT_EXECUTOR", "PMI_RANK", "PMIX_ID"),
        ),
        "x",
    )
    environment = {**kept, **dropped, "PYTHONPATH": f"{CODE}:/site:{CODE}"}
    assert clean_environment(environment, text, str(CODE)) == {**kept, "PYTHONPATH": "/site"}


POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("before", "failure", "expected"),
    [
        ("invalid partition specified: x", "Invalid partition name specified", ["--partition gpu", "sinfo"]),
        ("", "Invalid account or account/partition combination specified", ["--account abc", "sacctmgr"]),
        ("", "Invalid qos specification", ["--qos long"]),
        ("QOSMaxSubmitJobPerUserLimit", POLICY, ["quota of submitted jobs", "wait", "QOSMaxSubmitJobPerUserLimit"]),
        ("AssocMaxSubmitJobLimit", POLICY, ["quota of submitted jobs", "wait", "AssocMaxSubmitJobLimit"]),
        ("QOSMaxGRESPerJob", POLICY, ["quota", "--nodes", "QOSMaxGRESPerJob"]),
        ("", POLICY, ["quota", "--nodes"]),
        ("", "Requested time limit is invalid (missing or exceeds some limit)", ["--time 60 min"]),
        ("", "Requested node configuration is not available", ["--nodes 4", "--gpus-per-node 2"]),
        ("", "Node count specification invalid", ["--nodes 4"]),
        ("", "Invalid feature specification", ["constraint"]),
        ("Invalid generic resource (gres) specification", "", ["gpu_type"]),
        ("Memory specification can not be satisfied", "", ["mem_gb"]),
        ("", "Requested reservation is invalid", ["reservation"]),
        ("", "Job dependency problem", ["--after"]),
        ("", "Unable to contact slurm controller (connect failure)", ["does not answer", "nothing was submitted"]),
        ("", "Protocol authentication error", ["credential"]),
        ("", "User's group not permitted to use this partition", ["--partition gpu", "access"]),
        ("", "Something new", ["Something new", "refused"]),
    ],
)
def test_a_refusal_is_one_sentence_with_the_field_and_what_to_do(
    before: str, failure: str, expected: list[str]
) -> None:
    lines = [before, f"Batch job submission failed: {failure}" if failure else ""]
    told = "".join(f"sbatch: error: {line}\n" for line in lines if line)
    profile = slurm(partition="gpu", account="abc", qos="long", gpus_per_node=2, nodes=4)
    sentence = str(refusal(told, record(profile)))
    assert "\n" not in sentence
    for word in expected:
        assert word in sentence
