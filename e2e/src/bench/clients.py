"""Clients of the benchmark that no load generator offers.

    clients.py hold HOST PORT COUNT   connections that have each served one request and stay open until stdin ends
    clients.py first HOST PORT        time (seconds since 1970) of the first successful response
"""

import socket
import sys
import time

REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"


def ask(connection):
    """Sends a request and reads its response; whether it was successful."""
    connection.sendall(REQUEST)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = connection.recv(65536)
        if not piece:
            return False
        answer += piece
    head, body = answer.split(b"\r\n\r\n", 1)
    lines = head.lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        piece = connection.recv(65536)
        if not piece:
            return False
        body += piece
    return lines[0].split(b" ")[1] == b"200"


def hold(address, count):
    held = []
    for _ in range(count):
        connection = socket.create_connection(address, 10)
        if not ask(connection):
            sys.exit("a request failed")
        held.append(connection)
    print("held", flush=True)
    sys.stdin.read()


def first(address):
    deadline = time.time() + 20
    while time.time() < deadline:
        try:
            connection = socket.create_connection(address, 0.02)
            connection.settimeout(0.1)
            if ask(connection):
                print(time.time(), flush=True)
                return
        except OSError:
            time.sleep(0.001)
    sys.exit("no successful response within 20 s")


TARGET = (sys.argv[2], int(sys.argv[3]))
if sys.argv[1] == "hold":
    hold(TARGET, int(sys.argv[4]))
else:
    first(TARGET)
