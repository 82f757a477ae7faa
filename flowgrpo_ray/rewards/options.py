"""What the constructor of a reward takes, as a pydantic model that options are checked by.

The declaration is the constructor itself: its parameters with their annotations, as
`batch: Annotated[int, Field(ge=1, description="images at once")] = 8`, and for what options mean
together a static method `check_options(options)`.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from flowgrpo_ray.common.own_classes import nearest
from flowgrpo_ray.common.strict import Strict, mistake, mistakes, short, word


class Options(Strict):
    """The options of one class. Their names are aliases: a class may call an option anything."""

    OF: ClassVar[type]

    @model_validator(mode="after")
    def _together(self) -> Self:
        if rule := getattr(self.OF, "check_options", None):
            rule(self._values(type(self).model_fields))
        return self

    def given(self) -> dict[str, Any]:
        """Those that were named, without the defaults."""
        return self._values(self.model_fields_set)

    def _values(self, fields: Iterable[str]) -> dict[str, Any]:
        known = type(self).model_fields
        values = {str(known[name].alias): getattr(self, name) for name in fields if name in known}
        return values | (self.model_extra or {})


@functools.cache
def options_model(cls: type) -> type[Options]:
    """The model of the options of `cls`."""
    fields: dict[str, Any] = {}
    extra = "forbid"
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[f"option_{name}"] = (_declared(cls, parameter), Field(default, alias=name))
    model = create_model(cls.__name__, __base__=Options, __cls_kwargs__={"extra": extra}, **fields)
    model.OF = cls
    return model


def arguments_of(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the constructor of `cls` declares them; ValueError for others.

    They are what JSON can say: a list is a tuple where that is declared, a text is a path.
    """
    model = options_model(cls)
    names = [str(field.alias) for field in model.model_fields.values()]
    for key in options:
        if key not in names and model.model_config.get("extra") == "forbid":
            raise ValueError(
                f"no option {short(key)}{nearest(key, names)}; "
                f"options: {', '.join(names) or 'none'}"
            )
    data = json.dumps(dict(options), ensure_ascii=False).encode()
    try:
        return model.model_validate_json(data).given()
    except ValidationError as error:
        raise ValueError("; ".join(mistakes(error, _explain))) from error


def _explain(problem: Any) -> str:
    place = ".".join(map(word, problem["loc"]))
    return mistake(place and f"option {place}", problem)


def _declared(cls: type, parameter: inspect.Parameter) -> Any:
    """The annotation of a parameter; Any if there is none, if it is imported for type checkers
    alone, or if pydantic does not know it."""
    if parameter.annotation is parameter.empty:
        return Any
    holder = type("Holder", (), {"__annotations__": {parameter.name: parameter.annotation}})
    names = getattr(cls.__init__, "__globals__", {})
    try:
        hint = typing.get_type_hints(holder, names, include_extras=True)[parameter.name]
        TypeAdapter(hint)
    except (NameError, PydanticUserError):
        return Any
    return hint
