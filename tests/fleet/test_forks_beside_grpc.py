"""Worker processes of a simulation start in a process whose threads are inside gRPC all the time."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging, os, threading, time
from concurrent.futures import ThreadPoolExecutor

import turnout.wire
import grpc
from turnout.simulation.workers.pool import WorkerPool


class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)


def call():
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        while not over:
            channel.unary_unary("/echo/echo")(b"x" * 1000)


over = False
server = grpc.server(ThreadPoolExecutor(4), handlers=[Echo()])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
callers = [threading.Thread(target=call) for _ in range(2)]
for caller in callers:
    caller.start()
time.sleep(0.2)
for _ in range(20):
    WorkerPool(2, lambda parcels: lambda command: {}).start()
over = True
for caller in callers:
    caller.join()
server.stop(None)
print("done")
"""


def test_all_of_forty_workers_start() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout == "done\n", ended.stderr
    assert ended.stderr == ""
