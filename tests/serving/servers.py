"""A server in processes of its own, and the client that asks it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from longrope_kernels.integrations.vllm.settings import SCHEDULER

_PATIENCE = 600  # seconds, for a server to begin and to end where others have the cores


@contextmanager
def server(folder: str, mode: str, policy: str, **arguments: str) -> Iterator[openai.OpenAI]:
    """vLLM's, with our scheduler, over a model and its tokenizer, while inside.

    arguments: of the command line, without their dashes.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    chosen = {
        "model": folder,
        "port": str(port),
        "host": "127.0.0.1",
        "dtype": "float32",
        "scheduler-cls": SCHEDULER,
        "additional-config": f'{{"longrope": {{"mode": "{mode}", "policy": "{policy}"}}}}',
        **arguments,
    }
    flat = [part for name, value in chosen.items() for part in (f"--{name}", value)]
    log = Path(folder) / "server.log"
    with log.open("w") as file:
        started = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flat, "--enforce-eager"],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    asked = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(_PATIENCE):
            assert started.poll() is None, log.read_text()
            try:
                asked.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text())
        yield asked
        assert f"LongRoPE, mode {mode!r}, policy {policy!r}" in log.read_text()
    finally:
        started.terminate()  # and it ends its own processes
        started.wait(_PATIENCE)
