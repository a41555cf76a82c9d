"""A local HTTP server that stands in for the hub."""

from __future__ import annotations

import http.server


class Replies(http.server.BaseHTTPRequestHandler):
    """Request handler that logs nothing to stderr."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def reply(self, code: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(code)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)
