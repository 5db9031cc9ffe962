"""What a trained stage holds on disk (tokenizer/, model/): checkpoints, metrics, and the models that are read back.

    steps/0000500/            the model, what a resume needs (ops/checkpoints.py), and receipt.json: committed iff it is
                              there; files are named by their digest, so that no other run's write can damage them
    metrics/0000500.jsonl     rows since the checkpoint before       sheets/0000500.png   the same pictures each time
    tokenizer/                the frozen tokenizer that made the codes, in TOKENS and MODEL, so that each stands alone

The digest of a model is the sha256 of its safetensors file, whose header also holds its settings. Nothing here is a
pickle. May not live here: the loop (ops/training_loop.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from infra.store import Store, open_store
from ops.errors import DamagedArtifact, UsageError
from ops.recipes import canonical_json, file_sha256, parse_sealed, read_json, seal, sha256
from ops.shards import FileRef, read_verified

if TYPE_CHECKING:
    from torch import Tensor

    from models.dvae import Dvae
    from models.text import CaptionTokenizer
    from models.transformer import Transformer

FORMAT = 1
CHECKPOINT_FORMAT = 2
MODEL = "model.safetensors"
"""What is evaluated, drawn and used: the averaged weights where there are any."""
BPE = "bpe.json"
FROZEN_TOKENIZER = "tokenizer/receipt.json"
_HEADER = "armchair"
WORD = re.compile(r"steps/\d{7,}/part-\d{4,}-of-\d{4,}\.run-\d{4,}\.json")
"""What a rank tells rank 0 while a checkpoint is being written (ops/checkpoints.py)."""
_RECEIPT = re.compile(r"steps/(\d{7,})/receipt\.json")


@dataclass(frozen=True)
class Checkpoint:
    """A committed step: `step` updates were done on the positions below `cursor`, where a resume reads on.

    Learning rate, temperature and KL weight are functions of the step, and all randomness is one of the seed and the
    position: they need no place here. `digest` is the sha256 of the model's file: its name at this step. `state` holds
    the numbers that a resume needs besides tensors. `made_with` is what decides the last bits of the weights besides
    the recipe: workers, threads, device. It is compared in words, and never refused.
    """

    step: int
    cursor: int
    digest: str
    files: dict[str, FileRef]
    state: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)


def latest_checkpoint(store: Store) -> Checkpoint | None:
    """The highest step with a receipt, or None. Raises DamagedArtifact for a receipt that is cut, UnknownFormat."""
    steps = [int(match[1]) for entry in store.list("steps/") if (match := _RECEIPT.fullmatch(entry.key))]
    return read_checkpoint(store, max(steps)) if steps else None


def read_checkpoint(store: Store, step: int) -> Checkpoint:
    """The checkpoint of a step that has a receipt. Raises DamagedArtifact, UnknownFormat."""
    key = f"steps/{step:07d}/receipt.json"
    found = parse_sealed(store.read(key), f"{store.location}/{key}", CHECKPOINT_FORMAT)
    files = {name: FileRef(**ref) for name, ref in found.pop("files").items()}
    return Checkpoint(files=files, **{name: value for name, value in found.items() if name != "format"})


def write_checkpoint(
    store: Store,
    step: int,
    cursor: int,
    files: Mapping[str, Path],
    rows: list[dict[str, Any]],
    sheet: bytes | None,
    keep: int,
    state: Mapping[str, Any] = MappingProxyType({}),
    made_with: Mapping[str, Any] = MappingProxyType({}),
    check_owner: Callable[[], None] = lambda: None,
    others: Callable[[], dict[str, FileRef]] = dict,
) -> Checkpoint:
    """Commits a step: files, sheet and metrics first, the receipt last. Then removes all but the `keep` newest steps.

    `check_owner` raises if the directory belongs to another run; it is asked before each write. `others` waits for the
    files of other ranks, which they put themselves. A step that an earlier run left without its receipt is overwritten.
    """

    def put(key: str, data: bytes) -> None:
        check_owner()
        store.put(key, data, if_absent=False)

    refs = {name: put_file(store, step, name, path, check_owner) for name, path in files.items()}
    if sheet is not None:
        put(f"sheets/{step:07d}.png", sheet)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    put(f"metrics/{step:07d}.jsonl", lines.encode())
    refs |= others()
    checkpoint = Checkpoint(step, cursor, refs[MODEL].sha256, refs, dict(state), dict(made_with))
    put(f"steps/{step:07d}/receipt.json", seal({"format": CHECKPOINT_FORMAT, **asdict(checkpoint)}))
    check_owner()
    _prune(store, keep)
    return checkpoint


def put_file(store: Store, step: int, name: str, path: Path, check_owner: Callable[[], None]) -> FileRef:
    """Puts a file of a checkpoint under a name that holds its digest."""
    digest, (stem, extension) = file_sha256(path), name.split(".")
    ref = FileRef(f"steps/{step:07d}/{stem}-{digest[:16]}.{extension}", path.stat().st_size, digest)
    check_owner()
    store.put(ref.key, path, if_absent=False)
    return ref


def _prune(store: Store, keep: int) -> None:
    keys = [entry.key for entry in store.list("steps/")]
    steps = sorted(int(match[1]) for key in keys if (match := _RECEIPT.fullmatch(key)))
    for step in steps[:-keep]:
        store.delete(f"steps/{step:07d}/receipt.json")  # first, so that no receipt names what is gone
        for key in keys:
            if key.startswith(f"steps/{step:07d}/"):
                store.delete(key)


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """All rows up to the latest checkpoint, in order: `kind` is "train" or "evaluation", `step` counts updates done."""
    latest = latest_checkpoint(store)
    if latest is None:
        return []
    rows: list[dict[str, Any]] = []
    for entry in store.list("metrics/"):
        if int(Path(entry.key).stem) <= latest.step:
            found = [json.loads(line) for line in store.read(entry.key).splitlines()]
            # One that a run wrote after another had taken over says again what is known.
            known = rows[-1]["step"] if rows else -1
            rows += [row for row in found if row["step"] > known]
    return rows


def save_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes safetensors with `about` in its header, so that the file alone says what it is. Equal input, equal bytes.

    One header entry only: safetensors writes several in an order that changes from run to run.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={_HEADER: canonical_json(about).decode()})


def load_weights(data: bytes, place: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a file of `save_weights`. Raises DamagedArtifact naming `place` for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEADER])
        return load(data), about
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedArtifact(place, "weights of armchair", str(error)) from error


def read_checkpoint_file(store: Store, checkpoint: Checkpoint, name: str) -> bytes:
    """One file of a checkpoint. Raises DamagedArtifact."""
    return read_verified(store, checkpoint.files[name])


def freeze_tokenizer(source: str, into: Store) -> str:
    """Copies the tokenizer at `source` (a trained stage, TOKENS or MODEL) into a stage that depends on it.

    Returns its digest. What is there already stays; the stage's recipe is what refuses another tokenizer.
    """
    data, digest, _ = _tokenizer_bytes(source)
    if into.stat(FROZEN_TOKENIZER) is None:
        ref = FileRef(f"tokenizer/{digest[:16]}.safetensors", len(data), digest)
        into.put(ref.key, data)
        into.put(FROZEN_TOKENIZER, json.dumps({"format": FORMAT, "file": asdict(ref)}, indent=1).encode())
    return digest


def tokenizer_digest(location: str) -> str:
    """The digest of the tokenizer at a place, without reading its weights."""
    store = open_store(location)
    if store.stat(FROZEN_TOKENIZER) is not None:
        return str(read_json(store, FROZEN_TOKENIZER, FORMAT)["file"]["sha256"])
    return _checkpoint_to_use(store, "tokenizer").digest


def load_tokenizer(location: str) -> tuple[Dvae, str]:
    """The tokenizer of a trained stage, or the frozen one of TOKENS or MODEL, in eval mode, and its digest.

    Raises UsageError where there is none, DamagedArtifact for bytes that differ from the receipt.
    """
    from models.dvae import Dvae, DvaeSettings

    data, digest, place = _tokenizer_bytes(location)
    tensors, about = load_weights(data, place)
    dvae = Dvae(DvaeSettings(**about["settings"]))
    dvae.load_state_dict(tensors)
    return dvae.requires_grad_(False).eval(), digest


def load_transformer(location: str) -> tuple[Transformer, CaptionTokenizer, dict[str, Any], str]:
    """The transformer of MODEL at its latest checkpoint, its caption tokenizer, the recipe, and its digest.

    Raises UsageError where there is no checkpoint, DamagedArtifact for bytes that differ from the receipt.
    """
    from models.text import CaptionTokenizer
    from models.transformer import Transformer, TransformerSettings

    store = open_store(location)
    checkpoint = _checkpoint_to_use(store, "transformer")
    place = f"{location}/{checkpoint.files[MODEL].key}"
    tensors, about = load_weights(read_checkpoint_file(store, checkpoint, MODEL), place)
    transformer = Transformer(TransformerSettings(**about["settings"]))
    transformer.load_state_dict(tensors)
    bpe = store.read(BPE)
    if sha256(bpe) != about["bpe"]:
        raise DamagedArtifact(f"{location}/{BPE}", f"sha256 {about['bpe']}", f"sha256 {sha256(bpe)}")
    recipe = read_json(store, "recipe.json")
    captions = CaptionTokenizer.from_json(bpe.decode())
    return transformer.requires_grad_(False).eval(), captions, recipe, checkpoint.digest


def _tokenizer_bytes(location: str) -> tuple[bytes, str, str]:
    store = open_store(location)
    if store.stat(FROZEN_TOKENIZER) is not None:
        ref = FileRef(**read_json(store, FROZEN_TOKENIZER, FORMAT)["file"])
    else:
        checkpoint = _checkpoint_to_use(store, "tokenizer")
        ref = checkpoint.files[MODEL]
    return read_verified(store, ref), ref.sha256, f"{location}/{ref.key}"


def check_finished(tokenizer: str) -> None:
    """Raises UsageError if the training of a tokenizer has not reached its last step."""
    store = open_store(tokenizer)
    checkpoint = _checkpoint_to_use(store, "tokenizer")
    steps = read_json(store, "recipe.json")["identity"]["tokenizer_training"]["steps"]
    if checkpoint.step < steps:
        raise UsageError(
            f"{tokenizer} is at step {checkpoint.step} of {steps}.",
            "Let its training end first: the same `armchair train tokenizer` goes on from there.",
        )


def forget_after(store: Store, step: int, check_owner: Callable[[], None] = lambda: None) -> None:
    """Removes metrics and sheets past `step`, which a run left whose checkpoint was never committed, and the words of
    its ranks: workers that start again within a run must not take them for their own."""
    for prefix in ("metrics/", "sheets/"):
        for entry in list(store.list(prefix)):
            if int(Path(entry.key).stem) > step:
                check_owner()
                store.delete(entry.key)
    for entry in list(store.list("steps/")):
        if WORD.fullmatch(entry.key):
            check_owner()
            store.delete(entry.key)


def _checkpoint_to_use(store: Store, stage: str) -> Checkpoint:
    if store.stat("recipe.json") is None:
        raise UsageError(f"{store.location} holds no {stage}.", f"Make one with `armchair train {stage}`.")
    found = read_json(store, "recipe.json")["stage"]
    if found == "transformer" and stage == "tokenizer":
        raise UsageError(
            f"{store.location} lacks {FROZEN_TOKENIZER}, the tokenizer that made the codes it was trained on.",
            "Name that tokenizer with --tokenizer, or copy tokenizer/ from its TOKENS into it.",
        )
    if found != stage:
        raise UsageError(f"{store.location} is of the stage {found}, not {stage}.", "Name the other directory.")
    checkpoint = latest_checkpoint(store)
    if checkpoint is None:
        raise UsageError(
            f"{store.location} has no checkpoint yet.", f"Let `armchair train {stage}` reach its first checkpoint."
        )
    return checkpoint
