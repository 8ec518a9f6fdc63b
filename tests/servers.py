"""Object stores on this machine, reached as any other."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

BUCKET = "pairs"

# The emulator leaves out a header that Google sends with every object, and that TensorStore reads.
GCS_SERVER = """
import sys
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

whole = objects.download

def download(request, response, storage, *args, **kwargs):
    whole(request, response, storage, *args, **kwargs)
    if response.status.value < 300:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]

objects.download = download
for _, methods in server.HANDLERS:
    methods.update({method: download for method, handler in methods.items() if handler is whole})
server.create_server("127.0.0.1", int(sys.argv[1]), True, default_bucket=sys.argv[2]).run()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(command: list[str], port: int, **options) -> subprocess.Popen:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None, "the server did not start"
        time.sleep(0.1)
    raise TimeoutError("the server does not answer")


@contextlib.contextmanager
def serving(command: list[str], port: int, variables: dict[str, str]) -> Iterator[None]:
    """A server, with the variables by which every client finds it."""
    server = started([sys.executable, *command], port)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def s3(home: pathlib.Path) -> contextlib.AbstractContextManager:
    """An S3 server without a bucket."""
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    at = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "HOME": str(home)}  # in which indices of shards are kept
    return serving(["-m", "moto.server", "-p", str(port)], port, keys | at)


def gcs(home: pathlib.Path) -> contextlib.AbstractContextManager:
    """A server of Google Cloud Storage with one bucket."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    at = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "HOME": str(home)}
    return serving(["-c", GCS_SERVER, str(port), BUCKET], port, at)
