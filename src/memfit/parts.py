"""What every part of a config is made of: tables that are immutable and closed, and the kinds of their values."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Width = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Depth = Annotated[int, Field(ge=1, le=1024, strict=True)]
Text = Annotated[str, StringConstraints(max_length=1024)]
Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """A table of the config: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelPart(Part, ABC):
    """The table of a model, and the lighter variants that a plan may be allowed to fall back to."""

    variants: Annotated[dict[Name, dict[str, Any]], Field(max_length=64)] = {}
    """Name -> settings that differ from the model's own."""
    start: Annotated[str, Field(max_length=4096)] = ""
    """Weights to start from: a run directory, a checkpoint, or an exported bundle. None: drawn anew."""

    @property
    def own(self) -> dict[str, Any]:
        """The model's own settings, without the variants and where it starts from."""
        return self.model_dump(exclude=set(ModelPart.model_fields), exclude_none=True)

    @abstractmethod
    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's resolved settings by name, the model's own first. Raises: ValueError."""

    @model_validator(mode="after")
    def _variants_are_models(self) -> Self:
        self.all_variants()
        return self


def merge_variants(
    name: str, own: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], settings: type[BaseModel]
) -> dict[str, dict[str, Any]]:
    """Resolve variants, each of which changes some of a model's own settings; `name`: what the model itself is called.

    Raises: ValueError that names the variant and what is wrong with it.
    """
    found = {name: dict(own)}
    for variant, changes in variants.items():
        if variant == name:
            raise ValueError(f"variants.{variant}: expected a name other than the model's own")
        try:
            merged = settings.model_validate({**own, **changes})
        except ValidationError as error:
            faults = [explain(dict(fault), settings).removeprefix("config: ") for fault in error.errors()]
            raise ValueError(f"variants.{variant}: {'; '.join(faults)}") from None
        found[variant] = merged.model_dump(exclude_none=True)
    return found


def cut(text: str, length: int = 600) -> str:
    """Shorten a text that somebody is shown."""
    return text if len(text) <= length else f"{text[:length]}..."


def explain(fault: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Say one of pydantic's faults for people: where, what was expected, what was got; and the nearest key there is."""
    path = cut(".".join(str(part) for part in fault["loc"]), 200)
    if fault["type"] == "extra_forbidden":
        valid = _keys_at(root, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1])[:64], valid, n=1, cutoff=0.0)
        return f"{path}: unknown key; the nearest valid one is {near[0] if near else valid!r}."
    message = cut(str(fault["msg"]).removeprefix("Value error, ").rstrip("."))
    got = fault["input"]
    shown = "" if fault["type"] in ("missing", "value_error") else f", got {got!r:.80}"
    return f"{path or 'config'}: {message}{shown}."


def _keys_at(root: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """List the keys that are valid at a place, by walking the schema."""
    schema: dict[str, Any] = root.model_json_schema()
    at = schema
    for part in path:
        if "$ref" in at:
            at = schema["$defs"][at["$ref"].rsplit("/", 1)[1]]
        at = at["items"] if isinstance(part, int) else at.get("properties", {}).get(part, {})
    if "$ref" in at:
        at = schema["$defs"][at["$ref"].rsplit("/", 1)[1]]
    return list(at.get("properties", {}))
