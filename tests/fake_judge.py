"""A process that passes for a judge's server, in a tenth of a second: `fake_judge.py PORT`.

It has a child, as real ones do. Every answer is "Final Score: 3", to whom knows the key.
"""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        known = self.headers["authorization"] == f"Bearer {sys.argv[2]}"
        text = f"{asked['model']} says\nFinal Score: 3"
        self.answer(200 if known else 401, {"choices": [{"message": {"content": text}}]})

    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print("fake judge listens", flush=True)
    server.serve_forever()
