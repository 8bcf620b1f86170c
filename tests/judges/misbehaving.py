"""A chat endpoint on this machine that misbehaves on demand: plain asyncio, in a thread of its own."""

import asyncio
import collections
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

HANG = 60.0  # seconds; no test waits for as long


class Reply:
    """What the server does with one request.

    kind: "text" (a chat completion with `content`), "status" (an error), "raw" (any body), "hang", "cut" (half a body,
    then the connection ends), "drip" (a byte now and then). `delay`: seconds before it.
    """

    def __init__(
        self, kind: str, content: Any = "", *, status: int = 200, headers: str = "", delay: float = 0.0, **more
    ):
        self.kind, self.content, self.status, self.headers, self.delay = kind, content, status, headers, delay
        self.more = more


def completion(content: Any, finish: str = "stop", refusal: str | None = None, usage: Any = None) -> bytes:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    usage = {"prompt_tokens": 100, "completion_tokens": 10} if usage is None else usage
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}).encode()


class JudgeServer:
    """Answers each chat request with `behave(body of the request)`, and models and probes in good order.

    `forms` are the forms of a schema that it takes; others get `wrong_form` as status, and so do schemas with lengths
    of lists where it does not take `lengths`. `refuses` is asked of each body first: what it says goes out with HTTP
    400, "" = nothing. With `probes_too` probes are left to `behave`. `seen` holds the bodies of all but probes, `held`
    the seconds that each of those took here, `keys` the Authorization headers.
    """

    def __init__(
        self,
        behave: Callable[[dict], Reply],
        *,
        forms=("json_schema",),
        wrong_form: int = 400,
        lengths: bool = True,
        key: str = "",
        keep_bodies: bool = True,
        port: int = 0,
        refuses: Callable[[dict], str] = lambda body: "",
        probes_too: bool = False,
        models: bytes = b'{"data": [{"id": "the-model"}]}',
    ):
        self.behave, self.forms, self.wrong_form, self.key = behave, forms, wrong_form, key
        self.lengths = lengths
        self.refuses, self.probes_too, self.models = refuses, probes_too, models
        self.keep_bodies = keep_bodies
        self.seen: list[dict] = []
        self.probes: list[dict] = []
        self.held: list[float] = []
        self.keys: collections.Counter = collections.Counter()
        self.under_way = self.most_under_way = self.requests = 0
        self.lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 24, backlog=1000), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lines = head.split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.keys[headers.get("authorization", "")] += 1
                if not await self._answer(lines[0].split()[1], headers, body, reader, writer):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, headers: dict, raw: bytes, reader, writer) -> bool:
        """-> whether the connection stays open"""
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            told = headers.get("authorization", "").removeprefix("Bearer ")
            return await _send(writer, 401, json.dumps({"error": {"message": f"wrong key: {told}"}}).encode())
        if path.endswith("/models"):
            return await _send(writer, 200, self.models)
        body = json.loads(raw)
        form = body.get("response_format", {}).get("type", "plain")
        if form not in (*self.forms, "plain") or (not self.lengths and b"Items" in raw):
            return await _send(writer, self.wrong_form, b'{"error": {"message": "unknown response_format"}}')
        if said := self.refuses(body):
            return await _send(writer, 400, json.dumps({"error": {"message": said}}).encode())
        if is_probe(body):
            self.probes.append(body)
        if is_probe(body) and not self.probes_too:
            return await _send(writer, 200, completion('{"ok": [true]}'))
        begun = time.monotonic()
        self.requests += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        if self.keep_bodies:
            self.seen.append(body)
        try:
            return await self._behave(self.behave(body), reader, writer)
        finally:
            self.under_way -= 1
            self.held.append(time.monotonic() - begun)

    async def _behave(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if reply.delay:
            await asyncio.sleep(reply.delay)
        match reply.kind:
            case "text":
                return await _send(writer, 200, completion(reply.content, **reply.more))
            case "status":
                return await _send(writer, reply.status, str(reply.content).encode(), reply.headers)
            case "raw":
                return await _send(writer, 200, reply.content, reply.headers)
            case "hang":
                return await _left(reader, HANG)
            case "cut":
                body = completion(reply.content)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
                await writer.drain()
                return False
            case "drip":
                body = completion(reply.content)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
                left = asyncio.create_task(_left(reader, HANG))
                for byte in body:
                    writer.write(bytes([byte]))
                    if (await asyncio.wait([left], timeout=HANG / len(body)))[0]:
                        return False
                return True
        raise ValueError(reply.kind)


async def _left(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Waits until the client has gone, or for some time. -> False"""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1), seconds)
    return False


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: str = "") -> bool:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)
    await writer.drain()
    return True


def is_probe(body: dict) -> bool:
    return text_of(body).endswith('Answer with this JSON object and nothing else: {"ok": [true]}')


def text_of(body: dict) -> str:
    """The text of the last message of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


# ---- a judge that answers as it should ------------------------------------------------------------------------------

_BLOCK = re.compile(r"<data-([0-9a-f]{16}) kind=(\w+)>\n(.*?)\n</data-\1>", re.DOTALL)


def blocks_of(body: dict) -> list[tuple[str, str]]:
    """(kind, text) of the data in a request's prompt, by the marks that its system message names."""
    return [(kind, text) for _, kind, text in _BLOCK.findall(text_of(body))]


def kind_of(body: dict) -> str:
    system = body["messages"][0]["content"]
    starts = {"You check captions": "precision", "You check which": "recall", "You mark": "linguistic"}
    starts |= {"You answer multiple-choice": "choice", "You check whether": "rubric"}
    starts |= {
        "You describe pictures": "describe",
        "You fuse the text": "describe",
        "You write criteria": "rubric_writer",
    }
    starts |= {"You compare two captions": "preference"}
    return next((kind for start, kind in starts.items() if system.startswith(start)), "units")


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def right_answer(body: dict) -> dict:
    """What this judge thinks of the texts in a prompt: arbitrary, but a function of them alone."""
    blocks = blocks_of(body)
    text = blocks[-1][1]
    kind = kind_of(body)
    if kind == "precision":
        parts = [part for part in text.split(".") if part.strip()]
        return {
            "assertions": [
                {"text": part, "why": "it is so", "verified": digest(part) % 3 > 0, "pointable": digest(part) % 5 > 0}
                for part in parts
            ]
        }
    if kind == "recall":
        units = [unit for kind, unit in blocks if kind == "fact"]
        return {
            "units": [
                {"unit": i, "why": "it is so", "covered": digest(unit + text) % 2 == 0}
                for i, unit in enumerate(units, start=1)
            ]
        }
    if kind == "linguistic":
        marks = {name: 1 + digest(name + text) % 5 for name in ("clarity", "fluency", "coherency")}
        return {"why": "it is so"} | marks
    if kind == "choice":
        return {"answer": "ABC"[digest(text + blocks[0][1]) % 3]}
    if kind == "rubric":
        criteria = [criterion for kind, criterion in blocks if kind == "criterion"]
        return {
            "criteria": [
                {"criterion": i, "why": "it is so", "passed": digest(criterion + text) % 2 == 0}
                for i, criterion in enumerate(criteria, start=1)
            ]
        }
    if kind == "describe":  # of the pixels, as far as it can tell them apart
        seen = digest(body["messages"][-1]["content"][0]["image_url"]["url"])
        return {"caption": f"There is a thing {seen}. It is asked: {text}."}
    if kind == "preference":
        first, second = (digest(text) for _, text in blocks[-2:])
        return {"why": "it is so", "winner": "caption 1" if first > second else "caption 2"}
    if kind == "rubric_writer":
        return {"rubrics": [{"criterion": f"is not {text}", "weight": 1 + digest(text) % 3}]}
    return {"units": [part.strip() for part in text.split(".") if part.strip()]}


def well_behaved(body: dict) -> Reply:
    return Reply("text", json.dumps(right_answer(body)))
