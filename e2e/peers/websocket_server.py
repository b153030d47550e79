"""A WebSocket server that sends the caller's identity and three numbers unasked, and then echoes."""
import asyncio
import sys

import websockets


async def serve(socket, _path=None):
    # Where the handshake's headers are depends on the library's version.
    headers = socket.request.headers if hasattr(socket, "request") else socket.request_headers
    await socket.send(headers.get("tulle-client-id", ""))
    for number in range(3):
        await asyncio.sleep(0.1)
        await socket.send(str(number))
    async for message in socket:
        await socket.send(message)


async def main():
    async with websockets.serve(serve, "0.0.0.0", int(sys.argv[1]), max_size=None):
        await asyncio.Future()


asyncio.run(main())
