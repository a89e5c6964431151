"""Stopping a server: running answers are finished, new ones are not begun, and it ends within its time."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from server_fakes import PATH, FakeEngine, ask, make_app, until

from puna.errors import PunaError
from puna.serve.limits import Limits
from puna.serve.run import Draining, listen

HERE = Path(__file__).parent
SCRIPT = """
import sys
from server_fakes import FakeEngine, make_app
from puna.serve.run import listen, run
from puna.serve.limits import Limits
app = make_app(FakeEngine(lambda m: "word " * int(sys.argv[1]), pause=0.05, context=5000), limits=Limits.read())
run(app, listen("127.0.0.1", 0))
print("closed in order")
"""


@contextmanager
def server(words, **environment):
    source = str(HERE.parents[1] / "src")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), source]), **environment}
    command = [sys.executable, "-c", SCRIPT, str(words)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield process, int(process.stdout.readline().split(" (")[0].rpartition(":")[2])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def begin(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", PATH, json.dumps(ask(stream=True)), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and b"assistant" in response.readline()
    return connection, response


def status(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, response.getheader("retry-after")


def test_77_running_answers_are_finished_and_new_ones_refused():
    with server(words=40) as (process, port):
        connection, response = begin(port)
        assert status(port, "GET", "/ready")[0] == 200
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for path in (PATH, "/v1/responses"):
            assert status(port, "POST", path, ask()) == (503, "5")
        assert status(port, "GET", "/health")[0] == 200 and status(port, "GET", "/ready")[0] == 503
        text = response.read().decode()
        connection.close()
        assert text.rstrip().endswith("[DONE]") and '"finish_reason":"stop"' in text
        assert process.wait(10) == 0 and process.stdout.read() == "closed in order\n"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()


@contextmanager
def draining(**limits):
    """A server in this process with an answer of 50 s begun: (the server, its thread, the client's connection)."""
    app = make_app(FakeEngine(lambda m: "word " * 1000, pause=0.05, context=5000), limits=Limits(**limits))
    with listen("127.0.0.1", 0) as listener:
        server = Draining(app, log_level="critical")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        connection, _ = begin(listener.getsockname()[1])
        yield server, thread
        connection.close()


def test_77_drain_seconds_is_the_longest_wait():
    with draining(drain_seconds=1) as (server, thread):
        began = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive() and time.monotonic() - began > 0.9
        assert server.config.app.state.places.taken == 0


def test_77_a_second_signal_ends_it_at_once():
    with draining(drain_seconds=60) as (server, thread):
        for _ in range(2):
            server.handle_exit(signal.SIGINT, None)
        thread.join(20)
        assert not thread.is_alive()


def test_taken_or_impossible_addresses():
    with listen("127.0.0.1", 0) as taken, pytest.raises(PunaError, match="choose another --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    for host, port in [("127.0.0.1", 99_999), ("no.such.host.invalid", 8000)]:
        with pytest.raises(PunaError, match="cannot listen on"):
            listen(host, port)
