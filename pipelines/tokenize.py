"""The flow that turns pictures into codes: one token shard for each pair shard."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.cluster import Cluster
from ops.tokenize import Encoders, TokensSettings, pending_tasks, start_tokens
from ops.tokenize import tokenize as tokenize_shards
from pipelines.artifacts import Board
from pipelines.waves import end_state, on_ray, run_in_waves


@flow(name="tokenize", persist_result=False)
def tokenize(
    pairs: str,
    tokenizer: str,
    into: str,
    tokens: TokensSettings = TokensSettings(),
    cluster: Cluster = Cluster(),
    encoders: Encoders = Encoders(),
) -> dict[str, Any]:
    """Encodes every pair shard whose latest receipt is not named by a token shard yet."""
    start_tokens(pairs, tokenizer, into, tokens)
    tasks = pending_tasks(pairs, into, tokens)
    with Board("tokenize", into) as board, on_ray(cluster, board, pairs, tokenizer, into):
        tally = run_in_waves("tokenize", into, tasks, lambda tick: tokenize_shards(into, tasks, encoders, tick), board)
        told: dict[str, Any] = end_state("tokenize", into, tally, board)
    return told
