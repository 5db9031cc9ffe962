from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from infra.cluster import REPO, Place
from infra.store import TEMPORARY, open_store
from models.dvae import dvae_loss
from ops.errors import DamagedArtifact, Diverged, RecipeChanged, RunAlive, UsageError
from ops.jobs import Job, TokenizerTrainSettings, Worker
from ops.learning import LEARN
from ops.recipes import parse_sealed, seal
from ops.run_record import ask_to_stop, claim_run, end_run, read_run
from ops.snapshot import read_snapshot, take_snapshot
from ops.trained import (
    CHECKPOINT_FORMAT,
    latest_checkpoint,
    load_tokenizer,
    load_weights,
    read_checkpoint_file,
    read_metrics,
)
from ops.training import Told, _workers_died, prepare, train, train_here
from ops.training_loop import rate, run_loop
from pipelines.settings import PRESETS, resolve
from tests.ops.conftest import Learned, MakePairs
from tests.small_runs import (
    TOKENIZER_TRAINING,
    TRANSFORMER_TRAINING,
    tokenizer_job,
    transformer_job,
    write_pair_shard,
)
from tests.training_rounds import Target, training_rounds


def _job(learned: Learned, kind: str, into: Path, **changed: Any) -> Job:
    if kind == "tokenizer":
        return tokenizer_job(learned.pairs, into, replace(TOKENIZER_TRAINING, **changed))
    return transformer_job(learned.tokens, into, replace(TRANSFORMER_TRAINING, **changed))


def _digests(into: Path) -> dict[str, str]:
    """Weights, averaged weights and training state of the latest checkpoint."""
    checkpoint = latest_checkpoint(open_store(str(into)))
    assert checkpoint is not None
    return {name: ref.sha256 for name, ref in checkpoint.files.items()}


def _without_clocks(into: Path) -> list[dict[str, Any]]:
    clocks = {"steps_per_s", "tokens_per_s", "waited_share", "cpu_s"}
    return [
        {name: value for name, value in row.items() if name not in clocks}
        for row in read_metrics(open_store(str(into)))
    ]


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_run_that_stopped_and_went_on_ends_with_the_weights_of_an_undisturbed_one(
    learned: Learned, tmp_path: Path, kind: str
) -> None:
    undisturbed = {"tokenizer": learned.tokenizer, "transformer": learned.model}[kind]
    job = _job(learned, kind, tmp_path / "stopped")
    first = train_here(job, threads=1, stop_after=13)  # three updates past the checkpoint, done again below
    assert first.step == 10
    assert train_here(job, threads=1).step == 20
    assert _digests(tmp_path / "stopped") == _digests(undisturbed)
    assert _without_clocks(tmp_path / "stopped") == _without_clocks(undisturbed)


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_run_killed_between_its_files_and_its_receipt_goes_on_from_the_checkpoint_before(
    learned: Learned, tmp_path: Path, kind: str
) -> None:
    finished = {"tokenizer": learned.tokenizer, "transformer": learned.model}[kind]
    into = shutil.copytree(finished, tmp_path / "killed")
    expected = _digests(into)
    (into / "steps" / "0000020" / "receipt.json").unlink()
    (into / "metrics" / "0000020.jsonl").write_text('{"kind": "train", "step": 15, "loss": -1.0}\n')
    assert [row["step"] for row in read_metrics(open_store(str(into)))] == [0, 5, 10, 10]
    train_here(_job(learned, kind, into), threads=1)
    assert _digests(into) == expected
    assert all(row.get("loss") != -1.0 for row in read_metrics(open_store(str(into))))


