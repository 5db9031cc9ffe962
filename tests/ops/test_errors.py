"""Errors: one tree, one sentence with the next step, and the same type and text after pickling and after Ray."""

from __future__ import annotations

import pickle
import re

import pytest

from ops import errors
from ops.errors import ArmchairError

EXAMPLES: list[tuple[ArmchairError, int, list[str]]] = [
    (errors.ArmchairError("all is lost"), 2, ["all is lost"]),
    (errors.UsageError("There is no PAIRS.", "Name one."), 2, ["There is no PAIRS. Name one."]),
    (
        errors.BadList("list.tsv", 7, "has 3 fields"),
        2,
        ["list.tsv, line 7: has 3 fields", "run the same command again"],
    ),
    (errors.BadList("list.parquet", None, "has no rows"), 2, ["list.parquet: has no rows."]),
    (errors.BadSetting("fetch.deadline_s", "--set", "must be positive"), 2, ["fetch.deadline_s (--set)", "settings`"]),
    (
        errors.RecipeChanged("tokens", [("dvae.widths.0", 64, 32), ("crop", None, True)], "Use another --into."),
        2,
        ["tokens was made", "dvae.widths.0: was 64, now 32", "crop: was None, now True", "Use another --into."],
    ),
    (errors.RunAlive("model", "host-3, process 12", 3.2), 2, ["model", "host-3, process 12", "3 s ago", "Wait for it"]),
    (errors.StorageError("The disk is full.", "Make room."), 3, ["The disk is full. Make room."]),
    (errors.NotShared("/data", ["10.0.0.2", "10.0.0.3"]), 3, ["/data is not", "10.0.0.2, 10.0.0.3", "s3://"]),
    (errors.DamagedArtifact("a.tar", "sha256 x", "sha256 y"), 3, ["a.tar", "sha256 x", "sha256 y", "Restore"]),
    (errors.UnknownFormat("a.json", 9, 1), 3, ["a.json", "format 9", "format 1", "newer"]),
    (errors.Diverged("model", 500, 400), 4, ["model", "step 500", "step 400", "learning rate"]),
    (errors.Diverged("model", 500, None), 4, ["no checkpoint exists"]),
    (
        errors.Incomplete("pairs", 3, "2 deferred, 1 failed"),
        5,
        ["pairs: 3 shards", "2 deferred", "same command again"],
    ),
]


def test_every_error_of_the_tree_has_an_example_here_and_stands_in_the_drawing() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ArmchairError)}
    assert kinds == {type(error) for error, _, _ in EXAMPLES}
    assert errors.__doc__ is not None
    assert set(re.findall(r"─ (\w+)|^    (\w+Error) ", errors.__doc__, re.MULTILINE)) == {
        (kind.__name__, "") if kind is not ArmchairError else ("", "ArmchairError") for kind in kinds
    }


@pytest.mark.parametrize(("error", "exit_code", "parts"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_an_error_says_what_where_and_what_next_and_survives_pickling(
    error: ArmchairError, exit_code: int, parts: list[str]
) -> None:
    assert error.exit_code == exit_code
    for part in parts:
        assert part in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.args, str(again), again.exit_code) == (error.args, str(error), exit_code)


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_errors_keep_type_and_text_through_a_ray_task() -> None:
    import ray

    @ray.remote
    def fail(error: ArmchairError) -> None:
        raise error

    for error, exit_code, _ in EXAMPLES:
        with pytest.raises(type(error)) as raised:
            ray.get(fail.remote(error))
        # Ray raises a class made of its own and ours; ours, as it was, is the cause.
        assert raised.value.exit_code == exit_code
        assert str(error) in str(raised.value)
        cause = raised.value.cause
        assert type(cause) is type(error)
        assert (cause.args, str(cause)) == (error.args, str(error))
