"""Options that are declared once: a dataclass is one argument of a command and several of its options.

Each field is an option in typer's own terms, and what the options lead to is a method beside them::

    @dataclass(frozen=True, kw_only=True)
    class WhereOptions:
        device: Annotated[str, typer.Option(help="Where to run.")] = "cpu"

    def train_command(where: WhereOptions) -> None: ...

:func:`expand_option_groups` gives typer the flat function ``(*, device="cpu")``, which builds the dataclass.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

Result = TypeVar("Result")
_OMITTED = object()


def panel(name: str | None) -> Callable[..., Any]:
    """Make a short form of ``typer.Option`` for one panel of the help pages: help text, then names and settings.

    Without a name it is the first panel, of at most 15 options: those that a first run of the command needs.

    Example:
        >>> panel("Data")("Images a batch.", "--batch", min=1).rich_help_panel
        'Data'
    """

    def option(text: str, *names: str, **settings: Any) -> Any:
        return typer.Option(*names, help=text, rich_help_panel=name, **settings)

    return option


class override(dict[str, Any]):  # noqa: N801  # read as a verb: Annotated[DataOptions, override(batch_size=128)]
    """Change fields of a group for one command: a new default, or a new ``typer.Option`` with its help text."""


def omit(*fields: str) -> override:
    """Leave fields of a group out of a command; they keep their defaults."""
    return override(dict.fromkeys(fields, _OMITTED))


def expand_option_groups(function: Callable[..., Result]) -> Callable[..., Result]:
    """Replace each parameter that is a dataclass by the dataclass's fields.

    Args:
        function: a command. A parameter ``Group`` becomes its fields, of which those without default are required;
            ``Group | None`` asks for none, and the argument is None unless all of those were given. Either may be
            ``Annotated`` with :class:`override` and :func:`omit`.

    Returns:
        A function of keywords whose signature and annotations are flat.

    Raises:
        TypeError: two parameters bring an option of the same name, or an override names no field.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class SizeOptions:
        ...     width: int
        ...     height: int = 1
        >>> def area(size: SizeOptions, unit: str = "m") -> str:
        ...     return f"{size.width * size.height} {unit}"
        >>> flat = expand_option_groups(area)
        >>> list(inspect.signature(flat).parameters), flat(width=3, height=2, unit="cm")
        (['width', 'height', 'unit'], '6 cm')
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, _Group] = {}
    flat: dict[str, Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        group = _read_group(hints[name])
        if group is None:
            own = {name: parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY)}
        else:
            groups[name], own = group, group.options
        if twice := sorted(flat.keys() & own.keys()):
            raise TypeError(f"{function.__name__}: expected each option once, got {twice[0]!r} twice")
        flat |= own

    @functools.wraps(function)
    def command(**values: Any) -> Result:
        single = {name: value for name, value in values.items() if not any(name in g.options for g in groups.values())}
        return function(**single, **{name: group.build(values) for name, group in groups.items()})

    command.__signature__ = inspect.Signature(list(flat.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: option.annotation for name, option in flat.items()}
    return command


@dataclasses.dataclass(frozen=True)
class _Group:
    """A dataclass as options of a command; an argument of it is None while one of ``needed`` is."""

    cls: type[Any]
    options: dict[str, Parameter]
    needed: list[str]

    def build(self, values: Mapping[str, Any]) -> Any:
        if any(values[name] is None for name in self.needed):
            return None
        return self.cls(**{name: values[name] for name in self.options})


def _read_group(hint: Any) -> _Group | None:
    """Read a parameter's annotation; None for a parameter that is an option by itself."""
    base, *extras = _split(hint)
    cls = next((kind for kind in (base, *get_args(base)) if dataclasses.is_dataclass(kind)), None)
    if not isinstance(cls, type):
        return None
    types, options = get_type_hints(cls, include_extras=True), dict[str, Parameter]()
    for field in dataclasses.fields(cls):
        default = Parameter.empty if field.default is dataclasses.MISSING else field.default
        options[field.name] = Parameter(
            field.name, Parameter.KEYWORD_ONLY, default=default, annotation=types[field.name]
        )
    for name, value in [change for extra in extras if isinstance(extra, override) for change in extra.items()]:
        if name not in options:
            raise TypeError(f"{cls.__name__}: expected a field among {', '.join(options)}, got {name!r}")
        option = options.pop(name) if value is _OMITTED else options[name]
        if isinstance(value, ParameterInfo):
            options[name] = option.replace(annotation=Annotated[_split(option.annotation)[0], value])
        elif value is not _OMITTED:
            options[name] = option.replace(default=value)
    required = [name for name, option in options.items() if option.default is Parameter.empty]
    if cls is base:
        return _Group(cls, options, [])
    for name in required:
        kind, *info = _split(options[name].annotation)
        hint = functools.reduce(lambda hint, extra: Annotated[hint, extra], info, kind | None)
        options[name] = options[name].replace(annotation=hint, default=None)
    return _Group(cls, options, required)


def _split(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
