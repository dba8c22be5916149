"""A client and a server made of the released protos: run by test_compat.py, on these stubs only.

client ADDRESS MODEL   uploads, prunes, inspects; prints the SHA-256 of what came
server RESULT          answers Prune with the PruneResult of a file; prints its port
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import pathlib
import sys
import uuid
from typing import Any

import grpc

from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc, pruning_pb2, pruning_pb2_grpc


def client(address: str, path: str) -> None:
    content = pathlib.Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    with grpc.insecure_channel(address) as channel:
        blobs = bytestream_pb2_grpc.ByteStreamStub(channel)
        name = f"uploads/{uuid.uuid4()}/blobs/{digest}/{len(content)}"
        write = bytestream_pb2.WriteRequest(resource_name=name, data=content, finish_write=True)
        assert blobs.Write(iter([write])).committed_size == len(content)
        stub = pruning_pb2_grpc.PruningStub(channel)
        model = pruning_pb2.Payload(blob={"sha256": digest, "size_bytes": len(content)})
        request = pruning_pb2.PruneRequest(model=model)
        request.recipe.target["macs"] = 0.5
        *steps, last = stub.Prune(request)
        assert all(step.HasField("progress") for step in steps)
        result = last.result
        assert result.report.after.macs * 2 <= result.report.before.macs
        inspection = stub.Inspect(pruning_pb2.InspectRequest(model=model)).inspection
        assert len(inspection.groups) == len(result.report.groups)
        sys.stdout.write(hashlib.sha256(result.model.inline).hexdigest())


class Old(pruning_pb2_grpc.PruningServicer):  # type: ignore[misc]
    def __init__(self, result: bytes) -> None:
        self.result = pruning_pb2.PruneResult.FromString(result)

    def Prune(self, request: Any, context: Any) -> Any:
        assert request.model.inline
        yield pruning_pb2.PruneResponse(progress={"stage": 1, "fraction": 0.5})
        yield pruning_pb2.PruneResponse(result=self.result)


def server(result: str) -> None:
    old = Old(pathlib.Path(result).read_bytes())
    running = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    pruning_pb2_grpc.add_PruningServicer_to_server(old, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    sys.stdin.read()  # until whoever started it goes
    running.stop(None)


if __name__ == "__main__":
    {"client": client, "server": server}[sys.argv[1]](*sys.argv[2:])
