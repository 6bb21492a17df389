"""The parts of a W&B server that our runs need, on loopback, with the faults that real servers have."""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal
from urllib.parse import quote, unquote

from tests.range_server import LoopbackServer

Fault = Literal["none", "hangs", "hangs later", "refuses the key"]


class WandbServer(LoopbackServer):
    """Keeps each run's history by line number, so that overwritten lines show, and files by name."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.history: defaultdict[str, dict[int, Any]] = defaultdict(dict)
        self.files: dict[str, bytes] = {}
        self.asked = 0
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    def answer_query(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables") or {}
        match query.get("operationName"):
            case "Viewer":
                return {"viewer": {"id": "someone", "entity": "someone", "username": "someone", "flags": "{}"}}
            case "RunResumeStatus":
                return {"model": {**_PROJECT, "bucket": self._bucket(variables["name"])}}
            case "UpsertBucket":
                return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": True}}
            case "CreateRunFiles":
                files = [self._room_for(name) for name in variables["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                return {"createArtifact": {"artifact": {**_ARTIFACT, "state": "PENDING"}}}
            case "CreateArtifactFiles":
                files = [self._room_for(each["name"]) for each in variables["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": [{"node": each} for each in files]}}}
            case "CreateArtifactManifest":
                manifest = {"id": "manifest", "file": self._room_for("artifact manifest")}
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": _ARTIFACT}}
        return {"project": None}

    def _room_for(self, name: str) -> dict[str, Any]:
        """The answer that says where to send a file's content."""
        url = f"http://127.0.0.1:{self.server_port}/upload/{quote(name)}"
        names = {"id": name, "name": name, "displayName": name, "storagePath": name}
        return {**names, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": _ARTIFACT}

    def _bucket(self, name: str | None) -> dict[str, Any]:
        lines = self.history[name or ""]
        tail = json.dumps([json.dumps(lines[len(lines) - 1])] if lines else [])
        counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
        texts = {"summaryMetrics": "{}", "config": "{}", "historyTail": tail, "eventsTail": "[]"}
        return {"id": "run", "name": name, "displayName": name, "project": _PROJECT, **counts, **texts}


_ARTIFACT = {"id": "artifact", "digest": "", "artifactSequence": {"id": "sequence", "latestArtifact": None}}
_PROJECT = {"id": "project", "name": "needlestream", "entity": {"id": "someone", "name": "someone"}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        self.server.asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        starts = body.get("operationName") in ("RunResumeStatus", "UpsertBucket")
        if self.server.fault == "hangs" or (self.server.fault == "hangs later" and not starts):
            self.server.closing.wait()
        elif self.server.fault == "refuses the key":
            self._answer(401, {"errors": [{"message": "invalid key"}]})
        elif self.path == "/graphql":
            self._answer(200, {"data": self.server.answer_query(body)})
        else:
            self._keep_history(body)
            self._answer(200, {})

    def do_PUT(self) -> None:
        name = unquote(self.path.removeprefix("/upload/"))
        self.server.files[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def _keep_history(self, body: dict[str, Any]) -> None:
        part = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        lines = self.server.history[self.path.split("/")[-2]]  # /files/someone/needlestream/RUN/file_stream
        for number, line in enumerate(part["content"], start=part["offset"]):
            lines[number] = json.loads(line)

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@contextmanager
def wandb_server(fault: Fault = "none") -> Iterator[WandbServer]:
    """A server that runs for the time of the block."""
    server = WandbServer(fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
