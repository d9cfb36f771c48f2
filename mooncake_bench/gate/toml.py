"""How is a TOML file of the gate read? Into structs; an unknown key is an error with neighbours."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TypeVar

import msgspec

from mooncake_bench.gate.errors import GateError

Struct = TypeVar("Struct", bound=msgspec.Struct)
_UNKNOWN = re.compile(r"unknown field `(.+?)`(?: - at `\$\.?(.*?)`)?$")


def read_toml(path: Path, kind: type[Struct]) -> Struct:
    """The file as a `kind`; raises GateError with the place and the remedy in one line."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise GateError(f"{path}: {error.strerror}; give an existing file") from None
    except msgspec.ValidationError as error:
        raise GateError(f"{path}: {explain(str(error), kind)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GateError(f"{path}: not valid TOML ({error}); mend the file") from None


def explain(message: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's message with the names that may have been meant."""
    found = _UNKNOWN.search(message)
    if not found:
        text, _, place = message.partition(" - at `$.")
        return f"{place.rstrip('`') + ': ' if place else ''}{text}; mend the value"
    key, place = found.group(1), found.group(2) or ""
    names = [field.encode_name for field in msgspec.structs.fields(_at(kind, place))]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.4) or names
    where = f"[{place.split('[')[0]}] " if place else ""
    return f"unknown key {where}{key!r}; did you mean {', '.join(near)}?"


def _at(kind: type[msgspec.Struct], place: str) -> type[msgspec.Struct]:
    """The struct at a path like `runs` or `metric[...]`, one level down."""
    name = place.split("[")[0].split(".")[0]
    for field in msgspec.structs.fields(kind):
        if name and field.encode_name == name:
            inner = msgspec.inspect.type_info(field.type)
            if isinstance(inner, msgspec.inspect.ListType):
                inner = inner.item_type
            if isinstance(inner, msgspec.inspect.StructType):
                found: type[msgspec.Struct] = inner.cls
                return found
    return kind
