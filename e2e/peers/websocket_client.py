"""A WebSocket client. Prints as JSON the messages it received and the connection's close code."""
import asyncio
import json
import sys

import websockets


async def main():
    async with websockets.connect(sys.argv[1], max_size=None) as socket:
        seen = {"caller": await socket.recv()}
        seen["counted"] = [await socket.recv() for _ in range(3)]
        large = bytes(range(256)) * 8192
        await socket.send(large)
        seen["large"] = await socket.recv() == large
        await socket.send("last")
        seen["last"] = await socket.recv()
    seen["closed"] = socket.close_code
    print(json.dumps(seen))


asyncio.run(asyncio.wait_for(main(), 20))
