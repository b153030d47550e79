"""A gRPC client. `once TARGET`: one call of each kind. `load TARGET RATE`: streams of two seconds at a
fixed rate; each must arrive whole. `streams TARGET COUNT`: long streams on one channel. Prints JSON."""
import json
import sys
import threading
import time

import grpc


def method(channel, kind, name):
    return getattr(channel, kind)(f"/shop.Counter/{name}")


def once(target):
    channel = grpc.insecure_channel(target)
    seen = {"caller": method(channel, "unary_unary", "Caller")(b"", timeout=10).decode()}
    seen["counted"] = [int(n) for n in method(channel, "unary_stream", "Count")(b"5 50", timeout=10)]
    messages = [b"a", b"b" * 100_000, b"c"]
    seen["echoed"] = [len(m) for m in method(channel, "stream_stream", "Echo")(iter(messages), timeout=10)]
    try:
        method(channel, "unary_unary", "Missing")(b"", timeout=10)
    except grpc.RpcError as error:
        seen["missing"] = f"{error.code().name}: {error.details()}"
    print(json.dumps(seen))


def load(target, rate):
    account = {"sent": 0, "ok": 0, "failed": 0, "failures": {}, "versions": {}}
    lock = threading.Lock()
    channel = grpc.insecure_channel(target)

    def one():
        try:
            got = [int(n) for n in method(channel, "unary_stream", "Count")(b"10 200", timeout=30)]
            failure = None if got == list(range(10)) else f"only {got} arrived"
        except grpc.RpcError as error:
            # Which side ended it, and how: the code of a reset, say.
            failure = f"{error.code().name} at {time.time():.2f}: {error.debug_error_string()}"
        with lock:
            if not failure:
                account["ok"] += 1
            else:
                account["failed"] += 1
                account["failures"][failure] = account["failures"].get(failure, 0) + 1

    due = time.monotonic()
    while True:
        with lock:
            account["sent"] += 1
            if account["sent"] % rate == 0:
                print(json.dumps(account), flush=True)
        threading.Thread(target=one, daemon=True).start()
        due += 1 / rate
        time.sleep(max(0, due - time.monotonic()))


def streams(target, wanted):
    """How many long streams begin on one channel."""
    channel, began, lock = grpc.insecure_channel(target), [0], threading.Lock()

    def first(call):
        try:
            next(call)
            with lock:
                began[0] += 1
        except grpc.RpcError:
            pass

    calls = [method(channel, "unary_stream", "Count")(b"2 20000", wait_for_ready=True) for _ in range(wanted)]
    for call in calls:
        threading.Thread(target=first, args=(call,), daemon=True).start()
    end = time.monotonic() + 10
    while began[0] < wanted and time.monotonic() < end:
        time.sleep(0.1)
    print(json.dumps({"began": began[0]}))
    for call in calls:
        call.cancel()


if sys.argv[1] == "once":
    once(sys.argv[2])
elif sys.argv[1] == "streams":
    streams(sys.argv[2], int(sys.argv[3]))
else:
    load(sys.argv[2], int(sys.argv[3]))
