"""What readers in Python's standard library make of a path: `name=route` for each, and the port on the first line."""
import http.server
import os
import posixpath
import re
import urllib.parse


def route(path):
    if path == "/admin" or path.startswith("/admin/"):
        return "A"
    if re.fullmatch(r"/v1/[^/]*:delete", path):
        return "D"
    if path in ("/metrics", "/metrics/"):
        return "E"
    if re.fullmatch(r"/api/v1/[^/]*/?", path):
        return "P"
    return "-"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        try:
            split = urllib.parse.urlsplit(self.path).path
        except ValueError:
            split = ""
        once = urllib.parse.unquote(split)
        parsed = urllib.parse.unquote(urllib.parse.urlparse("http://host" + self.path).path)
        readers = {
            "sent": self.path.split("?")[0],
            "urlsplit": split,
            "unquote": once,
            "urlparse": parsed,
            "normpath": posixpath.normpath(once),
            "twice": posixpath.normpath(urllib.parse.unquote(once)),
            "ignore": urllib.parse.unquote(split, errors="ignore"),
            # The file that a static server opens.
            "files": "/" + os.path.relpath(self.translate_path(self.path), self.directory),
            "join": urllib.parse.unquote(urllib.parse.urlsplit(urllib.parse.urljoin("http://host/", self.path)).path),
        }
        body = " ".join(f"{name}={route(path)}" for name, path in readers.items()).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
