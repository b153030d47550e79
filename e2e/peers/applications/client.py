"""Prints as JSON what went wrong: client.py CHECK HOST...; an empty list is success."""

import json
import socket
import sys
import threading
import time

WRONG = []


def wrong(what, seen):
    WRONG.append(f"{what}: {seen}")


def connect(host, port, patience=5):
    connection = socket.create_connection((host, port), 5)
    connection.settimeout(patience)
    return connection


def until(connection, end):
    seen = b""
    while end not in seen:
        piece = connection.recv(65536)
        if not piece:
            break
        seen += piece
    return seen


def attempt(what, action):
    try:
        seen = action()
    except OSError as error:
        seen = type(error).__name__
    if seen is not None:
        wrong(what, seen)


def greetings(host):
    for greeting in [b"\x01ab", b"HZC", b"HELLO", b"GET", b"PUT /", b"GET hello\r\n", b"KEYS *\r\n", b"PRI"]:
        def greet():
            start = time.monotonic()
            with connect(host, 5701) as connection:
                connection.sendall(greeting)
                seen = connection.recv(64)
                if seen != greeting:
                    return f"answered {seen!r}"
                connection.sendall(b"more")
                seen = connection.recv(64)
                took = time.monotonic() - start
                return None if seen == b"more" and took < 2 else f"then {seen!r} after {took:.1f} s"
        attempt(f"{greeting!r} to {host}", greet)


def half_close(host):
    for method, delay in [("GET", 0), ("POST", 0), ("GET", 0.5), ("GET", 3), ("POST", 3)]:
        def ask():
            body = b"0123456789" if method == "POST" else b""
            with connect(host, 80, 9) as connection:
                head = f"{method} /slow/{delay} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                connection.shutdown(socket.SHUT_WR)
                seen = b""
                while piece := connection.recv(65536):
                    seen += piece
            return None if b" 200 " in seen[:16] and seen.endswith(b"/slow/%s" % str(delay).encode()) else repr(seen[:60])
        attempt(f"{method} answered after {delay} s by {host}", ask)


def upgrades(host):
    for token, body in [("tcp", b'{"Detach": false}'), ("tcp", b""), ("SPDY/3.1", b""), ("websocket", b"")]:
        def ask():
            with connect(host, 80) as connection:
                head = f"POST /exec HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: {token}\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                seen = until(connection, b"\r\n\r\n" + body)
                if b" 101 " not in seen[:16] or f"upgrade: {token}".lower().encode() not in seen.lower():
                    return repr(seen[:80])
                connection.sendall(b"through the tunnel")
                seen = until(connection, b"tunnel")
                return None if seen.endswith(b"through the tunnel") else repr(seen)
        attempt(f"{token} with {len(body)} bytes to {host}", ask)


def forward_proxy(host):
    for target in ["example.com:443", "10.0.0.1:8443"]:
        def tunnel():
            with connect(host, 80) as connection:
                connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
                seen = until(connection, b"\r\n\r\n")
                if b" 200 " not in seen[:16]:
                    return repr(seen[:80])
                connection.sendall(b"\x16\x03\x01 hello")
                seen = connection.recv(64)
                return None if seen == b"\x16\x03\x01 hello" else repr(seen)
        attempt(f"CONNECT {target} by {host}", tunnel)
    for target in ["http://example.com/a?b=c", "http://example.com:8080/"]:
        def absolute():
            with connect(host, 80) as connection:
                authority = target.split("/")[2]
                connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
                # This server says that it closes, and some clients read until it does.
                seen = b""
                while piece := connection.recv(65536):
                    seen += piece
                return None if seen.endswith(target.encode()) else repr(seen[-80:])
        attempt(f"GET {target} by {host}", absolute)


def odd_answers(host):
    for name in ["space", "no-reason", "until-close", "latin1", "large-head"]:
        def ask():
            with connect(host, 80) as connection:
                connection.sendall(f"GET /odd/{name} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                seen = b""
                while piece := connection.recv(65536):
                    seen += piece
            whole = seen.endswith(b"true") or seen.endswith(b"4\r\ntrue\r\n0\r\n\r\n")
            return None if b" 200" in seen[:16] and whole else repr(seen[:60] + b" ... " + seen[-20:])
        attempt(f"/odd/{name} by {host}", ask)


def large_heads(host):
    for size, status in [(40_000, b" 200 "), (58_000, b" 200 ")]:
        def ask():
            with connect(host, 80) as connection:
                connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nX: {'x' * size}\r\n\r\n".encode())
                seen = until(connection, b"\r\n\r\n")
                return None if status in seen[:16] else repr(seen[:60])
        attempt(f"a head of {size} bytes to {host}", ask)


def repeated(host, port, times, patience=15):
    """Requests on one connection each; many run at once."""
    def ask():
        def one():
            with connect(host, port, patience) as connection:
                connection.sendall(f"GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                seen = until(connection, b"\r\n\r\n")
                return None if b" 200 " in seen[:16] else repr(seen[:60])
        attempt(f"port {port} of {host}", one)
    threads = [threading.Thread(target=ask) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_at_a_time(host):
    for second in range(12):
        repeated(host, 8081, 2 if second % 3 == 0 else 1)
        time.sleep(1)


def late(host):
    repeated(host, 8083, 8, 20)


def closed_connections(host):
    """A client that keeps its connection to a server that closes after each answer: it connects again when it finds
    its connection closed, and asks once more."""
    connection = None
    for number in range(24):
        def ask():
            nonlocal connection
            for _ in range(2):
                connection = connection or connect(host, 8082)
                connection.sendall(f"GET /{number} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                seen = until(connection, b"/%d" % number)
                if seen:
                    return None if b" 200 " in seen[:16] else repr(seen[:60])
                connection = None
            return "closed twice"
        attempt(f"request {number} to {host}", ask)
        time.sleep(0.02 * (number % 3))


CHECKS = {check.__name__: check for check in [
    greetings, half_close, upgrades, forward_proxy, odd_answers, large_heads, one_at_a_time, late, closed_connections,
]}
for HOST in sys.argv[2:]:
    CHECKS[sys.argv[1]](HOST)
print(json.dumps(WRONG))
