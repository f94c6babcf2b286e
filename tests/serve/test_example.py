"""The example of the openai package, against a live server with the embedded language model."""

import runpy
import socket
import threading
from pathlib import Path

import pytest
import uvicorn

from qstar_decoding.agents import SearchEngine
from qstar_decoding.serve.app import create_app
from qstar_decoding.serve.listening import LOOPBACK

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_client.py"


def test_the_example_runs(lm, tmp_path, capfd):
    pytest.importorskip("openai")
    app = create_app(SearchEngine(lm, reward="sentiment"), hosts=LOOPBACK)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        source = EXAMPLE.read_text(encoding="utf-8")
        assert source.count(":8000/") == 1
        copy = tmp_path / EXAMPLE.name
        copy.write_text(source.replace(":8000/", f":{listener.getsockname()[1]}/"), encoding="utf-8")
        runpy.run_path(str(copy), run_name="__main__")
    finally:
        server.should_exit = True
        thread.join()
        app.state.service.close()
    shown = capfd.readouterr().out.splitlines()
    assert shown[-1] == "temperature 400"
    assert '"stars"' in shown[-2]
