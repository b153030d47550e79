"""An HTTP/1 server that records what it receives. Port 1: answers, and records every connection. Port 2:
`GET /seen` prints the records as JSON and deletes them."""
import json
import socket
import sys
import threading

LOCK = threading.Lock()
SEEN = []


class Closed(Exception):
    pass


class Connection:
    def __init__(self, sock):
        self.sock, self.buffer = sock, b""
        self.record = {"requests": [], "rest": "", "open": True}

    def more(self):
        data = self.sock.recv(65536)
        if not data:
            raise Closed
        self.buffer += data

    def take(self, length):
        while len(self.buffer) < length:
            self.more()
        taken, self.buffer = self.buffer[:length], self.buffer[length:]
        return taken

    def line(self):
        while b"\r\n" not in self.buffer:
            self.more()
        line, self.buffer = self.buffer.split(b"\r\n", 1)
        return line

    def request(self):
        first = self.line().decode("latin1")
        headers = {}
        while line := self.line().decode("latin1"):
            name, value = line.split(":", 1)
            headers[name.lower()] = value.strip()
        request = {"line": first, "headers": headers, "body": 0, "whole": False}
        with LOCK:
            self.record["requests"].append(request)
        return request

    def body(self, request):
        if request["headers"].get("transfer-encoding") == "chunked":
            while size := int(self.line().split(b";")[0], 16):
                request["body"] += len(self.take(size))
                self.line()
            while self.line():
                pass
        else:
            request["body"] = len(self.take(int(request["headers"].get("content-length", 0))))
        request["whole"] = True

    def serve(self):
        with LOCK:
            SEEN.append(self.record)
        try:
            while True:
                request = self.request()
                if "expect" in request["headers"]:
                    self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                early = " /early" in request["line"]
                if not early:
                    self.body(request)
                if " /hang" in request["line"]:
                    # Never answers; only the end of the connection leaves this loop.
                    while True:
                        self.more()
                self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                if early or "upgrade" in request["headers"]:
                    # Already answered; keeps whatever else arrives on the connection.
                    while True:
                        self.more()
        except (Closed, OSError, ValueError):
            pass
        with LOCK:
            self.record["rest"] = self.buffer.decode("latin1")
            self.record["open"] = False
        self.sock.close()


def listen(port, serve):
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def show(sock):
    sock.recv(65536)
    with LOCK:
        text = json.dumps([record for record in SEEN if record["requests"]]).encode()
        SEEN[:] = [record for record in SEEN if record["open"]]
        for record in SEEN:
            record["requests"], record["rest"] = [], ""
    sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
    sock.close()


threading.Thread(target=listen, args=(int(sys.argv[2]), show), daemon=True).start()
listen(int(sys.argv[1]), lambda sock: Connection(sock).serve())
