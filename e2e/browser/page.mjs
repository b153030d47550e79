// Looks at the page in a real Chromium.
//
// node page.mjs --login URL [--token TOKEN] --shots FOLDER [--modules FOLDER] [--browser PROGRAM] [--paint PATH] [--filter NAME] [--header LINE]... [--pause PATH] PATH...
//
// In: an address as `tulle dashboard` prints it, with its key, and the paths of views. Out: a screenshot of every view
// in light and dark, and one JSON object on standard output: `problems`, a list of sentences, is empty when all is well;
// `views` and `paint` have figures. Exits with 1 where there are problems, with 2 where it could not look.
//
// `--header` is sent with every request. `--pause` is the page of a Canary whose rollout is paused by keyboard, last of all.
// A path behind "!" is one that must be refused; the page that says so is a view too.
// Of each view: WCAG 2.1 AA by axe in both schemes; no error on the console and no violation of the CSP; all of it works
// by keyboard; without a script it shows the same rows; and 320 pixels are wide enough. Nothing but the page's own
// address may be asked for anything.
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { Keyboard } from "./keyboard.mjs";
import { rowsOf } from "./rows.mjs";

// Of one action of the browser, in milliseconds.
const LIMIT = 30_000;
// How often a view is looked at before a difference between two moments is believed.
const LOOKS = 10;
const RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"];

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    login: { type: "string" },
    token: { type: "string" },
    shots: { type: "string" },
    modules: { type: "string", default: dirname(fileURLToPath(import.meta.url)) },
    browser: { type: "string", default: "/usr/bin/chromium" },
    paint: { type: "string" },
    filter: { type: "string" },
    header: { type: "string", multiple: true, default: [] },
    pause: { type: "string" },
  },
});
const paths = positionals.map((path) => path.replace(/^!/, ""));
const refused = new Set(positionals.filter((path) => path.startsWith("!")).map((path) => path.slice(1)));
if (!options.login || !options.shots || paths.length === 0) {
  console.error("usage: node page.mjs --login URL --shots FOLDER PATH...");
  process.exit(2);
}
const load = createRequire(join(resolve(options.modules), "package.json"));
const { chromium } = load("playwright-core");
const axe = load("axe-core");
const base = new URL(options.login).origin;
const problems = [];

// Who has logged in: cookies. The first context logs in as a person does.
let session;

// A context that notes what must not happen, and a page in it. `where` is for the sentences.
async function context(browser, where, settings) {
  const viewport = { width: 1280, height: 800 };
  const extraHTTPHeaders = Object.fromEntries(options.header.map((line) => line.split(": ", 2)));
  if (options.token) extraHTTPHeaders.authorization = `Bearer ${options.token}`;
  const made = await browser.newContext({ viewport, extraHTTPHeaders, storageState: session, ...settings });
  made.setDefaultTimeout(LIMIT);
  await made.route(
    (url) => url.origin !== base,
    (route) => {
      problems.push(`${where()}: asks for ${route.request().url()}`);
      return route.abort();
    },
  );
  made.on("weberror", (error) => problems.push(`${where()}: ${error.error()}`));
  made.on("console", (message) => {
    // A violation of the CSP is an error too. An answer with an error is noted below.
    const answer = message.text().startsWith("Failed to load resource");
    if (message.type() === "error" && !answer) problems.push(`${where()}: console: ${message.text()}`);
  });
  made.on("response", (response) => {
    const path = response.url().slice(base.length);
    const wrong = refused.has(path) ? response.status() !== 404 : response.status() >= 400;
    if (wrong) problems.push(`${where()}: ${response.status()} for ${path}`);
  });
  await made.addInitScript(() => {
    globalThis.violations = [];
    addEventListener("securitypolicyviolation", (event) => {
      globalThis.violations.push(`${event.violatedDirective} by ${event.blockedURI || event.sourceFile}`);
    });
  });
  return { made, page: await made.newPage() };
}

async function logIn(browser) {
  const { made, page } = await context(browser, () => "login", {});
  const answer = await page.goto(options.login);
  if (!answer?.ok()) throw new Error(`the login was answered with ${answer?.status()}`);
  if (page.url().includes("key=")) problems.push("the address still has the key after the login");
  session = await made.storageState();
  await made.close();
}

