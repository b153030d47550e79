// Runs page.mjs in a network of its own, which has nothing but the page's address.
//
// sudo node apart.mjs ARGUMENTS OF page.mjs
//
// A browser gives up what it loads (ERR_NETWORK_CHANGED) whenever an interface of its network gets an address, and on a
// node one does with every pod. Here the address of `--login` is a listener beside the browser, whose connections go
// through a Unix socket to the real one.
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer, connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

// Passes what comes at one place on to another: a port of an address, or the path of a Unix socket.
function passes(from, to) {
  const server = createServer({ allowHalfOpen: true }, (near) => {
    const far = connect({ ...to, allowHalfOpen: true });
    near.on("error", () => far.destroy()).pipe(far);
    far.on("error", () => near.destroy()).pipe(near);
  });
  return new Promise((listens, fails) => server.once("error", fails).listen(from, () => listens(server)));
}

// Within the network of the browser's own: what stands for the page there.
async function inside(path, address, script, rest) {
  execFileSync("ip", ["link", "set", "lo", "up"]);
  await passes(address, { path });
  await runs(process.execPath, [script, ...rest]);
}

// Its exit code is this program's.
function runs(program, given) {
  return new Promise((ended) => {
    spawn(program, given, { stdio: "inherit" }).on("close", (code) => {
      process.exitCode = code ?? 2;
      ended();
    });
  });
}

const [own, script] = ["apart.mjs", "page.mjs"].map((name) => fileURLToPath(new URL(name, import.meta.url)));
const given = process.argv.slice(2);
const socket = given[0] === "--through" ? given.splice(0, 2)[1] : undefined;
const { values } = parseArgs({ args: given, options: { login: { type: "string" } }, strict: false });
const { hostname: host, port } = new URL(values.login);
if (socket) {
  await inside(socket, { host, port }, script, given);
} else {
  const folder = mkdtempSync(join(tmpdir(), "tulle-browser-"));
  const path = join(folder, "page");
  await passes({ path }, { host, port });
  await runs("unshare", ["--net", process.execPath, own, "--through", path, ...given]);
  rmSync(folder, { recursive: true });
}
// The listeners would keep it alive.
process.exit();
