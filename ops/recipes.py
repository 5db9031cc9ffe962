"""recipe.json: what a stage is made with, written before its work; a start with another identity is refused.

The identity is compared field by field. Code and library versions are recorded beside it and never compared.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infra.store import Store
from ops.errors import DamagedArtifact, RecipeChanged, UnknownFormat

FORMAT = 1
RECIPE = "recipe.json"


def canonical_json(value: Any) -> bytes:
    """Equal values give equal bytes: sorted keys, no spaces, UTF-8.

    >>> canonical_json({"b": 1, "a": (2,)})
    b'{"a":[2],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a local file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(store: Store, key: str, known_format: int = FORMAT) -> dict[str, Any]:
    """A JSON object of ours. Raises FileNotFoundError, DamagedArtifact, or UnknownFormat for one of a later version."""
    return parse_json(store.read(key), f"{store.location}/{key}", known_format)


def parse_json(
    data: bytes, place: str, known_format: int = FORMAT, hook: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """The JSON object of ours in `data`, which was read from `place`. `hook` is what json makes of each object in it.

    Raises DamagedArtifact or UnknownFormat.
    """
    try:
        found = json.loads(data, object_hook=hook)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DamagedArtifact(place, "a JSON object", f"{len(data)} bytes that are none")
    if found.get("format") != known_format:
        raise UnknownFormat(place, found.get("format"), known_format)
    return found


def seal(value: dict[str, Any]) -> bytes:
    """The canonical JSON of a receipt that holds its own sha256, so that one flipped byte of it is noticed.

    >>> parse_sealed(seal({"format": 1, "rows": 3}), "a receipt")
    {'format': 1, 'rows': 3}
    """
    return canonical_json({**value, "sha256": sha256(canonical_json(value))})


def parse_sealed(data: bytes, place: str, known_format: int = FORMAT) -> dict[str, Any]:
    """What `seal` wrote, without its sha256. Raises DamagedArtifact for another byte, UnknownFormat."""
    found = parse_json(data, place, known_format)
    recorded = found.pop("sha256", None)
    if data != seal(found):
        raise DamagedArtifact(place, f"sha256 {recorded}", f"sha256 {sha256(canonical_json(found))}")
    return found


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that decide bytes."""
    names = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg", "tokenizers", "torch")
    return {"armchair": _code_version(), **{name: version(name) for name in names}}


def _code_version() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version("armchair")  # a container image without git


def start_stage(
    store: Store,
    stage: str,
    identity: dict[str, Any],
    inputs: dict[str, Any],
    ways_out: str,
    places: dict[str, str] | None = None,
) -> None:
    """Writes recipe.json, or checks that the one there says the same. Raises RecipeChanged (was / now, `ways_out`).

    `identity` holds the settings that decide content, `inputs` the fingerprints of what the stage is made from, and
    `places` where that lay at first: a hint, never compared, since stages may be moved.
    """
    recipe = {
        "format": FORMAT,
        "stage": stage,
        "identity": identity,
        "inputs": inputs,
        "versions": versions(),
        "places": places or {},
    }
    if store.put(RECIPE, json.dumps(recipe, indent=1, sort_keys=True, allow_nan=False).encode()):
        return
    there = read_json(store, RECIPE)
    was = _flat({"stage": there["stage"], **there["identity"], **there["inputs"]})
    now = _flat(json.loads(canonical_json({"stage": stage, **identity, **inputs})))
    changes = [(k, was.get(k), now.get(k)) for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    if changes:
        raise RecipeChanged(store.location, changes, ways_out)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            out.update(_flat(item, f"{prefix}{key}."))
        else:
            out[prefix + key] = item
    return out
