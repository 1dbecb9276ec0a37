"""What doctor finds on this very machine, on broken ones made for the test, and the profiles it drafts."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from small_disks import small_disk
from tiny import SETTINGS

from maehpc.errors import InputError, RunError
from maehpc.experiment import Experiment
from maehpc.launch import doctor, probes, site
from maehpc.launch.probes import Finding, mount_of, results_folder
from maehpc.launch.profile import SlurmProfile, load_profile
from maehpc.launch.record import jobs_of
from maehpc.launch.site import Association, Rules
from maehpc.launch.slurm_formats import Partition

needs_slurm = pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm's commands are not installed")


def state_of(findings: list[Finding], name: str) -> str:
    (found,) = [finding for finding in findings if finding.name == name]
    assert bool(found.fix) == (found.state != "ok"), found
    return found.state


MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
server:/home /home nfs4 rw,vers=4.2,local_lock=none 0 0
mgs@o2ib:/work /home/projects/large\\040data lustre rw,localflock 0 0
tmpfs /scratch tmpfs rw 0 0
/dev/sdb1 /scratch xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind", "shared"),
    [
        ("/root", "ext4", False),
        ("/home/me/results", "nfs4", True),
        ("/home", "nfs4", True),
        ("/homes/me", "ext4", False),
        ("/home/projects/large data/me", "lustre", True),
        ("/home/projects/large", "nfs4", True),
        ("/scratch/me", "xfs", False),
    ],
)
def test_the_mount_a_folder_lies_on(folder: str, kind: str, shared: bool) -> None:
    found = mount_of(Path(folder), MOUNTS)
    assert (found.kind, found.is_shared) == (kind, shared)


def test_mounts_of_this_machine_are_read(tmp_path: Path) -> None:
    assert mount_of(Path("/proc/self")).kind == "proc"
    assert mount_of(tmp_path).kind != "unknown"


def test_a_good_results_folder_is_left_as_it_was(tmp_path: Path) -> None:
    results = tmp_path / "not" / "there"
    findings = list(results_folder(results, several_hosts=False))
    assert state_of(findings, "writing") == "ok"
    assert not doctor.blocking(findings)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_results_folder_blocks(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as mount:
        folder = mount("size=64k")
        findings = list(results_folder(folder / "results", several_hosts=True))
        assert (state_of(findings, "writing"), state_of(findings, "results")) == ("ok", "warning")
        assert "which is memory" in next(each.text for each in findings if each.name == "results")
        assert state_of(findings, "free space") == "warning"
        mount("ro")
        findings = list(results_folder(folder / "results", several_hosts=True))
        assert state_of(findings, "writing") == "problem" and doctor.blocking(findings)
        assert "read-only" in next(each.text.lower() for each in findings if each.name == "writing")


def test_a_local_disk_matters_only_beside_a_cluster(tmp_path: Path) -> None:
    if mount_of(tmp_path.resolve()).kind in {"tmpfs", *probes.NETWORK_FILE_SYSTEMS}:
        pytest.skip("the temporary folder is no local disk")
    assert state_of(list(results_folder(tmp_path, several_hosts=False)), "results") == "ok"
    assert state_of(list(results_folder(tmp_path, several_hosts=True)), "results") == "warning"


def test_python_and_packages() -> None:
    findings = list(probes.python())
    assert state_of(findings, "interpreter") == "ok"
    packages = next(each for each in findings if each.name == "packages")
    if packages.state == "ok":
        assert "torch " in packages.text and "pydantic " in packages.text


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PACKAGES", (*probes.PACKAGES, "no-such-package-of-anybody"))
    (found,) = [each for each in probes.python() if each.name == "packages"]
    assert found.state == "problem" and "no-such-package-of-anybody" in found.text and "pip install" in found.fix


def test_a_broken_pytorch_breaks_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = list(probes.devices())
    assert state_of(findings, "PyTorch") == "problem"
    assert "libcudart.so.99" in next(each.text for each in findings if each.name == "PyTorch")


@pytest.mark.slow
def test_this_machine_is_told_whole() -> None:
    findings = [*probes.devices(), *probes.machine(), *probes.network(), *probes.containers()]
    import torch

    assert torch.__version__ in next(each.text for each in findings if each.name == "PyTorch")
    assert {"CPU", "memory", "/dev/shm", "open files", "interfaces", "host name"} <= {each.name for each in findings}
    assert all(bool(each.fix) == (each.state != "ok") for each in findings)


def fake_command(folder: Path, name: str, text: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_host_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = list(doctor.cluster())
    assert state_of(findings, "commands") == "warning" and len(findings) == 1
    with pytest.raises(InputError, match="not on the PATH"):
        doctor.draft(tmp_path)


def test_half_of_slurm_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(tmp_path, "squeue")
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor.cluster()
    assert found.state == "problem" and "sbatch" in found.text and "squeue" not in found.text


@needs_slurm
@pytest.mark.slow
def test_a_controller_that_is_down_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = "SlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=16999\nNodeName=n1\nPartitionName=p Nodes=n1\n"
    (tmp_path / "slurm.conf").write_text(f"ClusterName=x\n{host}")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    findings = list(doctor.cluster())
    assert state_of(findings, "controller") == "problem" and doctor.blocking(findings)
    with pytest.raises(RunError):
        doctor.draft(tmp_path)


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:2", (2, None)),
        ("gpu:a100:4(S:0-1)", (4, "a100")),
        ("gpu:a100:4,shard:a100:8", (4, "a100")),
        ("gpu:a100:4 gpu:a100:8", (4, "a100")),
        ("gpu:a100:4 gpu:v100:2", (2, None)),
        ("gpu:nvidia_a100_3g.20gb:2", (2, "nvidia_a100_3g.20gb")),
        ("(null)", (0, None)),
        ("", (0, None)),
        ("gpu:4 (null)", (0, None)),
    ],
)
def test_gpus_of_a_partition(gres: str, expected: tuple[int, str | None]) -> None:
    assert site.gpus(gres) == expected


PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=projA,projB AllowQos=normal,long AllocNodes=ALL Default=YES QoS=N/A \
DefaultTime=01:00:00 DisableRootJobs=NO GraceTime=120 Hidden=NO MaxNodes=16 MaxTime=2-00:00:00 Nodes=g[1-32] \
PreemptMode=REQUEUE State=UP
PartitionName=cpu AllowAccounts=ALL AllowQos=ALL DefaultTime=NONE GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED \
PreemptMode=OFF State=UP
"""


