"""Sends bytes as they are. Arguments: host, port, port of the server's records, and JSON: a list of cases,
each with `send` (pieces of Latin-1, sent one after another) and optionally `leave` (close at once, without
waiting for an answer) and `wait` (seconds until the records are read). Prints for each case the statuses of
the answers, whether the connection was closed, and the server's records."""
import json
import re
import socket
import sys
import time
import urllib.request

HOST, PORT, SEEN = sys.argv[1], int(sys.argv[2]), f"http://{sys.argv[1]}:{sys.argv[3]}/seen"


def seen():
    return json.load(urllib.request.urlopen(SEEN, timeout=5))


def run(case):
    seen()
    sock = socket.create_connection((HOST, PORT), timeout=5)
    answer, closed = b"", False
    try:
        for piece in case["send"]:
            sock.sendall(piece.encode("latin1"))
            time.sleep(0.05)
        if not case.get("leave"):
            sock.settimeout(0.6)
            while data := sock.recv(65536):
                answer += data
            closed = True
    except (ConnectionError, BrokenPipeError):
        closed = True
    except socket.timeout:
        pass
    sock.close()
    time.sleep(case.get("wait", 0.05))
    # A body may end right before the next status line, and may speak of HTTP itself.
    statuses = [int(status) for status in re.findall(r"HTTP/1\.1 (\d{3}) ", answer.decode("latin1"))]
    return {"statuses": statuses, "closed": closed, "connections": seen()}


print(json.dumps([run(case) for case in json.loads(sys.argv[4])]))