async function violations(page, where) {
  for (const text of await page.evaluate(() => globalThis.violations)) problems.push(`${where}: CSP: ${text}`);
}

// By DevTools, because the CSP forbids a script element, as it should.
async function check(page, where) {
  const tools = await page.context().newCDPSession(page);
  await tools.send("Runtime.evaluate", { expression: axe.source });
  await tools.detach();
  const found = await page.evaluate(async (tags) => {
    const { passes, incomplete, violations } = await globalThis.axe.run(document, {
      runOnly: { type: "tag", values: tags },
      resultTypes: ["violations", "incomplete"],
      preload: false,
    });
    return { passes: passes.length, incomplete, violations };
  }, RULES);
  for (const { id, help, nodes } of found.violations) {
    const at = nodes.slice(0, 3).map((node) => `${node.target.join(" ")} (${node.failureSummary.replace(/\s+/g, " ")})`);
    problems.push(`${where}: axe ${id}: ${help}, ${nodes.length} times: ${at.join("; ")}`);
  }
  return { passed: found.passes, undecided: found.incomplete.map(({ id, nodes }) => `${id} ×${nodes.length}`) };
}

// `workload-shop-web` for `/workload/shop/web?window=10m`, and `ranking-shop` for `/?namespace=shop`.
function fileName(path) {
  const { pathname, searchParams } = new URL(path, base);
  searchParams.delete("window");
  const parts = [...pathname.split("/"), ...searchParams.values()].filter(Boolean);
  if (pathname === "/") parts.unshift("ranking");
  return parts.map(decodeURIComponent).join("-").replace(/[^A-Za-z0-9.-]/g, "_");
}

