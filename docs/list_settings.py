"""Writes docs/settings.md from the schema in roll_ckpt/config.py: keys, types, defaults, and the text under each field.

python docs/list_settings.py        writes it again; tests/test_docs.py fails if it is not up to date
"""

from __future__ import annotations

import ast
import inspect
import itertools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from roll_ckpt.config import DeepSpeedConfig, HubUpload, PipelineConfig, Settings, Upload

HEAD = """\
# Settings

<!-- Written by docs/list_settings.py from roll_ckpt/config.py. Change the text there. -->

One schema serves every way in. An unknown key is refused, and the message names the nearest known one; units stand in
the names.

| Way in | Where its settings stand |
|---|---|
| a pipeline | a YAML file, read by `PipelineConfig.from_yaml(path)`, or keyword arguments of `PipelineConfig` |
| a DeepSpeed script | the object `checkpoint.roll_ckpt` of the DeepSpeed config |
| `roll_ckpt.megatron` | `Settings(…)` of `roll_ckpt.config`, given as `settings=` |
| the variable `ROLL_CKPT` | [JSON, or a file](deepspeed.md#in-a-script-you-would-rather-not-touch) |

The variable has the keys of a DeepSpeed script; Megatron-core takes those of [every way in](#every-way-in).

**No setting holds a secret.** Configurations end up in logs, and DeepSpeed copies its config into every checkpoint. A
value that looks like a token of the Hugging Face Hub, or an address that holds a password, is refused. A token comes
from `HF_TOKEN` or `hf auth login`.
"""

WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", ByteSize: "size"}
SIZES = "A *size* is a number of bytes, or text with a unit: `67108864`, `64MiB`, `4GiB`."


def docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The text that stands under each field of a class."""
    body = ast.parse(inspect.getsource(section).lstrip()).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(inspect.cleandoc(text).split())
    return found


def kind(annotation: Any) -> str:
    """A type in the words of a YAML file."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Annotated:
        pattern = next((part.metadata[0].pattern for part in inner[1:] if isinstance(part, FieldInfo)), None)
        return f"`{pattern.removeprefix('^')}…`" if pattern else kind(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        *first, last = [kind(one) for one in inner if one is not type(None)]
        return " or ".join([", ".join(first), last] if first else [last])
    if origin is tuple:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return f"mapping of {kind(inner[0])} to {kind(inner[1])}"
    raise TypeError(f"docs/list_settings.py has no word for {annotation}")


def size(nbytes: int) -> str:
    """A number of bytes with its unit."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes % (1 << exponent) == 0:
            return f"{nbytes >> exponent}{unit}"
    return str(nbytes)


def bounds(field: FieldInfo) -> str:
    """What a number may be."""
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    limits = [(sign, getattr(part, name)) for part in field.metadata for name, sign in signs if hasattr(part, name)]
    in_bytes = "ByteSize" in str(field.annotation)
    return ",".join(f" {sign} {size(limit) if in_bytes else limit}" for sign, limit in limits)


def default(field: FieldInfo) -> str:
    """The default as it would be written."""
    value = field.default
    if field.is_required():
        return "required"
    if value is None:
        return "unset"
    if isinstance(value, ByteSize):
        return f"`{size(value)}`"
    if value == ():
        return "`[]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def is_section(field: FieldInfo) -> bool:
    return any(isinstance(one, type) and issubclass(one, BaseModel) for one in all_of(field.annotation))


def all_of(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from all_of(inner)


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One row for each field that the class itself has; a field that is a section of its own has its own table."""
    told = docstrings(section)
    for name in inspect.get_annotations(section):
        field = section.model_fields.get(name)
        if field is None or is_section(field) or name == "type":  # the heading says it
            continue
        aliases = [alias for alias in getattr(field.validation_alias, "choices", ()) if alias != name]
        meaning = told[name] + "".join(f" Alias: `{alias}`." for alias in aliases)
        cells = [f"`{prefix}{name}`", kind(field.annotation) + bounds(field), default(field), meaning]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(section: type[BaseModel], prefix: str = "") -> str:
    return "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows(section, prefix)])


def about(section: type[BaseModel]) -> str:
    """What the docstring of a section says."""
    return " ".join(inspect.cleandoc(section.__doc__ or "").split())


def settings_page() -> str:
    """The whole of docs/settings.md."""
    parts = [HEAD, "## Every way in\n", table(Settings), ""]
    for name, field in Settings.model_fields.items():
        if is_section(field):
            inner = next(one for one in all_of(field.annotation) if isinstance(one, type))
            parts += [f"### `{name}`\n", f"{about(inner)}\n", table(inner, f"{name}."), ""]
    parts += [SIZES, "", "## Pipelines\n", table(PipelineConfig), ""]
    key = "checkpoint_config"
    parts += [f"### `{key}`\n", docstrings(PipelineConfig)[key], ""]
    for upload in (Upload, HubUpload):
        chosen = get_args(upload.model_fields["type"].annotation)[0]
        parts += [f"#### `type: {chosen}`\n", f"{about(upload)}\n", table(upload, f"{key}."), ""]
    parts += ["## DeepSpeed scripts\n", table(DeepSpeedConfig), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8")
