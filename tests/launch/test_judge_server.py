"""launch/judge_server.sh: the commands it would run, and a server that it starts, waits for and gives up on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "judge_server.sh"
FAKE = """#!{python}
import http.server, sys, time
if "--broken" in sys.argv:
    sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{{"data": [{{"id": "tiny"}}]}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
port = int(sys.argv[sys.argv.index("--port") + 1])
time.sleep(0.5)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_commands():
    assert run("Qwen/Qwen2.5-VL-7B-Instruct", "--dry_run").stdout == (
        "vllm serve Qwen/Qwen2.5-VL-7B-Instruct --host 127.0.0.1 --port 8000 --max-model-len 8192 \n"
    )
    done = run("--dry_run", "a model.gguf", "--", "--mmproj", "m.gguf", ENGINE="llama-server", PORT="9000", SLOTS="4")
    assert done.stdout == (
        "llama-server --model a\\ model.gguf --host 127.0.0.1 --port 9000 --ctx-size 32768 --parallel 4 "
        "--mmproj m.gguf \n"
    )
    assert "-m llama_cpp.server --model m.gguf" in run("--dry_run", "m.gguf", ENGINE="llama_cpp").stdout
    assert "--dry_run" in run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, "name a MODEL"),
        (("a", "b"), {}, "one MODEL, got a and b"),
        (("--quick", "a"), {}, "unknown argument --quick"),
        (("a",), {"PORT": "eighty"}, "PORT must be a whole number, got 'eighty'"),
        (("a",), {"ENGINE": "ollama"}, "ENGINE must be vllm, llama-server or llama_cpp"),
        (("a",), {"PATH": "/usr/bin:/bin"}, "vllm is not installed"),
    ],
)
def test_bad_input_is_one_line(arguments, environment, expected):
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def fake_vllm(tmp_path):
    """PATH with a `vllm` that is a small web server."""
    file = tmp_path / "bin" / "vllm"
    file.parent.mkdir()
    file.write_text(FAKE.format(python=sys.executable))
    file.chmod(0o755)
    return {"PATH": f"{file.parent}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "PORT": str(free_port())}


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_it_returns_when_the_server_answers(fake_vllm):
    done = run("tiny", **fake_vllm)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    server = int(last.removeprefix("end it with: kill "))
    try:
        assert f"--config.judge.endpoints=http://127.0.0.1:{fake_vllm['PORT']}/v1" in done.stdout
        assert "tiny answers after" in done.stdout
        again = run("tiny", **fake_vllm)
        assert again.returncode == 2
        assert "answers at http://127.0.0.1" in again.stderr
    finally:
        os.kill(server, signal.SIGTERM)


def test_a_server_that_ends_is_reported_with_its_last_lines(fake_vllm):
    done = run("tiny", "--", "--broken", **fake_vllm)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "no such model"
    assert "error: the server ended with status 1 before it answered" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.stdout == ""
