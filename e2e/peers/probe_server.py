"""An application that is probed. Arguments: its HTTP port, its gRPC port, and the gRPC service that is SERVING.
`GET /seen` prints as JSON the distinct requests that it has seen: request line and headers."""
import http.server
import json
import sys
import threading
from concurrent import futures

import grpc

LOCK = threading.Lock()
SEEN = set()
REDIRECTS = {
    "/to-ok": "/ok?redirected",
    "/to-broken": "/broken",
    "/to-elsewhere": "http://login.example/",
    "/loop": "/loop",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/seen":
            with LOCK:
                return self.answer(200, [json.loads(request) for request in sorted(SEEN)])
        with LOCK:
            SEEN.add(json.dumps([self.requestline, sorted(self.headers.items())]))
        if location := REDIRECTS.get(self.path):
            return self.answer(302, None, location)
        return self.answer(500 if self.path == "/broken" else 200, None)

    def answer(self, status, body, location=None):
        body = json.dumps(body).encode()
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def service_of(request):
    """The only field of a HealthCheckRequest: a tag, the length as a varint, the name."""
    if not request:
        return ""
    assert request[0] == 0x0A, request
    at = 1
    while request[at] & 0x80:
        at += 1
    return request[at + 1 :].decode()


def check(request, context):
    """A HealthCheckResponse is one field, too: 1 is SERVING, 2 is NOT_SERVING."""
    service = service_of(request)
    if service == sys.argv[3]:
        return b"\x08\x01"
    if service == "down":
        return b"\x08\x02"
    context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")


methods = {"Check": grpc.unary_unary_rpc_method_handler(check)}
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", methods),))
server.add_insecure_port(f"0.0.0.0:{sys.argv[2]}")
server.start()
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
