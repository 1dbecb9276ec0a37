"""A mini cluster comes up twice, goes without a trace, and heals whatever a killed command leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_cluster import COMMAND, SPARE, Mini, MiniError, RefusedError, running

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {
    "MAEHPC_MINI_STATE": str(SPARE.state),
    "MAEHPC_MINI_BRIDGE": SPARE.bridge,
    "MAEHPC_MINI_NETWORK": SPARE.network,
    "MAEHPC_MINI_LETTER": SPARE.letter,
    "MAEHPC_MINI_PORT": str(SPARE.port),
}


@pytest.fixture(scope="module")
def possible() -> None:
    """Skips where this machine cannot have a cluster."""
    with running(Mini(SPARE)):
        pass


@pytest.fixture
def spare(possible: None) -> Iterator[Mini]:
    """The spare cluster, down before and after the test."""
    Mini(SPARE).stop()
    yield Mini(SPARE)
    Mini(SPARE).stop()


def command(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COMMAND), *words],
        env=ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def traces(mini: Mini) -> dict[str, list[Any]]:
    """Everything on this machine that a cluster makes."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={mini.state}/".encode() in path.read_bytes():
                processes.append((path.parent / "cmdline").read_bytes())
        except OSError:
            continue
    spaces = Path("/run/netns")
    return {
        "processes": processes,
        "spaces": sorted(path.name for path in spaces.iterdir() if mini.settings.bridge in path.name),
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir() if mini.settings.bridge in path.name),
        "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(mini.state) in line],
        "names": [line for line in Path("/etc/hosts").read_text().splitlines() if str(mini.state) in line],
        "folder": list(mini.state.iterdir()) if mini.state.exists() else [],
    }


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_starts_once_stops_without_a_trace(spare: Mini) -> None:
    hosts = Path("/etc/hosts").read_bytes()
    ray = Path("/tmp/ray").exists()
    first = command("start")
    assert (first.returncode, first.stderr) == (0, "")
    assert f"export SLURM_CONF={spare.state}/slurm.conf" in first.stdout.splitlines()
    up = traces(spare)
    assert len(up["processes"]) >= 2 + 4 * 3
    assert all(up.values()), up
    assert b"10.78.0.14 m4 #" in Path("/etc/hosts").read_bytes()

    second = command("start")
    assert second.returncode == 0
    assert "already up" in second.stdout
    assert sorted(traces(spare)["processes"]) == sorted(up["processes"])
    assert command("start", "--hosts", "2").returncode == 2
    shown = command("status")
    assert shown.returncode == 0
    assert [line.split()[2] for line in shown.stdout.splitlines()[1:5]] == ["idle"] * 4
    assert command("env").stdout == f"export SLURM_CONF={spare.state}/slurm.conf\n"

    assert command("stop").stdout == "stopped\n"
    assert not any(traces(spare).values()), traces(spare)
    assert Path("/etc/hosts").read_bytes() == hosts
    assert Path("/tmp/ray").exists() == ray
    assert (command("stop").stdout, command("stop").returncode) == ("already down\n", 0)
    assert command("status").returncode == 1
    # A fault needs a cluster, and asking for one makes nothing.
    assert command("power-off", "m1").returncode == 2
    assert not spare.state.exists()


