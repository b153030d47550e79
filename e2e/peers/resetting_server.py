"""An HTTP/1 server that resets connections. Argument: port.

A POST is read to its end, counted, and never answered: its connection is reset. So is the first attempt of every GET; the
next one is answered. `GET /seen` prints as JSON how often each request was seen, by method and path."""
import collections
import http.client
import json
import socket
import struct
import sys
import threading

LOCK = threading.Lock()
SEEN = collections.Counter()
# A lingering time of zero makes the kernel reset the connection, although everything was read (socket(7)).
RESET = struct.pack("ii", 1, 0)


def request(stream):
    """Reads a request; returns its method and path, or nothing at the end of the connection."""
    first = stream.readline().decode("latin1").split()
    if not first:
        return None
    stream.read(int(http.client.parse_headers(stream).get("content-length", 0)))
    return " ".join(first[:2])


def serve(connection):
    with connection, connection.makefile("rb") as stream:
        while name := request(stream):
            body = b"done"
            with LOCK:
                if name == "GET /seen":
                    body = json.dumps(SEEN).encode()
                else:
                    SEEN[name] += 1
                    if name.startswith("POST ") or SEEN[name] == 1:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        return
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def guarded(connection):
    try:
        serve(connection)
    except OSError:
        pass


LISTENER = socket.create_server(("0.0.0.0", int(sys.argv[1])))
while True:
    threading.Thread(target=guarded, args=(LISTENER.accept()[0],), daemon=True).start()
