"""Applications as they are found in clusters, one per port.

    5701  echoes what it reads
    8080  HTTP/1 by hand: slow answers, odd answers, upgrades, a forward proxy, or the request's target
    8081  HTTP/1, one connection at a time, kept open
    8082  HTTP/1, closes each connection after an answer that does not say so
    8083  HTTP/1, accepts its first connection nine seconds after the first client has come
"""

import http.server
import select
import socket
import threading
import time

ODD = {
    "space": b"HTTP/1.1 200 OK\r\nExpires : -1\r\nContent-Length: 4\r\n\r\ntrue",
    "no-reason": b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\ntrue",
    "until-close": b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\ntrue",
    "latin1": b"HTTP/1.1 200 OK\r\nX-Name: caf\xe9\r\nContent-Length: 4\r\n\r\ntrue",
    "large-head": b"HTTP/1.1 200 OK\r\nX-Large: " + b"x" * 58_000 + b"\r\nContent-Length: 4\r\n\r\ntrue",
}


def listen(port, serve, backlog=128):
    listener = socket.create_server(("0.0.0.0", port), backlog=backlog)

    def guarded(connection):
        try:
            serve(connection)
        except OSError:
            pass
        connection.close()

    def accept():
        while True:
            threading.Thread(target=guarded, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def echo(connection):
    while said := connection.recv(65536):
        connection.sendall(said)


def read_head(connection, rest=b""):
    while b"\r\n\r\n" not in rest:
        piece = connection.recv(65536)
        if not piece:
            return None
        rest += piece
    head, rest = rest.split(b"\r\n\r\n", 1)
    first, *lines = head.decode("latin1").split("\r\n")
    fields = {}
    for line in lines:
        name, value = line.split(":", 1)
        fields[name.lower()] = value.strip()
    return first.split(" "), fields, rest


def answer(connection, text, status="200 OK"):
    body = text.encode()
    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def by_hand(connection):
    rest = b""
    while head := read_head(connection, rest):
        (method, target, _), fields, rest = head
        length = int(fields.get("content-length", 0))
        while len(rest) < length:
            rest += connection.recv(65536)
        body, rest = rest[:length], rest[length:]
        if method == "CONNECT":
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n" + rest)
            return echo(connection)
        if "upgrade" in fields and "upgrade" in fields.get("connection", "").lower():
            token = fields["upgrade"]
            switch = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {token}\r\n\r\n"
            connection.sendall(switch.encode() + body + rest)
            return echo(connection)
        if target.startswith("/slow/"):
            time.sleep(float(target[6:]))
        if target.startswith("/odd/"):
            connection.sendall(ODD[target[5:]])
            return None
        if target.startswith("http://"):
            body = target.encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            return connection.sendall(head.encode() + body)
        answer(connection, target)


def closes(connection):
    if head := read_head(connection):
        answer(connection, head[0][1])


class OneAtATime(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *_):
        pass


def late():
    listener = socket.create_server(("0.0.0.0", 8083), backlog=32)
    first = True
    while True:
        if first:
            # Somebody has come: wait, without accepting.
            select.select([listener], [], [])
            time.sleep(9)
            first = False
        connection = listener.accept()[0]
        threading.Thread(target=closes_after, args=(connection,), daemon=True).start()


def closes_after(connection):
    try:
        closes(connection)
    except OSError:
        pass
    connection.close()


listen(5701, echo)
listen(8080, by_hand)
listen(8082, closes)
threading.Thread(target=late, daemon=True).start()
http.server.HTTPServer(("0.0.0.0", 8081), OneAtATime).serve_forever()
