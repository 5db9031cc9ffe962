"""Training as a Ray job: the same `train`, in a process of the cluster that outlives whoever asked for it.

    python -m ops.train_job '{"kind": "transformer", "source": "s3://…", "into": "s3://…", …}'     what the cluster runs

The job's `submission_id` is named after the stage and the number of the run that it begins, so asking twice gives one
job: who comes later, or comes back, finds it and follows it. Its last line is its result, or its error, as JSON. May
not live here: training (ops/training.py), where clusters are (infra/cluster.py).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

import ops.errors
from infra.cluster import Cluster, ClusterError, Place, connect, quiet_environment, shipped
from infra.store import StoreError, absolute, open_store
from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.transformer import TransformerSettings
from ops.errors import ArmchairError, UsageError
from ops.jobs import Job, TokenizerTrainSettings, TransformerTrainSettings
from ops.recipes import sha256
from ops.run_record import HEARTBEAT_S, read_run
from ops.shared import check_shared
from ops.trained import latest_checkpoint
from ops.training import SILENCE_S, Say, Told, Trained, prepare, train

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PARTS: dict[str, dict[str, Any]] = {
    "tokenizer": {"model": DvaeSettings, "training": TokenizerTrainSettings},
    "transformer": {"model": TransformerSettings, "training": TransformerTrainSettings},
}
RESULT = "armchair-result "
"""Begins the last line of a job."""
STOP_S = 30
"""A job that is stopped has this long to end by itself; then Ray kills it."""
JOB_ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),  # Ray's 3 s are too short for workers that finish their update
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard shows the run by name, and its ranks
}
"""Of a job's process, beside what every worker has."""
PATIENCE_S = 60.0
"""A job server that does not answer for longer is given up; the job is not."""
REQUEST_S = 30.0
TAIL_LINES = 12
_ENVIRONMENT = threading.Lock()


# Whoever asks ---------------------------------------------------------------------------------------------------------


def train_as_job(job: Job, place: Place, server: str, say: Say = lambda line: None) -> Trained:
    """`train` as a job of the cluster whose job server is at `server` (infra.cluster.job_server), followed to its end.

    A job of this stage that is under way is followed instead of a second one. What is left by a Ctrl-C, a SIGTERM or a
    cancelled flow stops it; the death of this process, or a server that answers no more, does not. Raises what `train`
    raises in the job, and ClusterError for a job that ended without a word.
    """
    prepare(job, say)
    latest = latest_checkpoint(open_store(job.into))
    if latest is not None and latest.step >= job.training.steps:
        return train(job, place, say)  # at once, without Ray
    client = _client(server)
    name = None
    try:
        name = _find_or_submit(client, job, place, say)
        _follow(client, name, job, say)
    except Exception:
        raise  # of the server or the storage: the job may be well
    except BaseException:
        if name is not None:
            _stop(client, name, job, say)
        raise
    trained = _result(client, name)
    say(f"{job.kind:<12}{trained.step}/{job.training.steps} steps   done")
    return trained


def job_name(job: Job, run: int) -> str:
    """The `submission_id` of the job that begins run `run` of a stage.

    >>> job_name(Job("tokenizer", "runs/a/pairs", "s3://bucket/My_run/tokenizer", None, None), 3)
    'train-tokenizer-my-run-tokenizer-8c9ed0cb-0003'
    """
    return f"{_stem(job)}{run:04d}"


def _stem(job: Job) -> str:
    location = absolute(job.into).rstrip("/")
    place = re.sub(r"[^a-z0-9]+", "-", "-".join(location.split("/")[-2:]).lower()).strip("-")
    return f"train-{job.kind}-{place}-{sha256(location.encode())[:8]}-"


def _client(server: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Without a limit of time a head that is frozen would freeze whoever asks."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": REQUEST_S, **options})

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # it tells each file of the repo that is not shipped
    try:
        with _instead_of_ray_address(server):
            return Client(server)
    except AuthenticationError:
        raise ClusterError(f"{server} wants another token. Set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN.") from None
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"{server} is no job server of Ray: {error}. Correct --address or RAY_ADDRESS.") from None


@contextmanager
def _instead_of_ray_address(server: str) -> Iterator[None]:
    """Ray's client takes its address from the environment, whatever it is given; this variable goes before all."""
    name = "RAY_API_SERVER_ADDRESS"
    with _ENVIRONMENT:
        before = os.environ.get(name)
        os.environ[name] = server
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _find_or_submit(client: JobSubmissionClient, job: Job, place: Place, say: Say) -> str:
    stem = _stem(job)
    try:
        ours = [each for each in client.list_jobs() if (each.submission_id or "").startswith(stem)]
        for each in ours:
            if not each.status.is_terminal():
                say(f"{job.kind:<12}follows {each.submission_id}, which is under way")
                return str(each.submission_id)
        record = read_run(open_store(job.into))
        numbers = [int(each.submission_id.rpartition("-")[2]) for each in ours]
        name = job_name(job, 1 + max([*numbers, record["run"] if record else 0]))
        environment = shipped()
        environment["env_vars"] |= JOB_ENVIRONMENT
        metadata = {"stage": job.kind, "into": absolute(job.into), "source": absolute(job.source)}
        try:
            client.submit_job(
                entrypoint=entrypoint(job, place), submission_id=name, runtime_env=environment, metadata=metadata
            )
        except RuntimeError as refused:
            try:
                client.get_job_info(name)  # the other of two that asked in the same moment
            except RuntimeError:
                raise refused from None
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"The cluster takes no job: {error} Look at its dashboard, then run it again.") from error
    say(f"{job.kind:<12}trains as the Ray job {name}")
    return name


