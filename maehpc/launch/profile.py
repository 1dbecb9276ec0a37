"""Profiles: where to compute. A profile never changes what is computed.

A file of cluster/ holds one profile. The key `extends` names a profile to start from (another file, or a name of
`maehpc doctor`'s list of shipped ones); mappings are merged, everything else is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from maehpc import files
from maehpc.errors import InputError
from maehpc.shipped import shipped_folder

SUFFIXES = (".yaml", ".yml")

OWN_OPTIONS = frozenset(
    {
        *("array", "chdir", "comment", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue"),
        *("open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"),
    }
)
"""Options of sbatch that every script sets, or that would break it."""

FIELD_OF_OPTION = {
    "account": "account",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task",
    "exclude": "exclude",
    "exclusive": "exclusive",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node and gpu_request: gres",
    "mail-type": "mail_type",
    "mail-user": "mail_user",
    "mem": "mem_gb",
    "mem-per-cpu": "mem_per_cpu_gb",
    "mem-per-gpu": "mem_per_gpu_gb",
    "nodelist": "nodelist",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "partition": "partition",
    "qos": "qos",
    "reservation": "reservation",
    "time": "time_min",
}
"""Options of sbatch that a profile has a field for."""

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def minutes(value: Any) -> Any:
    """Minutes in one of Slurm's ways to write a wall time, rounded up; anything else is left to the validator.

    Raises:
        ValueError: a text is no wall time.
    """
    if not isinstance(value, str):
        return value
    match = _TIME.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"'{value}' is no wall time; write minutes, 12:00:00 or 2-00:00:00")
    days, *parts = (int(part) if part else None for part in match.groups())
    first, second, third = parts
    assert first is not None
    if days is not None:
        seconds = ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = (first * 60 + (second or 0)) * 60 + third
    else:
        seconds = first * 60 + (second or 0)
    return -(-seconds // 60)


def _one_line(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("a line break or control character is no part of a value; give one line")
    return value


def _a_word(value: str) -> str:
    if not value.strip():
        raise ValueError("an empty text says nothing; leave the key out or give null")
    return value


Positive = Annotated[int, Field(gt=0)]
Gigabytes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Line = Annotated[str, BeforeValidator(lambda value: _one_line(value) if isinstance(value, str) else value)]
Word = Annotated[Line, BeforeValidator(lambda value: _a_word(value) if isinstance(value, str) else value)]
Minutes = Annotated[
    Positive,
    BeforeValidator(minutes, json_schema_input_type=int | str),
    Field(description="wall time of a job: minutes, 12:00:00 (hours) or 2-00:00:00 (days)"),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Common(_Settings):
    """What every profile has."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a CUDA device where there is one")
    threads: Positive | None = Field(
        None, description="CPU threads a rank; null: those of the experiment's first run, or the CPUs given to it"
    )
    results: Word | None = Field(
        None, description="folder of experiments where --results is not given; all hosts see it"
    )
    packs: Word | None = Field(None, description="folder of packed data sets where --packs is not given")
    gpu_teraflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak of one GPU in 1e12 operations/s, for the estimate; null: known from its name"
    )


class DebugProfile(_Common):
    """In the foreground of this process: `maehpc run`."""

    kind: Literal["debug"] = Field(description="debug: in the foreground of this process")


class LocalProfile(_Common):
    """In the background on this machine, through submitit's local executor."""

    kind: Literal["local"] = Field(description="local: in the background on this machine")
    tasks: Positive = Field(1, description="ranks of a job, or workers where it explains")
    gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs of a job; null: all that are visible here")
    time_min: Minutes = 7 * 24 * 60
    parallel: Positive = Field(1, description="jobs of one results folder that may run at once; others wait")
    signal_lead_s: Positive = Field(120, description="seconds before the wall time's end that a job is told to save")
    collective_timeout_s: Positive = Field(600, description="seconds until a rank that waits for another gives up")


class Container(_Settings):
    """What the ranks run in."""

    kind: Literal["apptainer", "pyxis"] = Field(description="apptainer: `apptainer exec`; pyxis: srun's own (enroot)")
    image: Word = Field(description="a file on a shared folder, or an address that the kind understands")
    mounts: tuple[Word, ...] = Field(
        (), description="SOURCE:TARGET[:ro]; the results, the packs and the code are mounted by themselves"
    )
    arguments: tuple[Word, ...] = Field((), description="more words for `apptainer exec`, or for srun with pyxis")
    host_python: Word | None = Field(
        None, description="interpreter outside the container, for the script's last line; null: this one"
    )
    after_inside: bool = Field(
        False, description="run the script's last line in the container too, where it has scontrol and sbatch"
    )


