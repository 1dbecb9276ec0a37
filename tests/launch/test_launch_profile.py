"""Profiles: what is read, refused, merged, and written for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maehpc.errors import InputError
from maehpc.launch.profile import (
    FIELD_OF_OPTION,
    OWN_OPTIONS,
    DebugProfile,
    LocalProfile,
    SlurmProfile,
    list_profiles,
    load_profile,
    minutes,
    parse_profile,
    profile_schema,
)
from maehpc.shipped import shipped_folder


def slurm(**fields: Any) -> SlurmProfile:
    profile = parse_profile({"kind": "slurm", **fields})
    assert isinstance(profile, SlurmProfile)
    return profile


def refused(**fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        slurm(**fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_ships() -> None:
    kinds = {name: type(load_profile(name)) for name in list_profiles()}
    assert kinds["debug"] is DebugProfile
    assert kinds["local"] is LocalProfile
    assert [kind for name, kind in kinds.items() if name not in ("debug", "local")] == [SlurmProfile] * 4
    mini = load_profile("mini")
    assert isinstance(mini, SlurmProfile)
    assert (mini.partition, mini.nodes, mini.ranks_per_node, mini.device) == ("gpu", 4, 2, "cpu")


def test_the_committed_schema_is_the_current_one() -> None:
    committed = json.loads((shipped_folder("cluster") / "profile.schema.json").read_text())
    current = json.loads(json.dumps(profile_schema()))
    assert committed == current, "run: maehpc profile schema > cluster/profile.schema.json"


def test_the_schema_names_every_field_and_says_what_it_is() -> None:
    definitions = profile_schema()["$defs"]
    for name in ("SlurmProfile", "LocalProfile", "DebugProfile", "Container", "Requeue"):
        assert definitions[name]["additionalProperties"] is False
    fields = definitions["SlurmProfile"]["properties"]
    undescribed = {name for name, field in fields.items() if "description" not in field}
    assert undescribed <= {"container", "requeue", "reservation"}  # told by their own names or definitions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("12:00:00", 720),
        ("2-00:00:00", 2880),
        ("2-00:00", 2880),
        ("2-12", 3600),
        ("1:30", 2),  # minutes:seconds, rounded up
        ("0:01:01", 2),
        ("100:00:00", 6000),
    ],
)
def test_wall_times_as_slurm_writes_them(text: str, expected: int) -> None:
    assert minutes(text) == expected
    assert slurm(time_min=text, signal_lead_s=1).time_min == expected


@given(st.integers(0, 20), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_every_wall_time_is_the_sum_of_its_parts(days: int, hours: int, mins: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + mins) * 60 + seconds
    assert minutes(f"{days}-{hours:02d}:{mins:02d}:{seconds:02d}") == -(-total // 60)
    assert minutes(f"{days * 24 + hours}:{mins:02d}:{seconds:02d}") == -(-total // 60)


def test_a_time_without_quotes_is_no_number_of_base_60(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\ntime_min: 12:00:00\nmem_gb: 1.5\nnodes: 4\nexclusive: true\naccount: abc@a100\n")
    profile = load_profile(str(path))
    assert isinstance(profile, SlurmProfile)
    assert (profile.time_min, profile.mem_gb, profile.nodes, profile.exclusive) == (720, 1.5, 4, True)
    assert yaml.safe_load(path.read_text())["time_min"] == 43200  # what it would have been


def test_a_profile_extends_another(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "kind: slurm\npartition: a\nsetup: [one, two]\nenvironment: {A: x, B: y}\n"
        "requeue: {attempts_without_progress: 5}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "extends: site.yaml\npartition: b\nsetup: [three]\nenvironment: {B: z}\nrequeue: {enabled: false}\n"
    )
    mine = load_profile(str(tmp_path / "mine.yaml"))
    assert isinstance(mine, SlurmProfile)
    assert (mine.partition, mine.setup, mine.environment) == ("b", ("three",), {"A": "x", "B": "z"})
    assert (mine.requeue.enabled, mine.requeue.attempts_without_progress) == (False, 5)
    (tmp_path / "quick.yaml").write_text("extends: mini\nnodes: 1\n")
    quick = load_profile(str(tmp_path / "quick.yaml"))
    assert isinstance(quick, SlurmProfile)
    assert (quick.nodes, quick.partition) == (1, "gpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: a.yaml", "extends itself"),
        ("extends: absent", "absent"),
        ("extends: [mini]", "extends"),
        ("kind: slurm\nnodes: [", "not YAML"),
        ("- kind", "mapping"),
        ("", "mapping"),
        ("kind: pbs", "debug, local, slurm"),
        ("partition: gpu", "kind"),
        ("kind: slurm\nextra: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_files_that_are_no_profile(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_profile(str(tmp_path / "a.yaml"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_is_no_path() -> None:
    for name in ("../cluster/mini", "absent", ""):
        with pytest.raises(InputError, match="choose one of"):
            load_profile(name)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"partitions": "a"}, ["partitions", "account", "partition", "time_min"]),
        ({"container": {"kind": "pyxis", "image": "x", "mount": []}}, ["container.mount", "mounts"]),
        ({"requeue": {"attempts": 2}}, ["requeue.attempts", "attempts_without_progress"]),
        ({"nodes": 0}, ["nodes", "greater than 0"]),
        ({"nodes": "many"}, ["nodes", "'many'"]),
        ({"time_min": "a day"}, ["time_min", "12:00:00"]),
        ({"time_min": 1, "signal_lead_s": 60}, ["signal_lead_s 60", "--time"]),
        ({"mem_gb": 4, "mem_per_cpu_gb": 1}, ["mem_gb and mem_per_cpu_gb"]),
        ({"mem_gb": float("nan")}, ["mem_gb"]),
        ({"partition": 12}, ["partition", "12"]),
        ({"partition": " "}, ["partition", "null"]),
        ({"gpu_type": "a100"}, ["gpu_type", "gpus_per_node"]),
        ({"mem_per_gpu_gb": 4}, ["mem_per_gpu_gb"]),
        ({"environment": {"A B": "x"}}, ["environment", "A B"]),
        ({"scratch": "$(rm -rf /)"}, ["scratch"]),
        ({"sbatch": {"--hint": "x"}}, ["sbatch.--hint", "dashes"]),
    ],
)
def test_wrong_settings_are_told_in_a_sentence(fields: dict[str, Any], expected: list[str]) -> None:
    sentence = refused(**fields)
    for word in expected:
        assert word in sentence


@pytest.mark.parametrize("option", sorted({*OWN_OPTIONS, *FIELD_OF_OPTION}))
def test_options_that_have_a_place_of_their_own(option: str) -> None:
    for spelling in (option, option.replace("-", "_")):
        assert f"sbatch.{spelling}" in refused(sbatch={spelling: "x"})


@pytest.mark.parametrize("field", ["partition", "account", "python", "constraint", "mail_user", "interface"])
@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b", "a\x85b", "a\u2028b", "#SBATCH\n--wrap=x"])
def test_a_value_never_holds_a_line_break(field: str, text: str) -> None:
    assert field in refused(**{field: text})
    assert "setup" in refused(setup=[text])
    assert "srun" in refused(srun=[text])
    assert "environment" in refused(environment={"A": text})
    assert "sbatch" in refused(sbatch={"hint": text})


PRINTABLE = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])
WORDS = st.text(PRINTABLE, min_size=1).filter(str.strip)
PROFILES = st.fixed_dictionaries(
    {"kind": st.just("slurm"), "nodes": st.integers(1, 1000), "time_min": st.integers(10, 10**6)},
    optional={
        "partition": WORDS,
        "account": WORDS,
        "qos": WORDS,
        "gpus_per_node": st.integers(0, 16),
        "gpu_request": st.sampled_from(["gres", "gpus-per-node"]),
        "cpus_per_task": st.integers(1, 256),
        "mem_gb": st.floats(0, 1e6),
        "modules": st.lists(WORDS),
        "setup": st.lists(WORDS),
        "environment": st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]*", fullmatch=True), WORDS),
        "container": st.fixed_dictionaries({"kind": st.sampled_from(["apptainer", "pyxis"]), "image": WORDS}),
        "requeue": st.fixed_dictionaries({"enabled": st.booleans()}),
        "sbatch": st.dictionaries(st.sampled_from(["hint", "nice", "licenses"]), st.booleans() | st.integers() | WORDS),
    },
)


@settings(deadline=None)
@given(mapping=PROFILES)
def test_a_profile_survives_its_record(mapping: dict[str, Any]) -> None:
    profile = parse_profile(mapping)
    assert parse_profile(json.loads(json.dumps(profile.model_dump(mode="json")))) == profile


@settings(deadline=None)
@given(mapping=PROFILES)
def test_a_profile_survives_its_file(mapping: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "profile.yaml"
    path.write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8")
    assert load_profile(str(path)) == parse_profile(mapping)
