"""As much of W&B's server as a run needs that logs rows: GraphQL answers and the file stream, kept in memory."""

from __future__ import annotations

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1; holds the rows, summary and fields of one run."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.run: dict[str, Any] = {}
        """The run's fields as its clients have set them, such as groupName; empty before the first."""
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle is no error."""

    def stream(self, body: dict[str, Any]) -> dict[str, Any]:
        """A part of the files that a run writes; history goes to the line that the client names."""
        files = body.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            self.rows[history["offset"] :] = map(json.loads, history["content"])
        if summary := files.get("wandb-summary.json"):
            self.summary = json.loads(summary["content"][-1])
        if body.get("complete"):
            self.exit_codes.append(body["exitcode"])
        return {}

    def query(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        if name == "RunResumeStatus":
            return {"model": {"entity": {"id": "1", "name": "e"}, "bucket": self._bucket() if self.run else None}}
        if name == "UpsertBucket":
            self.run |= {key: value for key, value in variables.items() if value is not None}
            return {"upsertBucket": {"bucket": self._bucket(), "inserted": not self.rows}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self) -> dict[str, Any]:
        entity = {"id": "1", "name": "e"}
        return {
            "id": "1",
            "name": self.run["name"],
            "displayName": "n",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "historyLineCount": len(self.rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
            "summaryMetrics": json.dumps(self.summary),
            "project": {"id": "1", "name": "p", "entity": entity},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            self._answer({"data": self.server.query(name[1] if name else "", asked.get("variables") or {})})
        else:
            self._answer(self.server.stream(json.loads(body)) if self.path.endswith("/file_stream") else {})

    def _body(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