def test_evaluation_is_logged_from_step_0_and_each_checkpoint_has_a_sheet(learned: Learned) -> None:
    for stage, names in (
        (
            learned.tokenizer,
            {"psnr_db", "bits_per_dim", "perplexity", "used_fraction", "hard_minus_relaxed_nats_per_dim"},
        ),
        (learned.model, {"image_nats_per_code", "information_gain_nats_per_code", "text_nats_per_token"}),
    ):
        store = open_store(str(stage))
        evaluations = [row for row in read_metrics(store) if row["kind"] == "evaluation"]
        assert [row["step"] for row in evaluations] == [0, 10, 20]
        assert all(names <= row.keys() and row["on"] == "held_out" for row in evaluations)
        assert [entry.key for entry in store.list("sheets/")] == ["sheets/0000010.png", "sheets/0000020.png"]


def test_the_rate_is_the_papers_and_every_preset_ends_with_its_final_one() -> None:
    paper = TokenizerTrainSettings()
    assert rate(paper, 0) == pytest.approx(1e-4)
    assert rate(paper, 600_000) == pytest.approx((1e-4 + 1.25e-6) / 2)  # half a cosine: half-way at half of the steps
    assert rate(paper, 1_200_000) == rate(paper, 2_999_999) == 1.25e-6
    for preset in PRESETS.glob("*.toml"):
        settings = resolve(preset.stem)
        for training in (settings.tokenizer_training, settings.transformer_training):
            assert rate(training, training.warmup_steps) == pytest.approx(training.learning_rate, rel=0.01)
            end = round(training.decay_share * training.steps)
            middle = rate(training, (training.warmup_steps + end) // 2)
            assert middle == pytest.approx((training.learning_rate + training.final_learning_rate) / 2, rel=0.05)


def test_learning_learns(learned: Learned, tmp_path: Path) -> None:
    train_here(_job(learned, "tokenizer", tmp_path / "t", steps=60, checkpoint_every=60), threads=1)
    rows = [row for row in read_metrics(open_store(str(tmp_path / "t"))) if row["kind"] == "evaluation"]
    assert rows[-1]["bits_per_dim"] < rows[0]["bits_per_dim"] - 1
    assert rows[-1]["psnr_db"] > rows[0]["psnr_db"] + 3


def test_a_finished_stage_returns_at_once_and_needs_no_ray(learned: Learned) -> None:
    before = {path: path.stat().st_mtime_ns for path in learned.model.rglob("*") if path.is_file()}
    trained = train(_job(learned, "transformer", learned.model), Place())
    assert trained.was_done
    assert trained.step == 20
    assert trained.evaluation["step"] == 20
    assert {path: path.stat().st_mtime_ns for path in learned.model.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_field_by_field_and_those_that_change_no_weight_are_not(learned: Learned) -> None:
    with pytest.raises(RecipeChanged) as refused:
        prepare(_job(learned, "tokenizer", learned.tokenizer, learning_rate=1e-3, flips=False))
    assert "training.learning_rate: was 0.004, now 0.001" in str(refused.value)
    assert "training.flips: was True, now False" in str(refused.value)
    prepare(_job(learned, "tokenizer", learned.tokenizer, checkpoint_every=7, log_every=1, evaluate_pictures=2))


def test_a_source_that_grew_changes_nothing_for_a_run_that_began(learned: Learned, tmp_path: Path) -> None:
    pairs = shutil.copytree(learned.pairs, tmp_path / "pairs")
    job = tokenizer_job(pairs, tmp_path / "into")
    train_here(job, threads=1, stop_after=10)
    write_pair_shard(pairs, 2, list(range(80, 120)))
    train_here(job, threads=1)
    assert _digests(tmp_path / "into") == _digests(learned.tokenizer)
    pinned = read_snapshot(open_store(str(tmp_path / "into"))).rows()
    assert take_snapshot(open_store(str(pairs)), "pictures", {}).rows() > pinned


def test_what_can_be_refused_is_refused_before_a_recipe_is_written(learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "into"
    for job, words in (
        (_job(learned, "tokenizer", into, where={"colour": "mauve"}), "no pictures to train on"),
        (tokenizer_job(tmp_path / "nowhere", into), "holds no pairs"),
        (
            replace(_job(learned, "transformer", into), model=replace(transformer_job(into, into).model, grid=8)),
            "grid=4",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            prepare(job)
    assert not into.exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_touches_the_weights(learned: Learned, tmp_path: Path) -> None:
    into = shutil.copytree(learned.tokenizer, tmp_path / "into")
    (into / "steps" / "0000020" / "receipt.json").unlink()
    path = next((into / "steps" / "0000010").glob("part-*.safetensors"))
    tensors, about = load_weights(path.read_bytes(), "")
    tensors["weight/decoder.output.bias"].fill_(math.nan)
    _replace_file(into, path, "part-0000-of-0001.safetensors", tensors, about)
    with pytest.raises(Diverged) as ended:
        train_here(_job(learned, "tokenizer", into), threads=1)
    assert ended.value.args == (str(into), 11, 10)
    assert latest_checkpoint(open_store(str(into))).step == 10  # type: ignore[union-attr]


def _replace_file(into: Path, path: Path, name: str, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Writes a checkpoint's weights anew, and its receipt to match."""
    from ops.recipes import file_sha256
    from ops.trained import save_weights

    save_weights(path, tensors, about)
    receipt = path.with_name("receipt.json")
    content = parse_sealed(receipt.read_bytes(), "", CHECKPOINT_FORMAT)
    content["files"][name] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    receipt.write_bytes(seal(content))


@pytest.mark.parametrize("name", ["part", "receipt"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_is_named_and_without_its_receipt_the_run_goes_on_from_the_one_before(
    learned: Learned, tmp_path: Path, name: str, damage: str
) -> None:
    into = shutil.copytree(learned.model, tmp_path / "into")
    job = _job(learned, "transformer", into, steps=30)
    recipe = json.loads((into / "recipe.json").read_text())
    recipe["identity"]["transformer_training"]["steps"] = 30  # a run of thirty steps that has made twenty
    (into / "recipe.json").write_text(json.dumps(recipe))
    step = into / "steps" / "0000020"
    path = next(step.glob(f"{name}*"))
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = bytes([whole[middle] ^ 0xFF])
        path.write_bytes(whole[:middle] if damage == "cut" else whole[:middle] + flipped + whole[middle + 1 :])
    if (name, damage) != ("receipt", "gone"):
        with pytest.raises(DamagedArtifact) as refused:
            train_here(job, threads=1)
        assert refused.value.exit_code == 3
        assert path.name in str(refused.value)
        assert "delete that receipt and run the same command again" in str(refused.value)
        assert latest_step(into) == 20 if name != "receipt" else True
        (step / "receipt.json").unlink()
    assert latest_step(into) == 10
    train_here(job, threads=1)
    assert latest_step(into) == 30


def latest_step(into: Path) -> int:
    checkpoint = latest_checkpoint(open_store(str(into)))
    return checkpoint.step if checkpoint else 0


def test_a_cursor_that_is_not_the_steps_is_no_checkpoint(learned: Learned, tmp_path: Path) -> None:
    into = shutil.copytree(learned.model, tmp_path / "into")
    (into / "steps" / "0000020" / "receipt.json").unlink()
    receipt = into / "steps" / "0000010" / "receipt.json"
    receipt.write_bytes(seal(parse_sealed(receipt.read_bytes(), "", CHECKPOINT_FORMAT) | {"cursor": 72}))
    with pytest.raises(DamagedArtifact, match=r"0000010/receipt\.json.*step 10 of 8 positions.*the cursor 72"):
        train_here(_job(learned, "transformer", into), threads=1)


@pytest.mark.slow
def test_a_run_cut_at_any_write_leaves_whole_checkpoints_and_ends_with_equal_weights(
    learned: Learned, tmp_path: Path
) -> None:
    job = _job(learned, "transformer", tmp_path / "begun", steps=4, checkpoint_every=2, evaluate_pictures=0)
    train_here(job, threads=1, stop_after=2)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-m", "tests.ops.cut_each_write"]
    paths = [tmp_path / "begun", tmp_path / "rounds", tmp_path / "job"]
    done = subprocess.run([*command, *paths], cwd=REPO, stdout=subprocess.PIPE, check=True)
    train_here(job, threads=1)
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(told["left_whole"] and told["ended_at"] == 4 for told in rounds)
    assert all(told["digests"] == _digests(tmp_path / "begun") for told in rounds)
    assert {told["left_at"] for told in rounds} == {2, 4}
    killed = [told for told in rounds if told["killed_by"] == signal.SIGKILL]
    assert len(killed) > len(rounds) / 2  # all but the last: heartbeats by the clock make their number vary


def test_only_the_newest_checkpoints_stay_and_every_sheet_does(learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "into"
    train_here(
        _job(learned, "transformer", into, checkpoint_every=4, keep_checkpoints=2, evaluate_pictures=0), threads=1
    )
    assert sorted(path.name for path in (into / "steps").iterdir() if any(path.iterdir())) == ["0000016", "0000020"]
    assert len(list((into / "sheets").iterdir())) == 5
    assert [row["step"] for row in read_metrics(open_store(str(into))) if row["kind"] == "train"] == [
        4, 5, 8, 10, 12, 15, 16, 20,
    ]  # fmt: skip


def test_a_batch_of_holes_only_is_no_step(make_pairs: MakePairs, tmp_path: Path) -> None:
    into = tmp_path / "into"
    job = tokenizer_job(
        make_pairs(weight=1e-9), into, replace(TOKENIZER_TRAINING, steps=2, checkpoint_every=2, ema=0.0)
    )
    train_here(job, threads=1)
    store = open_store(str(into))
    checkpoint = latest_checkpoint(store)
    assert checkpoint is not None
    weights, _ = load_weights(read_checkpoint_file(store, checkpoint, "model.safetensors"), "")
    untouched = LEARN["tokenizer"](job, store, read_snapshot(store), Worker()).initial().state_dict()
    assert all(torch.equal(weights[name], untouched[name]) for name in untouched)


def test_the_usage_term_has_the_value_and_the_gradient_of_the_batch_statistic(learned: Learned) -> None:
    job = tokenizer_job(learned.pairs, learned.tokenizer)
    store = open_store(str(learned.tokenizer))
    learning = LEARN["tokenizer"](job, store, read_snapshot(store), Worker())
    model, batch = learning.initial(), learning.batch(0, 8)
    assert batch is not None

    def gradients(objective: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(objective, list(model.parameters()), allow_unused=True))

    total, codes = learning.measure(model, batch, 3)["usage"], batch.counts["usage"]
    expected = dvae_loss(model, *batch.inputs, 3).usage_loss  # type: ignore[arg-type]
    assert float(total.detach()) / codes == pytest.approx(float(expected.detach()), rel=1e-5)
    for mine, its in zip(gradients(total / codes), gradients(expected), strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_a_second_training_on_a_directory_is_refused_while_the_first_lives(learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "into"
    job = _job(learned, "tokenizer", into)
    prepare(job)
    claim_run(open_store(str(into)))
    with pytest.raises(RunAlive, match=f"process {os.getpid()}"):
        train_here(job)
    with pytest.raises(RunAlive):
        train(job, Place())


FROZEN = """
import os, pickle, sys, threading, time
from pathlib import Path
from infra.store import TEMPORARY, open_store
from ops.jobs import Worker
from ops.run_record import claim_run
from ops.training import prepare
from ops.training_loop import run_loop
job, workers = pickle.loads(Path(sys.argv[1]).read_bytes()), []
prepare(job)
run = claim_run(open_store(job.into))
if os.fork():
    os._exit(0)  # the driver is gone, its worker lives on
run_loop(job, Worker(threads=1), run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_worker_that_was_frozen_while_another_run_took_over_changes_nothing_when_it_wakes_up(
    learned: Learned, tmp_path: Path, kind: str
) -> None:
    """Its driver is dead. It is stopped where it is about to write a checkpoint, and would go on to write others."""
    into = tmp_path / "into"
    job = _job(learned, kind, into, steps=60, checkpoint_every=10, keep_checkpoints=6)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    log = tmp_path / "log"
    with log.open("wb") as out:
        subprocess.run([sys.executable, "-c", FROZEN, tmp_path / "job"], cwd=REPO, stderr=out, check=True)
    store = open_store(job.into)
    while not any((into / "steps").glob("*/model-*")):
        time.sleep(0.001)
    pid = read_run(store)["worker"]["pid"]  # type: ignore[index]
    os.kill(pid, signal.SIGSTOP)
    frozen_at = latest_step(into)
    try:
        assert frozen_at < 60
        # Another interval and other checkpoints than the frozen one would write, so that each file of it would show.
        other = replace(job, training=replace(job.training, checkpoint_every=15))
        train_here(other, threads=1)
        before = {path: path.read_bytes() for path in into.rglob("*") if path.is_file()}
    finally:
        os.kill(pid, signal.SIGCONT)
    while _is_alive(pid):
        time.sleep(0.01)
    assert "is being trained by" in log.read_text()
    after = {path: path.read_bytes() for path in into.rglob("*") if path.is_file()}
    changed = {path.relative_to(into).as_posix() for path in after if after[path] != before.get(path)}
    # One write may have been under way when it was frozen; its own sign of life is its own.
    assert len([name for name in changed if not name.startswith("runs/0001/")]) <= 1
    assert {path for path in before if TEMPORARY not in path.name} <= after.keys()
    assert latest_step(into) == 60
    assert [row["step"] for row in read_metrics(store)] == sorted(row["step"] for row in read_metrics(store))
    undisturbed = replace(job, into=str(tmp_path / "undisturbed"))
    train_here(undisturbed, threads=1)
    assert _digests(into) == _digests(tmp_path / "undisturbed")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_is_asked_to_stop_ends_without_an_error(learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "into"
    job, store = _job(learned, "tokenizer", into), open_store(str(into))
    prepare(job)
    run = claim_run(store)
    ask_to_stop(store, run)
    run_loop(job, Worker(), run)
    assert latest_checkpoint(store) is None
    end_run(store, run, "stopped")
    train_here(job, threads=1)
    assert _digests(into) == _digests(learned.tokenizer)


def test_workers_that_start_again_within_a_run_are_told_of(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an elastic run do: their record has no step until they have made one."""
    monkeypatch.setattr("ops.training.SILENCE_S", 0.0)
    lines: list[str] = []
    told = Told(_job(learned, "transformer", tmp_path / "into"), lines.append)
    trains = {"step": 5, "steps": 20, "loss": 2.0, "steps_per_s": 1.0, "seconds_left": 15.0, "doing": "trains"}
    for record in (trains, {"doing": "prepares the model"}, trains | {"step": 10}):
        told.look(record)
    assert ["5/20 steps" in lines[0], "prepares the model" in lines[1], "10/20 steps" in lines[2]] == [True] * 3


@pytest.mark.parametrize(
    ("place", "is_loss"), [(Place(), False), (Place(workers=2), True), (Place(workers=1, most_workers=3), True)]
)
def test_who_has_peers_may_lose_one_and_who_has_none_met_an_error_of_its_own(place: Place, is_loss: bool) -> None:
    failure = WorkerGroupError("", {0: RuntimeError("Connection reset by peer"), 1: ActorDiedError()})
    assert _workers_died(failure, place) == is_loss


@pytest.mark.cluster
@pytest.mark.slow
def test_two_workers_follow_the_path_of_one(ray_cluster: None, make_pairs: MakePairs, tmp_path: Path) -> None:
    # An odd batch and holes: the workers' parts differ in size.
    training = replace(TOKENIZER_TRAINING, steps=4, batch=7, checkpoint_every=4, log_every=1, evaluate_pictures=0)
    pairs = make_pairs(weight=0.7)
    one, two = (tokenizer_job(pairs, tmp_path / name, training) for name in ("one", "two"))
    train_here(one, threads=1)
    lines: list[str] = []
    trained = train(two, Place(workers=2, threads=1), lines.append)
    assert trained.step == 4
    assert lines[-1].split() == ["tokenizer", "4/4", "steps", "done"]
    rows = zip(_without_clocks(tmp_path / "one"), _without_clocks(tmp_path / "two"), strict=True)
    for mine, its in ((a, b) for a, b in rows if a["kind"] == "train"):
        # The first step differs by the order of its sums only; later ones by what Adam makes of that.
        tolerance = 1e-5 if mine["step"] == 1 else 1e-2
        for name in ("loss", "nats_per_dim", "distortion_nats", "kl_nats", "usage", "gradient_norm"):
            assert its[name] == pytest.approx(mine[name], rel=tolerance), (mine["step"], name)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_driver_leave_no_trace_in_the_weights(learned: Learned, tmp_path: Path) -> None:
    """Both models at once. Ten kills of each, also with two workers: tests/chaos/test_training_chaos.py."""
    endless = {"steps": 1_000_000, "checkpoint_every": 10, "evaluate_pictures": 8}
    targets = [
        Target(_job(learned, "tokenizer", tmp_path / "tokenizer", **endless), Place(workers=1, threads=1)),
        Target(_job(learned, "transformer", tmp_path / "model", **endless), Place(workers=1, threads=1)),
    ]
    training_rounds(tmp_path, targets, ["worker", "driver"], seed=1)
    assert "a worker died" in (tmp_path / "log").read_text()


DIVERGES = (
    *("tokenizer_training.steps=50", "tokenizer_training.checkpoint_every=10"),
    *('tokenizer_training.schedule="wsd"', "tokenizer_training.final_learning_rate=1e25"),  # from step 40 on
)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_training_that_diverges_ends_with_4_and_a_second_one_beside_it_with_2(
    learned: Learned, tmp_path: Path
) -> None:
    """Real command lines: the rate of a slip of the pen, and the same command again, with the same end."""
    into = tmp_path / "into"
    settings = [word for line in DIVERGES for word in ("--set", line)]
    command = [sys.executable, "-m", "pipelines", "train", "tokenizer", learned.pairs, "--into", into]
    first = subprocess.Popen(
        [*command, "--preset", "tiny", *settings], cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while read_run(open_store(str(into))) is None:
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run([*command, "--preset", "tiny", *settings], cwd=REPO, capture_output=True, check=False)
    said = first.communicate()[1].decode()
    assert (second.returncode, first.returncode) == (2, 4), second.stderr.decode() + said
    assert f"is being trained by process {first.pid} on" in second.stderr.decode()
    end = next(line for line in said.splitlines() if "the loss is not finite" in line)
    assert "the last good checkpoint is step 40" in end
    load_tokenizer(str(into))
    before = _digests(into)
    told = resolve("tiny", DIVERGES)
    again = Job("tokenizer", str(learned.pairs), str(into), told.dvae, told.tokenizer_training)
    with pytest.raises(Diverged) as ended:
        train_here(again)
    assert str(ended.value).split(":")[1] in end
    assert _digests(into) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_gpu_learns_what_a_cpu_learns(learned: Learned, tmp_path: Path, kind: str, precision: str) -> None:
    """The first losses agree; a checkpoint of one goes on on the other. In bf16 all that saves time or memory is on."""
    job, is_bf16 = _job(learned, kind, tmp_path / "into", precision=precision), precision == "bf16"
    prepare(job)
    run = claim_run(open_store(job.into))
    run_loop(job, Worker(device="cuda", recompute=is_bf16, compile=is_bf16), run)
    end_run(open_store(job.into), run, "done")
    on_cpu = learned.tokenizer if kind == "tokenizer" else learned.model
    first_gpu, first_cpu = (
        next(row["loss"] for row in read_metrics(open_store(str(into))) if row["kind"] == "train")
        for into in (tmp_path / "into", on_cpu)
    )
    assert first_gpu == pytest.approx(first_cpu, rel=0.2)
    assert train(job, Place()).was_done