@pytest.mark.parametrize("next_command", ["start", "stop"])
@pytest.mark.parametrize(
    "moment",
    [
        "lock",
        "maehpc-mini.json",
        "slurm.conf",
        "munge/key",
        "run/slurmctld.process",
        "run/host-m2.process",
        "run/ready-m4",
    ],
)
def test_a_start_killed_at_any_moment_is_cleaned(spare: Mini, moment: str, next_command: str) -> None:
    start = subprocess.Popen([sys.executable, str(COMMAND), "start"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    until((spare.state / moment).exists)
    start.kill()
    start.wait()
    assert not (spare.state / "whole").exists()

    done = command(next_command)
    assert (done.returncode, done.stderr) == (0, "")
    if next_command == "start":
        assert "started in" in done.stdout
        assert set(Mini(SPARE).slurm_states().values()) == {"idle"}
        assert command("stop").returncode == 0
    assert not any(traces(spare).values()), traces(spare)


def test_a_killed_stop_is_finished_by_the_next(spare: Mini) -> None:
    spare.start()
    stop = subprocess.Popen([sys.executable, str(COMMAND), "stop"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    until(lambda: not spare.process_ids("m2"))
    stop.kill()
    stop.wait()
    assert any(traces(spare).values())
    assert not spare.up()
    assert command("stop").returncode == 0
    assert not any(traces(spare).values()), traces(spare)


def test_a_start_that_fails_leaves_nothing_and_says_why(spare: Mini) -> None:
    # A daemon that cannot start: its configuration's template is broken in a copy of the command.
    folder = spare.state.with_name("maehpc-mini-copy")
    subprocess.run(["cp", "-r", str(COMMAND.parent), str(folder)], check=True)
    try:
        with (folder / "slurm.conf").open("a") as conf:
            conf.write("NoSuchWord=1\n")
        done = subprocess.run(
            [sys.executable, str(folder / COMMAND.name), "start"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert done.returncode == 1
    assert "slurmctld" in done.stderr and "NoSuchWord" in done.stderr
    assert not any(traces(spare).values()), traces(spare)


def test_a_recycled_process_number_is_left_alone(spare: Mini) -> None:
    spare.start()
    record = spare.state / "run" / "munged.process"
    honest = record.read_text()
    bystander = subprocess.Popen(["sleep", "100"])
    try:
        record.write_text(" ".join([str(bystander.pid), *honest.split(" ")[1:]]))
        assert spare.processes.alive("munged") is None
        spare.processes.end("munged")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    record.write_text(honest)
    assert spare.processes.alive("munged") is not None
    assert spare.stop()
    assert not any(traces(spare).values()), traces(spare)


def test_refuses_what_is_not_its_own(spare: Mini, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    foreign = {"MAEHPC_MINI_STATE": str(tmp_path)}
    for word in ("start", "stop"):
        done = command(word, environment=foreign)
        assert done.returncode == 2
        assert done.stderr == f"mini: {tmp_path} is no mini cluster's folder: set MAEHPC_MINI_STATE to another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]

    subprocess.run(["ip", "link", "add", "maehpc-taken", "type", "bridge"], check=True)
    try:
        done = command("start", environment={"MAEHPC_MINI_BRIDGE": "maehpc-taken"})
        assert (done.returncode, "MAEHPC_MINI_BRIDGE" in done.stderr) == (2, True)
        subprocess.run(["ip", "addr", "add", "10.78.0.99/32", "dev", "maehpc-taken"], check=True)
        done = command("start")
        assert (done.returncode, "MAEHPC_MINI_NETWORK" in done.stderr) == (2, True)
        assert Path("/sys/class/net/maehpc-taken").exists()
    finally:
        subprocess.run(["ip", "link", "del", "maehpc-taken"], check=True)
    assert not any(traces(spare).values()), traces(spare)


def refused(wrapper: list[str], before: str = "") -> str:
    """What a start says that is refused, in a changed world; nothing may be left of it."""
    # The command is read first: an account without rights may not be able to read this folder.
    lines = ["import os, sys", f"sys.path.insert(0, {str(COMMAND.parent)!r})", "import mini", before]
    program = "\n".join([*lines, "sys.exit(mini.main(['start']))"])
    words = [*wrapper, sys.executable, "-c", program]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not any(traces(Mini(SPARE)).values())
    return done.stderr


def in_a_world_where(lines: str) -> list[str]:
    """Runs a command with mounts of its own, after some lines of a shell."""
    return ["unshare", "--mount", "sh", "-ec", f'{lines}; exec "$@"', "sh"]


def test_refuses_another_account(spare: Mini) -> None:
    assert "needs root" in refused([], "os.setuid(65534)")


def test_refuses_where_root_may_not_make_networks(spare: Mini) -> None:
    assert "needs CAP_NET_ADMIN, which" in refused(["setpriv", "--bounding-set=-net_admin"])


def test_refuses_a_machine_with_a_slurm_of_its_own(spare: Mini) -> None:
    world = in_a_world_where("mount -t tmpfs none /etc/slurm; >/etc/slurm/slurm.conf")
    assert "has a Slurm already" in refused(world)


def test_names_the_missing_packages(spare: Mini) -> None:
    world = in_a_world_where("for it in slurmctld munged; do mount --bind /dev/null /usr/sbin/$it; done")
    assert "apt-get install munge slurmctld\n" in refused(world)


def test_two_starts_at_once_make_one_cluster(spare: Mini) -> None:
    starts = [
        subprocess.Popen([sys.executable, str(COMMAND), "start"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = sorted(start.communicate()[0].splitlines()[0] for start in starts)
    assert [start.returncode for start in starts] == [0, 0]
    assert "already up" in told[0] and "started in" in told[1]


def test_starts_what_is_down_of_it(spare: Mini) -> None:
    spare.start()
    spare.power_off("m1")
    spare.kill_slurmd("m2")
    spare.cut("m3", "m4")
    spare.stop_controller()
    assert not spare.start()
    assert set(spare.slurm_states().values()) == {"idle"}
    reach = f"exec 3<>/dev/tcp/{spare.settings.address_of('m4')}/{spare.settings.port + 1}"
    assert spare.on("m3", "timeout", "2", "bash", "-c", reach).returncode == 0
    assert spare.run("srun", "--nodes=4", "hostname").returncode == 0


def test_accounting_answers(spare: Mini) -> None:
    spare.start(accounting=True)
    assert spare.run("srun", "--nodes=2", "--job-name=told", "--gres=gpu:2", "true").returncode == 0

    def row() -> str:
        return spare.run("sacct", "--noheader", "--parsable2", "--allocations", "--format=jobname,state,nnodes").stdout

    until(row)
    until(lambda: row() == "told|COMPLETED|2\n")
    # It stays when asked for without, and is refused when it is not there.
    assert not spare.start()
    assert spare.settings.accounting
    spare.stop()
    assert not any(traces(spare).values()), traces(spare)
    plain = Mini(SPARE)
    plain.start()
    assert "accounting storage is disabled" in plain.run("sacct").stderr
    with pytest.raises(MiniError, match="without accounting: stop it first"):
        plain.start(accounting=True)
    with pytest.raises(RefusedError, match="m9 is no host"):
        plain.power_off("m9")
