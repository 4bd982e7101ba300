"""A local HTTP server that speaks as much of OpenML's API as a download needs, faults included."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DESCRIPTION = """<oml:data_set_description xmlns:oml="http://openml.org/openml">
<oml:id>{number}</oml:id><oml:name>table</oml:name><oml:version>1</oml:version>
<oml:description>A table</oml:description><oml:format>ARFF</oml:format>
<oml:upload_date>2015-05-25T19:00:00</oml:upload_date>
<oml:url>{root}/data/download/1/table.arff</oml:url>
<oml:parquet_url>{root}/parquet/table.pq</oml:parquet_url>
<oml:default_target_attribute>{target}</oml:default_target_attribute>{extra}
<oml:md5_checksum>{md5}</oml:md5_checksum>
</oml:data_set_description>"""
UNKNOWN = (
    '<oml:error xmlns:oml="http://openml.org/openml"><oml:code>111</oml:code>'
    "<oml:message>Unknown dataset</oml:message></oml:error>"
)
FAULTS = (
    *("not found", "server error", "unknown dataset", "login page", "stall", "trickle"),
    *("truncated", "wrong checksum", "bad arff"),
)


class OpenMLServer(ThreadingHTTPServer):
    """Serves one ARFF text as every dataset; `fault` is None or one of `FAULTS`.

    `paths` are the paths that were asked for.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, arff_text, fault=None, target="Class", extra=""):
        assert fault is None or fault in FAULTS
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = b"not an ARFF file\n" if fault == "bad arff" else arff_text.encode()
        self.fault, self.target, self.extra = fault, target, extra
        self.paths = []
        self.closing = threading.Event()
        self.root = f"http://127.0.0.1:{self.server_address[1]}"
        self.api = f"{self.root}/api/v1/xml"


class _Handler(BaseHTTPRequestHandler):
    server: OpenMLServer

    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        if server.fault == "stall":
            server.closing.wait(60)
        elif server.fault == "not found":
            self._send("<html><body><h1>Not Found</h1></body></html>", 404, "text/html")
        elif server.fault == "login page":
            self._send("<html><body>Please log in</body></html>", 200, "text/html")
        elif server.fault == "server error":
            self._send("", 500, "text/html")
        elif server.fault == "unknown dataset":
            self._send(UNKNOWN, 412)
        elif "/data/download/" in self.path:
            self._send_file()
        else:
            self._send_description()

    def do_HEAD(self):
        self.server.paths.append(self.path)
        self.send_error(404)

    def _send_description(self):
        server = self.server
        wrong = server.fault == "wrong checksum"
        md5 = "0" * 32 if wrong else hashlib.md5(server.body).hexdigest()
        number = self.path.rpartition("/")[2]
        self._send(
            DESCRIPTION.format(
                number=number, root=server.root, target=server.target, extra=server.extra, md5=md5
            )
        )

    def _send_file(self):
        body = self.server.body
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.fault == "truncated":
            self.wfile.write(body[: len(body) // 2])
        elif self.server.fault == "trickle":
            with contextlib.suppress(OSError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if self.server.closing.wait(0.1):
                        return
        else:
            self.wfile.write(body)

    def _send(self, text, status=200, kind="text/xml"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(arff_text, fault=None, **options):
    """Run an `OpenMLServer` in a thread for the length of a `with` block."""
    server = OpenMLServer(arff_text, fault, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def point_openml_at(api, config_home):
    """Write the openml configuration file under what will be XDG_CONFIG_HOME."""
    folder = config_home / "openml"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config").write_text(f"server = {api}\n")


def as_arff(frame, nominal=()):
    """A frame as ARFF text; `nominal` columns are written with their list of values."""
    lines = ["@RELATION table"]
    for name, column in frame.items():
        values = ",".join(f"{value:g}" for value in sorted(set(column)))
        lines.append(f"@ATTRIBUTE {name} {f'{{{values}}}' if name in nominal else 'NUMERIC'}")
    lines.append("@DATA")
    lines += [",".join(f"{value:.12g}" for value in row) for row in frame.to_numpy(dtype=float)]
    return "\n".join(lines) + "\n"
