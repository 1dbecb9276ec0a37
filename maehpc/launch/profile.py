"""Profiles: where to compute. A profile never changes what is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maehpc import files
from maehpc.errors import InputError
from maehpc.recipes.load import parse_yaml
from maehpc.shipped import shipped_folder


class Profile(BaseModel):
    """One YAML file of cluster/."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["debug"] = Field(description="debug: in the foreground of this process")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a CUDA device where there is one")
    threads: Annotated[int, Field(gt=0)] | None = Field(None, description="CPU threads; PyTorch's choice where null")


def list_profiles() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in shipped_folder("cluster").glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or a YAML file by path.

    Raises:
        InputError: it does not exist or a key is wrong.
    """
    path = files.user_path(name) if name.endswith((".yaml", ".yml")) else shipped_folder("cluster") / f"{name}.yaml"
    if not path.is_file():
        raise InputError(
            f"there is no profile '{name}'; choose one of {', '.join(list_profiles())} or give a .yaml file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} cannot be read: {error}") from error
    try:
        return Profile.model_validate(parse_yaml(text, f"profile {path}"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "profile"
        raise InputError(f"profile {path}: {field}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
