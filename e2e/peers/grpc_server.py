"""A gRPC server: unary methods, a stream of numbers, an echo, and an error without a message."""
import signal
import sys
import threading
import time
from concurrent import futures

import grpc


def caller(context):
    return dict(context.invocation_metadata()).get("tulle-client-id", "").encode()


def count(request, context):
    """`number milliseconds`: that many messages, so far apart."""
    number, pause = map(int, request.split())
    for sent in range(number):
        yield str(sent).encode()
        time.sleep(pause / 1000)


def slow(request, context):
    """Answers after so many milliseconds with the seconds that the deadline left at the start."""
    remaining = context.time_remaining()
    time.sleep(int(request) / 1000)
    return str(remaining).encode()


def missing(request, context):
    context.abort(grpc.StatusCode.NOT_FOUND, "there is no such thing")


METHODS = {
    "Caller": grpc.unary_unary_rpc_method_handler(lambda request, context: caller(context)),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Echo": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
    "Slow": grpc.unary_unary_rpc_method_handler(slow),
    "Missing": grpc.unary_unary_rpc_method_handler(missing),
}
server = grpc.server(futures.ThreadPoolExecutor(200))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Counter", METHODS),))
server.add_insecure_port(f"0.0.0.0:{sys.argv[1]}")
server.start()
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
told.wait()
# This library answers calls that come in the moment of its stop with CANCELLED (grpc/grpc#41785), with a mesh and without.
# Sidecars have learned by then that the pod ends, and send it none.
time.sleep(1)
# Running calls may end; new ones are refused.
server.stop(25).wait()
