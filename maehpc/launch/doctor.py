"""A look at a machine and its cluster: what is there, what is missing, what to do; and a first profile for it.

Each probe stands by itself: what one of them cannot find out keeps none of the others from answering.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from maehpc.errors import InputError, RunError
from maehpc.launch import probes, site, slurm
from maehpc.launch.probes import Finding
from maehpc.launch.site import Association, Rules

SHORT_GRACE_S = 30
LONGEST_DRAFT_MIN = 24 * 60
LEAD_S = 120
"""Seconds before the end that a drafted profile wants to be told."""


def examine(results: Path) -> list[Finding]:
    """Everything that is looked at, in the order of a report.

    Args:
        results: folder of experiments, which need not exist; nothing stays behind in it.
    """
    return [
        *probes.python(),
        *probes.devices(),
        *probes.machine(),
        *probes.network(),
        *probes.results_folder(results, several_hosts=slurm.available()),
        *cluster(),
        *probes.containers(),
    ]


def blocking(findings: Iterable[Finding]) -> bool:
    """Whether something was found that will make jobs fail."""
    return any(finding.state == "problem" for finding in findings)


def cluster() -> Iterator[Finding]:
    """Slurm: commands, controller, rules, partitions, accounting."""
    missing = site.missing_commands()
    if len(missing) == len(site.NAMED_COMMANDS):
        fix = "run doctor on a host of the cluster (a login node); the profiles debug and local work here"
        yield Finding("slurm", "commands", "warning", "no Slurm on the PATH", fix)
        return
    if missing:
        fix = "load the module that brings Slurm's commands"
        yield Finding("slurm", "commands", "problem", f"not on the PATH: {', '.join(missing)}", fix)
        return
    try:
        yield Finding("slurm", "commands", "ok", f"Slurm {site.version()}")
        settings, rules = site.config(), site.rules()
    except RunError as error:
        fix = "wait until `scontrol ping` says UP; ask the site's support where it does not"
        yield Finding("slurm", "controller", "problem", str(error), fix)
        return
    yield Finding("slurm", "controller", "ok", f"cluster {settings.get('ClusterName', '?')} answers")
    yield from _settings(settings)
    yield from _accounting(settings)
    for each in rules:
        yield _partition(each)
    if not any(each.partition.state == "up" for each in rules):
        yield Finding("slurm", "partitions", "problem", "none is up", "ask the site's support")


def _settings(settings: dict[str, str]) -> Iterator[Finding]:
    kind = settings.get("SelectType", "?").removeprefix("select/")
    if kind == "linear":
        fix = "set exclusive: true in the profile and ask for all CPUs and GPUs of a host"
        yield Finding("slurm", "allocation", "warning", "whole hosts alone (select/linear)", fix)
    else:
        yield Finding("slurm", "allocation", "ok", f"parts of hosts ({kind})")
    allowed = settings.get("JobRequeue") == "1"
    text = "jobs are requeued unless they say no" if allowed else "jobs are requeued where they ask for it, as ours do"
    yield Finding("slurm", "requeue", "ok", text)
    wait = _seconds(settings.get("KillWait", ""))
    short = wait is not None and wait < SHORT_GRACE_S
    fix = f"keep signal_lead_s at {LEAD_S} or more: the wall time's own signal comes too late to save" if short else ""
    found = "unknown" if wait is None else f"{wait} s from SIGTERM to SIGKILL at the wall time"
    yield Finding("slurm", "KillWait", "warning" if short else "ok", found, fix)


def _seconds(text: str) -> int | None:
    word = text.split()[0] if text.split() else ""
    return int(word) if word.isdigit() else None


def _accounting(settings: dict[str, str]) -> Iterator[Finding]:
    storage = settings.get("AccountingStorageType", "").rpartition("/")[2]
    age = _seconds(settings.get("MinJobAge", ""))
    if storage in ("", "none", "(null)"):
        text = f"none; Slurm forgets an ended job after {age} s" if age else "none"
        fix = "status then rests on scontrol and on our own records; nothing needs to be done"
        yield Finding("slurm", "accounting", "warning", text, fix)
        return
    mine = site.associations()
    if mine is None:
        fix = "ask the site's support which account to use, and set account in the profile"
        yield Finding("slurm", "accounting", "warning", f"{storage}, which does not tell your accounts", fix)
    elif not mine and settings.get("AccountingStorageEnforce", "none") not in ("none", ""):
        fix = "ask the site's support for an account"
        yield Finding("slurm", "accounting", "problem", "you have no account, and the site demands one", fix)
    else:
        names = ", ".join(dict.fromkeys(each.account for each in mine)) or "no account of yours"
        qos = ", ".join(dict.fromkeys(word for each in mine for word in each.qos))
        yield Finding("slurm", "accounting", "ok", f"{storage}: {names}" + (f"; QOS {qos}" if qos else ""))


def _partition(rules: Rules) -> Finding:
    found = rules.partition
    gpus, kind = site.gpus(found.gres)
    words = [
        f"{found.nodes} host{'s' * (found.nodes != 1)}",
        f"{found.cpus_per_node} CPUs",
        f"{found.memory_mb / 1024:.0f} GiB",
        f"{gpus} GPU{'s' * (gpus != 1)}" + (f" ({kind})" if kind else "") if gpus else "no GPUs",
        "no time limit" if found.max_time_min is None else f"up to {_duration(found.max_time_min)}",
    ]
    preempted = rules.preempt_mode not in ("off", "", "n/a")
    if preempted:
        words.append(f"preemption: {rules.preempt_mode} with {rules.grace_s} s of grace")
    text = ", ".join(words) + (" (the default)" if found.default else "")
    name = f"partition {found.name}"
    if found.state != "up":
        return Finding("slurm", name, "warning", f"{found.state}; {text}", "choose another partition")
    if preempted and rules.preempt_mode != "requeue":
        fix = "resume such jobs by hand: Slurm does not start them again"
        return Finding("slurm", name, "warning", text, fix)
    if preempted and rules.grace_s < SHORT_GRACE_S:
        fix = "checkpoint often: a preemption may leave too little time to save, and the steps since are computed again"
        return Finding("slurm", name, "warning", text, fix)
    return Finding("slurm", name, "ok", text)


def _duration(minutes: int) -> str:
    days, rest = divmod(minutes, 24 * 60)
    hours, left = divmod(rest, 60)
    words = [(days, "d"), (hours, "h"), (left, "min")]
    return " ".join(f"{count} {unit}" for count, unit in words if count) or "0 min"


def choose_partition(rules: Sequence[Rules]) -> Rules | None:
    """The partition that a first profile should name: up, with GPUs where any has some, the default where it fits."""
    up = [each for each in rules if each.partition.state == "up"]
    return max(
        up,
        key=lambda each: (
            site.gpus(each.partition.gres)[0] > 0,
            each.partition.default,
            each.partition.nodes,
        ),
        default=None,
    )


def draft(results: Path) -> str:
    """A profile of this site as YAML with comments.

    Raises:
        InputError: there is no Slurm here.
        RunError: it cannot be asked, or has no partition that is up.
    """
    if not slurm.available():
        raise InputError("a profile is drafted from Slurm, which is not on the PATH; run this on a host of the cluster")
    rules = site.rules()
    chosen = choose_partition(rules)
    if chosen is None:
        raise RunError("no partition of this cluster is up; wait, or ask the site's support")
    settings = site.config()
    accounting = settings.get("AccountingStorageType", "").rpartition("/")[2] not in ("", "none", "(null)")
    mine = (site.associations() or []) if accounting else []
    kind = settings.get("SelectType", "").removeprefix("select/")
    return profile_text(chosen, rules, mine, kind, results, settings.get("ClusterName", "this cluster"))


def profile_text(
    chosen: Rules,
    rules: Sequence[Rules],
    accounts: Sequence[Association],
    select: str,
    results: Path,
    cluster_name: str,
) -> str:
    """The draft itself.

    Args:
        chosen: the partition it names.
        rules: all partitions, told in a comment.
        accounts: of this user.
        select: Slurm's way to allocate: cons_tres, cons_res, linear.
        results: folder of experiments.
        cluster_name: for the heading.
    """
    found = chosen.partition
    gpus, kind = site.gpus(found.gres)
    others = [each.partition.name for each in rules if each.partition.name != found.name]
    lines = [
        f"# A profile of the cluster {cluster_name}, drafted by `maehpc doctor`. Look through it before it is used.",
        "kind: slurm",
        _line("partition", found.name, f"others: {', '.join(others)}" if others else ""),
    ]
    names = list(dict.fromkeys(each.account for each in accounts))
    usable = [name for name in names if not chosen.accounts or name in chosen.accounts] or names
    if usable:
        lines.append(_line("account", usable[0], f"others: {', '.join(usable[1:])}" if usable[1:] else ""))
    elif chosen.accounts:
        lines.append("# " + _line("account", chosen.accounts[0], f"this partition is for {', '.join(chosen.accounts)}"))
    qos = list(dict.fromkeys(word for each in accounts for word in each.qos))
    if qos:
        lines.append("# " + _line("qos", qos[0], f"one of {', '.join(qos)}"))
    most = min(found.nodes, chosen.max_nodes or found.nodes)
    lines.append(_line("nodes", 1, f"where --nodes is not given; at most {most}"))
    ranks = max(gpus, 1)
    if gpus:
        lines.append(_line("gpus_per_node", gpus, "one rank each"))
        if kind:
            lines.append(_line("gpu_type", kind))
        lines.append(_line("gpu_request", "gpus-per-node" if select == "cons_tres" else "gres"))
    share = max(found.cpus_per_node // ranks, 1)
    lines.append(_line("cpus_per_task", share, f"of a host's {found.cpus_per_node}"))
    if select == "linear":
        lines.append(_line("exclusive", True, "Slurm gives whole hosts here"))
    longest = found.max_time_min
    time = min(longest or LONGEST_DRAFT_MIN, LONGEST_DRAFT_MIN)
    limit = f"the longest is {_duration(longest)}" if longest else "there is no limit"
    lines.append(_line("time_min", time, f"minutes; {limit}; what is not done by then goes on in another attempt"))
    lead = min(LEAD_S, max(time * 60 // 4, 1))
    lines.append(_line("signal_lead_s", lead, "time to save; more than one checkpoint takes"))
    if chosen.preempt_mode not in ("off", "", "n/a"):
        lines.append(
            f"# Jobs here are preempted ({chosen.preempt_mode}, {chosen.grace_s} s of grace): checkpoint often."
        )
    lines += ["requeue:", "  enabled: true  # false where the site forbids it; a job then submits itself anew"]
    lines.append(_line("results", str(results.absolute()), "every host must see it"))
    names = [each.name for each in probes.interfaces()] or ["ib0"]
    others_here = f" (or {', '.join(names[1:])})" if names[1:] else ""
    lines += [
        f"# interface: {names[0]}{others_here}  # found by itself; name the one between hosts should that go wrong",
        "# modules: [cuda]  # names for `module load`",
        '# setup: ["ulimit -n 65536"]  # lines of the shell before the ranks start',
        "# scratch: /local/scratch  # folder on each host's own disk",
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: str | int | bool, comment: str = "") -> str:
    """`key: value  # comment`, the value quoted where YAML would read something else in it."""
    text = json.dumps(value) if isinstance(value, str) and yaml.safe_load(value) != value else str(value)
    text = str(value).lower() if isinstance(value, bool) else text
    return f"{key}: {text}" + (f"  # {comment}" if comment else "")