def partition(name: str, **facts: object) -> Partition:
    given = {"default": False, "state": "up", "nodes": 4, "max_time_min": 1440, "gres": "", "cpus_per_node": 64}
    return Partition(name=name, **{"memory_mb": 256_000, **given, **facts})


def test_rules_of_partitions() -> None:
    details = site.parse_partitions(PARTITIONS)
    gpu = site._with_details(partition("gpu"), details["gpu"])
    assert (gpu.preempt_mode, gpu.grace_s, gpu.default_time_min, gpu.max_nodes) == ("requeue", 120, 60, 16)
    assert (gpu.accounts, gpu.qos) == (("projA", "projB"), ("normal", "long"))
    cpu = site._with_details(partition("cpu"), details["cpu"])
    assert (cpu.preempt_mode, cpu.accounts, cpu.qos, cpu.max_nodes, cpu.default_time_min) == ("off", (), (), None, None)


def test_the_partition_a_draft_names() -> None:
    def chosen(*partitions: Partition) -> str | None:
        found = doctor.choose_partition([Rules(each) for each in partitions])
        return found.partition.name if found else None

    cpu, gpu = partition("cpu", default=True), partition("gpu", gres="gpu:4")
    assert chosen(cpu, gpu) == "gpu"
    assert chosen(cpu, partition("gpu", gres="gpu:4", state="down")) == "cpu"
    assert chosen(gpu, partition("other", gres="gpu:8", default=True)) == "other"
    assert chosen(partition("x", state="drain")) is None


def drafted(
    tmp_path: Path, chosen: Rules, *others: Rules, accounts: tuple[Association, ...] = (), select: str = "cons_tres"
) -> SlurmProfile:
    text = doctor.profile_text(chosen, [chosen, *others], accounts, select, tmp_path, "somewhere")
    path = tmp_path / "site.yaml"
    path.write_text(text)
    profile = load_profile(str(path))
    assert isinstance(profile, SlurmProfile)
    # Every line that is only a suggestion must be right, too, once its mark is taken away.
    bare = [
        line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and ": " in line.split("#")[1]
    ]
    keys = {line.split(":")[0] for line in bare} & set(SlurmProfile.model_fields)
    whole = text + "".join(line + "\n" for line in bare if line.split(":")[0] in keys)
    path.write_text(whole)
    load_profile(str(path))
    return profile