class Requeue(_Settings):
    """What happens when an attempt ends before its job is done."""

    enabled: bool = Field(True, description="false where the site forbids requeueing; a job then submits itself anew")
    attempts_without_progress: Positive = Field(3, description="starts that came no further after which a job fails")


class SlurmProfile(_Common):
    """Through sbatch. A field that is null leaves the choice to the site."""

    kind: Literal["slurm"] = Field(description="slurm: through sbatch")
    partition: Word | None = Field(None, description="partition, or several with commas between")
    account: Word | None = Field(None, description="account that pays")
    qos: Word | None = Field(None, description="quality of service")
    nodes: Positive = Field(1, description="hosts of a job where --nodes is not given")
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(0, description="GPUs on each host")
    gpu_type: Word | None = Field(None, description="the GPUs' name in `scontrol show node` (Gres), such as a100")
    gpu_request: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="which of sbatch's options asks for GPUs; older and stricter sites want gres"
    )
    tasks_per_node: Positive | None = Field(None, description="ranks a host; null: one a GPU, or one")
    cpus_per_task: Positive | None = Field(None, description="CPUs a rank")
    mem_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="memory a host, GiB; 0: all of it"
    )
    mem_per_cpu_gb: Gigabytes | None = Field(None, description="memory a CPU, GiB")
    mem_per_gpu_gb: Gigabytes | None = Field(None, description="memory a GPU, GiB")
    time_min: Minutes = 60
    constraint: Word | None = Field(None, description="features that hosts must have")
    exclude: Word | None = Field(None, description="hosts not to use")
    nodelist: Word | None = Field(None, description="hosts to use")
    reservation: Word | None = None
    exclusive: bool = Field(False, description="share no host with other jobs")
    signal_lead_s: Annotated[int, Field(gt=0, le=65535)] = Field(
        120, description="seconds before the wall time's end that a job is told to save"
    )
    modules: tuple[Word, ...] = Field((), description="names for `module load`")
    setup: tuple[Line, ...] = Field((), description="lines of the shell on the first host, before the ranks start")
    environment: dict[Name, Line] = Field(default_factory=dict, description="variables of the ranks")
    python: Word | None = Field(
        None, description="interpreter on the hosts, or in the container; null: this one, or python3 in a container"
    )
    container: Container | None = None
    interface: Word | None = Field(None, description="network interface between hosts, such as ib0; null: found")
    collective_timeout_s: Positive = Field(600, description="seconds until a rank that waits for another gives up")
    host_timeout_s: Positive = Field(
        300, description="seconds that the hosts of a pool have to come up; those that came work meanwhile"
    )
    scratch: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./${}:-]+$")] | None = Field(
        None,
        description="folder on each host's own disk for temporary files, such as $TMPDIR/mine or /local/$SLURM_JOB_ID",
    )
    requeue: Requeue = Requeue()
    mail_user: Word | None = Field(None, description="address that Slurm writes to")
    mail_type: Word | None = Field(None, description="when it writes, such as END,FAIL")
    array_parallelism: Positive = Field(32, description="members of a sweep that run at once")
    sbatch: dict[str, bool | int | float | Line] = Field(
        default_factory=dict,
        description="more options of sbatch by long name; true for one without value",
    )
    srun: tuple[Word, ...] = Field((), description="more words for srun")

    @property
    def ranks_per_node(self) -> int:
        """Tasks a host: as given, or one a GPU, or one."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        memory = [name for name in ("mem_gb", "mem_per_cpu_gb", "mem_per_gpu_gb") if getattr(self, name) is not None]
        if len(memory) > 1:
            raise ValueError(f"{memory[0]} and {memory[1]} contradict each other; keep one")
        for key in self.sbatch:
            if key.replace("_", "-") in OWN_OPTIONS:
                raise ValueError(f"sbatch.{key} is set by maehpc itself; leave it out")
            if field := FIELD_OF_OPTION.get(key.replace("_", "-")):
                raise ValueError(f"sbatch.{key} has a field of its own; use {field}")
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", key):
                raise ValueError(f"sbatch.{key} is no option's name; write it without dashes in front, as in 'hint'")
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError("gpu_type without gpus_per_node asks for nothing; set gpus_per_node")
        if self.mem_per_gpu_gb is not None and not self.gpus_per_node:
            raise ValueError("mem_per_gpu_gb without gpus_per_node asks for nothing; set gpus_per_node or use mem_gb")
        if self.signal_lead_s >= 60 * self.time_min:
            raise ValueError(
                f"signal_lead_s {self.signal_lead_s} leaves nothing of time_min {self.time_min} "
                f"({60 * self.time_min} s); raise --time or lower signal_lead_s"
            )
        return self


Profile: TypeAlias = DebugProfile | LocalProfile | SlurmProfile

_ADAPTER: TypeAdapter[Profile] = TypeAdapter(Annotated[Profile, Field(discriminator="kind")])
_KINDS: dict[str, type[_Common]] = {"debug": DebugProfile, "local": LocalProfile, "slurm": SlurmProfile}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 12:00:00 stays a text; YAML 1.1 would read 43200 in it, and minutes would be meant."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1], re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?$"), list("-+0123456789")
)


def _problem(error: ValidationError) -> str:
    """The first thing that is wrong, in one sentence."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if part not in _KINDS]
    field = ".".join(path) or "profile"
    if first["type"] == "extra_forbidden":
        return f"there is no key {field}; choose from {', '.join(_valid_keys(first['loc']))}"
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"kind: give one of {', '.join(_KINDS)}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], (dict, BaseModel)) else f", not {first['input']!r}"
    sentence = f"{message[:1].lower()}{message[1:]}{given if first['type'] != 'value_error' else ''}"
    return sentence if first["type"] == "value_error" and not path else f"{field}: {sentence}"


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys that a mapping of a profile may have, for the location of one that it may not."""
    parts: dict[str, type[BaseModel]] = {**_KINDS, "container": Container, "requeue": Requeue}
    settings = next(parts[str(part)] for part in reversed(location[:-1]) if part in parts)
    return sorted(settings.model_fields)


def parse_profile(mapping: Mapping[str, Any], origin: str = "profile") -> Profile:
    """A profile from its resolved form, as a job's record holds it.

    Args:
        mapping: keys and values; nothing is looked up.
        origin: where it came from, for the sentence of an error.

    Raises:
        InputError: a key or a value is wrong.
    """
    try:
        return _ADAPTER.validate_python(mapping)
    except ValidationError as error:
        raise InputError(f"{origin}: {_problem(error)}") from error


def list_profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in shipped_folder("cluster").glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or a YAML file by path.

    Raises:
        InputError: it does not exist or a key is wrong.
    """
    path = _locate(name, None)
    return parse_profile(_resolved(path, ()), f"profile {path}")


