"""Routes of Flask on Werkzeug's own server, lenient about slashes at the end: `flask=route`."""
import logging

from flask import Flask
from werkzeug.serving import make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
app = Flask(__name__)
app.url_map.strict_slashes = False


@app.route("/admin/")
@app.route("/admin/<path:rest>")
def admin(rest=""):
    return "flask=A"


@app.route("/v1/<name>:delete")
def delete(name):
    return "flask=D"


@app.route("/metrics")
def metrics():
    return "flask=E"


@app.route("/api/v1/<name>")
def api(name):
    return "flask=P"


@app.route("/", defaults={"path": ""})
@app.route("/<path:path>")
def rest(path):
    return "flask=-"


server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
