"""A mutating webhook that adds a container to every pod, and a native sidecar before all init containers. Arguments: its
port, and the two as JSON. The certificate and its key are in /tls."""
import base64
import http.server
import json
import ssl
import sys

ADDED, FIRST = (json.loads(argument) for argument in sys.argv[2:4])


def patch(pod):
    if any(container["name"] == ADDED["name"] for container in pod["spec"]["containers"]):
        return []
    first = "/spec/initContainers/0" if "initContainers" in pod["spec"] else "/spec/initContainers"
    value = FIRST if first.endswith("/0") else [FIRST]
    return [
        {"op": "add", "path": "/spec/containers/-", "value": ADDED},
        {"op": "add", "path": first, "value": value},
    ]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["request"]
        response = {"uid": request["uid"], "allowed": True}
        if operations := patch(request["object"]):
            response["patchType"] = "JSONPatch"
            response["patch"] = base64.b64encode(json.dumps(operations).encode()).decode()
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
        body = json.dumps(review).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
server = http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler)
# The handshake runs in the connection's own thread, because a client that never begins it must not block the
# others.
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
