"""llama.cpp's server for tests, in a process of its own: ``python llama_cpp_server.py GGUF PORT STREAMS``."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CONTEXT = 512  # tokens of each stream


def serve(gguf: str, port: int, streams: int) -> None:
    """Serve a model until the process is ended."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf
    parameters.hostnames, parameters.port = ["127.0.0.1"], port
    parameters.n_parallel, parameters.n_ctx = streams, CONTEXT * streams
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = (
        1  # on a busy machine, more wait for each other
    )
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


@contextlib.contextmanager
def llama_cpp_server(gguf: Path, *, port: int | None = None, streams: int = 4) -> Iterator[str]:
    """Run the server while the context lasts, and return its address."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, __file__, str(gguf), str(port), str(streams)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/models", timeout=10).close()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"llama.cpp's server ended with status {process.returncode}")
        yield url
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
