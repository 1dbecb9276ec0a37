"""What the mini cluster is, and that its faults are the faults they are called."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mini_cluster import SPARE, Mini, RefusedError, running, small_disk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spare() -> Iterator[Mini]:
    with running(Mini(SPARE)) as up:
        yield up


@pytest.fixture
def whole(spare: Mini) -> Iterator[Mini]:
    """The spare cluster, without jobs and mended after the test."""
    yield spare
    spare.start()
    spare.run("scancel", "--user=root")
    wait(lambda: not spare.run("squeue", "--noheader").stdout, 30)


def wait(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def submit(mini: Mini, folder: Path, script: str, *options: str) -> str:
    """Submits lines for a shell and gives the job's number; what it prints goes to `folder`/out."""
    log = ("--output", str(folder / "out"), "--open-mode=append")
    done = mini.run("sbatch", "--parsable", *log, *options, f"--wrap={script}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job(mini: Mini, number: str) -> dict[str, str]:
    told = mini.run("scontrol", "show", "job", number).stdout
    return dict(word.split("=", 1) for word in told.split() if "=" in word)


def hears(mini: Mini, one: str, address: str, port: int) -> bool:
    """Whether a connection can be opened from a host."""
    return mini.on(one, "timeout", "2", "bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}").returncode == 0


def test_four_idle_hosts_with_two_gpus_each(spare: Mini) -> None:
    told = spare.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T %G %c").stdout
    assert told.split("\n")[:-1] == [f"m{number} idle gpu:2 4" for number in (1, 2, 3, 4)]
    partitions = spare.run("sinfo", "--noheader", "--summarize", "--format=%P").stdout.split()
    assert partitions == ["gpu*", "nograce", "urgent"]


def test_every_host_is_its_own_machine(spare: Mini, tmp_path: Path) -> None:
    # Each task leaves a file where only its own host may see it, then looks what is there.
    look = (
        "for place in /dev/shm /tmp/ray; do touch $place/$(hostname); done; sleep 1; "
        "echo $(hostname) $(ls /dev/shm) $(ls /tmp/ray) $CUDA_VISIBLE_DEVICES $(ls -d /proc/[0-9]* | wc -l)"
    )
    command = ("srun", "--nodes=4", "--gres=gpu:1", "--gpus-per-task=1", "sh", "-c", look)
    lines = sorted(line.split() for line in spare.run(*command).stdout.splitlines())
    assert [line[:3] for line in lines] == [[host] * 3 for host in spare.hosts]
    assert [line[3] for line in lines] == ["0"] * 4
    assert all(int(line[4]) < 30 for line in lines)


def test_an_urgent_job_sends_another_back_to_the_queue(whole: Mini, tmp_path: Path) -> None:
    number = submit(whole, tmp_path, "hostname; sleep 100", "--nodes=4", "--partition=nograce", "--requeue")
    wait(lambda: job(whole, number)["JobState"] == "RUNNING", 20)
    assert whole.run("srun", "--partition=urgent", "--nodes=4", "--exclusive", "hostname").returncode == 0
    wait(lambda: job(whole, number)["JobState"] == "RUNNING", 40)
    assert job(whole, number)["Restarts"] == "1"


def test_grace_is_a_warning_and_fifteen_seconds(whole: Mini, tmp_path: Path) -> None:
    task = "trap 'echo warned; kill $!; exit 0' TERM; echo began; sleep 100 & wait"
    number = submit(whole, tmp_path, f"srun sh -c '{task.replace(chr(39), chr(34))}'", "--nodes=4", "--requeue")
    wait(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text().count("began") == 4, 20)
    assert whole.run("srun", "--partition=urgent", "--nodes=4", "--exclusive", "hostname").returncode == 0
    assert (tmp_path / "out").read_text().count("warned") == 4
    # Who leaves within the grace is not sent back: that is up to the job.
    assert job(whole, number)["JobState"] == "COMPLETED"


def test_without_power_a_host_is_down_and_without_slurmd_its_job_lives(whole: Mini, tmp_path: Path) -> None:
    # Both in one test, because Slurm takes half a minute to notice either.
    number = submit(whole, tmp_path, "srun sleep 300", "--nodelist=m3", "--nodes=1", "--requeue")
    wait(lambda: job(whole, number)["JobState"] == "RUNNING", 20)
    wait(lambda: b"sleep\x00300" in told_commands(whole, "m3"), 20)
    (Path(f"/proc/{whole.process_ids('m2')[0]}/root/dev/shm") / "memory").touch()

    whole.power_off("m2")
    whole.kill_slurmd("m3")
    assert whole.process_ids("m2") == []
    assert not hears(whole, "m1", whole.settings.address_of("m2"), whole.settings.port + 1)
    assert not hears(whole, "m1", whole.settings.address_of("m3"), whole.settings.port + 1)
    with pytest.raises(RefusedError, match="m2 has no power"):
        whole.on("m2", "true")
    wait(lambda: {"m2": "down*", "m3": "down*"}.items() <= whole.slurm_states().items(), 60)
    # Slurm has given the job up, and it runs on: what fencing is for.
    assert b"sleep\x00300" in told_commands(whole, "m3")
    assert whole.slurm_states()["m1"] == "idle"

    whole.power_on("m2")
    whole.start_slurmd("m3")
    wait(lambda: set(whole.slurm_states().values()) <= {"idle", "allocated", "mixed", "completing"}, 30)
    assert whole.on("m2", "ls", "/dev/shm").stdout == ""
    assert whole.run("srun", "--nodelist=m2", "--partition=urgent", "hostname").stdout == "m2\n"


def told_commands(mini: Mini, host: str) -> bytes:
    """The command lines of all processes on a host."""
    found = []
    for one in mini.process_ids(host):
        with suppress(OSError):  # it has ended since
            found.append(Path(f"/proc/{one}/cmdline").read_bytes())
    return b"\n".join(found)


def test_a_power_failure_says_no_goodbye(whole: Mini) -> None:
    address = whole.settings.address_of("m2")
    serve = (
        "import socket, time; door = socket.create_server(('', 4444)); "
        "caller, _ = door.accept(); caller.send(b'hello '); time.sleep(60)"
    )
    listen = f"exec 3<>/dev/tcp/{address}/4444; timeout 6 cat <&3; echo $?"
    server = subprocess.Popen([*whole.entry("m2"), sys.executable, "-c", serve])
    wait(lambda: "4444" in whole.on("m2", "ss", "-ltn").stdout, 10)
    client = subprocess.Popen([*whole.entry("m1"), "bash", "-c", listen], stdout=subprocess.PIPE, text=True)
    wait(lambda: "ESTAB" in whole.on("m1", "ss", "-tn", "dport", "4444").stdout, 10)
    assert client.stdout is not None and client.stdout.read(6) == "hello "
    whole.power_off("m2")
    assert server.wait() != 0
    # A connection that was closed would end `cat` with 0; `timeout` ends it with 124.
    assert client.communicate()[0] == "124\n"


def test_a_cut_is_between_two_hosts_alone(whole: Mini) -> None:
    daemon = whole.settings.port + 1
    pairs = [(one, other) for one in ("m1", "m2", "m3") for other in ("m1", "m2", "m3") if one != other]

    def heard() -> dict[tuple[str, str], bool]:
        return {pair: hears(whole, pair[0], whole.settings.address_of(pair[1]), daemon) for pair in pairs}

    assert all(heard().values())
    whole.cut("m1", "m2")
    assert heard() == {pair: set(pair) != {"m1", "m2"} for pair in pairs}
    assert all(hears(whole, host, whole.settings.address, whole.settings.port) for host in ("m1", "m2"))
    assert whole.run("srun", "--nodelist=m1,m2", "--nodes=2", "hostname").returncode == 0
    whole.heal()
    assert all(heard().values())


def test_a_job_outlives_the_controller(whole: Mini, tmp_path: Path) -> None:
    number = submit(whole, tmp_path, "sleep 8; echo lived")
    wait(lambda: job(whole, number)["JobState"] == "RUNNING", 20)
    whole.stop_controller()
    assert whole.run("scontrol", "ping").returncode != 0
    whole.start_controller()
    whole.restart_controller()
    wait(lambda: job(whole, number)["JobState"] == "COMPLETED", 30)
    assert (tmp_path / "out").read_text() == "lived\n"


def test_a_small_disk_is_seen_full_and_read_only_on_every_host(spare: Mini) -> None:
    with small_disk(spare, "small", 65536) as disk:
        fill = f"head -c 50000 /dev/zero >{disk.path}/$(hostname)"
        done = spare.run("srun", "--nodes=4", "sh", "-c", fill)
        assert "No space left on device" in done.stderr
        assert 50000 < sum(path.stat().st_size for path in disk.path.iterdir()) <= 65536
        disk.remount("size=1m")
        assert spare.run("srun", "--nodes=4", "sh", "-c", fill).returncode == 0
        disk.remount("ro")
        assert "Read-only file system" in spare.run("srun", "--nodes=1", "touch", str(disk.path / "new")).stderr
    assert spare.on("m1", "ls", str(spare.shared)).stdout == ""