// Every view in one scheme: a screenshot, and what axe says once every table is open.
async function look(browser, scheme, views) {
  let where = scheme;
  const { made, page } = await context(browser, () => where, { colorScheme: scheme });
  for (const path of paths) {
    where = `${scheme} ${path}`;
    await page.goto(base + path);
    const picture = join(options.shots, `${fileName(path)}-${scheme}.png`);
    await page.screenshot({ path: picture, fullPage: true, caret: "initial" });
    await violations(page, where);
    await page.evaluate(() => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
    views[path] ??= {};
    views[path][scheme] = { picture, ...(await check(page, where)) };
  }
  await made.close();
}

// On a telephone, or at 400 %: only what is wide by nature may be scrolled sideways, and not the whole page.
async function narrow(browser, views) {
  let where = "narrow";
  const { made, page } = await context(browser, () => where, { viewport: { width: 320, height: 640 } });
  for (const path of paths) {
    where = `narrow ${path}`;
    await page.goto(base + path);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (wide > 0) problems.push(`${where}: the page is ${wide} pixels too wide for 320`);
    views[path].narrow = join(options.shots, `${fileName(path)}-narrow.png`);
    await page.screenshot({ path: views[path].narrow, fullPage: true, caret: "initial" });
  }
  await made.close();
}

// The same rows with and without a script. Workloads and pods come and go meanwhile, here also those of other tests, so a
// difference counts that is there whenever one looks.
async function withoutScript(browser) {
  let where = "without a script";
  const plain = await context(browser, () => where, { javaScriptEnabled: false });
  const usual = await context(browser, () => where, {});
  for (const path of paths) {
    where = `without a script ${path}`;
    let [left, right] = [[], []];
    for (let attempt = 0; attempt < LOOKS; attempt += 1) {
      if (attempt > 0) await plain.page.waitForTimeout(500);
      await Promise.all([plain.page.goto(base + path), usual.page.goto(base + path)]);
      [left, right] = await Promise.all([plain.page.evaluate(rowsOf), usual.page.evaluate(rowsOf)]);
      if (JSON.stringify(left) === JSON.stringify(right)) break;
    }
    const missing = right.filter((row) => !left.includes(row));
    const added = left.filter((row) => !right.includes(row));
    if (missing.length + added.length > 0) {
      problems.push(`${where}: lacks ${JSON.stringify(missing)}, and has ${JSON.stringify(added)} more`);
    }
    if (left.length === 0) problems.push(`${where}: no heading, row or fact is there`);
  }
  await plain.made.close();
  await usual.made.close();
}

async function byKeyboard(browser, views) {
  let where = "keyboard";
  const { made, page } = await context(browser, () => where, {});
  for (const path of paths) {
    where = `keyboard ${path}`;
    const keyboard = new Keyboard(page, (text) => problems.push(`${where}: ${text}`));
    await page.goto(base + path);
    await keyboard.skips();
    await page.goto(base + path);
    views[path].stops = await keyboard.walks();
    await keyboard.sorts();
    await violations(page, where);
  }
  if (options.filter) {
    where = "keyboard filter";
    const keyboard = new Keyboard(page, (text) => problems.push(`${where}: ${text}`));
    await page.goto(`${base}/?window=10m`);
    await keyboard.filters(options.filter);
    where = "keyboard update";
    await page.goto(`${base}/?window=10m`);
    await keyboard.stays();
  }
  await made.close();
}

// A rollout is paused by keyboard: the button leads to a page that asks, and that leads back once it is paused. The
// browser says by itself what the form needs to be taken.
async function pauses(browser, path) {
  const where = `pause ${path}`;
  const { made, page } = await context(browser, () => where, {});
  const keyboard = new Keyboard(page, (text) => problems.push(`${where}: ${text}`));
  await page.goto(base + path);
  await keyboard.reaches(`a[href="${path}/pause"]`);
  await Promise.all([page.waitForURL(`${base}${path}/pause`), keyboard.press("Enter")]);
  await keyboard.reaches("#confirm");
  await Promise.all([page.waitForURL(base + path), keyboard.press("Enter")]);
  await page.locator(`a[href="${path}/resume"]`).waitFor().catch(() => {
    problems.push(`${where}: after the pause, the page does not offer to resume`);
  });
  await violations(page, where);
  await made.close();
}

// How long it takes until something shows, from the request on, in a browser that has nothing of the page.
async function paint(browser, path) {
  const where = `paint ${path}`;
  const { made, page } = await context(browser, () => where, {});
  const answer = await page.goto(base + path);
  const bytes = (await answer.body()).length;
  const figures = await page.evaluate(async () => {
    const entry = await new Promise((found) => {
      const known = performance.getEntriesByName("first-contentful-paint")[0];
      if (known) found(known);
      new PerformanceObserver((list) => {
        list.getEntriesByName("first-contentful-paint").forEach(found);
      }).observe({ type: "paint", buffered: true });
      setTimeout(() => found(undefined), 30_000);
    });
    const [load] = performance.getEntriesByType("navigation");
    return {
      rows: document.querySelectorAll(".ranking tbody tr").length,
      firstPaintMs: entry ? Math.round(entry.startTime) : null,
      answerMs: Math.round(load.responseEnd),
      readyMs: Math.round(load.domContentLoadedEventEnd),
    };
  });
  const picture = join(options.shots, "many.png");
  await page.screenshot({ path: picture, caret: "initial" });
  await made.close();
  return { path, bytes, picture, ...figures };
}

let browser;
let result = {};
try {
  mkdirSync(options.shots, { recursive: true });
  browser = await chromium.launch({
    executablePath: options.browser,
    // Names and addresses but this one are not there, also for the browser itself. Root can have no sandbox.
    args: ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
    chromiumSandbox: false,
  });
  const views = {};
  await logIn(browser);
  const many = options.paint ? await paint(browser, options.paint) : undefined;
  await look(browser, "light", views);
  await look(browser, "dark", views);
  await narrow(browser, views);
  await withoutScript(browser);
  await byKeyboard(browser, views);
  if (options.pause) await pauses(browser, options.pause);
  result = { browser: browser.version(), axe: axe.version, problems, paint: many, views };
} catch (error) {
  console.error(error.stack);
  result = { failed: String(error), problems };
} finally {
  await browser?.close();
}
console.log(JSON.stringify(result));
process.exitCode = result.failed ? 2 : Math.min(problems.length, 1);
