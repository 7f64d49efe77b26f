"""Answers a PostgreSQL client up to the question for a password, and no further: a fake for the network checks."""

import socketserver
import struct


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(8)
        self.request.sendall(b"N")
        self.request.recv(4096)
        body = struct.pack(">I", 10) + b"SCRAM-SHA-256\0\0"
        self.request.sendall(b"R" + struct.pack(">I", len(body) + 4) + body)
        self.request.recv(4096)


socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("", 5433), Handler).serve_forever()
