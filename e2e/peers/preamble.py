"""A gateway that tells its server the client's address with the PROXY protocol, and such a server.

    preamble.py gateway HOST    port 8080: passes a GET on to HOST with all its headers. /v1 and /v2 go to port 81 behind a
                                preamble of that version, /declared goes to port 82 without one
    preamble.py server          port 8081: HTTP/1 behind a preamble; 8082: without one. Answers as JSON with the headers
                                whose names begin with "tulle", and reads lines that end with a line feed alone"""
import http.client
import http.server
import json
import socket
import sys
import threading

TEXT = b"PROXY TCP4 192.0.2.1 192.0.2.2 4444 80\r\n"
# Signature; version, command and family; the length of what follows: two addresses and two ports.
BINARY = b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11\0\x0c" + bytes([192, 0, 2, 1, 192, 0, 2, 2, 17, 92, 0, 80])
WAYS = {"/v1": (81, TEXT), "/v2": (81, BINARY), "/declared": (82, b"")}


class Gateway(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            status, body = self.forward()
        except (OSError, http.client.HTTPException) as error:
            status, body = 502, type(error).__name__.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def forward(self):
        port, preamble = WAYS[self.path]
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = f"GET {self.path} HTTP/1.1\r\n{fields}\r\n".encode("latin1")
        with socket.create_connection((sys.argv[2], port), 5) as connection:
            connection.sendall(preamble + head)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.read()


def skip_preamble(stream):
    """Whether there was one."""
    first = stream.read(6)
    if first == TEXT[:6]:
        stream.readline()
    elif first == BINARY[:6]:
        header = stream.read(10)
        stream.read(int.from_bytes(header[8:], "big"))
    else:
        return False
    return True


def serve(connection, has_preamble):
    with connection, connection.makefile("rb") as stream:
        if has_preamble and not skip_preamble(stream) or not stream.readline():
            return
        headers = http.client.parse_headers(stream)
        names = {name.lower(): value for name, value in headers.items() if name.lower().startswith("tulle")}
        body = json.dumps(names).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def guarded(connection, has_preamble):
    try:
        serve(connection, has_preamble)
    except OSError:
        pass


def listen(port, has_preamble):
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        arguments = (listener.accept()[0], has_preamble)
        threading.Thread(target=guarded, args=arguments, daemon=True).start()


if sys.argv[1] == "gateway":
    http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Gateway).serve_forever()
threading.Thread(target=listen, args=(8081, True), daemon=True).start()
listen(8082, False)