def test_a_draft_for_gpus(tmp_path: Path) -> None:
    rules = Rules(
        partition("gpu", gres="gpu:a100:4", nodes=32, max_time_min=2880), "requeue", 60, 60, ("projB",), (), 16
    )
    mine = (Association("projA", "", ("normal", "long"), "normal"), Association("projB", "", ("normal",), ""))
    profile = drafted(tmp_path, rules, Rules(partition("cpu")), accounts=mine)
    assert (profile.partition, profile.account, profile.gpus_per_node, profile.gpu_type) == ("gpu", "projB", 4, "a100")
    assert (profile.cpus_per_task, profile.gpu_request, profile.time_min) == (16, "gpus-per-node", 1440)
    assert profile.ranks_per_node == 4 and profile.requeue.enabled and profile.results == str(tmp_path)


def test_a_draft_without_gpus_and_with_short_jobs(tmp_path: Path) -> None:
    profile = drafted(tmp_path, Rules(partition("debug", max_time_min=1, cpus_per_node=1)), select="linear")
    assert (profile.gpus_per_node, profile.cpus_per_task, profile.exclusive) == (0, 1, True)
    assert profile.time_min == 1 and profile.signal_lead_s < 60
    endless = drafted(tmp_path, Rules(partition("long", max_time_min=None)), select="cons_res")
    assert endless.time_min == 24 * 60


@pytest.mark.parametrize("name", ["1", "on", "no", "null", "1e3", "0x10", "12:30", "a b", "gpu#1", "~"])
def test_names_that_yaml_would_read_as_something_else(tmp_path: Path, name: str) -> None:
    found = drafted(tmp_path, Rules(partition(name, gres="gpu:2")), accounts=(Association(name, "", (name,), ""),))
    assert (found.partition, found.account) == (name, name)


@pytest.mark.slow
def test_the_mini_cluster_is_told(on_mini: Any) -> None:
    findings = list(doctor.cluster())
    assert not doctor.blocking(findings)
    assert (
        state_of(findings, "commands") == state_of(findings, "controller") == state_of(findings, "allocation") == "ok"
    )
    texts = {finding.name: finding.text for finding in findings}
    assert texts["partition gpu"].startswith("4 hosts, 4 CPUs, 4 GiB, 2 GPUs, up to 1 d")
    assert "preemption: requeue with 15 s of grace (the default)" in texts["partition gpu"]
    assert "preemption" not in texts["partition urgent"]
    assert texts["KillWait"].startswith("5 s")


@pytest.mark.slow
def test_a_drafted_profile_submits_a_job(on_mini: Any) -> None:
    """From `doctor` to a finished job of two ranks, and as many files as the estimate said."""
    folder = Path(tempfile.mkdtemp(dir=on_mini.shared))
    try:
        (folder / "recipe.yaml").write_text(json.dumps(SETTINGS))

        def maehpc(*words: str) -> str:
            command = [sys.executable, "-m", "maehpc", *words, "--results", str(folder / "results")]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
            return done.stdout

        maehpc("doctor", "--profile-out", "site.yaml")
        profile = load_profile(str(folder / "site.yaml"))
        assert isinstance(profile, SlurmProfile)
        assert (profile.partition, profile.gpus_per_node, profile.cpus_per_task) == ("gpu", 2, 2)
        given = ("--recipe", "recipe.yaml", "--name", "drafted", "--cluster", "site.yaml", "--time", "10")
        promised = json.loads(maehpc("submit", "pretrain", *given, "--dry-run", "--json"))["estimate"]
        maehpc("submit", "pretrain", *given, "--wait")

        experiment = Experiment(folder / "results" / "drafted")
        (job,) = jobs_of(experiment)
        attempt, outcome = job.attempt(1), job.outcome(1)
        assert attempt is not None and attempt.ranks == 2
        assert outcome is not None and outcome.outcome == "done"
        found = [path for path in experiment.root.rglob("*") if path.is_file()]
        if job.newest_attempt() == 1:  # nobody else's urgent job came first
            assert promised["total"]["files"] == len(found)
        assert sum(path.stat().st_size for path in found) <= 1.2 * promised["total"]["bytes"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
