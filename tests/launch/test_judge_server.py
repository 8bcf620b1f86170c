"""launch/judge_server.sh: the commands it would run, and a server that it starts, waits for and gives up on."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from balcap_jax.config.schema import parse_endpoints

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
        "vllm serve Qwen/Qwen2.5-VL-7B-Instruct --host 127.0.0.1 --port 8000 --max-model-len 8192 "
        "--enable-prefix-caching --limit-mm-per-prompt " + r"\{\"image\":\ 1\} " + "\n"
    )
    done = run("--dry_run", "a model.gguf", "--", "--mmproj", "m.gguf", ENGINE="llama-server", PORT="9000", SLOTS="4")
    assert done.stdout == (
        "llama-server --model a\\ model.gguf --host 127.0.0.1 --port 9000 --ctx-size 32768 --parallel 4 "
        "--mmproj m.gguf \n"
    )
    assert "-m llama_cpp.server --model m.gguf" in run("--dry_run", "m.gguf", ENGINE="llama_cpp").stdout
    assert "--dry_run" in run("--help").stdout


def test_replicas_have_ports_and_gpus_of_their_own():
    four = {"REPLICAS": "2", "GPUS": "2", "PORT": "9000", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    lines = run("m", "--dry_run", **four).stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["CUDA_VISIBLE_DEVICES=4,5", "CUDA_VISIBLE_DEVICES=6,7"]
    assert [line.split("--port ")[1].split()[0] for line in lines] == ["9000", "9001"]
    assert all("--tensor-parallel-size 2" in line for line in lines)
    lines = run("m", "--dry_run", REPLICAS="3", CUDA_VISIBLE_DEVICES="").stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"CUDA_VISIBLE_DEVICES={i}" for i in range(3)]
    assert not any("tensor-parallel" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, "name a MODEL"),
        (("a", "b"), {}, "one MODEL, got a and b"),
        (("--quick", "a"), {}, "unknown argument --quick"),
        (("a",), {"PORT": "eighty"}, "PORT must be a whole number, got 'eighty'"),
        (("a",), {"ENGINE": "ollama"}, "ENGINE must be vllm, llama-server or llama_cpp"),
        (("a",), {"PATH": "/usr/bin:/bin"}, "vllm is not installed"),
        (("a",), {"REPLICAS": "0"}, "REPLICAS must be a whole number, got '0'"),
        (("a.gguf",), {"REPLICAS": "2", "ENGINE": "llama-server"}, "REPLICAS, GPUS and KEY_ENV are for vLLM"),
        (("a",), {"REPLICAS": "2", "CUDA_VISIBLE_DEVICES": "0"}, "2 replicas of 1 GPUs need 2 GPUs"),
        (("a",), {"KEY_ENV": "not a name"}, "KEY_ENV must name a variable"),
        (("a",), {"KEY_ENV": "NO_SUCH_KEY"}, "KEY_ENV names NO_SUCH_KEY, which is not set"),
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
    """A port that nobody has, nor the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                next_one.bind(("127.0.0.1", port + 1))
                return port


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


def test_replicas_are_one_line_of_endpoints(fake_vllm):
    port = free_port()
    done = run("tiny", REPLICAS="2", **(fake_vllm | {"PORT": str(port), "CUDA_VISIBLE_DEVICES": "0,1"}))
    assert done.returncode == 0, done.stderr
    *_, flags, last = done.stdout.splitlines()
    servers = list(map(int, last.removeprefix("end it with: kill ").split()))
    try:
        assert len(servers) == 2
        urls = f"http://127.0.0.1:{port}/v1,http://127.0.0.1:{port + 1}/v1"
        assert flags.strip() == f"--config.judge.name=remote --config.judge.endpoints={urls}"
        assert len(parse_endpoints(urls)) == 2
        assert Path(f"{fake_vllm['LOG']}.{port + 1}").exists()
    finally:
        for server in servers:
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
