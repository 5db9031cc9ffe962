"""A program for tests: img2dataset 1.47's own `download`, shard after shard in this process, with a disk that fails.

    python -m tests.img2dataset_run LIST FOLDER PAIRS_PER_SHARD SHORT OUTAGE

Before shard OUTAGE it prints `outage` and waits for a line, and again `well` after it: the test breaks its web in
between. Of shard SHORT three pictures meet an EIO on their way into the tar, as a disk or a bucket does for a moment.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tests.bench.ingest import _NoLogger

LOST = (2, 5, 9)
"""Rows of shard SHORT whose write fails once."""


def main(listed: str, folder: str, pairs_per_shard: int, short: int, outage: int) -> None:
    import webdataset

    img2dataset: Any = importlib.import_module("img2dataset.main")  # `img2dataset.main` is a function of that name
    writes, write = 0, webdataset.TarWriter.write

    def failing(writer: Any, sample: dict[str, Any]) -> Any:
        nonlocal writes
        writes += 1
        if at_work == short and writes in LOST:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(writer, sample)

    def distribute(processes: int, downloader: Callable[[Any], Any], reader: Any, *rest: Any) -> None:
        nonlocal at_work, writes
        for shard in reader:
            at_work, writes = shard[0], -1  # 0 is the first row of it
            if at_work == outage:
                say("outage")
            downloader(shard)
            if at_work == outage:
                say("well")

    at_work = -1
    webdataset.TarWriter.write = failing
    img2dataset.multiprocessing_distributor = distribute
    img2dataset.LoggerProcess = _NoLogger
    img2dataset.download(
        url_list=listed,
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_folder=folder,
        output_format="webdataset",
        processes_count=1,
        thread_count=1,  # rows come in the list's order, so that it is known which are lost
        image_size=128,
        resize_mode="keep_ratio",
        number_sample_per_shard=pairs_per_shard,
        save_additional_columns=["note"],
        enable_wandb=False,
    )


def say(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