def _locate(name: str, beside: Path | None) -> Path:
    if name.endswith(SUFFIXES):
        path = files.user_path(name)
        path = path if path.is_absolute() or beside is None else beside.parent / path
    else:
        path = shipped_folder("cluster") / f"{name}.yaml"
        path = path if Path(name).name == name else Path()
    if not path.is_file():
        raise InputError(
            f"there is no profile '{name}'; choose one of {', '.join(list_profiles())} or give a .yaml file"
        )
    return path


def _resolved(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in chain:
        raise InputError(f"profile {path} extends itself; remove it from extends")
    mapping = _read(path)
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    if not isinstance(parent, str):
        raise InputError(f"profile {path}: extends: give one profile's name or file, not {parent!r}")
    return _merged(_resolved(_locate(parent, path), (*chain, path)), mapping)


def _merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in update.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"profile {path} is not YAML: {' '.join(str(error).split())}; mend that value") from error
    if not isinstance(value, dict):
        raise InputError(f"profile {path} must hold a mapping of settings, not {type(value).__name__}")
    return value


def profile_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) that editors check cluster/*.yaml against."""
    schema = _ADAPTER.json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "maehpc profile"
    extends = {"type": "string", "description": "a profile to start from: a shipped one's name, or a file"}
    child = {"type": "object", "required": ["extends"], "properties": {"extends": extends}}
    schema["anyOf"] = [{"oneOf": schema.pop("oneOf"), "discriminator": schema.pop("discriminator")}, child]
    return schema