def _follow(client: JobSubmissionClient, name: str, job: Job, say: Say) -> None:
    """Tells the progress of a job until it has ended."""
    into, first = open_store(job.into), int(name.rpartition("-")[2])
    told, began_s = Told(job, say), time.monotonic()
    heard_s = spoke_s = began_s
    run = first
    while True:
        record = None
        try:
            info = client.get_job_info(name)
            heard_s = time.monotonic()
            if info.status.is_terminal():
                return
            record = read_run(into)
        except (OSError, RuntimeError) as error:  # a head or a storage that is away for a moment
            if time.monotonic() - heard_s > PATIENCE_S:
                raise ClusterError(
                    f"The job server does not answer any more ({error}); {name} may be well. Run the same command "
                    "again: it goes on from where the job is."
                ) from error
        if record is not None and record["run"] >= first:
            if record["run"] > run:
                say(f"{job.kind:<12}its workers were started again: run {record['run']}")
                run = record["run"]
            if record["state"] == "running":
                told.look(record)
        elif time.monotonic() - spoke_s > SILENCE_S:
            spoke_s = time.monotonic()
            say(f"{job.kind:<12}{info.status.value.lower()} on the cluster   {spoke_s - began_s:.0f} s")
        time.sleep(HEARTBEAT_S / 2)


def _stop(client: JobSubmissionClient, name: str, job: Job, say: Say) -> None:
    """SIGTERM to the job's process, which asks its run to stop, as Ctrl-C on a laptop does; and waits for its end."""
    say(f"{job.kind:<12}stops the Ray job {name}")
    try:
        client.stop_job(name)
        give_up_s = time.monotonic() + STOP_S + 10
        while not client.get_job_status(name).is_terminal() and time.monotonic() < give_up_s:
            time.sleep(0.2)
    except (OSError, RuntimeError) as error:
        say(f"{job.kind:<12}it could not be stopped ({error}): ray job stop {name}")


def _result(client: JobSubmissionClient, name: str) -> Trained:
    """What a job that has ended said last. Raises what it raised."""
    try:
        info, log = client.get_job_info(name), client.get_job_logs(name)
    except (OSError, RuntimeError) as error:
        raise ClusterError(
            f"{name} has ended, but its log can't be read: {error} Run the same command again."
        ) from None
    lines = log.splitlines()
    told = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
    if not told:
        tail = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or f"  {info.message}"
        raise ClusterError(
            f"The Ray job {name} ended as {info.status.value}. The last that it said:\n{tail}\n"
            "Mend what it names, then run the same command again: it goes on from the last checkpoint."
        )
    if "trained" in told[-1]:
        return Trained(**told[-1]["trained"])
    raise error_from(told[-1])


# In the cluster -------------------------------------------------------------------------------------------------------


def entrypoint(job: Job, place: Place) -> str:
    """The command that a cluster runs, for a shell."""
    return f"python -m ops.train_job {shlex.quote(to_json(job, place))}"


def to_json(job: Job, place: Place) -> str:
    """A job and its place as one line; what is as by default is left out."""
    asked = {"kind": job.kind, "source": absolute(job.source), "into": absolute(job.into)}
    parts = {**PARTS[job.kind], "sampling": SampleSettings, "place": Place}
    values = {"model": job.model, "training": job.training, "sampling": job.sampling, "place": place}
    for name, part in parts.items():
        if told := TypeAdapter(part).dump_python(values[name], mode="json", exclude_defaults=True):
            asked[name] = told
    return json.dumps(asked, ensure_ascii=False)


def from_json(text: str) -> tuple[Job, Place]:
    """The reverse of `to_json`. Raises UsageError for what is none.

    >>> job, place = from_json('{"kind": "tokenizer", "source": "/p", "into": "/t", "place": {"workers": 2}}')
    >>> job.training.batch, place.workers
    (512, 2)
    """
    try:
        asked = json.loads(text)
        parts = {**PARTS[asked["kind"]], "sampling": SampleSettings, "place": Place}
        values = {name: TypeAdapter(part).validate_python(asked.pop(name, {})) for name, part in parts.items()}
        place = values.pop("place")
        return Job(**asked, **values), place
    except (ValueError, KeyError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise UsageError(f"this is no training: {error}.", "Give what ops.train_job.to_json makes.") from None


def told_of(error: ArmchairError | OSError) -> dict[str, Any]:
    """An error as JSON can carry it: one of the tree by its name and values, another by its text."""
    if isinstance(error, ArmchairError):
        return {"error": type(error).__name__, "args": error.args}
    return {"error": StoreError.__name__, "args": [str(error)]}


def error_from(told: dict[str, Any]) -> ArmchairError | OSError:
    """The reverse of `told_of`."""
    kind = getattr(ops.errors, told["error"], StoreError)
    error: ArmchairError | OSError = kind(*told["args"])
    return error


def main(text: str) -> int:
    """Trains on the cluster that this process was started by; the exit code. SIGTERM asks the run to stop."""
    quiet_environment()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    result: dict[str, Any]
    try:
        job, place = from_json(text)
        with connect(Cluster()):
            check_shared(job.source, job.into)
            result = {"trained": asdict(train(job, place, lambda line: print(line, flush=True)))}  # noqa: T201
        code = 0
    except (ArmchairError, OSError) as error:
        result, code = told_of(error), getattr(error, "exit_code", 3)
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    print(f"{RESULT}{json.dumps(result, default=str)}", flush=True)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
