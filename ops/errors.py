"""What can go wrong with a shard or a run. A pair that fails is no exception but data: see ops/reasons.py.

    ArmchairError                 one sentence each: what happened, where, what to do next
    ├─ UsageError                 the person can fix it now                                        exit 2
    │  ├─ BadList                 a list file, a line or a column of it can't be read
    │  ├─ BadSetting              a dotted path and what is wrong with its value
    │  ├─ RecipeChanged           the stage was made with other settings: was / now, field by field
    │  └─ RunAlive                somebody else is training in this directory
    ├─ StorageError               disk or bucket                                                   exit 3
    │  ├─ NotShared               a local directory that not every node of the cluster sees
    │  ├─ DamagedArtifact         bytes differ from what the receipt recorded
    │  └─ UnknownFormat           written by a later version
    ├─ Diverged                   the loss is not a number                                         exit 4
    └─ Incomplete                 done, but not everything                                         exit 5

Values are passed positionally and the text is built in `__str__`: an exception with a keyword-only `__init__`
loses its type on the way through Ray.
"""

from __future__ import annotations

from typing import ClassVar


class ArmchairError(Exception):
    """The root. `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 2


class UsageError(ArmchairError):
    """The person can fix it now: UsageError(what, next_step)."""

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.args)


class BadList(UsageError):
    """BadList(path, line, what): `line` is 1-based, or None where the whole file is meant."""

    def __str__(self) -> str:
        path, line, what = self.args
        place = f"{path}, line {line}" if line is not None else str(path)
        return (
            f"{place}: {str(what).rstrip('.')}. Nothing was planned; correct the list and run the same command again."
        )


class BadSetting(UsageError):
    """BadSetting(dotted_path, layer, what): `layer` names the preset file or --set it came from."""

    def __str__(self) -> str:
        path, layer, what = self.args
        return f"{path} ({layer}): {what}. `armchair settings` lists every setting with its unit."


class RecipeChanged(UsageError):
    """RecipeChanged(location, changes, ways_out): `changes` is a list of (field, was, now)."""

    def __str__(self) -> str:
        location, changes, ways_out = self.args
        lines = [f"  {field}: was {was!r}, now {now!r}" for field, was, now in changes]
        return "\n".join([f"{location} was made with other settings:", *lines, ways_out])


class RunAlive(UsageError):
    """RunAlive(location, who, seconds): another process gave a sign of life `seconds` ago."""

    def __str__(self) -> str:
        location, who, seconds = self.args
        return (
            f"{location} is being trained by {who} (sign of life {seconds:.0f} s ago). "
            "Wait for it or stop it; if it is dead, run the same command again in a minute."
        )


class StorageError(ArmchairError):
    """StorageError(what, next_step)."""

    exit_code: ClassVar[int] = 3

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.args)


class NotShared(StorageError):
    """NotShared(location, nodes): `nodes` are the addresses of those that do not see it."""

    def __str__(self) -> str:
        location, nodes = self.args
        return (
            f"{location} is not the same directory on {', '.join(nodes)}: what is written there would be lost to the "
            "others. Use a bucket (s3://…) or a filesystem that every node mounts."
        )


class DamagedArtifact(StorageError):
    """DamagedArtifact(path, expected, found): digests or sizes, as text."""

    def __str__(self) -> str:
        path, expected, found = self.args
        return (
            f"{path} is damaged: {expected} was recorded, found {found}. Restore the file from a copy; "
            "if a receipt names it, delete that receipt and run the same command again: a shard is made anew, "
            "a training goes on from the checkpoint before."
        )


class UnknownFormat(StorageError):
    """UnknownFormat(path, found, known)."""

    def __str__(self) -> str:
        path, found, known = self.args
        return f"{path} has format {found}; this version of armchair reads format {known}. Use a newer armchair."


class Diverged(ArmchairError):
    """Diverged(location, step, last_good): the loss was not finite at `step`."""

    exit_code: ClassVar[int] = 4

    def __str__(self) -> str:
        location, step, last_good = self.args
        good = f"the last good checkpoint is step {last_good}" if last_good is not None else "no checkpoint exists"
        return (
            f"{location}: the loss is not finite at step {step}; {good}. "
            "Lower the learning rate, with another --into: the same settings would meet the same batch again."
        )


class Incomplete(ArmchairError):
    """Incomplete(location, missing, why): some shards are not committed."""

    exit_code: ClassVar[int] = 5

    def __str__(self) -> str:
        location, missing, why = self.args
        return (
            f"{location}: {missing} shards are not committed ({why}). "
            "Run the same command again: it does only what is missing."
        )
